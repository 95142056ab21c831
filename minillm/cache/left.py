"""Left: what the compression of a cache leaves for the next one."""

from collections import deque
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np


@dataclass
class Left:
    """What a pass over a cache leaves for the next. A cache that nobody compresses has one that says nothing."""

    COUNTS = ("tail", "shift")  # whole numbers
    FLOATS = ("queries", "predicted", "scores", "thresholds")

    tail: int = 0  # the newest tokens, stored one entry each in every head, that no Plan has touched yet
    shift: int = 0  # how much lower the position of the next token is than the number of tokens seen
    queries: deque | None = None  # (L, Hq, d) of each token generated since the last pass, if the next one asks
    predicted: list | None = (
        None  # for each layer [(H, n)]: predicted scores of the tokens read since then, if it asks;
    )
    # arrays of the backend or, of generated tokens, of the host
    scores: list | None = None  # (E,) of each layer: what the last pass's entries scored, if the next one asks
    thresholds: np.ndarray | None = None  # (L,) float64 that the last pass came to (NaN: none), where it has such

    def copy(self):
        """The same for a fork: what is noted later is noted in one of the two."""
        queries = None if self.queries is None else self.queries.copy()
        predicted = None if self.predicted is None else [parts.copy() for parts in self.predicted]
        return replace(self, queries=queries, predicted=predicted)

    def note(self, queries, scores, b):
        """Note the token that sequence b of a batch has read, as far as the next pass asks.

        queries: rotated, L times (B, Hq, d); scores: predicted, L times (B, H)."""
        if self.queries is not None:
            self.queries.append(np.stack([q[b] for q in queries]))
        if self.predicted is not None:
            for parts, layer in zip(self.predicted, scores, strict=True):
                parts.append(layer[b][:, None])

    def noted(self, layer, ops):
        """(H, n) the predicted scores of a layer, an array of the backend `ops`."""
        parts = [part for part in self.predicted[layer] if part.shape[1]] or self.predicted[layer][:1]
        runs = [list(run) for _, run in groupby(parts, type)]
        runs = [ops.array(run[0] if len(run) == 1 else np.concatenate(run, axis=1)) for run in runs]
        return runs[0] if len(runs) == 1 else np.concatenate(runs, axis=1)

    def settle(self, shape, ops):
        """Nothing stored so far is asked about again. shape: (layers, KV heads)."""
        self.tail, self.scores, self.thresholds = 0, None, None
        if self.queries is not None:
            self.queries.clear()
        if self.predicted is not None:
            self.note_nothing(shape, ops)

    def note_nothing(self, shape, ops):
        """Predicted scores are noted from here on. shape: (layers, KV heads)."""
        nothing = ops.array(np.zeros((shape[1], 0), np.float32))
        self.predicted = [[nothing] for _ in range(shape[0])]

    # as plain arrays

    def arrays(self, shape, head_dim, ops):
        """name -> array on the host. shape: (layers, KV heads)."""
        found = {"tail": np.array(self.tail), "shift": np.array(self.shift)}
        if self.queries is not None:
            empty = np.zeros((0, shape[0], shape[1], head_dim), np.float32)
            found["queries"] = np.stack(list(self.queries)) if self.queries else empty
        if self.predicted is not None:
            found["predicted"] = np.stack([ops.host(self.noted(layer, ops)) for layer in range(shape[0])])
        if self.scores is not None:
            found["scores"] = np.concatenate([ops.host(scores) for scores in self.scores])
        if self.thresholds is not None:
            found["thresholds"] = self.thresholds.copy()
        return found

    @classmethod
    def of_arrays(cls, arrays, lengths, ops):
        """The other way. lengths (L, H): entries that scores may be of."""
        left = cls(int(arrays["tail"]), int(arrays["shift"]), thresholds=arrays.get("thresholds"))
        if "queries" in arrays:
            left.queries = deque(arrays["queries"])
        if "predicted" in arrays:
            left.predicted = [[noted] for noted in arrays["predicted"]]
        if "scores" in arrays:
            since = (int(lengths.sum()) - len(arrays["scores"])) // lengths.size
            scored = (lengths - since).sum(axis=1)
            left.scores = [ops.array(part) for part in np.split(arrays["scores"], np.cumsum(scored)[:-1])]
        return left

    @classmethod
    def fits(cls, arrays, lengths, head_dim):
        """Whether arrays of the right types fit one another and `lengths` (L, H) entries that are not settled."""
        tail, shift, seen = arrays["tail"], arrays["shift"], len(arrays["token_ids"])
        if not (0 <= tail <= min(lengths.min(), seen) and 0 <= shift <= seen):
            return False
        queries, predicted, scores, thresholds = map(arrays.get, cls.FLOATS)
        if not all(x is None or np.isfinite(x).all() for x in (queries, predicted, scores)):
            return False
        since = int(tail)  # tokens read since the last compression; with scores of its entries it is known how many
        if scores is not None:
            since, rest = divmod(int(lengths.sum()) - scores.size, lengths.size)
            if scores.ndim != 1 or rest or not 0 <= since <= tail or (queries is not None and since != len(queries)):
                return False
        return (
            (thresholds is None or thresholds.shape == lengths.shape[:1])
            and (queries is None or cls._queries_fit(queries, lengths.shape, head_dim, int(tail)))
            and (predicted is None or predicted.shape == (*lengths.shape, since))
        )

    @staticmethod
    def _queries_fit(queries, shape, head_dim, tail):
        if queries.ndim != 4 or queries.shape[1::2] != (shape[0], head_dim) or len(queries) > tail:
            return False
        return queries.shape[2] > 0 and queries.shape[2] % shape[1] == 0
