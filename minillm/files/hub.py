"""From a model's name to its files on this machine: a folder, a .gguf file, a Hub repository, the default model."""

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minillm.errors import MinillmError, UsageError
from minillm.files import default_wheel

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model as safetensors, where pip cannot help

# What is fetched of a repository. Its subfolders (original/, onnx/) and Mistral's consolidated copy stay there.
WANTED = [
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer*.json",
    "tokenizer.model",
    "added_tokens.json",
    "chat_template*",
    "*.safetensors",
    "*.safetensors.index.json",
]
UNWANTED = ["*/*", "consolidated*"]

REPO_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?::(?P<tag>.+)|/(?P<file>.+\.gguf))?", re.ASCII)
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class ModelFiles:
    kind: str  # "folder": config.json, *.safetensors and the tokenizer; "gguf": one file with all of it
    path: Path
    name: str  # for people: the repository id, or the file's or folder's own name


def resolve(model: str | None = None, *, offline: bool = False, progress: bool = True) -> ModelFiles:
    """The files of `model`, fetched if need be. With `progress`, downloads say so on stderr.

    `model`: None or DEFAULT_MODEL; a folder; a .gguf file; a Hub repository `owner/name`, and for one .gguf of several
    `owner/name/file.gguf`, `owner/name:file.gguf` or, as in llama.cpp, `owner/name:Q8_0`. What is on disk comes first.
    Offline (the argument, or HF_HUB_OFFLINE in the environment) nothing is fetched. Raises MinillmError.
    """
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    if model is None:
        return _default(offline, progress)
    if not model:
        raise UsageError("the name of the model is empty: give a folder, a .gguf file or a repository id (owner/name)")
    path = Path(model).expanduser()
    if path.exists():
        try:
            return _local(path)
        except OSError as error:
            raise MinillmError(f"cannot read {path}: {error.strerror or error}") from error
    if model == DEFAULT_MODEL:
        return _default(offline, progress)
    match = REPO_ID.fullmatch(model)
    if not match:
        raise MinillmError(
            f"{model}: there is no such file or folder, and it is not the id of a Hub repository (owner/name)"
        )
    with _hub_errors(match["repo"], model, offline), _hub_bars(progress):
        return _repository(match["repo"], match["tag"] or match["file"], offline)


# Files on this machine


def _local(path: Path) -> ModelFiles:
    name = path.resolve().name
    if path.is_dir():
        if _is_model(path):
            return ModelFiles("folder", path, name)
        ggufs = [file.name for file in path.glob("*.gguf")]
        if not ggufs:
            raise MinillmError(f"{path} holds no model: neither config.json with *.safetensors nor a .gguf file")
        path = path / _one_gguf(ggufs, None, f"{path}", f"{path}/")
    elif path.suffix == ".safetensors":
        raise MinillmError(f"{path} is only the weights: give the folder that holds it together with config.json")
    with path.open("rb") as file:
        magic = file.read(20)
    if magic.startswith(b"version https://git-"):
        raise MinillmError(f"{path} is a Git LFS pointer, not the model: run `git lfs pull` in its folder")
    if not magic.startswith(b"GGUF"):
        raise MinillmError(f"{path} is not a GGUF file: give one, or a folder with config.json and *.safetensors")
    return ModelFiles("gguf", _whole(path), name.removesuffix(".gguf"))


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors"))


def _one_gguf(names: Iterable[str], wanted: str | None, where: str, prefix: str) -> str:
    """The one of `names` that is `wanted`: an exact name, or a part of it such as Q8_0; None if there is one alone."""
    names = sorted(name for name in names if not (shard := SHARD.search(name)) or int(shard[1]) == 1)
    if not names:
        raise MinillmError(
            f"{where} holds neither config.json with *.safetensors nor a .gguf file: minillm reads no other weights"
        )
    if wanted in names:
        return wanted
    found = [name for name in names if wanted is None or wanted.lower() in name.lower()]
    if len(found) != 1:
        what = "several .gguf files" if wanted is None else f"{len(found) or 'no'} .gguf files that match {wanted!r}"
        choice = ", ".join(prefix + name for name in found or names)
        raise MinillmError(f"{where} holds {what}: name one of them, {choice}")
    return found[0]


def _whole(path: Path) -> Path:
    """`path`, unless it is a part of a model: an error that tells how to put the parts together."""
    shard = SHARD.search(path.name)
    if shard and int(shard[2]) > 1:
        merged = SHARD.sub(".gguf", path.name)
        first = SHARD.sub(f"-00001-of-{shard[2]}.gguf", path.name)
        raise MinillmError(
            f"{path.name} is one of {int(shard[2])} parts of a model: fetch them all, merge them with "
            f"`llama-gguf-split --merge {first} {merged}` and use {merged}"
        )
    return path


# Hugging Face Hub


def _repository(repo: str, wanted: str | None, offline: bool) -> ModelFiles:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(file: str) -> ModelFiles:
        _whole(Path(file))
        return ModelFiles("gguf", Path(hf_hub_download(repo, file, local_files_only=offline)), f"{repo}/{file}")

    if wanted is None:
        folder = snapshot_download(repo, allow_patterns=WANTED, ignore_patterns=UNWANTED, local_files_only=offline)
        folder = Path(folder)
        if _is_model(folder):
            return ModelFiles("folder", folder, repo)
        if offline:
            path = _local(folder).path
            return ModelFiles("gguf", path, f"{repo}/{path.name}")
    elif wanted.endswith(".gguf"):
        try:
            return fetch(wanted)
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
    elif offline:
        raise MinillmError(f"{repo}:{wanted}: offline, give the full name of the file ({repo}/NAME.gguf)")
    ggufs = [name for name in HfApi().list_repo_files(repo) if name.endswith(".gguf")]
    return fetch(_one_gguf(ggufs, wanted, repo, f"{repo}/"))


@contextlib.contextmanager
def _hub_bars(progress: bool) -> Iterator[None]:
    """The Hub library draws its own bars (on a terminal only); they are silenced for a caller who wants none."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silence = not progress and not are_progress_bars_disabled()
    if silence:
        disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            enable_progress_bars()


@contextlib.contextmanager
def _hub_errors(repo: str, model: str, offline: bool) -> Iterator[None]:
    """Whatever the Hub library raises becomes one sentence with the remedy; the original stays as its cause."""
    try:
        yield
    except MinillmError:
        raise
    except Exception as error:  # connection errors are the HTTP library's own, and that library has changed twice
        raise MinillmError(_explain(error, repo, model, offline)) from error


def _explain(error: Exception, repo: str, model: str, offline: bool) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    chain: list[BaseException] = [error]  # "not in the cache" is often only the consequence of what the server said
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    page = f"{constants.ENDPOINT}/{repo}"
    answer = next((e for e in chain if isinstance(e, HfHubHTTPError) and e.response is not None), None)
    status = answer.response.status_code if answer is not None else None
    said = " ".join((answer.server_message or "nothing more").split()) if answer is not None else ""
    if isinstance(answer, GatedRepoError) and status == 401:
        return f"{repo} is gated: accept its licence at {page}, then log in with `hf auth login` or set HF_TOKEN"
    if isinstance(answer, GatedRepoError) or status == 403:
        return (
            f"your account or token may not read {repo} (the Hub says: {said}): ask for access and accept the licence "
            f"at {page}; a fine-grained token also needs the permission to read gated repositories"
        )
    if status == 401 and "credentials" in said:
        return f"the Hub refused your token for {repo}: log in again with `hf auth login`, or correct HF_TOKEN"
    if isinstance(answer, RepositoryNotFoundError) or status == 401:  # 401: absent, or private and no token
        return (
            f"{model}: there is no such file or folder here, and no repository {repo} on the Hub that you may see; "
            "check the spelling, and for a private repository log in with `hf auth login` or set HF_TOKEN"
        )
    if status is not None and status != 404:
        return f"the Hub answered {status} for {repo}: try again later, or use a local folder or .gguf file"
    if full := next((e for e in chain if isinstance(e, OSError) and e.errno == errno.ENOSPC), None):
        return f"the disk of {constants.HF_HUB_CACHE} is full ({full}): free some space, or set HF_HOME to another disk"
    if denied := next((e for e in chain if isinstance(e, PermissionError)), None):
        return f"cannot write the Hugging Face cache ({denied}): set HF_HOME to a folder of yours"
    if offline:
        return (
            f"{model}: there is no such file or folder, nor a complete copy of {repo} in the Hugging Face cache: run "
            "once without --offline and HF_HUB_OFFLINE, or give a local folder or .gguf file"
        )
    what = " ".join(str(chain[-1]).split())[:200]
    return (
        f"{model}: there is no such file or folder here, and {repo} cannot be fetched from {constants.ENDPOINT} "
        f"({type(chain[-1]).__name__}: {what}): check the network, use --offline if it was fetched before, or give a "
        "local folder or .gguf file"
    )


# The default model


def _default(offline: bool, progress: bool) -> ModelFiles:
    target = default_wheel.place()
    if default_wheel.is_whole(target):
        return ModelFiles("gguf", target, DEFAULT_MODEL)
    with contextlib.suppress(MinillmError):  # fetched from the Hub by an earlier run that had no pip
        return _default_from_hub(offline=True, progress=False)
    if offline:
        raise MinillmError(
            f"the default model is not in {target.parent}: run once without --offline and HF_HUB_OFFLINE, or give -m a "
            "local folder or .gguf file"
        )
    no_wheel = default_wheel.fetch(target, DEFAULT_MODEL, progress)
    if no_wheel is None:
        return ModelFiles("gguf", target, DEFAULT_MODEL)
    try:
        return _default_from_hub(offline=False, progress=progress)
    except MinillmError as error:
        raise MinillmError(f"cannot fetch the default model with pip ({no_wheel}); {error}") from error


def _default_from_hub(offline: bool, progress: bool) -> ModelFiles:
    with _hub_errors(DEFAULT_REPO, DEFAULT_REPO, offline), _hub_bars(progress):
        return ModelFiles("folder", _repository(DEFAULT_REPO, None, offline).path, DEFAULT_MODEL)
