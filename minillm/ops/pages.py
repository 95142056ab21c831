"""What a slab of pages holds: the formats of rows of K and V, an object each, and the fields they lie in.

In int8 a row x (d,), an entry's key or value, is d whole numbers q and a scale s in bf16: s = max|x| / 127 rounded, q =
x / s rounded, and q s is what is read. That is stored as the same words again, for 127 s has no more than 15 bits:
entries that stay when a layer is compressed once more stay as they are.

In q4 (k5v4: keys in 5 bits, values in 4) a row is y = H x, H the Hadamard transform, which spreads any row over
elements that are about Gaussian; u = 127 y / max|y|; c, the nearest of 16 (32) levels of each u; and the scale
s = max|y| / 127 (u.c) / (c.c), which makes |y - s c| least, in bf16. H s c is what is read: as H is its own inverse and
transpose, a query q meets c as s (H q).c, and sums of values are transformed once, not row by row. One element of c is
always at the last level, 127: so H s c, whose transform's largest is 127 s, is stored as the same words again."""

import mmap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minillm.errors import MinillmError

PAGE_SIZE = 32  # entries a page, as in pages.cuh, where nothing else is said
LARGEST = 127  # of a row in 8 bits


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How pages store rows (n, d) float32: keys, or values. Stored, they are one array or several."""

    kind: int | None = None  # of enum RowFormat in kernels/cpu/rows.h; None: not there
    exact = False  # whether rows are floats that every kernel can read as they lie: a backend's own format is
    turned = False  # whether what is stored is of the row's Hadamard transform

    def parts(self, head_dim):
        """What a row is stored as: suffix of the name -> (shape, type)."""
        raise NotImplementedError

    def pack(self, rows):
        """rows (n, d) -> the parts of n rows, in their order."""
        raise NotImplementedError

    def unpack(self, parts, head_dim):
        """The other way."""
        raise NotImplementedError

    def row_bytes(self, head_dim):
        """Bytes of a row without its scale."""
        shape, word = self.parts(head_dim)[""]
        return int(np.prod(shape)) * np.dtype(word).itemsize


@dataclass(frozen=True, kw_only=True)
class Floats(RowFormat):
    """A word for each element. words, floats: of float32 values of any backend, to nearest, ties to even, and back."""

    word: type
    words: Callable
    floats: Callable
    exact = True

    def parts(self, head_dim):
        return {"": ((head_dim,), self.word)}

    def pack(self, rows):
        return (self.words(rows),)

    def unpack(self, parts, head_dim):
        (words,) = parts
        return self.floats(words)


class Whole(RowFormat):
    """Whole numbers of 8 bits and a scale a row."""

    def parts(self, head_dim):
        return {"": ((head_dim,), np.int8), "_scale": ((), np.uint16)}

    def pack(self, rows):
        words = bf16_words(np.abs(rows).max(axis=1) / np.float32(LARGEST))
        scale = from_bf16(words)[:, None]
        units = np.divide(rows, scale, out=np.zeros_like(rows), where=scale > 0)
        return np.clip(np.rint(units), -LARGEST, LARGEST).astype(np.int8), words

    def unpack(self, parts, head_dim):
        numbers, words = parts
        return numbers * from_bf16(words)[:, None]


@dataclass(frozen=True, kw_only=True)
class Levels(RowFormat):
    """Which of 2^bits levels each element of the row's Hadamard transform is at, and a scale a row.

    Levels are whole numbers, those above zero in `upper`: the best ones of a Gaussian (Lloyd 1982, Max 1960), the last
    one made 127, rounded. Of each 32 elements the 4 low bits of element i and of i + 16 are byte i; of 5 bits, the
    fifth ones of all elements follow, 8 a byte, the first lowest. What lies beyond d is 0."""

    bits: int
    upper: tuple
    turned = True

    @property
    def levels(self):
        """(2^bits,) float32, ascending."""
        upper = np.array(self.upper, np.float32)
        return np.append(-upper[::-1], upper)

    def parts(self, head_dim):
        return {"": ((-(-head_dim // 32) * 4 * self.bits,), np.uint8), "_scale": ((), np.uint16)}

    def pack(self, rows):
        turned, levels = hadamard(rows), self.levels
        unit = np.abs(turned).max(axis=1, keepdims=True) / np.float32(LARGEST)
        units = np.divide(turned, unit, out=np.zeros_like(turned), where=unit > 0)
        codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, units)
        at = levels[codes]
        scale = np.einsum("rd,rd->r", units, at) / np.einsum("rd,rd->r", at, at) * unit[:, 0]
        return self._packed(codes), bf16_words(scale)

    def _packed(self, codes):
        """codes (n, d) -> (n, bytes)."""
        (n, d), blocks = codes.shape, -(-codes.shape[1] // 32)
        padded = np.zeros((n, blocks * 32), np.uint8)
        padded[:, :d] = codes
        padded = padded.reshape(n, blocks, 32)
        low = (padded[:, :, :16] & 15 | padded[:, :, 16:] << 4).reshape(n, blocks * 16)
        if self.bits == 4:
            return low
        high = np.packbits(padded >> 4, axis=2, bitorder="little").reshape(n, blocks * 4)
        return np.append(low, high, axis=1)

    def unpack(self, parts, head_dim):
        (stored, words), blocks = parts, -(-head_dim // 32)
        low = stored[:, : blocks * 16].reshape(-1, blocks, 16)
        codes = np.concatenate([low & 15, low >> 4], axis=2)
        if self.bits == 5:
            high = stored[:, blocks * 16 :].reshape(-1, blocks, 4)
            codes |= np.unpackbits(high, axis=2, bitorder="little") << 4
        codes = codes.reshape(-1, blocks * 32)[:, :head_dim]
        return hadamard(self.levels[codes] * from_bf16(words)[:, None])


def hadamard(rows):
    """rows (n, d) times the normalised Hadamard matrix of each block of the largest power of two that divides d (which
    is its own inverse), by differences and sums (Yates 1937)."""
    (n, d), step = rows.shape, 1
    block = d & -d
    while step < block:
        pair = rows.reshape(n, d // (2 * step), 2, step)
        rows = np.stack([pair[:, :, 0] + pair[:, :, 1], pair[:, :, 0] - pair[:, :, 1]], axis=2)
        step *= 2
    return rows.reshape(n, d) * np.float32(block**-0.5)


@dataclass(frozen=True)
class PageFormat:
    """How pages store K and V."""

    name: str  # in flags and session files
    k: RowFormat
    v: RowFormat
    cuda: str | None = None  # the struct in CUDA, of kernels/cuda/page_formats.cuh
    note: str = ""  # what it does for who asks for it

    @property
    def exact(self):
        return self.k.exact and self.v.exact

    def layout(self, head_dim):
        """name -> (shape of an entry's, type), in the order in which the fields lie in a slab."""
        parts = {field + part: each for field in "kv" for part, each in getattr(self, field).parts(head_dim).items()}
        rows = {name: parts[name] for name in sorted(parts, key=len)}  # the scales after both
        return rows | {"log_size": ((), np.float32), "pos": ((), np.int32)}

    def entry_bytes(self, head_dim):
        """Bytes of an entry in all its fields."""
        return sum(int(np.prod(shape)) * np.dtype(word).itemsize for shape, word in self.layout(head_dim).values())

    def stored(self, entries):
        """Entries of the host, k and v float32 -> name -> array of what is stored of them."""
        arrays = {"log_size": entries.log_size, "pos": entries.pos}
        for field, rows in (("k", entries.k), ("v", entries.v)):
            format = getattr(self, field)
            arrays |= {field + part: array for part, array in zip(format.parts(1), format.pack(rows), strict=True)}
        return arrays

    def rows(self, field, arrays, head_dim):
        """The keys ("k") or values ("v") among stored arrays by name: (n, d) float32, a view where that is stored."""
        format = getattr(self, field)
        return format.unpack([arrays[field + part] for part in format.parts(head_dim)], head_dim)


def bf16_words(x):
    """Finite float32 values of any backend, rounded to nearest, ties to even -> uint16 words."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(words):
    """uint16 words of bf16 -> float32."""
    return (words.astype(np.uint32) << 16).view(np.float32)


def _same(x):
    return x


F32_ROWS = Floats(word=np.float32, words=_same, floats=_same, kind=0)
BF16_ROWS = Floats(word=np.uint16, words=bf16_words, floats=from_bf16, kind=1)
F16_ROWS = Floats(
    word=np.uint16,
    words=lambda x: x.astype(np.float16).view(np.uint16),
    floats=lambda words: words.view(np.float16).astype(np.float32),
)
INT8_ROWS = Whole(kind=2)
Q4_ROWS = Levels(bits=4, upper=(6, 18, 31, 44, 58, 75, 96, 127), kind=3)
Q5_ROWS = Levels(bits=5, upper=(3, 8, 13, 18, 24, 29, 35, 41, 47, 54, 61, 70, 79, 90, 105, 127), kind=4)

FLOAT32 = PageFormat("float32", F32_ROWS, F32_ROWS)
BFLOAT16 = PageFormat("bfloat16", BF16_ROWS, BF16_ROWS, "Words")
FLOAT16 = PageFormat("float16", F16_ROWS, F16_ROWS, "Words")
INT8 = PageFormat("int8", INT8_ROWS, INT8_ROWS, "Int8", "about half of their bytes")
K5V4 = PageFormat("k5v4", Q5_ROWS, Q4_ROWS, "K5V4", "about a third: keys of 5 bits, values of 4")
Q4 = PageFormat("q4", Q4_ROWS, Q4_ROWS, "Q4", "less than a third: keys and values of 4 bits")
PAGE_FORMATS = {format.name: format for format in (FLOAT32, BFLOAT16, FLOAT16, INT8, K5V4, Q4)}
DTYPES = {  # what may be asked for, and what it gives
    "auto": "16-bit floats",
    **{name: format.note for name, format in PAGE_FORMATS.items() if not format.exact},
}


def page_format(dtype, ops):
    """The PageFormat of a name; auto is the backend's own. MinillmError where the backend has none such."""
    format = ops.page_format if dtype == "auto" else PAGE_FORMATS[dtype]
    if not ops.holds(format):
        raise MinillmError(f"there are no kernels for a cache of {dtype} on {ops.name}: use auto or int8")
    return format


@dataclass
class Slab:
    """Memory of pages, each `page_size` entries of one KV head of one layer. Fields of one kind lie together, so that
    consecutive pages of a head are one array."""

    memory: np.ndarray  # (bytes,) uint8, of any backend
    fields: dict  # name -> (n_pages, page_size, shape of an entry's), views of the memory

    @classmethod
    def within(cls, memory, n_pages, page_size, head_dim, format):
        """Of n_pages whose fields lie in memory (bytes,)."""
        fields, lo = {}, 0
        for name, (shape, word) in format.layout(head_dim).items():
            hi = lo + n_pages * page_size * int(np.prod(shape)) * np.dtype(word).itemsize
            fields[name] = memory[lo:hi].view(word).reshape(n_pages, page_size, *shape)
            lo = hi
        return cls(memory, fields)

    def entries(self, pages, rows):
        """Of the entries of consecutive pages (a slice) some consecutive rows (a slice): name -> view of the field,
        without the axis of pages."""
        return {name: field[pages].reshape(-1, *field.shape[2:])[rows] for name, field in self.fields.items()}


def anonymous(n_bytes):
    """A mapping of n_bytes zeros, of this process alone: what a child of it writes there is the child's. MemoryError
    where the system has none."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        return mmap.mmap(-1, n_bytes, **private)
    except OSError as error:
        raise MemoryError(f"the system has no {n_bytes} bytes left: {error.strerror}") from None


@dataclass
class StoredRows:
    """K or V of the rows of one layer where they lie, KV heads one after another: of each head the entries stored after
    the first `start`, and then those of n new tokens."""

    past: object  # PagedLayer
    start: np.ndarray  # (H,)
    field: str  # "k" or "v"
    new: object = None  # (H, n, d) rows of the backend

    @property
    def lengths(self):
        """(H,) rows of each head."""
        return self.past.lengths - self.start + (0 if self.new is None else self.new.shape[1])

    @property
    def shape(self):
        return int(self.lengths.sum()), self.past.pool.head_dim
