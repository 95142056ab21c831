"""PackedTensor: a matrix that a checkpoint stores as several tensors. files.checkpoints has the schemes of them.

All are w = scale * q + minimum, with a scale for a group of neighbours in a row. Each matrix becomes, some rows at a
time, the smallest format that holds it without loss or nearly so (docs/models.md has the errors):

Q4_0  4 bits around a fixed middle
Q4_1  up to 4 bits, Q5_1 5 bits: the minimum is rounded to float16
Q8_0  8 bits around a fixed middle; other 6 and 8 bits, and groups that do not lie together, are rounded anew
F16   floats of 8 bits
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from minillm.errors import MinillmError
from minillm.files.formats import F16, F32, FLOATS, FORMATS, WeightFormat
from minillm.files.mapped_file import MappedFile, StoredTensor

WAY_OUT = "take the 16-bit repository of the model, or a GGUF of it"
_INTEGERS = ("I32", "U32")
_FLOATS = tuple(format.name for format in FLOATS)
_WORDS = {"I32": np.uint32, "U32": np.uint32, "I8": np.uint8, "F8_E4M3": np.uint8}  # bits, not numbers
_WORDS |= {format.name: format.words for format in FLOATS}
# parts that nothing but packed matrices has
_SIGNS = {"qweight", "qzeros", "scales", "weight_packed", "weight_scale", "weight_scale_inv"}


@dataclass(frozen=True)
class Codes:
    """n rows of a matrix: w = scale * q + minimum."""

    q: np.ndarray  # (n, in) uint8, or float32
    scale: np.ndarray  # (n, groups) float32
    minimum: np.ndarray | None  # as scale; None: 0
    group: int  # neighbours in a row that share a scale
    columns: np.ndarray | None = None  # (in,) the group of each column, where groups do not lie together

    def floats(self) -> np.ndarray:
        """(n, in) float32."""
        w = self.q.astype(np.float32, order="C")
        w *= self._spread(self.scale)
        if self.minimum is not None:
            w += self._spread(self.minimum)
        return w

    def _spread(self, values: np.ndarray) -> np.ndarray:
        if self.columns is not None:
            return values[:, self.columns]
        return np.repeat(values, self.group, axis=1)[:, : self.q.shape[1]]

    def centred(self, bits: int) -> bool:
        """Whether the middle of `bits` bits means 0."""
        return np.array_equal(self.minimum, -(2.0 ** (bits - 1)) * self.scale, equal_nan=True)

    def blocks(self, format: WeightFormat) -> np.ndarray:
        """(n, blocks of a row, block_bytes) uint8 of Q4_0, Q4_1, Q5_1 or Q8_0. Groups lie together, and are multiples
        of 32. Scales beyond float16 become infinite."""
        q = np.ascontiguousarray(self.q).reshape(len(self.q), -1, 32)
        halves = [self.scale, self.minimum] if format.name in ("Q4_1", "Q5_1") else [self.scale]
        with np.errstate(over="ignore"):
            halves = np.stack(halves, axis=2).astype(np.float16).view(np.uint8)  # (n, groups, bytes)
        parts = [np.repeat(halves, self.group // 32, axis=1)[:, : q.shape[1]]]
        if format.name == "Q8_0":
            parts.append(q ^ 128)
        else:
            fifth = [np.packbits(q >> 4, axis=2, bitorder="little")] if format.name == "Q5_1" else []
            parts += [*fifth, q[..., :16] & 15 | q[..., 16:] << 4]
        return np.concatenate(parts, axis=2)


@dataclass(frozen=True)
class Packing:
    """A scheme with its settings; files.checkpoints has one class for each scheme."""

    needs: ClassVar[tuple[str, ...]]  # the parts of a matrix; the first has the codes
    kinds: ClassVar[tuple[str, ...]] = _INTEGERS  # of the codes
    integers: ClassVar[tuple[str, ...]] = ()  # which other parts are integers; the rest are floats
    aliases: ClassVar[dict[str, str]] = {}  # other names of parts
    unread: ClassVar[tuple[str, ...]] = ()  # parts that the weights do not depend on

    @property
    def held(self) -> str:
        """The name of the format that a matrix is read into."""
        raise NotImplementedError

    @property
    def groups(self) -> int:
        """How many neighbours in a row share a scale; 0: all of them."""
        raise NotImplementedError

    def of(self, module: str) -> "Packing | None":
        """The packing of the matrix of this module; None: it is not packed."""
        return self

    def size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(out, in) of the matrix whose codes have this shape."""
        raise NotImplementedError

    def shapes(self, n_out: int, n_in: int) -> dict[str, tuple[tuple[int, ...], ...]]:
        """The shapes that each part but the codes may have."""
        raise NotImplementedError

    def codes(self, tensor: "PackedTensor", lo: int, hi: int) -> Codes:
        """Rows lo : hi of the parts. MinillmError naming the part that is damaged."""
        raise NotImplementedError


@dataclass(frozen=True)
class PackedTensor:
    """A matrix of several tensors, in the place of a StoredTensor. `kind`: the format that it is read into."""

    name: str
    packing: Packing
    stored: dict[str, StoredTensor]  # its parts, by the last part of their names
    shape: tuple[int, int]  # (out, in)
    whole: int  # rows of the parts
    first: int = 0  # the row of the parts that is row 0 here

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        return tuple(self.stored.values())

    @property
    def kind(self) -> str:
        return self.packing.held

    @property
    def file(self) -> MappedFile:
        return self.parts[0].file

    @property
    def offset(self) -> int:
        return self.parts[0].offset

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts) * self.shape[0] // self.whole

    def error(self, what: str) -> MinillmError:
        return MinillmError(f"{self.file.path}: tensor {self.name} {what}")

    def rows(self, lo: int, hi: int) -> "PackedTensor":
        """Rows lo : hi."""
        return replace(self, shape=(hi - lo, self.shape[1]), first=self.first + lo)

    def read(self, lo: int, hi: int, format: WeightFormat) -> np.ndarray:
        """Rows lo : hi as a Weight of this format has them. MinillmError for what it cannot hold."""
        codes = self.packing.codes(self, self.first + lo, self.first + hi)
        if format is F32:
            return codes.floats()
        if format is F16:
            with np.errstate(over="ignore"):
                return self._finite(codes.floats().astype(np.float16))
        if format.name != self.kind or format.name == "Q8_0" and (codes.columns is not None or not codes.centred(8)):
            return format.quantize(codes.floats())
        if codes.columns is not None:
            raise self.error(f"has groups that do not lie together, but config.json does not say desc_act; {WAY_OUT}")
        if format.name == "Q4_0" and not codes.centred(4):
            raise self.error(f"has zero points other than 8, but config.json calls it symmetric; {WAY_OUT}")
        blocks = codes.blocks(format)
        self._finite(np.ascontiguousarray(blocks[..., : 4 if format.name in ("Q4_1", "Q5_1") else 2]))
        return blocks.reshape(hi - lo, -1)

    def _finite(self, halves: np.ndarray) -> np.ndarray:
        if not np.isfinite(halves.view(np.float16)).all():
            raise self.error(f"has numbers that no float16 holds; {WAY_OUT}")
        return halves

    def words(self, part: str) -> np.ndarray:
        """A part as it lies in its file."""
        tensor = self.stored[part]
        return tensor.bytes.view(_WORDS[tensor.kind]).reshape(tensor.shape)

    def floats(self, part: str, cut=...) -> np.ndarray:
        """A part that holds floats, or a cut of it, as float32."""
        words = self.words(part)[cut]
        out = np.empty(words.shape, np.float32)
        FORMATS[self.stored[part].kind].to_float32(words, out)
        return out


Tensors = dict[str, StoredTensor | PackedTensor]


def gathered(found: dict[str, StoredTensor], packing: Packing | None) -> Tensors:
    """The tensors of a folder with the parts of each packed matrix as one, NAME.weight. Raises MinillmError naming the
    tensor: a part that is missing, or of another type or shape."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in found.items():
        module, dot, part = name.rpartition(".")
        modules.setdefault(module + dot, {})[part] = tensor
    made: Tensors = {}
    for module, parts in modules.items():
        if packing is None and (signs := _SIGNS & parts.keys()):
            raise parts[min(signs)].error(
                "is a part of a packed matrix, but config.json has no quantization_config that says how it is packed: "
                f"get the config.json that belongs to it, or {WAY_OUT}"
            )
        own = packing.of(module[:-1]) if packing else None
        if own and _is_packed(own, parts := _renamed(own, parts)):
            made[f"{module}weight"] = _packed(f"{module}weight", parts, own)
            parts = {part: tensor for part, tensor in parts.items() if part not in own.needs}
        unread = packing.unread if packing else ()
        made |= {module + part: tensor for part, tensor in parts.items() if part not in unread}
    return made


def idle(tensors: Tensors) -> set[str]:
    """The names of biases and zero points of packed matrices that are all 0: old quantisers gave them to every one."""
    modules = [name.removesuffix("weight") for name, t in tensors.items() if isinstance(t, PackedTensor)]
    names = [module + part for module in modules for part in ("bias", "weight_zero_point")]
    return {name for name in names if name in tensors and not tensors[name].bytes.any()}


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """(n, k) words -> (n, 32 k / bits) uint8: codes follow one another from the lowest bit of the first word."""
    common = math.gcd(bits, 8)
    stream = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1, bits // common)
    codes = np.empty((*stream.shape[:2], 8 // common), np.uint8)
    for i in range(codes.shape[2]):
        byte, shift = divmod(i * bits, 8)
        codes[..., i] = stream[..., byte] >> shift
        if shift + bits > 8:
            codes[..., i] |= stream[..., byte + 1] << 8 - shift
    codes &= 2**bits - 1
    return codes.reshape(len(words), -1)


def _renamed(packing: Packing, parts: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    renamed = {packing.aliases.get(part, part): tensor for part, tensor in parts.items()}
    return renamed if len(renamed) == len(parts) else parts


def _has_codes(packing: Packing, parts: dict[str, StoredTensor]) -> bool:
    return packing.needs[0] in parts and parts[packing.needs[0]].kind in packing.kinds


def _is_packed(packing: Packing, parts: dict[str, StoredTensor]) -> bool:
    return _has_codes(packing, parts) or not parts.keys().isdisjoint(packing.needs[1:])


def _packed(name: str, parts: dict[str, StoredTensor], packing: Packing) -> PackedTensor:
    if missing := [part for part in packing.needs if part not in parts]:
        there = next(parts[part] for part in packing.needs if part in parts)
        raise there.error(f"has no {missing[0]} beside it; download the model again, or {WAY_OUT}")
    codes = parts[packing.needs[0]]
    if not _has_codes(packing, parts) or len(codes.shape) != 2:
        raise codes.error(f"is {codes.kind} {list(codes.shape)}; it must be a matrix of {' or '.join(packing.kinds)}")
    n_out, n_in = packing.size(codes.shape)
    for part, shapes in packing.shapes(n_out, n_in).items():
        tensor, kinds = parts[part], _INTEGERS if part in packing.integers else _FLOATS
        if tensor.kind not in kinds:
            raise tensor.error(f"is of type {tensor.kind}; minillm reads {', '.join(kinds)} here")
        if tensor.shape not in shapes:
            asked = " or ".join(str(list(shape)) for shape in shapes)
            raise tensor.error(f"has shape {list(tensor.shape)}, but {codes.name} and config.json ask for {asked}")
    made = PackedTensor(name, packing, {part: parts[part] for part in packing.needs}, (n_out, n_in), n_out)
    if not FORMATS[packing.held].is_float and (n_in % 32 or packing.groups % 32):
        groups = f" in groups of {packing.groups}" if packing.groups else ""
        raise made.error(f"has rows of {n_in} weights{groups}, which are no blocks of 32; {WAY_OUT}")
    return made
