"""Pages of the compiled backend: K and V in bf16 words, and the tables by which C finds them."""

import mmap

import numpy as np

from minillm.ops import cpu_lib
from minillm.ops.cpu_lib import pointer
from minillm.ops.numpy_ops import Slab

CACHE_DTYPE = "bfloat16"  # of K and V in pages

_lib = cpu_lib.library()


def page_bytes(page_size, head_dim):
    """Bytes of one page: K and V in bf16, log s in float32, position in int32."""
    return page_size * (2 * head_dim * 2 + 4 + 4)


def new_slab(n_pages, page_size, head_dim):
    """A Slab whose k and v are bf16 words: half the bytes that a decode step reads. An anonymous mapping of its own: it
    goes back to the operating system when the last reference to it goes."""
    n = n_pages * page_size
    words = np.frombuffer(mmap.mmap(-1, n_pages * page_bytes(page_size, head_dim)), np.uint16)
    k, v, log_size, pos = np.split(words, np.cumsum([n * head_dim, n * head_dim, 2 * n]))
    return Slab(
        k.reshape(n_pages, page_size, head_dim),
        v.reshape(n_pages, page_size, head_dim),
        log_size.view(np.float32).reshape(n_pages, page_size),
        pos.view(np.int32).reshape(n_pages, page_size),
    )


def stored_rows(stored):
    """Entries' k or v, a view of a slab -> float32 (n, d); a view if the slab is float32."""
    if stored.dtype != np.uint16:
        return stored
    out = np.empty(stored.shape, np.float32)
    _lib.bf16_to(pointer(stored), stored.size, pointer(out))
    return out


def paged(layer, slabs):
    """The PagedLayer as a C struct; `slabs`: slab_table of its pool, kept alive by the caller."""
    pages, pool = layer.pages, layer.pool
    assert pages.dtype == np.int32 and layer.lengths.dtype == np.int64
    bf16 = bool(pool.slabs) and pool.slabs[0].k.dtype == np.uint16
    return cpu_lib.Paged(
        pointer(slabs),
        pointer(pages),
        pointer(layer.lengths),
        pages.shape[-1],
        layer.seen,
        pool.slab_pages,
        pool.page_size,
        bf16,
        0,
    )


def slab_table(pool):
    """(slabs, 4) uint64: addresses of k, v, log_size and pos. Made anew for every call: slabs come and go."""
    return np.array([[field.ctypes.data for field in vars(slab).values()] for slab in pool.slabs], np.uint64).reshape(
        -1, 4
    )
