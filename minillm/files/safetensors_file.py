"""The tensors of a Hugging Face model folder: headers of the safetensors files, checked before any tensor is touched.

The header is parsed here because safetensors.numpy cannot read BF16. Format: 8 bytes little-endian length, that many
bytes of JSON {name: {dtype, shape, data_offsets}}, then the tensors without holes.
"""

import json
import math
from pathlib import Path

from minillm.errors import MinillmError
from minillm.files.mapped_file import MappedFile, StoredTensor

_DTYPE_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}
_MAX_HEADER = 100_000_000  # bytes, the limit of the format


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name. Raises MinillmError naming the file, and the tensor if one is at fault."""
    file = MappedFile(path)
    length = int.from_bytes(file.map[:8], "little")
    if length > _MAX_HEADER or 8 + length > file.size:
        raise file.error(f"is no safetensors file, or truncated: its header would take {length} of {file.size} bytes")
    try:
        header = json.loads(file.map[8 : 8 + length], object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise file.error(f"has a damaged header ({error}); download it again") from None
    if not isinstance(header, dict):
        raise file.error("has a damaged header (not a JSON object); download it again")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(file, name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(file, tensors, 8 + length)
    return tensors


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of model.safetensors, or of all shards of model.safetensors.index.json."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return read_safetensors(single)
    if not index.exists():
        others = sorted(p.name for pattern in ("*.bin", "*.pth", "*.pt", "*.h5") for p in folder.glob(pattern))
        found = f" but {', '.join(others[:3])}" if others else ""
        raise MinillmError(
            f"{folder} has neither model.safetensors nor {index.name}{found}: minillm reads safetensors; fetch a "
            "revision that has them, or save the model again with transformers' save_pretrained"
        )
    weight_map = _weight_map(index)
    shards = {name: folder / name for name in dict.fromkeys(weight_map.values())}
    if missing := [name for name, path in shards.items() if not path.exists()]:
        raise MinillmError(f"{folder} lacks {', '.join(missing)}, which {index.name} names; download it again")
    tensors: dict[str, StoredTensor] = {}
    for path in shards.values():
        for name, tensor in read_safetensors(path).items():
            if name in tensors:
                raise tensor.error(f"is in {tensors[name].file.path.name} too; keep one of them")
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.path.name != shard:
            raise MinillmError(
                f"{shards[shard]} lacks tensor {name}, which {index.name} says it has; download both again"
            )
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes(), object_pairs_hook=_no_duplicates)["weight_map"]
        # a shard is a plain file name: an index must not reach outside its folder
        good = all(isinstance(s, str) and s == Path(s).name and s.endswith(".safetensors") for s in weight_map.values())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise MinillmError(f"{index} is damaged ({type(error).__name__}: {error}); download it again") from None
    if not good or not weight_map:
        raise MinillmError(f"{index} is damaged: weight_map must name .safetensors files beside it; download it again")
    return weight_map


def _check_layout(file: MappedFile, tensors: dict[str, StoredTensor], start: int) -> None:
    """Raises MinillmError unless one tensor follows directly on the other, from `start` up to the end of the file."""
    end = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.end > file.size:
            raise tensor.cut_off()
        if tensor.offset < end:
            raise tensor.error("overlaps the one before it: the header lies; download the file again")
        if tensor.offset > end:
            raise tensor.error(f"leaves a hole of {tensor.offset - end} bytes before it; download the file again")
        end = tensor.end
    if tensors and end < file.size:
        raise file.error(f"has {file.size - end} bytes after its last tensor: the header lies; download it again")


def _no_duplicates(pairs: list) -> dict:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{twice} is there twice")
    return values


def _tensor(file: MappedFile, name: str, entry, start: int) -> StoredTensor:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise file.error(f"has a damaged header: tensor {name} needs dtype, shape and data_offsets") from None
    if kind not in _DTYPE_BYTES:
        raise file.error(f"has tensor {name} of dtype {kind}, which minillm does not know")
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise file.error(f"has a damaged header: shape {list(shape)} or offsets {begin}, {end} of tensor {name}")
    tensor = StoredTensor(file, name, kind, shape, start + begin, end - begin)
    if math.prod(shape) * _DTYPE_BYTES[kind] != tensor.nbytes:
        raise tensor.error(
            f"of {kind} {list(shape)} cannot take {tensor.nbytes} bytes: the header lies; download it again"
        )
    return tensor
