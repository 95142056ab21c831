"""When a sequence is compressed, and which of its rows: the step between fresh keys and values and the pages they end
in.

Entries that an earlier Plan made are settled: they are not touched again, unless the budget is a number of entries
that the settled ones have already used up. What a Plan decides about is the tail (tokens stored one entry each) and
the new tokens."""

import numpy as np

from minillm.cache import Entries
from minillm.compress.plan import SHORT, Layer, Ledger

MAX_OPEN = 256  # generated text without a delimiter is compressed all the same once it is this long


class Compressor:
    """Compresses the sequences of one model with one CacheConfig.

    classes (vocab,) uint8: DelimiterClass of each token id."""

    def __init__(self, config, rope, ops, classes):
        self.config, self.rope, self.ops, self.classes = config, rope, ops, classes

    def due(self, cache):
        """Whether so much was generated that its closed chunks are to be compressed."""
        config = self.config
        return config.method != "full" and 0 < config.recompress <= cache.tail - config.window

    def begin(self, cache, new_ids, closed_only=False):
        """The Compression that stores the layers of `new_ids`, read after what `cache` has seen; None where nothing
        is to be compressed. closed_only: leave a chunk that no delimiter has ended yet."""
        config, seen = self.config, cache.seen + len(new_ids)
        if config.method == "full" or seen <= SHORT:
            return None
        sinks, window = config.sinks, config.window
        if config.budget is not None:
            sinks, window = config.budget.protect(seen, sinks, window)
        end = seen - window  # rows at positions before `end` are compressed
        classes = self.classes[np.concatenate([cache.token_ids, new_ids]).astype(np.int64)]
        if closed_only:
            delimiters = np.flatnonzero(classes[max(end - MAX_OPEN, 0) : end])
            closed = max(end - MAX_OPEN, 0) + int(delimiters[-1]) + 1 if len(delimiters) else 0
            if config.budget is None or sinks + seen - closed <= config.budget.per_head(seen) / 2:
                end = closed or end
        if end <= cache.seen - cache.tail:
            return None
        return Compression(self, cache, classes, seen, sinks, end)


class Compression:
    """One pass over the layers: `store` is called for each in turn."""

    def __init__(self, compressor, cache, classes, seen, sinks, end):
        self.config, self.ops, self.cache = compressor.config, compressor.ops, cache
        self.classes, self.seen, self.sinks, self.end = classes, seen, sinks, end
        self.cos, self.sin = compressor.rope.tables(np.arange(seen), seen)
        self.tail = seen - end  # the tail of the cache when all layers are stored
        self.settled = cache.lengths - cache.tail  # (L, H) entries that stay as they are
        self.ledger = None
        if self.config.budget is not None:
            left = self.config.budget.total(seen, self.settled.size) - int(self.settled.sum())
            if left < self.settled.size * (self.tail + 1):  # the settled entries use it up: they are compressed again
                left += int(self.settled.sum())
                self.settled = np.zeros_like(self.settled)
            rows = cache.lengths - self.settled + (seen - cache.seen)
            self.ledger = Ledger(left, rows.sum(axis=1).tolist())

    def store(self, index, k=None, v=None):
        """Compress the tail of layer `index` and its new keys and values k, v (H, n, d), and write the result to the
        pages."""
        settled = self.settled[index]
        entries = self._compressed(index, self._rows(index, settled, k, v))
        self.cache.write(index, entries, settled)

    def _rows(self, index, settled, k, v):
        """The Entries after the first `settled` of each head, followed by the new tokens."""
        cache = self.cache
        n_heads, d = cache.lengths.shape[1], cache.pool.head_dim
        n = 0 if k is None else k.shape[1]
        old = cache.read(index, settled)
        new_pos = np.arange(cache.seen, cache.seen + n, dtype=np.int32)
        if not len(old.pos):  # a first prompt: nothing is copied
            k, v = k.reshape(-1, d), v.reshape(-1, d)
            return Entries(k, v, np.zeros(n_heads * n, np.float32), np.tile(new_pos, n_heads), np.full(n_heads, n))
        if not n:
            return old
        parts = np.split(np.arange(len(old.pos)), np.cumsum(old.lengths)[:-1])
        new = (k, v, np.zeros((n_heads, n), np.float32), np.broadcast_to(new_pos, (n_heads, n)))

        def joined(a, b):
            return np.concatenate([x for head, rows in enumerate(parts) for x in (a[rows], b[head])])

        columns = map(joined, (old.k, old.v, old.log_size, old.pos), new)
        return Entries(*columns, old.lengths + n)

    def _compressed(self, index, rows):
        layer = Layer(
            index,
            rows.k,
            rows.v,
            np.exp(rows.log_size),
            rows.pos,
            np.where(rows.log_size > 0, 0, self.classes[rows.pos]).astype(np.uint8),
            (rows.pos < self.sinks) | (rows.pos >= self.end),
            rows.lengths,
            self.cos,
            self.sin,
            self.ops,
        )
        plan = self.config.plan(layer, self.ledger)
        if self.ledger:
            self.ledger.spend(len(plan.size))
        return plan.apply(layer)
