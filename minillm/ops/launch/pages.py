"""The pages of a cache: entries in and out, page tables."""

from dataclasses import dataclass

from minillm.ops.launch.start import blocks, blocks_of_rows, page_defines, run
from minillm.ops.pages import PageFormat


@dataclass
class Paged:
    """The stored entries of one layer of B sequences, as kernels/cuda/pages.cuh reads them: device arrays."""

    format: PageFormat  # of K and V
    slabs: object  # (slabs,) uint64 addresses
    slab_pages: int  # pages a slab
    pages: object  # (B, H, capacity) int32 page ids; a row holds the pages of a head, the first of them are meant
    lengths: object  # (B, H) int32 entries of each head
    seen: object  # (B,) int32 tokens seen before the new ones: the position of the first of them
    memory: object = None  # of the slabs, where no pool holds it

    def arguments(self):
        return {
            "slabs": self.slabs,
            "slab_pages": self.slab_pages,
            "pages": self.pages,
            "capacity": self.pages.shape[2],
            "lengths": self.lengths,
        }


def write_entries(device, k, v, log_size, pos, past, first, start, real16):
    """The entries of a layer, heads one after another (rows first[h] : first[h + 1]; first (H + 1,) int32), into the
    pages of `past` (Paged, B = 1) from entry start[h] on."""
    n, d = k.shape
    assert v.shape == k.shape and log_size.shape == pos.shape == (n,)
    arguments = {"k": k, "v": v, "log_size": log_size, "pos": pos}
    _entries(device, "write_entries", arguments, n, past, first, start, d, real16)


def read_entries(device, past, first, start, d, real16, *, k=None, v=None, log_size=None, pos=None):
    """The other way: out of the pages, into those of the arrays that are given."""
    arguments = {"k": k, "v": v, "log_size": log_size, "pos": pos}
    (n,) = {len(array) for array in arguments.values() if array is not None}
    _entries(device, "read_entries", arguments, n, past, first, start, d, real16)


def _entries(device, kernel, arguments, n, past, first, start, d, real16):
    n_kv_heads = past.lengths.shape[1]
    assert past.lengths.shape[0] == 1 and first.shape == (n_kv_heads + 1,) and start.shape == (n_kv_heads,)
    arguments |= {"first": first, "start": start} | past.arguments() | {"n_kv_heads": n_kv_heads, "n_rows": n}
    del arguments["lengths"]
    defines = page_defines(d, real16, past.format)
    run(device, "entries", kernel, (blocks_of_rows(n, d),), (256,), arguments, defines=defines)


def last_pages(device, pages, lengths, last):
    """pages (L, B, H, capacity): the page of entry lengths - 1 of each head becomes last; both (L, B, H) int32."""
    assert pages.shape[:3] == lengths.shape == last.shape
    arguments = {"pages": pages, "lengths": lengths, "last_pages": last, "capacity": pages.shape[3]}
    arguments["n_heads"] = lengths.size
    run(device, "last_pages", "last_pages", (blocks(lengths.size, 256),), (256,), arguments)
