"""Pages of the compiled backend: K and V in bf16 words or in 8 bits, and the tables by which C finds them."""

import numpy as np

from minillm.ops import cpu_lib
from minillm.ops.cpu_lib import KINDS, pointer
from minillm.ops.pages import from_int8

CACHE_DTYPE = "bfloat16"  # of K and V in pages

_lib = cpu_lib.library()


def stored_rows(stored, scale=None):
    """Rows of K or V as a slab has them, with their scales (n,) where they are int8 -> float32 (n, d); a view if they
    are float32."""
    if scale is not None:
        return from_int8(stored, scale)
    if stored.dtype != np.uint16:
        return stored
    out = np.empty(stored.shape, np.float32)
    _lib.bf16_to(pointer(stored), stored.size, pointer(out))
    return out


def paged(layer, slabs):
    """The PagedLayer as a C struct; `slabs`: slab_table of its pool, kept alive by the caller."""
    pages, pool = layer.pages, layer.pool
    assert pages.dtype == np.int32 and layer.lengths.dtype == np.int64
    return cpu_lib.Paged(
        pointer(slabs),
        pointer(pages),
        pointer(layer.lengths),
        pages.shape[-1],
        layer.seen,
        pool.slab_pages,
        pool.page_size,
        KINDS[pool.dtype],
        0,
    )


def slab_table(pool):
    """(slabs, 6) uint64: the addresses of the fields of a Slab, 0 for one that is not there. Made anew for every call:
    slabs come and go."""
    addresses = [[0 if a is None else a.ctypes.data for a in vars(slab).values()] for slab in pool.slabs]
    return np.array(addresses, np.uint64).reshape(-1, 6)
