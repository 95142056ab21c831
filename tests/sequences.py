"""A sequence of random keys and values that is read and generated without a model."""

import numpy as np
from literal import FakeRope
from small_models import CLASSES_OF_14, bare_compressor, bare_model

from minillm.cache.kv_cache import KVCache
from minillm.cache.page_pool import PagePool
from minillm.compress.plan import Queries
from minillm.ops.numpy_ops import NUMPY as numpy_ops
from minillm.ops.pages import FLOAT32

F32 = np.float32


CONTENT = {  # what a model may put into its keys before it rotates them, (H, n, d)
    "text": lambda rng, shape: np.eye(shape[2])[rng.integers(0, shape[2], shape[:2])] + 0.2 * rng.normal(size=shape),
    "random": lambda rng, shape: rng.normal(size=shape),
    "equal": lambda rng, shape: np.ones(shape),
    "zero": lambda rng, shape: np.zeros(shape),
    "orthogonal": lambda rng, shape: np.broadcast_to(np.eye(*shape[1:]), shape),
}


class Sequence:
    """A model reduced to what its cache sees: random keys and values, and the steps of reading, of Model.decode and of
    recompressing."""

    def __init__(self, config, *, n_layers=2, n_heads=2, d=8, delimiters=0.12, keys="text", factor=1.0, seed=0):
        self.rng, self.delimiters, self.keys = np.random.default_rng(seed), delimiters, keys
        self.rope = FakeRope(d, factor=factor)
        self.pool = PagePool(numpy_ops, d, 8, 16 * 8 * FLOAT32.entry_bytes(d))
        self.cache = KVCache(self.pool, n_layers, n_heads)
        self.ids = []
        self.k = np.zeros((n_layers, n_heads, 0, d), F32)  # of every token there was, rotated
        self.v = np.zeros((n_layers, n_heads, 0, d), F32)
        self.asks = np.random.default_rng(seed + 1)
        shape = n_layers, 24, 2 * n_heads * d  # W_O of two query heads a KV head
        self.model = bare_model(self.rope, self.asks.normal(size=shape).astype(F32), n_heads)
        self.compressor = bare_compressor(config, self.model)

    def _queries(self, n):
        """Random ones, two query heads a KV head: (L, Hq, n, d)."""
        n_layers, n_heads, _, d = self.k.shape
        return self.asks.normal(size=(n_layers, 2 * n_heads, n, d)).astype(F32)

    def _note(self, n):
        """Random predicted scores of the n tokens that come next, where they are asked for."""
        if self.cache.left.predicted is not None:
            for noted, heads in zip(self.cache.left.predicted, self.cache.lengths, strict=True):
                noted.append(np.log(self.asks.random((len(heads), n), F32)))

    def _new(self, n):
        shape = (*self.k.shape[:2], n, self.k.shape[3])
        kinds = [self.keys] * shape[0] if isinstance(self.keys, str) else self.keys
        content = np.stack([CONTENT[kind](self.rng, shape[1:]) for kind in kinds])
        pos = np.arange(self.cache.seen, self.cache.seen + n)
        k, v = self.rope.rotated(content, pos).astype(F32), self.rng.normal(size=shape).astype(F32)
        if callable(self.delimiters):
            ids = [10 if self.delimiters(p) else int(self.rng.integers(0, 10)) for p in pos]
        else:
            some = self.rng.random(n) < self.delimiters
            ids = np.where(some, self.rng.integers(10, 14, n), self.rng.integers(0, 10, n)).tolist()
        self.k, self.v = np.concatenate([self.k, k], axis=2), np.concatenate([self.v, v], axis=2)
        self.ids += ids
        return k, v, pos, ids

    def read(self, n):
        cache = self.cache
        k, v, pos, ids = self._new(n)
        compression, q = self.compressor.begin(cache, ids), self._queries(n)
        self._note(n)
        for layer in range(len(k)):
            if compression:
                compression.store(layer, k[layer], v[layer], [Queries(q[layer], pos)])
            else:
                cache.append(layer, k[layer], v[layer], pos)
        compression.finish() if compression else cache.advance(ids)
        return self

    def generate(self, n):
        """One token at a time; yields True after those that brought a compression."""
        cache = self.cache
        k, v, pos, ids = self._new(n)
        for i in range(n):
            for layer in range(len(k)):
                cache.append(layer, k[layer, :, i : i + 1], v[layer, :, i : i + 1], pos[i : i + 1])
            cache.advance(ids[i : i + 1])
            self._note(1)
            if cache.left.queries is not None:
                cache.left.queries.append(self._queries(1)[:, :, 0])
            compression = None
            if self.compressor.due(cache):
                compression = self.compressor.begin(cache, [], generated=True)
                if compression:
                    for layer in range(len(k)):
                        compression.store(layer)
                    compression.finish()
            yield compression is not None

    def check_kept(self, share):
        """The entries of all layers and heads together are this share of the tokens seen, to the entry."""
        n_heads = self.cache.lengths.size
        assert self.cache.entries == self.cache.lengths.sum() == max(n_heads, round(share * self.cache.seen * n_heads))

    def check_entries(self, entries):
        """... are this number a head on average, or one for each token."""
        assert self.cache.entries == self.cache.lengths.sum() == self.cache.lengths.size * min(entries, self.cache.seen)

    def check_sizes(self):
        """No token was lost: the sizes of each head add up to the tokens seen."""
        for layer in range(len(self.k)):
            entries = self.cache.read(layer)
            sizes = np.split(np.exp(np.float64(entries.log_size)), np.cumsum(entries.lengths)[:-1])
            np.testing.assert_allclose([part.sum() for part in sizes], self.cache.seen, rtol=1e-4)

    def check_newest(self, n):
        """The newest n tokens are the last n entries of each head, bit for bit."""
        for layer, head in np.ndindex(self.cache.lengths.shape):
            k, v, log_size, pos = self.cache.layer(layer).read(head)
            newest = slice(self.cache.seen - n, self.cache.seen)
            assert pos[-n:].tolist() == list(range(newest.start, newest.stop))
            np.testing.assert_array_equal(k[-n:], self.k[layer, head, newest])
            np.testing.assert_array_equal(v[-n:], self.v[layer, head, newest])
            assert not log_size[-n:].any()

    def head_rows(self, layer, head, lo, hi, sinks, end):
        """Rows lo to hi as literal.make_layer wants them."""
        pos = np.arange(lo, hi)
        classes = CLASSES_OF_14[np.array(self.ids)[lo:hi]]
        protected = (pos < sinks) | (pos >= end)
        k, v = self.k[layer, head, lo:hi], self.v[layer, head, lo:hi]
        return {"k": k, "v": v, "size": np.ones(hi - lo), "pos": pos, "classes": classes, "protected": protected}


def positions(sequence, layer, head):
    return sequence.cache.layer(layer).read(head)[3].tolist()
