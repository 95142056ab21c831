"""The tables by which C finds pages."""

import numpy as np

from minillm.ops import cpu_lib
from minillm.ops.cpu_lib import KINDS, pointer


def paged(layer, slabs):
    """The PagedLayer as a C struct; `slabs`: slab_table of its pool, kept alive by the caller."""
    pages, pool = layer.pages, layer.pool
    assert pages.dtype == np.int32 and layer.lengths.dtype == np.int64
    return cpu_lib.Paged(
        slabs=pointer(slabs),
        pages=pointer(pages),
        lengths=pointer(layer.lengths),
        capacity=pages.shape[-1],
        seen=layer.seen,
        slab_pages=pool.slab_pages,
        page_size=pool.page_size,
        kind=KINDS[pool.dtype],
    )


def slab_table(pool):
    """(slabs, 6) uint64: the addresses of the fields of a Slab, 0 for one that is not there. Made anew for every call:
    slabs come and go."""
    addresses = [[0 if a is None else a.ctypes.data for a in vars(slab).values()] for slab in pool.slabs]
    return np.array(addresses, np.uint64).reshape(-1, 6)
