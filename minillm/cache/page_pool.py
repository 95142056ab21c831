"""Pages of key-value memory, in slabs that the operating system lends and takes back, and who counts on which."""

import weakref
from collections import deque

import numpy as np

from minillm.errors import MemoryLimit
from minillm.memory import return_freed_memory
from minillm.ops.pages import PAGE_SIZE, page_format

SLAB_BYTES = 8 << 20


class PagePool:
    """Slabs of pages, counted references to each page, and exact numbers of bytes. dtype: the name of their PageFormat,
    "auto" for the backend's own. limit: bytes that pages in use and promised may take; None: no limit.

    A pool is touched by one thread at a time, which the engine sees to; only `abandon` may be called by any.

    A page id is slab index x pages a slab + page within the slab. Pages are handed out lowest id first, so that the
    pages of a head written at once are consecutive."""

    def __init__(self, ops, head_dim, page_size=PAGE_SIZE, slab_bytes=SLAB_BYTES, dtype="auto", limit=None):
        self.ops, self.head_dim, self.page_size, self.format = ops, head_dim, page_size, page_format(dtype, ops)
        self.page_bytes = page_size * self.format.entry_bytes(head_dim)
        self.float_page_bytes = page_size * ops.page_format.entry_bytes(head_dim)  # of the backend's own format
        self.slab_pages = max(1, slab_bytes // self.page_bytes)
        self.slabs = []
        self.refs = np.zeros(0, np.int32)  # (pages held,) how many page tables hold each page
        self.first_free = 0  # no page before it is free
        self.caches = weakref.WeakSet()  # whose tables `trim` rewrites
        self.limit_pages = None if limit is None else limit // self.page_bytes
        self.promises = weakref.WeakKeyDictionary()  # KVCache -> pages of its own that it may come to hold
        self.abandoned = deque()  # caches that garbage collection took, in whatever thread

    @property
    def slab_entries(self):
        """Entries of a slab, which is what the operating system lends and takes back."""
        return self.slab_pages * self.page_size

    @property
    def bytes_in_use(self):
        return self.pages_in_use * self.page_bytes

    @property
    def pages_in_use(self):
        refs = self.refs.copy()
        for cache in list(self.abandoned):
            refs[cache.held_pages] -= 1
        return int(np.count_nonzero(refs))

    @property
    def bytes_held(self):
        return len(self.slabs) * self.slab_pages * self.page_bytes

    def alloc(self, n):
        """n page ids (n,) int32, each with one reference, in ascending order."""
        self._collect()
        free = self.first_free + np.flatnonzero(self.refs[self.first_free :] == 0)[:n]
        if len(free) < n:
            more, held = -(-(n - len(free)) // self.slab_pages), len(self.refs)
            new = [self.ops.new_slab(self.slab_pages, self.page_size, self.head_dim, self.format) for _ in range(more)]
            self.slabs += new
            self.refs = np.append(self.refs, np.zeros(more * self.slab_pages, np.int32))
            free = np.append(free, held + np.arange(n - len(free)))
        self.refs[free] = 1
        if n:
            self.first_free = int(free[-1]) + 1
        return free.astype(np.int32)

    def share(self, pages):
        """One more page table holds each of `pages` (all different)."""
        self.refs[pages] += 1

    def release(self, pages):
        """One page table fewer holds each of `pages` (all different)."""
        assert (self.refs[pages] > 0).all()
        self.refs[pages] -= 1
        self.first_free = min(self.first_free, int(pages.min(initial=self.first_free)))

    def abandon(self, cache):
        """A KVCache that nobody has any more: its pages go back when the pool is next touched by its owner."""
        self.abandoned.append(cache)

    def _collect(self):
        while self.abandoned:
            self.abandoned.popleft().clear()

    def check(self, n):
        """Raise MemoryLimit if n pages are more than this pool may ever have."""
        if self.limit_pages is not None and n > self.limit_pages:
            needed, limit = n * self.page_bytes, self.limit_pages * self.page_bytes
            raise MemoryLimit(
                f"this may take {needed} bytes of cache and the limit is {limit}: try a shorter prompt, a smaller "
                "max_tokens or budget, or a higher cache_limit",
                needed,
                limit,
            )

    def reserve(self, cache, n):
        """Promise a cache that it may come to hold n pages of its own. -> False where they do not fit beside the pages
        in use and what is promised to others, now; MemoryLimit where they never would."""
        if self.missing(cache, n):
            return False
        if self.limit_pages is not None:
            self.promises[cache] = n
        return True

    def missing(self, cache, n):
        """Pages that would have to come back before `reserve` makes that promise. MemoryLimit where it never would."""
        if self.limit_pages is None:
            return 0
        self.check(n)
        self._collect()
        mine = max(n - cache.own_pages, 0)
        others = sum(max(n - other.own_pages, 0) for other, n in list(self.promises.items()) if other is not cache)
        return max(self.pages_in_use + others + mine - self.limit_pages, 0)

    def unreserve(self, cache):
        """The promise to a cache is over; what it holds it keeps."""
        self.promises.pop(cache, None)

    def copy_pages(self, sources, targets):
        """Copy pages (n,) to others (n,), none of them among the first: all those of two slabs at once."""
        (a, i), (b, j) = np.divmod(sources, self.slab_pages), np.divmod(targets, self.slab_pages)
        for source, target in sorted({*zip(a.tolist(), b.tolist(), strict=True)}):
            some = (a == source) & (b == target)
            here, there = self.ops.array(i[some]), self.ops.array(j[some])
            copies, originals = self.slabs[target].fields, self.slabs[source].fields
            for name in copies:
                copies[name][there] = originals[name][here]

    def runs(self, pages):
        """Consecutive pages of one slab: (slab, first page, last page + 1, number of pages before) for each run."""
        pages, size, lo = pages.tolist(), self.slab_pages, 0
        for hi in range(1, len(pages) + 1):
            if hi == len(pages) or pages[hi] != pages[hi - 1] + 1 or pages[hi] % size == 0:
                slab, page = divmod(pages[lo], size)
                yield self.slabs[slab], page, page + hi - lo, lo
                lo = hi

    def trim(self):
        """Move the last pages into holes and give slabs that are empty then, and what else was freed, back to the
        operating system."""
        holders = self._holders()
        self._collect()
        used = np.flatnonzero(self.refs)
        n_slabs = -(-len(used) // self.slab_pages)
        if n_slabs < len(self.slabs) and self._known(holders):
            self._move(used[used >= len(used)], np.flatnonzero(self.refs[: len(used)] == 0), holders)
            self.refs = self.refs[: n_slabs * self.slab_pages].copy()
            self.first_free = 0
            del self.slabs[n_slabs:]
        self.ops.trim()
        return_freed_memory()

    def _move(self, sources, targets, holders):
        """Move pages to free ones, and tell every page table."""
        moved_to = np.arange(len(self.refs), dtype=np.int32)
        moved_to[sources] = targets
        self.copy_pages(sources, targets)
        self.refs[targets], self.refs[sources] = self.refs[sources], 0
        for cache in holders:
            cache.pages_moved(moved_to)

    def _holders(self):
        while True:
            try:
                return list(self.caches)
            except RuntimeError:  # another thread has made one meanwhile: it holds no page yet
                continue

    def _known(self, holders):
        """Whether every page is held by one of these: else garbage collection is at one that is not told any more."""
        counts = np.zeros_like(self.refs)
        for cache in holders:
            np.add.at(counts, cache.held_pages, 1)
        return (counts == self.refs).all()
