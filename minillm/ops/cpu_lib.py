"""The compiled library of kernels/cpu: finding it, choosing the processor's path, and the C structs as ctypes sees
them.

MINILLM_CPU names a path (portable, avx2, avx512, amx), or numpy for none of them; without it the best one there is is
taken.
"""

import ctypes
import functools
import mmap
import os
import threading
import weakref
from ctypes import POINTER, Structure, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import numpy as np

from minillm.architectures import BLOCK
from minillm.errors import UsageError
from minillm.ops.pages import anonymous

ARENA_BYTES = 64 << 20  # of address space: what is not written to takes no memory
PATHS = ("amx", "avx512", "avx2", "portable")  # best first
SLAB = ("k", "v", "k_scale", "v_scale", "log_size", "pos")  # fields that C knows, in the order of its Slab


class Matrix(Structure):
    _fields_ = [("kind", c_int32), ("n_out", c_int32), ("n_in", c_int32), ("unused", c_int32), ("data", c_void_p)]


class Product(Structure):
    _fields_ = [("w", Matrix), ("bias", c_void_p), ("y", c_void_p), ("head_dim", c_int64), ("add", c_int64)]


class Block(Structure):
    _fields_ = [
        *((part.field, Matrix if part.columns else c_void_p) for part in BLOCK),
        ("w_score", Matrix),
        ("b_score", c_void_p),
        *((name, c_int32) for name in ("rope", "window")),
        *((name, c_float) for name in ("linear", "cubic")),
    ]


class Model(Structure):
    _fields_ = [
        *(
            (name, c_int32)
            for name in ("n_layers", "n_heads", "n_kv_heads", "head_dim", "dim", "ffn_dim", "vocab_size")
        ),
        *((name, c_float) for name in ("eps", "scale", "embedding_scale")),
        ("blocks", POINTER(Block)),
        ("norm", c_void_p),
        ("embedding", Matrix),
        ("head", Matrix),
    ]


class Paged(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("slabs", "pages", "lengths")),
        *((name, c_int64) for name in ("capacity", "seen")),
        *((name, c_int32) for name in ("slab_pages", "page_size", "keys", "values")),
    ]


class PrefillAttention(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "out", "lse", "q_pos")),
        ("past", Paged),
        *((name, c_int32) for name in ("n", "m", "n_heads", "n_kv_heads", "head_dim", "window")),
        ("scale", c_float),
    ]


class DecodeAttention(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "out", "past")),
        *((name, c_int32) for name in ("batch", "n_heads", "n_kv_heads", "head_dim", "window", "unused")),
        ("scale", c_float),
    ]


class Scores(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "keys", "log_size", "lengths", "pos", "q_pos", "lse", "out")),
        *((name, c_int64) for name in ("n", "n_rows")),
        *((name, c_int32) for name in ("n_heads", "n_kv_heads", "head_dim", "window", "min_distance", "reduce")),
        ("scale", c_float),
    ]


class Nearest(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("rows", "others", "first", "last", "found", "product")),
        *((name, c_int64) for name in ("n", "m", "d")),
    ]


class StoredRows(Structure):
    _fields_ = [
        ("past", Paged),
        *((name, c_void_p) for name in ("start", "fresh")),
        *((name, c_int64) for name in ("n_heads", "n", "d", "values")),
    ]


class Merge(Structure):
    _fields_ = [
        ("rows", StoredRows),
        *((name, c_void_p) for name in ("dest", "weight", "out", "pos", "entry_pos", "cos", "sin")),
        *((name, c_int64) for name in ("n_rows", "n_entries")),
    ]


class Entries(Structure):
    _fields_ = [
        ("to", Paged),
        *((name, c_void_p) for name in ("k", "v", "log_size", "pos", "start", "lengths")),
        *((name, c_int64) for name in ("n_heads", "d")),
    ]


class Rewrite(Structure):
    _fields_ = [
        ("within", Paged),
        *((name, c_void_p) for name in ("start", "lengths", "dest", "key_weight", "value_weight", "log_size", "pos")),
        *((name, c_int64) for name in ("n_heads", "d")),
    ]


class Fold(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("scores", "size", "pos", "kept", "protected", "lengths")),
        *((name, c_void_p) for name in ("dest", "weight", "sizes", "rows")),
        *((name, c_int64) for name in ("n_segments", "reach")),
        ("counts", c_float),
    ]


class Segments(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("keys", "rows", "starts", "lengths", "pos", "cos", "sin")),
        *((name, c_int64) for name in ("d", "n_segments")),
    ]


_P, _N = c_void_p, c_int64
_SIGNATURES = {  # name -> (result, arguments)
    "trim": (None, []),
    "panels_bytes": (c_int64, [c_int, c_int, c_int]),
    "repack": (None, [c_int, c_int, c_int, _P, _P]),
    "rms_norm": (None, [_P, _P, c_float, _P, _N, _N]),
    "rope": (None, [_P, _P, _P, _P, _N, _N, _N]),
    "glu": (None, [_P, _P, _N, c_float, c_float]),
    "linear": (None, [POINTER(Product), c_int, _P, _N]),
    "rows": (None, [POINTER(Matrix), _P, _N, _P]),
    "prefill_attention": (None, [POINTER(PrefillAttention)]),
    "decode_attention": (None, [POINTER(DecodeAttention)]),
    "scores": (None, [POINTER(Scores)]),
    "merge": (None, [POINTER(Merge)]),
    "write_entries": (None, [POINTER(Entries)]),
    "rewrite": (None, [POINTER(Rewrite)]),
    "clusters": (None, [POINTER(Segments), _P, c_int, _P, _P, _P]),
    "unit_rows": (None, [_P, _N, _N, _P]),
    "segment_topk": (None, [_P, _P, _P, _N, _P]),
    "segment_count": (None, [_P, _P, _N, _P]),
    "compact": (None, [_P, _N, _P, _P]),
    "neighbours": (None, [_P, _P, _P, _N, _N, _P]),
    "fold": (None, [POINTER(Fold)]),
    "nearest": (None, [POINTER(Nearest)]),
    "stream": (c_double, [_P, _N]),
    "layer_attention": (None, [POINTER(Model), c_int, _P, _N, _P, _P, _P, POINTER(Paged), *[_P] * 6]),
    "layer_output": (c_int, [POINTER(Model), c_int, _P, _N, _P]),
    "logits": (None, [POINTER(Model), _P, _N, _P]),
    "decode": (c_int, [POINTER(Model), _P, _N, _P, _P, _P, POINTER(Paged), _P, _P, _P]),
}

_SETTINGS = {
    "set_threads": (c_int, [c_int]),
    "has_path": (c_int, [ctypes.c_char_p]),
    "use_path": (c_int, [ctypes.c_char_p]),
}


class Library:
    """The compiled library, which a process has once: its threads, its path and its scratch memory are everybody's.
    So it is called by one Python thread at a time, with the path and the threads that the caller wants. MemoryError
    where the system had no memory for a call; what it was to write is then undefined."""

    def __init__(self, file):
        library = ctypes.CDLL(str(file))
        self.missing = c_int64.in_dll(library, "minillm_missing")
        self._unlock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._unlock)  # the thread that holds the lock is not in the child
        self.functions = {}
        for name, (result, arguments) in (_SIGNATURES | _SETTINGS).items():
            function = self.functions[name] = getattr(library, f"minillm_{name}")
            function.restype, function.argtypes = result, arguments
        self.paths = [path for path in PATHS if self.functions["has_path"](path.encode())]
        self.path = self.threads = None  # that are set

    def _unlock(self):
        self.lock = threading.Lock()

    def call(self, function, path, threads, arguments):
        with self.lock:
            if path != self.path:
                self.functions["use_path"](path.encode())
                self.path = path
            if threads != self.threads:
                self.functions["set_threads"](threads)
                self.threads = threads
            result = function(*arguments)
            if n_bytes := self.missing.value:
                self.missing.value = 0
                raise MemoryError(f"the system has no {n_bytes} bytes left")
            return result


class Kernels:
    """The functions of the library as attributes, without their prefix, on one path and with so many threads."""

    def __init__(self, path, threads=None):
        self.library, self.path = library(), path
        self.threads = processors() if threads is None else max(1, threads)
        for name in _SIGNATURES:
            setattr(self, name, self._call(name))

    def _call(self, name):
        function = self.library.functions[name]
        return lambda *arguments: self.library.call(function, self.path, self.threads, arguments)


def processors():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@functools.cache
def library():
    """The Library, or None where it was not built."""
    files = [f for f in sorted(Path(__file__).parent.glob("_cpu.*")) if f.suffix in (".so", ".dylib")]
    return Library(files[0]) if files else None


def available_paths():
    """Names of the paths this processor and this build can take, best first."""
    return library().paths if library() else []


def choose_path():
    """The path that MINILLM_CPU names, or the best there is; "numpy" where the library is not there and nothing was
    asked for. UsageError if what was asked for cannot be had."""
    name, paths = os.environ.get("MINILLM_CPU") or None, available_paths()
    if name is not None and name not in ("numpy", *paths):
        there = ", ".join(["numpy", *reversed(paths)])
        raise UsageError(
            f"MINILLM_CPU={name} cannot be had on this machine: set it to one of {there}, or leave it unset"
        )
    return name or next(iter(paths), "numpy")


_arena, _used = None, 0  # a weak reference to the newest arena; how many of its bytes are taken


def huge_pages(nbytes):
    """Zeros (nbytes,) uint8, aligned to 64 bytes, in an arena of huge pages where the system has those: to be given
    memory 4 KiB at a time takes longer than to lay a weight out in it. An arena goes back with the last array in it."""
    global _arena, _used
    whole = _arena and _arena()
    if whole is None or nbytes > len(whole) - _used:
        mapping = anonymous(max(nbytes, ARENA_BYTES))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(mapping, np.uint8)
        _arena, _used = weakref.ref(whole), 0
    array = whole[_used : _used + nbytes]
    _used += -(-nbytes // 64) * 64
    return array


def pointer(array):
    """The address of a contiguous array; None (NULL) for None. It does not keep the array: give the array a name until
    the call has returned."""
    if array is None:
        return None
    assert array.flags.c_contiguous
    return array.ctypes.data


def floats(array):
    """`array` as contiguous float32: itself if it is."""
    return np.ascontiguousarray(array, np.float32)


def whole(array):
    """`array` as contiguous int64: itself if it is."""
    return np.ascontiguousarray(array, np.int64)


def pointing(arrays):
    """name -> pointer of arrays by name, which must stay where they are until the call has returned."""
    return {name: pointer(array) for name, array in arrays.items()}


def paged(layer, slabs):
    """The PagedLayer as a C struct; `slabs`: slab_table of its pool, kept alive by the caller."""
    pages, pool = layer.pages, layer.pool
    assert pages.dtype == np.int32 and layer.lengths.dtype == np.int64
    return Paged(
        slabs=pointer(slabs),
        pages=pointer(pages),
        lengths=pointer(layer.lengths),
        capacity=pages.shape[-1],
        seen=layer.seen,
        slab_pages=pool.slab_pages,
        page_size=pool.page_size,
        keys=pool.format.k.kind,
        values=pool.format.v.kind,
    )


def slab_table(pool):
    """(slabs, 6) uint64: the addresses of the fields of C's Slab, 0 for one that the format does not have. Made anew
    for every call: slabs come and go."""
    addresses = [[pointer(slab.fields.get(name)) or 0 for name in SLAB] for slab in pool.slabs]
    return np.array(addresses, np.uint64).reshape(-1, len(SLAB))
