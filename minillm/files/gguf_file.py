"""Reads the header of a GGUF file (versions 2 and 3, little-endian): metadata, and where each tensor lies.

gguf.GGUFReader takes seconds for a vocabulary, one NumPy slice a string; this takes a tenth of one. Every count and
length is checked against the bytes that are left before it is believed.
"""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minillm.errors import MinillmError
from minillm.files.formats import FORMATS
from minillm.files.mapped_file import MappedFile, StoredTensor
from minillm.files.not_a_model import check_gguf

# ggml type number -> (name, weights of a block, bytes of a block). Types that minillm cannot read are looked up in the
# gguf package, which takes 0.1 s to import.
_TYPES = {format.number: (format.name, format.block, format.block_bytes) for format in FORMATS.values()}
# metadata value type -> struct code
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_U64 = struct.Struct("<Q")
_MAX_DIMS, _MAX_NESTING = 4, 4
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")  # the end of the name of one file of a model in several
_ONE_MODEL = "get all parts of one model"


@dataclass(frozen=True)
class GGUFFile:
    """Metadata by key (numbers, booleans, strings, lists of them) and tensors by name, in the file's order."""

    metadata: dict
    tensors: dict[str, StoredTensor]


def part_names(name: str) -> list[str]:
    """The names of all parts of the model that `name` is a part of, in order; of a whole model its own."""
    part = PART.search(name)
    if not part or not 1 <= int(part[1]) <= int(part[2]):
        return [name]
    return [f"{name[: part.start()]}-{i:05}-of-{part[2]}.gguf" for i in range(1, int(part[2]) + 1)]


def read_gguf(path: Path) -> GGUFFile:
    """Metadata and tensors; of a model in parts, of which `path` is any, the metadata of the first and the tensors of
    all. Raises MinillmError naming the file, the tensor or key at fault, and what is wrong."""
    paths = [path.with_name(name) for name in part_names(path.name)]
    for i, part in enumerate(paths):
        if len(paths) > 1 and not part.exists():
            what = f"part {i + 1} of the {len(paths)} parts of a model"
            raise MinillmError(f"{part} is missing, {what}: get it from where the others came, into the same folder")
    parts = [_read_part(part) for part in paths]
    metadata, tensors = parts[0].metadata, {}
    count = metadata.get("split.tensors.count")
    for i, (part, found) in enumerate(zip(paths, parts, strict=True)):
        _check_part(part, found.metadata, i, len(paths), count)
        for name, tensor in found.tensors.items():
            if name in tensors:
                raise tensor.error(f"is in {tensors[name].file.path.name} too: {_ONE_MODEL}")
            tensors[name] = tensor
    if len(paths) > 1 and count != len(tensors):
        raise MinillmError(
            f"{paths[0]} is of a model of {count} tensors, and its parts hold {len(tensors)}: {_ONE_MODEL}"
        )
    check_gguf(path, metadata)
    return GGUFFile(metadata, tensors)


def _check_part(path: Path, metadata: dict, i: int, count: int, n_tensors) -> None:
    """Whether a file is part i of `count` parts of a model, as its name says."""
    no, said = metadata.get("split.no", 0), metadata.get("split.count", 0) or 1
    if (no, said) != (i, count):
        says = f"part {no + 1} of {said}" if isinstance(no, int) else f"part {no!r}"
        name = f"part {i + 1} of {count}" if count > 1 else "a whole model"
        raise MinillmError(
            f"{path} says that it is {says} of a model (split.no, split.count), and its name that it is {name}: give "
            f"every part its own name, MODEL-00001-of-0000N.gguf, and {_ONE_MODEL}"
        )
    if metadata.get("split.tensors.count") != n_tensors:
        raise MinillmError(f"{path} is part of another model than the first part (split.tensors.count): {_ONE_MODEL}")


def _read_part(path: Path) -> GGUFFile:
    """Metadata and tensors of one file."""
    file = MappedFile(path)
    reader = _Reader(file)
    if file.map[:4] != b"GGUF":
        raise file.error("is no GGUF file: it does not begin with the letters GGUF")
    reader.at = 4
    version = reader.number("I", "version")
    if version & 0xFFFF == 0:
        raise file.error("is a big-endian GGUF file; minillm reads little-endian ones, convert it again")
    if version not in (2, 3):
        raise file.error(f"is of GGUF version {version}; minillm reads 2 and 3, convert it again")
    n_tensors, n_keys = reader.number("Q", "tensor count"), reader.number("Q", "key count")
    metadata: dict = {}
    for _ in range(n_keys):
        key = reader.string("a metadata key")
        if key in metadata:
            raise file.error(f"has the metadata key {key} twice; convert or download it again")
        metadata[key] = reader.value(reader.number("I", key), key)
    return GGUFFile(metadata, _read_tensors(reader, n_tensors, metadata.get("general.alignment", 32)))


def _read_tensors(reader: "_Reader", count: int, alignment) -> dict[str, StoredTensor]:
    file, infos = reader.file, {}
    for _ in range(count):
        name = reader.string("a tensor name")
        if name in infos:
            raise file.error(f"has tensor {name} twice; convert or download it again")
        n_dims = reader.number("I", name)
        if not 1 <= n_dims <= _MAX_DIMS:
            raise file.error(f"is damaged: tensor {name} has {n_dims} dimensions; download it again")
        dims = [reader.number("Q", name) for _ in range(n_dims)]
        infos[name] = (dims, reader.number("I", name), reader.number("Q", name))
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise file.error(f"is damaged: general.alignment = {alignment} is no power of two; download it again")
    start = end = reader.at + -reader.at % alignment
    tensors = {}
    for name, (dims, type_number, offset) in infos.items():
        kind, block, block_bytes = _type(type_number)
        if kind is None or dims[0] % block:
            what = f"type number {type_number}, dimensions {dims}"
            raise file.error(f"is damaged or too new: tensor {name} has {what}; download it again")
        nbytes = math.prod(dims) // block * block_bytes
        tensor = tensors[name] = StoredTensor(file, name, kind, tuple(reversed(dims)), start + offset, nbytes)
        if tensor.offset != end:  # llama.cpp's rule; without it a wrong count or alignment shifts all that is read
            raise tensor.error(f"has offset {offset}, but those before it end at {end - start}; download it again")
        if tensor.end > file.size:
            raise tensor.cut_off()
        end = tensor.end + -tensor.end % alignment
    if file.size > end:
        raise file.error(
            f"has {file.size - end} bytes after its last tensor: its tensor count or alignment is wrong; "
            "download it again"
        )
    return tensors


def _type(number: int) -> tuple[str | None, int, int]:
    if number in _TYPES:
        return _TYPES[number]
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        return None, 1, 1
    return kind.name, *GGML_QUANT_SIZES[kind]


class _Reader:
    """A cursor over the header that never passes the end of the file."""

    def __init__(self, file: MappedFile):
        self.file, self.map, self.size, self.at = file, file.map, file.size, 0

    def take(self, nbytes: int, what: str) -> int:
        """Moves past `nbytes` and returns where they begin."""
        at = self.at
        if nbytes > self.size - at:
            raise self.file.error(f"is truncated or damaged: {what} runs past the end of the file; download it again")
        self.at = at + nbytes
        return at

    def number(self, code: str, what: str):
        code = "<" + code
        return struct.unpack_from(code, self.map, self.take(struct.calcsize(code), what))[0]

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings, each 8 bytes of length and its UTF-8 bytes; one tight loop, as there may be 100,000."""
        if count > (self.size - self.at) // 8:
            raise self.file.error(f"is damaged: {what} claims {count} strings, more than fit; download it again")
        data, size, at, out = self.map, self.size, self.at, []
        unpack = _U64.unpack_from
        try:
            for _ in range(count):
                begin = at + 8
                at = begin + unpack(data, at)[0]
                if at > size:
                    raise struct.error
                out.append(data[begin:at].decode())
        except struct.error:
            raise self.file.error(f"is truncated or damaged: a string of {what} runs past its end") from None
        except UnicodeDecodeError:
            raise self.file.error(f"is damaged: a string of {what} is not UTF-8; download it again") from None
        self.at = at
        return out

    def value(self, kind: int, what: str, depth: int = 0):
        """A metadata value: a number, a boolean, a string or a list of values of one kind."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY or depth == _MAX_NESTING:
            raise self.file.error(
                f"is damaged: {what} is of metadata type {kind}, nested {depth} deep; download it again"
            )
        item, count = self.number("I", what), self.number("Q", what)
        if item == _STRING:
            return self.strings(count, what)
        if item in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[item])
            at = self.take(count * dtype.itemsize, what)
            return np.frombuffer(self.map, dtype, count, at).tolist()
        return [self.value(item, what, depth + 1) for _ in range(count)]
