"""When a sequence is compressed, and which of its rows."""

from collections import deque

import numpy as np

from minillm.compress.compression import Compression, Pass
from minillm.compress.one_cut import OneCut
from minillm.compress.plan import SHORT
from minillm.errors import MinillmError, UsageError

BLOCK_TOKENS = 2048  # of a prompt, read at a time where what is kept of a token is known as soon as it is read
MAX_OPEN = 256  # generated text without a delimiter is compressed all the same once it is this long


class Compressor:
    """Compresses sequences of one model by one Recipe.

    model: Model. classes (vocab,) uint8: DelimiterClass of each token id. worth (L, H) float32: what an entry is worth
    in each head, where a profile of the model says that. profile: the digest of it. asked: token ids of questions that
    a second reading of a text asks, too."""

    def __init__(self, recipe, model, classes, worth=None, profile=None, asked=()):
        self.recipe, self.config, self.model = recipe, recipe.config, model
        self.ops, self.classes, self.worth, self.profile = model.ops, classes, worth, profile
        self.asked = list(asked)

    @property
    def block_tokens(self):
        """Tokens of a prompt that are read and compressed at a time; None: all of them."""
        return BLOCK_TOKENS if self.config.predicts else None

    def due(self, cache):
        """Whether so much was generated that it is to be compressed."""
        config, since = self.config, cache.seen - cache.settled_tokens
        if not config.generates or config.recompress == 0 or since <= SHORT:
            return False
        return cache.left.tail - config.protect(since, self._budget(cache))[1] >= config.recompress

    def check_settles(self):
        """Raise UsageError where this method moves entries that a settled prefix is to keep."""
        if self.config.options.get("positions") == "cache":
            raise UsageError("positions=cache moves entries that a document is to keep: take positions=original")

    def check_left(self, arrays, n_heads):
        """Raise ValueError where the arrays of a cache's `state` lack what this method's last compression must have
        left for the next one, or its queries are not those of n_heads heads."""
        config, lengths, seen = self.config, arrays["lengths"] - arrays["settled"], len(arrays["token_ids"])
        cut = lengths.sum() < lengths.size * (seen - arrays["settled_tokens"])
        needed = {"scores"} if config.remembers and cut else set()
        if config.reads == "new" and config.generates and seen:
            needed.add("queries")
        if config.predicts and seen:
            needed.add("predicted")
        if missing := sorted(needed - arrays.keys()):
            raise ValueError(f"it lacks {missing[0]}")
        queries = arrays.get("queries")
        if queries is not None and len(queries) and queries.shape[2:3] != (n_heads,):
            raise ValueError("its queries are of another model")

    def begin(self, cache, new_ids, coming=0, generated=False):
        """The Compression that stores the layers of `new_ids`, read after what `cache` has seen; None where nothing is
        to be compressed.

        coming: tokens that will be read right after these, which the budget counts already. generated: compress tokens
        already generated (new_ids is empty). If the method settles entries, an unfinished chunk is left for later."""
        config, seen, before = self.config, cache.seen + len(new_ids), cache.settled_tokens
        asked, cache.left.queries = cache.left.queries, None
        self._note_predicted(cache)
        if config.reads == "new" and config.generates:  # so many are looked at
            cache.left.queries = deque(maxlen=None if config.adds_up else config.options.get("queries"))
        if config.method == "full" or seen - before <= SHORT:
            return None
        budget = self._budget(cache)
        sinks, window = config.protect(seen + coming - before, budget)
        end = max(seen - window, before)  # rows at positions before `end` are compressed
        token_ids = np.concatenate([cache.token_ids, new_ids]).astype(np.int64)
        if generated and config.spec.settles:
            closed = self._closed(token_ids, end)
            if budget is None or sinks + seen - closed <= budget.per_head(seen - before) / 2:
                end = closed or end
        if end <= cache.seen - cache.left.tail and config.spec.settles:
            return None
        kind = Compression if config.allocation.layers else OneCut
        sinks = 0 if before else sinks  # they are settled
        asked = asked if generated else None
        return kind(self, cache, Pass(len(new_ids), token_ids, budget, sinks, end, coming, generated, asked))

    def _budget(self, cache):
        """The Budget of what comes after the settled entries."""
        budget = self.config.budget
        return budget and budget.after(cache.settled)

    def _closed(self, token_ids, end):
        """Where the last chunk ended before `end`, or 0."""
        first = max(end - MAX_OPEN, 0)
        delimiters = np.flatnonzero(self.classes[token_ids[first:end]])
        return first + int(delimiters[-1]) + 1 if len(delimiters) else 0

    def _note_predicted(self, cache):
        """Have the predicted scores of what is read noted, where the method looks at them."""
        left = cache.left
        if not self.config.predicts:
            left.predicted = None
        elif left.predicted is None:
            if cache.seen > cache.settled_tokens:
                raise MinillmError("what this session holds was read without predicting scores: start a new session")
            left.note_nothing(cache.lengths.shape, self.ops)
