"""Files of minillm's own, sessions and profiles: arrays and texts in the safetensors format.

A digest of all of them makes sure that a file is as it was written, or is refused. Among the texts of a file of a kind
("session") is one named minillm_KIND.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from minillm.errors import MinillmError

_DIGEST = "digest"


def write(path: Path, arrays: dict[str, np.ndarray], texts: dict[str, str]) -> None:
    """Write arrays and texts by name to a file, all of it or nothing. Raises MinillmError."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = {name: np.array(array, order="C") for name, array in arrays.items()}  # it writes memory as it lies
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(arrays, unfinished, texts | {_DIGEST: _digest(arrays, texts)})
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        raise MinillmError(f"cannot write {path} ({error}): free some space there or name another file") from error
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: Path, kind: str, remedy: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, texts) that `write` wrote. MinillmError, with the remedy at its end, where this is no file of the kind,
    or not as it was written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            texts = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        if f"minillm_{kind}" not in texts:
            raise ValueError("it does not say that it is one")
        if _DIGEST not in texts:
            raise ValueError("another version of minillm wrote it")
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise MinillmError(f"{path} is not a minillm {kind} ({error}): {remedy}") from None
    written = texts.pop(_DIGEST)
    if written != _digest(arrays, texts):
        raise MinillmError(f"{path} is damaged (it does not hold what was written): {remedy}")
    return arrays, texts


def _digest(arrays, texts):
    digest = hashlib.sha256(repr(sorted(texts.items())).encode())
    for name, array in sorted(arrays.items()):
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    return digest.hexdigest()
