"""When a sequence is compressed, and which of its rows."""

from collections import deque

import numpy as np

from minillm.compress.compression import Compression
from minillm.compress.one_cut import OneCut
from minillm.compress.plan import SHORT
from minillm.errors import MinillmError

BLOCK_TOKENS = 2048  # of a prompt, read at a time where what is kept of a token is known as soon as it is read
MAX_OPEN = 256  # generated text without a delimiter is compressed all the same once it is this long


class Compressor:
    """Compresses the sequences of one model with one CacheConfig.

    classes (vocab,) uint8: DelimiterClass of each token id. scale, window: of the model's attention. worth (L, H)
    float32: what an entry is worth in each head, where a profile of the model says that."""

    def __init__(self, config, rope, ops, classes, scale=1.0, window=None, worth=None):
        self.config, self.rope, self.ops, self.classes = config, rope, ops, classes
        self.scale, self.window, self.worth = scale, window, worth
        self.outputs = {}  # layer -> Output

    @property
    def block_tokens(self):
        """Tokens of a prompt that are read and compressed at a time; None: all of them."""
        return BLOCK_TOKENS if self.config.foresees else None

    def due(self, cache):
        """Whether so much was generated that it is to be compressed."""
        config = self.config
        if not config.generates or config.recompress == 0 or cache.seen <= SHORT:
            return False
        return cache.tail - config.protect(cache.seen)[1] >= config.recompress

    def check_left(self, arrays, n_heads):
        """Raise ValueError where the arrays of a cache's `state` lack what this method's last compression must have
        left for the next one, or its queries are not those of n_heads heads."""
        config, cut = self.config, arrays["lengths"].sum() < arrays["lengths"].size * len(arrays["token_ids"])
        needed = {"scores"} if config.remembers and cut else set()
        if config.reads == "new" and config.generates and len(arrays["token_ids"]):
            needed.add("queries")
        if config.foresees and len(arrays["token_ids"]):
            needed.add("predicted")
        if missing := sorted(needed - arrays.keys()):
            raise ValueError(f"it lacks {missing[0]}")
        queries = arrays.get("queries")
        if queries is not None and len(queries) and queries.shape[2:3] != (n_heads,):
            raise ValueError("its queries are of another model")

    def begin(self, cache, new_ids, coming=0, generated=False):
        """The Compression that stores the layers of `new_ids`, read after what `cache` has seen; None where nothing is
        to be compressed. coming: tokens that will be read right after these and that the budget counts already.
        generated: no new ids, but those that were generated; of a method that settles, a chunk that no delimiter has
        ended yet is left alone."""
        config, seen = self.config, cache.seen + len(new_ids)
        asked, cache.queries = cache.queries, None
        self._foresee(cache)
        if config.reads == "new" and config.generates:
            cache.queries = deque(
                maxlen=None if config.adds_up else config.options.get("queries")
            )  # that are looked at
        if config.method == "full" or seen <= SHORT:
            return None
        sinks, window = config.protect(seen + coming)
        end = seen - window  # rows at positions before `end` are compressed
        classes = self.classes[np.concatenate([cache.token_ids, new_ids]).astype(np.int64)]
        if generated and config.spec.settles:
            delimiters = np.flatnonzero(classes[max(end - MAX_OPEN, 0) : end])
            closed = max(end - MAX_OPEN, 0) + int(delimiters[-1]) + 1 if len(delimiters) else 0
            if config.budget is None or sinks + seen - closed <= config.budget.per_head(seen) / 2:
                end = closed or end
        if end <= cache.seen - cache.tail and config.spec.settles:
            return None
        asked = asked if generated else None
        kind = Compression if config.allocation.layers else OneCut
        return kind(self, cache, new_ids, classes, sinks, end, coming, generated, asked)

    def _foresee(self, cache):
        """Have the predicted scores of what is read noted, where the method looks at them."""
        if not self.config.foresees:
            cache.predicted = None
        elif cache.predicted is None:
            if cache.seen:
                raise MinillmError("what this session holds was read without predicting scores: start a new session")
            n_layers, n_heads = cache.lengths.shape
            nothing = self.ops.array(np.zeros((n_heads, 0), np.float32))
            cache.predicted = [[nothing] for _ in range(n_layers)]
