"""What a slab of pages holds: the formats of K and V, an object each, and the fields they lie in.

In int8 a row x (d,), an entry's key or value, is d whole numbers q and a scale s in bf16: s = max|x| / 127 rounded, q =
x / s rounded, and q s is what is read. That is stored as the same words again, for 127 s has no more than 15 bits:
entries that stay when a layer is compressed once more stay as they are."""

import mmap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PAGE_SIZE = 32  # entries a page, as in pages.cuh, where nothing else is said
LARGEST = 127  # of a row in 8 bits


@dataclass(frozen=True, kw_only=True)
class PageFormat:
    """How pages store K and V. Rows (n, d) are float32. Stored, the field "k" or "v" is one array or several."""

    name: str  # in flags and session files
    kind: int | None = None  # of enum PageFormat in kernels/cpu/rows.h; None: not there
    cuda: str | None = None  # the struct in CUDA, of kernels/cuda/page_formats.cuh
    note: str = ""  # what it does for who asks for it
    exact = False  # whether rows are floats that every kernel can read as they lie: a backend's own format is

    def parts(self, head_dim):
        """What a row is stored as: suffix of the name -> (shape, type)."""
        raise NotImplementedError

    def pack(self, rows):
        """rows (n, d) -> the parts of n rows, in their order."""
        raise NotImplementedError

    def unpack(self, *parts):
        """The other way."""
        raise NotImplementedError

    def layout(self, head_dim):
        """name -> (shape of an entry's, type), in the order in which the fields lie in a slab."""
        rows = {field + part: each for part, each in self.parts(head_dim).items() for field in "kv"}
        return rows | {"log_size": ((), np.float32), "pos": ((), np.int32)}

    def entry_bytes(self, head_dim):
        """Bytes of an entry in all its fields."""
        return sum(int(np.prod(shape)) * np.dtype(word).itemsize for shape, word in self.layout(head_dim).values())

    def row_bytes(self, head_dim):
        """Bytes of a key, and of a value, without its scale."""
        shape, word = self.parts(head_dim)[""]
        return int(np.prod(shape)) * np.dtype(word).itemsize

    def stored(self, entries):
        """Entries of the host, k and v float32 -> name -> array of what is stored of them."""
        arrays = {"log_size": entries.log_size, "pos": entries.pos}
        for field, rows in (("k", entries.k), ("v", entries.v)):
            arrays |= {field + part: array for part, array in zip(self.parts(1), self.pack(rows), strict=True)}
        return arrays

    def rows(self, field, arrays):
        """The keys ("k") or values ("v") among stored arrays by name: (n, d) float32, a view where that is stored."""
        return self.unpack(*(arrays[field + part] for part in self.parts(1)))


@dataclass(frozen=True, kw_only=True)
class Floats(PageFormat):
    """A word for each element. words, floats: of float32 values of any backend, to nearest, ties to even, and back."""

    word: type
    words: Callable
    floats: Callable
    exact = True

    def parts(self, head_dim):
        return {"": ((head_dim,), self.word)}

    def pack(self, rows):
        return (self.words(rows),)

    def unpack(self, words):
        return self.floats(words)


class Int8(PageFormat):
    """Whole numbers and a scale a row."""

    def parts(self, head_dim):
        return {"": ((head_dim,), np.int8), "_scale": ((), np.uint16)}

    def pack(self, rows):
        words = bf16_words(np.abs(rows).max(axis=1) / np.float32(LARGEST))
        scale = from_bf16(words)[:, None]
        units = np.divide(rows, scale, out=np.zeros_like(rows), where=scale > 0)
        return np.clip(np.rint(units), -LARGEST, LARGEST).astype(np.int8), words

    def unpack(self, numbers, words):
        return numbers * from_bf16(words)[:, None]


def bf16_words(x):
    """Finite float32 values of any backend, rounded to nearest, ties to even -> uint16 words."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(words):
    """uint16 words of bf16 -> float32."""
    return (words.astype(np.uint32) << 16).view(np.float32)


def _same(x):
    return x


FLOAT32 = Floats(name="float32", word=np.float32, words=_same, floats=_same, kind=0)
BFLOAT16 = Floats(name="bfloat16", word=np.uint16, words=bf16_words, floats=from_bf16, kind=1, cuda="Words")
FLOAT16 = Floats(
    name="float16",
    word=np.uint16,
    words=lambda x: x.astype(np.float16).view(np.uint16),
    floats=lambda words: words.view(np.float16).astype(np.float32),
    cuda="Words",
)
INT8 = Int8(name="int8", kind=2, cuda="Int8", note="about half of their bytes")
PAGE_FORMATS = {format.name: format for format in (FLOAT32, BFLOAT16, FLOAT16, INT8)}
DTYPES = {  # what may be asked for, and what it gives
    "auto": "16-bit floats",
    **{name: format.note for name, format in PAGE_FORMATS.items() if not format.exact},
}


def page_format(dtype, ops):
    """The PageFormat of a name; auto is the backend's own."""
    return ops.page_format if dtype == "auto" else PAGE_FORMATS[dtype]


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
