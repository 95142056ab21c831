"""What a slab of pages holds: its fields for each type of K and V, and rows of 8 bits.

In int8 a row x (d,), an entry's key or value, is d whole numbers q and a scale s in bf16: s = max|x| / 127 rounded, q =
x / s rounded, and q s is what is read. That is stored as the same words again, for 127 s has no more than 15 bits:
entries that stay when a layer is compressed once more stay as they are."""

import mmap
from dataclasses import dataclass, fields

import numpy as np

PAGE_SIZE = 32  # entries a page, as in pages.cuh, where nothing else is said
LARGEST = 127  # of a row in 8 bits
WORDS = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.uint16, "int8": np.int8}  # of K and V
DTYPES = ("auto", "int8")  # what may be asked for


def stored_as(dtype, ops):
    """The type of K and V in pages, by name: auto is the backend's own."""
    return ops.CACHE_DTYPE if dtype == "auto" else dtype


@dataclass
class Slab:
    """Memory of n_pages pages, each `page_size` entries of one KV head of one layer. Fields of one kind lie together,
    so that consecutive pages of a head are one (entries, d) array."""

    k: np.ndarray  # (n_pages, page_size, d)
    v: np.ndarray  # (n_pages, page_size, d)
    log_size: np.ndarray  # (n_pages, page_size) float32
    pos: np.ndarray  # (n_pages, page_size) int32
    k_scale: np.ndarray | None = None  # (n_pages, page_size) bf16 words, where K is int8
    v_scale: np.ndarray | None = None  # (n_pages, page_size)

    def fields(self):
        """name -> array, of those there are."""
        named = {field.name: getattr(self, field.name) for field in fields(Slab)}
        return {name: array for name, array in named.items() if array is not None}

    def entries(self, pages, rows):
        """Of the entries of consecutive pages (a slice) some consecutive rows (a slice): a Slab of views without the
        axis of pages."""
        return Slab(**{name: a[pages].reshape(-1, *a.shape[2:])[rows] for name, a in self.fields().items()})


def layout(page_size, head_dim, dtype):
    """name -> (shape of a page, its type), in the order in which the fields lie in a slab."""
    rows, each = (page_size, head_dim), (page_size,)
    scales = {"k_scale": (each, np.uint16), "v_scale": (each, np.uint16)} if dtype == "int8" else {}
    words = {"k": (rows, WORDS[dtype]), "v": (rows, WORDS[dtype])}
    return words | scales | {"log_size": (each, np.float32), "pos": (each, np.int32)}


def page_bytes(page_size, head_dim, dtype):
    """Bytes of one page."""
    fields = layout(page_size, head_dim, dtype).values()
    return sum(int(np.prod(shape)) * np.dtype(word).itemsize for shape, word in fields)


def slab_in(memory, n_pages, page_size, head_dim, dtype, make=Slab, **more):
    """The Slab, or what `make` makes with `more`, whose fields lie in memory (bytes,) uint8, of any backend."""
    arrays, lo = {}, 0
    for name, (shape, word) in layout(page_size, head_dim, dtype).items():
        hi = lo + n_pages * int(np.prod(shape)) * np.dtype(word).itemsize
        arrays[name] = memory[lo:hi].view(word).reshape(n_pages, *shape)
        lo = hi
    return make(**arrays, **more)


def anonymous(n_bytes):
    """A mapping of n_bytes zeros, of this process alone: what a child of it writes there is the child's. MemoryError
    where the system has none."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        return mmap.mmap(-1, n_bytes, **private)
    except OSError as error:
        raise MemoryError(f"the system has no {n_bytes} bytes left: {error.strerror}") from None


def new_slab(n_pages, page_size, head_dim, dtype):
    """A Slab in an anonymous mapping of its own: it goes back to the operating system when the last reference to it
    goes."""
    memory = np.frombuffer(anonymous(n_pages * page_bytes(page_size, head_dim, dtype)), np.uint8)
    return slab_in(memory, n_pages, page_size, head_dim, dtype)


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


def to_words(rows, dtype):
    """Float32 values of any backend as words of float16 or bfloat16, to nearest, ties to even; as they are of
    float32."""
    if dtype == "float16":
        return rows.astype(np.float16).view(np.uint16)
    return bf16_words(rows) if dtype == "bfloat16" else rows


def from_words(words, dtype):
    """The other way: float32."""
    if dtype == "float16":
        return words.view(np.float16).astype(np.float32)
    return from_bf16(words) if dtype == "bfloat16" else words


def to_int8(rows):
    """rows (n, d) float32 -> (n, d) int8, (n,) bf16 words."""
    words = bf16_words(np.abs(rows).max(axis=1) / np.float32(LARGEST))
    scale = from_bf16(words)[:, None]
    units = np.divide(rows, scale, out=np.zeros_like(rows), where=scale > 0)
    return np.clip(np.rint(units), -LARGEST, LARGEST).astype(np.int8), words


def from_int8(rows, scale):
    """The other way: (n, d) float32."""
    return rows * from_bf16(scale)[:, None]


def bf16_words(x):
    """Finite float32 values of any backend, rounded to nearest, ties to even -> uint16 words."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(words):
    """uint16 words of bf16 -> float32."""
    return (words.astype(np.uint32) << 16).view(np.float32)
