"""A translation unit -> a shared library by g++, kept in the user's cache by the hash of all that goes into it."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

HERE = Path(__file__).parent
CACHE = user_cache_path("minillm", appauthor=False) / "emulator"
DAYS = 60  # that a file is kept for which nobody asks
SANITIZER = os.environ.get("MINILLM_EMULATOR", "")
SANITIZERS = {
    "": ["-O1"],
    "address": ["-O1", "-fsanitize=address,alignment,bounds", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "thread": ["-O1", "-fsanitize=thread"],
}
PRELUDE = '#include "cuda_cpu.h"\n'  # of every unit: half of the time to compile one, and so compiled once


class EmulatorError(RuntimeError):
    """A kernel does what CUDA does not allow, or is called with what does not fit its parameters."""


def library(unit):
    """Path of the library of a translation unit that begins with PRELUDE."""
    prelude = _kept("cuda_cpu.h.gch", PRELUDE, "-xc++-header")
    return _kept("kernels.so", unit, f"-I{prelude.parent}", "-shared", "-xc++")


def _kept(name, text, *options):
    """Path of what g++ makes of a text. Who asks for it while another process compiles it waits."""
    flags = ["-std=c++20", "-g1", "-fPIC", "-w", "-mf16c", "-ffp-contract=off", *SANITIZERS[SANITIZER]]
    headers = [header.read_bytes() for header in sorted(HERE.rglob("*.h"))]
    key = hashlib.sha256(b"\0".join([text.encode(), " ".join(flags).encode(), *headers])).hexdigest()[:20]
    folder = CACHE / key
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)  # asked for: see forget()
    path, source, unfinished = folder / name, folder / "source", folder / "unfinished"
    with FileLock(folder / "lock"):
        if not path.exists():
            source.write_text(text)
            command = ["g++", *flags, *options, f"-I{HERE}", f"-I{HERE}/include", source, "-o", unfinished]
            done = subprocess.run(command, text=True, capture_output=True, env=_environment())
            if done.returncode:
                raise EmulatorError(done.stderr)
            unfinished.replace(path)
    return path


def _environment():
    """Sanitizers are for the kernels only."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def start_ahead():
    """-> a process that compiles all kernels side by side, for tests that will ask for them."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # a test says what is wrong with a kernel
    return subprocess.Popen([sys.executable, "-m", "emulator"], cwd=HERE.parent, env=_environment(), **silent)


def forget():
    """Remove from the cache what nobody asked for in DAYS."""
    for folder in CACHE.glob("*"):
        if time.time() - folder.stat().st_mtime > DAYS * 24 * 3600:
            shutil.rmtree(folder)
