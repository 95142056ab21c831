"""From a model's name to its files on this machine: a folder, a .gguf file, a Hub repository, the default model."""

import contextlib
import errno
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minillm.errors import MinillmError, UsageError
from minillm.files import default_wheel
from minillm.files.gguf_file import PART, part_names
from minillm.files.not_a_model import refuse_file, refuse_folder, refuse_names

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
DEFAULT_QUANTS = (
    "Q4_K_M",
    "Q8_0",
)  # of a repository of .gguf files, if none is named; else the first file: as llama.cpp
NO_MODELS = re.compile("mmproj|imatrix|mtp-|eagle3-|dflash-|dspark-")  # .gguf files that come with a model
ANSWER_SECONDS = 10  # how long the Hub may take to say what a repository holds


@dataclass(frozen=True)
class ModelFiles:
    kind: str  # "folder": config.json, *.safetensors and the tokenizer; "gguf": a file with all of it
    path: Path  # of the folder or the .gguf file, of a model in parts one of them
    name: str  # for people: the repository id, or the file's or folder's own name


def resolve(model: str | None = None, *, offline: bool = False, progress: bool = True) -> ModelFiles:
    """The files of `model`, fetched if need be. With `progress`, downloads say so on stderr.

    `model`: None or DEFAULT_MODEL; a folder; a .gguf file, of a model in parts any of them; a Hub repository
    `owner/name`, and for one .gguf of several `owner/name/file.gguf`, `owner/name:file.gguf` or, as in llama.cpp,
    `owner/name:Q8_0`. What is on disk comes first. Offline (the argument, or HF_HUB_OFFLINE in the environment) and
    without a network nothing is fetched. Raises MinillmError.
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
        names = {file.name for file in path.iterdir() if file.exists()}
        if _is_model(names):
            return ModelFiles("folder", path, name)
        ggufs = [file for file in names if file.endswith(".gguf")]
        if not ggufs:
            raise refuse_folder(path)
        path = path / _one_gguf(ggufs, None, f"{path}", f"{path}/")
    with path.open("rb") as file:
        magic = file.read(20)
    if magic.startswith(b"version https://git-"):
        raise MinillmError(f"{path} is a Git LFS pointer, not the model: run `git lfs pull` in its folder")
    if not magic.startswith(b"GGUF"):
        raise refuse_file(path)
    return ModelFiles("gguf", path, PART.sub("", name).removesuffix(".gguf"))


def _is_model(names: Collection[str]) -> bool:
    return "config.json" in names and not {"model.safetensors", "model.safetensors.index.json"}.isdisjoint(names)


def _one_gguf(names: Iterable[str], wanted: str | None, where: str, prefix: str) -> str:
    """The one of `names` that is `wanted`: an exact name, a quantisation such as Q8_0 or a part of the name; None if
    there is one alone. Of a model in parts that is the first part."""
    names = sorted(names)
    if wanted in names:
        return wanted
    names = [name for name in names if part_names(name)[0] == name and not NO_MODELS.search(name.rpartition("/")[2])]
    found = names if wanted is None else _quantised(names, wanted) or _holding(names, wanted)
    if len(found) != 1:
        what = "several .gguf files" if wanted is None else f"{len(found) or 'no'} .gguf files that match {wanted!r}"
        choice = ", ".join(prefix + name for name in found or names)
        raise MinillmError(f"{where} holds {what}: name one of them, {choice}")
    return found[0]


def _quantised(names: list[str], tag: str) -> list[str]:
    """Those whose name has the tag as a word before a dot or a hyphen, as llama.cpp looks for it."""
    return [name for name in names if re.search(rf"(?<![a-z0-9]){re.escape(tag)}[.-]", name, re.IGNORECASE)]


def _holding(names: list[str], text: str) -> list[str]:
    return [name for name in names if text.lower() in name.lower()]


# Hugging Face Hub


def _repository(repo: str, wanted: str | None, offline: bool) -> ModelFiles:
    from huggingface_hub import hf_hub_download, snapshot_download

    names, offline = _listed(repo, offline)
    if wanted is None and _is_model(names):
        folder = snapshot_download(repo, allow_patterns=WANTED, ignore_patterns=UNWANTED, local_files_only=offline)
        return ModelFiles("folder", Path(folder), repo)
    ggufs = [name for name in names if name.endswith(".gguf")]
    where = f"the cached copy of {repo}" if offline else repo
    if not ggufs and wanted is None:
        raise refuse_names(where, names)
    if offline and wanted and wanted.endswith(".gguf"):  # the library says what the cache lacks
        file = wanted
    else:
        file = _one_gguf(ggufs, wanted or _default_gguf(ggufs), where, f"{repo}/")
    parts = part_names(file)
    if missing := [part for part in parts if part not in names and not offline]:
        raise MinillmError(f"{repo} lacks {missing[0]}, a part of the model: ask those who made the repository")
    paths = [hf_hub_download(repo, part, local_files_only=offline) for part in parts]
    return ModelFiles("gguf", Path(paths[0]), f"{repo}/{file}")


def _listed(repo: str, offline: bool) -> tuple[list[str], bool]:
    """(names of the repository's files, whether they are those of the cache, as they are without a network)."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    refusal = None
    if not offline:
        try:  # this call asks once; those that fetch would try again for half a minute
            found = HfApi().model_info(repo, timeout=ANSWER_SECONDS)
            return [file.rfilename for file in found.siblings or ()], False
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code < 500:
                raise
            refusal = error
        except Exception as error:  # the HTTP library's own
            refusal = error
    try:
        folder = Path(snapshot_download(repo, allow_patterns=[], local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise (refusal or error) from None
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()], True


def _default_gguf(names: list[str]) -> str | None:
    """What llama.cpp takes of a repository of .gguf files where no quantisation is named."""
    models = sorted(name for name in names if not NO_MODELS.search(name.rpartition("/")[2]))
    found = [name for tag in DEFAULT_QUANTS for name in _quantised(models, tag)]
    return next(iter(found + models), None)


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
