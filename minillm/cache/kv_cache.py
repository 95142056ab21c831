"""Who owns which page of key-value memory, how long each head is, and how many tokens were seen.

A page holds `page_size` entries of one KV head of one layer: K, V, log s, position. Heads keep different numbers of
entries and nothing is padded to the longest. `seen` (tokens read), `position` (of the next token; the same but where a
compression moves entries up) and `lengths` (entries stored) are three numbers. The cache knows nothing of compression
methods.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import numpy as np

from minillm.cache.left import Left
from minillm.cache.page_pool import PagePool
from minillm.ops.pages import StoredRows

VERSIONS = count()  # of page tables: no two caches ever have the same


@dataclass
class Entries:
    """Entries of one layer, heads one after another: E = lengths.sum() rows. Arrays of the backend, but for lengths."""

    k: np.ndarray  # (E, d) rotated at `pos`
    v: np.ndarray  # (E, d)
    log_size: np.ndarray  # (E,) float32; log of the number of tokens an entry stands for
    pos: np.ndarray  # (E,) int32
    lengths: np.ndarray  # (H,) entries of each head

    def on_host(self, ops):
        """The same in NumPy, k and v in float32."""
        k, v = (ops.host(ops.stored_rows(rows)) for rows in (self.k, self.v))
        return Entries(k, v, ops.host(self.log_size), ops.host(self.pos), self.lengths)


@dataclass
class PagedLayer:
    """What attention sees of one layer of one sequence: a table of pages and a length for each KV head."""

    pool: PagePool
    pages: np.ndarray  # (H, capacity) int32
    lengths: np.ndarray  # (H,)
    seen: int  # the position of the next token

    def runs(self, head, start=0):
        """The head's entries from `start` on, a stretch of consecutive pages at a time: name -> view of a field."""
        size, length = self.pool.page_size, int(self.lengths[head])
        pages = self.pages[head, start // size : -(-length // size)]
        base = start // size * size
        for slab, lo, hi, before in self.pool.runs(pages) if len(pages) else ():
            offset = base + before * size
            rows = slice(max(start - offset, 0), min(length - offset, (hi - lo) * size))
            yield slab.entries(slice(lo, hi), rows)

    def read(self, head, start=0):
        """k (m, d), v (m, d) float32, log_size (m,), pos (m,) of the head's entries from `start` on, m = length -
        start: copies, or a view where the pages lie together."""
        format, runs = self.pool.format, []
        for run in self.runs(head, start):
            run = {name: self.pool.ops.host(field) for name, field in run.items()}
            k, v = (format.rows(field, run, self.pool.head_dim) for field in "kv")
            runs.append((k, v, run["log_size"], run["pos"]))
        if not runs:
            empty = np.zeros((0, self.pool.head_dim), np.float32)
            return empty, empty, np.zeros(0, np.float32), np.zeros(0, np.int32)
        return runs[0] if len(runs) == 1 else tuple(np.concatenate(parts) for parts in zip(*runs, strict=True))


class KVCache:
    """The stored entries of one sequence.

    window: of the model's attention, where pages that no later token will see are to be given back: a cache whose
    entries are tokens, in their order. None: nothing is given back unasked.

    version: of the page tables. It is another one when they are, but for the page that `make_room` puts the new entry
    of a head into: who has a copy of them, and the lengths of that time, need not compare them."""

    def __init__(self, pool, n_layers, n_kv_heads, window=None):
        self.pool, self.window = pool, window
        self._pages = np.zeros((n_layers, n_kv_heads, 8), np.int32)
        self.version = next(VERSIONS)
        self.lengths = np.zeros((n_layers, n_kv_heads), np.int64)  # entries stored
        self.token_ids = []  # the tokens read
        self.left = Left()  # by the last compression, for the next one
        self.settled = np.zeros_like(self.lengths)  # (L, H) entries that no later compression touches
        self.settled_tokens = 0  # that they stand for
        pool.caches.add(self)

    @property
    def seen(self):
        """Tokens read."""
        return len(self.token_ids)

    @property
    def position(self):
        """Of the next token: `seen`, but where a compression has moved the entries up."""
        return self.seen - self.left.shift

    @property
    def tau(self):
        """The mean of the thresholds, or None."""
        return None if self.left.thresholds is None else float(np.nanmean(self.left.thresholds))

    def __del__(self):
        if hasattr(self, "lengths") and self.lengths.any():  # any thread may be the one that collects garbage
            self.pool.abandon(self)

    @property
    def pages(self):
        """(L, H, capacity) int32: the page tables, to be read. The first n_pages() of each head are meant."""
        tables = self._pages.view()
        tables.flags.writeable = False
        return tables

    def _new_pages(self):
        """The page tables, to be written."""
        self.version = next(VERSIONS)
        return self._pages

    def pages_moved(self, moved_to):
        """What each page id is from now on."""
        pages = self._new_pages()
        held = self._held()
        pages[held] = moved_to[pages[held]]

    def _held(self):
        """(L, H, capacity) bool: which of the page tables are meant."""
        return np.arange(self._pages.shape[2]) < self.n_pages()[:, :, None]

    @property
    def held_pages(self):
        """Page ids (n,), all different."""
        return self._pages[self._held()]

    @property
    def own_pages(self):
        """Pages behind the whole ones of what is settled that no fork holds as well."""
        settled = self.settled // self.pool.page_size
        behind = np.arange(self._pages.shape[2]) >= settled[:, :, None]
        return int((self.pool.refs[self._pages[self._held() & behind]] == 1).sum())

    def n_pages(self):
        """(L, H) pages each head holds."""
        return -(-self.lengths // self.pool.page_size)

    @property
    def bytes_in_use(self):
        """Bytes of the pages this sequence holds (a page shared with a fork counts in both)."""
        return int(self.n_pages().sum()) * self.pool.page_bytes

    @property
    def full_bytes(self):
        """Bytes of the pages that a full cache of the tokens seen would hold, in the backend's own type."""
        return self.lengths.size * -(-self.seen // self.pool.page_size) * self.pool.float_page_bytes

    @property
    def entries(self):
        return int(self.lengths.sum())

    @property
    def kept(self):
        """Entries stored / entries a full cache would hold."""
        return self.entries / (self.lengths.size * self.seen) if self.seen else 1.0

    @property
    def memory(self):
        """Bytes of the entries stored / bytes of those of a full cache in the backend's own type."""
        return self.kept * self.pool.page_bytes / self.pool.float_page_bytes

    def layer(self, index):
        """The PagedLayer of a layer, or of several (a slice), whose heads are taken for those of one."""
        pages = self.pages[index].reshape(-1, self.pages.shape[2])
        return PagedLayer(self.pool, pages, self.lengths[index].ravel(), self.position)

    def write(self, layer, entries, start=None):
        """Store Entries after the first `start` (H,) entries of each head (default: after all); what followed is
        given up."""
        start = self.lengths[layer].copy() if start is None else np.asarray(start, np.int64)
        for head, first in enumerate(start.tolist()):
            self._resize(layer, head, first, first + int(entries.lengths[head]))
        self.pool.ops.write_entries(self.layer(layer), start, entries)

    def rewrite(self, layers, start, dest, weights, entries):
        """The entries of some layers (a slice), after the first `start` (H,) of each of their heads, become sums of
        themselves where they lie: see ops.rewrite. entries: Entries, with neither k nor v."""
        shape = self.lengths[layers].shape
        self._make_own(layers, start.reshape(shape) // self.pool.page_size)
        self.pool.ops.rewrite(self.layer(layers), start, dest, weights, entries)
        self.cut((start + entries.lengths).reshape(shape), layers)

    def _make_own(self, layers, first):
        """Copies of the pages of some layers, from the first (n, H) of each head on, that forks hold as well."""
        number, held = np.arange(self._pages.shape[2]), self.n_pages()[layers]
        at = np.nonzero((number >= first[:, :, None]) & (number < held[:, :, None]))
        shared = self.pool.refs[self._pages[layers][at]] > 1
        if shared.any():
            at = tuple(part[shared] for part in at)
            table = self._new_pages()[layers]
            own = self.pool.alloc(len(at[0]))
            self.pool.copy_pages(table[at], own)
            self.pool.release(table[at])
            table[at] = own

    def _resize(self, layer, head, kept, length):
        """Give the head room for `length` entries, of which the first `kept` stay and the rest may be written."""
        size = self.pool.page_size
        held, needed, whole = -(-int(self.lengths[layer, head]) // size), -(-length // size), kept // size
        self._widen(needed)
        table = self._new_pages()[layer, head]
        if kept % size:
            self._own(table, whole)
        first_new = -(-kept // size)
        if held > first_new:
            self.lengths[layer, head] = kept  # what is released is held no more, should there be no memory for others
            self.pool.release(table[first_new:held])
        table[first_new:needed] = self.pool.alloc(max(needed - first_new, 0))
        self.lengths[layer, head] = length

    def _own(self, table, index):
        """A page that stays and is written must be this sequence's own: a fork may hold it too."""
        if self.pool.refs[table[index]] > 1:
            own = self.pool.alloc(1)
            self.pool.copy_pages(table[index : index + 1], own)
            self.pool.release(table[index : index + 1])
            table[index] = own[0]

    def _widen(self, n_pages):
        """Page tables for n_pages of each head."""
        n_layers, n_heads, capacity = self._pages.shape
        if n_pages > capacity:
            grown = np.zeros((n_layers, n_heads, max(n_pages, 2 * capacity)), np.int32)
            grown[:, :, :capacity] = self._pages
            self._pages = grown

    def append(self, layer, k, v, pos):
        """n tokens as one entry each in every head: k, v (H, n, d), pos (n,)."""
        n_heads, n, d = k.shape
        entries = Entries(
            k.reshape(-1, d),
            v.reshape(-1, d),
            np.zeros(n_heads * n, np.float32),
            np.tile(np.asarray(pos, np.int32), n_heads),
            np.full(n_heads, n),
        )
        self.write(layer, entries)

    def make_room(self):
        """One more entry in every head; what it is, is not written yet."""
        size = self.pool.page_size
        new = self.lengths % size == 0  # a page, of all heads at once: there may be thousands
        shared = ~new  # or one of its own, where a fork holds it too
        open_pages = np.take_along_axis(self._pages, (self.lengths // size * shared)[:, :, None], axis=2)[:, :, 0]
        shared[shared] = self.pool.refs[open_pages[shared]] > 1
        for layer, head in np.argwhere(shared):
            self._own(self._pages[layer, head], self.lengths[layer, head] // size)
        self._widen(int(self.lengths.max()) // size + 1)
        at = np.nonzero(new)
        self._pages[(*at, self.lengths[at] // size)] = self.pool.alloc(len(at[0]))
        self.lengths += 1

    def read(self, layer, start=None):
        """The Entries of a layer after the first `start` (H,) of each head (default: all of them)."""
        view, ops = self.layer(layer), self.pool.ops
        start = np.zeros_like(view.lengths) if start is None else start
        k, v = (ops.gather(StoredRows(view, start, field)) for field in ("k", "v"))
        return Entries(k, v, *ops.read_labels(view, start), view.lengths - start)

    def advance(self, token_ids, tail=None):
        """These tokens were read, every layer of them stored; `tail`: how many of the newest are untouched by any
        Plan now."""
        self.token_ids.extend(int(token) for token in token_ids)
        self.left.tail = self.left.tail + len(token_ids) if tail is None else tail
        self.forget()

    def settle(self):
        """No later compression touches what is stored now: forks share its pages for good."""
        self.settled, self.settled_tokens = self.lengths.copy(), self.seen
        self.left.settle(self.lengths.shape, self.pool.ops)

    def forget(self):
        """Give back the pages before the `window` newest entries of each head."""
        if self.window is None:
            return
        size, held = self.pool.page_size, self.n_pages()
        unseen = np.maximum(self.lengths - self.window, 0) // size
        for layer, head in np.argwhere(unseen):
            n, table = unseen[layer, head], self._new_pages()[layer, head, : held[layer, head]]
            self.pool.release(table[:n])
            table[:-n] = table[n:].copy()
        self.lengths -= unseen * size
        self.settled = np.maximum(self.settled - unseen * size, 0)
        self.left.tail = min(self.left.tail, int(self.lengths.min()))

    def cut(self, lengths, layers=slice(None)):
        """Give up what follows the first `lengths` (n, H) entries of each head of some layers."""
        lengths = np.minimum(lengths, self.lengths[layers])
        size, number = self.pool.page_size, np.arange(self._pages.shape[2])
        needed, held = -(-lengths // size), self.n_pages()[layers]
        gone = (number >= needed[:, :, None]) & (number < held[:, :, None])
        self.pool.release(self._new_pages()[layers][gone])
        self.lengths[layers] = lengths

    def clear(self):
        """Give every page back to the pool; nothing has been seen."""
        self.cut(np.zeros_like(self.lengths))
        self.token_ids, self.left = [], Left()
        self.settled, self.settled_tokens = np.zeros_like(self.lengths), 0

    def fork(self):
        """A second sequence with the same past: pages are shared until one of the two writes to them."""
        other = KVCache(self.pool, *self.lengths.shape, self.window)
        pages, lengths = self._pages.copy(), self.lengths.copy()
        other.token_ids, other.left = list(self.token_ids), self.left.copy()
        other.settled, other.settled_tokens = self.settled.copy(), self.settled_tokens
        self.pool.share(self.held_pages)
        other._pages, other.lengths = pages, lengths  # what it holds is counted first
        return other

    @contextmanager
    def undone_on_error(self):
        """What is done to this cache inside is undone where it ends by an exception, or is left (GeneratorExit)."""
        before = self.fork()
        try:
            yield
        except BaseException:
            self._swap(before)
            raise
        finally:
            before.clear()

    def take_up(self, other):
        """Hold what another cache of the same pool and model holds, as a fork of it does, in place of what it held."""
        fork = other.fork()
        self._swap(fork)
        fork.clear()

    def _swap(self, other):
        """Hold what the other holds, and the other what this one held."""
        for name in ("_pages", "lengths", "token_ids", "left", "settled", "settled_tokens"):
            here, there = getattr(self, name), getattr(other, name)
            setattr(self, name, there)
            setattr(other, name, here)
        self.version, other.version = next(VERSIONS), next(VERSIONS)
