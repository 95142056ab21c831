"""Plan: what becomes of each row of a layer. Layer: what a method may look at. Budget and Ledger: how many entries a
sequence may keep, and the layers of one pass.

What there is of each row or entry is an array of the backend: NumPy's, on a GPU CuPy's, on which NumPy's functions run
as well; the two do not mix. What there is of each head is in NumPy."""

import functools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from minillm.cache.kv_cache import Entries
from minillm.output_projection import OutputProjection

SHORT = 128  # sequences up to this length are left whole: there is nothing to gain, and much to lose


@dataclass
class Queries:
    """Queries of one layer whose attention says what matters.

    lse: the log of each one's sum of exponentials, where the attention was computed: over all that it saw, the rows
    and, in a second reading of the text, what it had read of that. None: over the rows."""

    q: np.ndarray  # (Hq, m, d) rotated
    pos: np.ndarray  # (m,)
    lse: np.ndarray | None = None  # (Hq, m)
    asks: bool = False  # of questions about the text, not of the text itself


@dataclass(kw_only=True)
class Rows:
    """Rows that may be compressed, KV heads one after another (R rows in all): what one cut through several layers may
    look at, whose heads it takes for those of one.

    A row is a token that is stored as one entry, or an entry that an earlier Plan made."""

    protected: np.ndarray  # (R,) bool: sinks and window; they stay, and nothing joins them
    lengths: np.ndarray  # (H,) rows of each head, on the host
    ops: object  # the backend
    shared: dict = field(default_factory=dict)  # computed of them, alike in layers with rows of the same tokens

    @property
    def heads(self):
        """(R,) the KV head of each row."""
        return self.once("heads", lambda: self.ops.segment_ids(self.lengths))

    @property
    def n_protected(self):
        """(H,) rows of each head that are protected, on the host."""
        return self.once("n_protected", lambda: self.count(self.protected))

    @property
    def n_free(self):
        """(H,) rows of each head that are not protected, on the host."""
        return self.lengths - self.n_protected

    @property
    def free(self):
        """(F,) the rows that are not protected."""
        return self.once("free", lambda: self.ops.nonzero(~self.protected, int(self.n_free.sum())))

    def once(self, key, make):
        """What `make` makes of these rows, made once for all layers with rows of the same tokens."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def count(self, mask):
        """(H,) how many of each head's rows are true of mask (R,), on the host."""
        return self.ops.segment_count(mask, self.lengths)

    def of_heads(self, rows):
        """[(n, ...)] rows (R, ...) of each head."""
        return np.split(rows, np.cumsum(self.lengths)[:-1].tolist())


@dataclass(kw_only=True)
class Layer(Rows):
    """The rows of one layer."""

    index: int
    k_rows: object  # (R, d) rotated at pos: an array, or StoredRows, which stay where they are
    v_rows: object  # (R, d)
    size: np.ndarray  # (R,) float32, tokens each row stands for
    pos: np.ndarray  # (R,) int32
    find_tokens: Callable  # () -> (R,) token id of each row, -1 of one that is no single token; and its DelimiterClass
    cos: np.ndarray  # (seen, d/2) rotation of every position, on the host
    sin: np.ndarray
    queries: list[Queries] = field(default_factory=list)  # of the tokens read since the last compression
    hidden: object = None  # (n, dim) normed hidden states of the n new tokens, the last rows of every head
    generated: bool = False  # whether the new tokens were generated, not read
    history: np.ndarray | None = None  # (R,) float32: the score that an earlier compression left each row; new rows 0
    predicted: np.ndarray | None = None  # (R,) float32: the attention that the profile predicts each row to be worth
    threshold: float | None = None  # that an earlier compression came to
    worth: np.ndarray | None = None  # (H,) float32: what an entry of each head is worth, where a profile says that
    output: OutputProjection | None = None  # the layer's W_O
    block: object = None  # the weights of the layer: minillm.model.Block
    scale: float = 1.0  # of the logits
    attention_window: int | None = None  # the model's sliding window
    computed: dict = field(default_factory=dict)  # what was computed of k, v and queries, by what it was computed from

    @property
    def is_asked(self):
        """Whether some of the queries are of questions about the text."""
        return any(some.asks for some in self.queries)

    @property
    def classes(self):
        """(R,) uint8: the DelimiterClass of each row's token."""
        return self.once("tokens", self.find_tokens)[1]

    @property
    def token_ids(self):
        """(R,) the token id of each row; -1 of an entry that stands for several tokens, or whose token is not known."""
        return self.once("tokens", self.find_tokens)[0]

    @functools.cached_property
    def k(self):
        """(R, d) keys."""
        return self.ops.gather(self.k_rows)

    @functools.cached_property
    def v(self):
        """(R, d) values, in the same way."""
        return self.ops.gather(self.v_rows)

    @functools.cached_property
    def k_unrotated(self):
        """(R, d) keys with the rotation undone: what RoPE was applied to."""
        return self.ops.unrotated(self.k, self.pos, self.cos, self.sin)

    @functools.cached_property
    def values(self):
        """(R, d) float32: v, which a GPU has in 16 bits."""
        return self.ops.stored_rows(self.v)

    def window_scores(self, w):
        """(G, m, R) float32: the attention probabilities that the newest m <= w queries give to each row."""
        key = "window_scores", w
        if key not in self.computed:
            newest = self.queries[-1]
            self.computed[key] = self.ops.window_scores(
                *(newest.q[:, -w:], self.k, self.lengths, np.log(self.size), self.pos, newest.pos[-w:]),
                *(self.scale, self.attention_window),
            )
        return self.computed[key]

    def window_means(self, w):
        """(G, R) float32: the mean of the probabilities that the newest m <= w queries give to each row: window_scores
        where no more is wanted of them, and m times less to hold."""
        q, pos = self.queries[-1].q[:, -w:], self.queries[-1].pos[-w:]
        arguments = q, self.k, self.lengths, np.log(self.size), self.pos, pos, self.scale, self.attention_window
        return self.ops.column_scores(*arguments) / np.float32(len(pos))

    def output_norms(self, order):
        """(G, R) float32: |v W_O^h| of each row for the query heads of its group; order: "l1" or "l2"."""
        return self.output.norms(self.values, self.lengths, order)

    def column_scores(self, reduce, min_distance=0, asks=False):
        """(G, R) float32: the sum or the largest ("sum", "max") of the probabilities that all queries give to each row,
        those of the text or, if `asks`, of questions about it; only queries at least min_distance positions after it
        count."""
        rows = self.k, self.lengths, np.log(self.size), self.pos
        common = {"reduce": reduce, "min_distance": min_distance}
        parts = [
            self.ops.column_scores(x.q, *rows, x.pos, self.scale, self.attention_window, lse=x.lse, **common)
            for x in self.queries
            if x.asks == asks
        ]
        return functools.reduce(np.add if reduce == "sum" else np.maximum, parts)


class Into(NamedTuple):
    """Which rows become entries, and which they are joined by."""

    rows: np.ndarray  # (R,) int64: of a row that stays its own number, of one that joins another the other's, else -1
    threshold: float | None = None  # that the allocation came to, where it has one


@dataclass
class Plan:
    """Each row goes to one entry of its head, or to none: entry = sum of weight x row (idea 1 of the house).

    Keys of an entry with several rows are summed as they are stored, or (`unrotate`) with RoPE undone, and then
    rotated to the position of the entry. An entry with one row of weight 1 is that row, bit for bit."""

    dest: np.ndarray  # (R,) entry of the layer, heads one after another; -1: dropped
    weight: np.ndarray  # (R,) float32
    size: np.ndarray  # (E,) float32, tokens each entry stands for
    pos: np.ndarray  # (E,) int32
    lengths: np.ndarray  # (H,) entries of each head, on the host; the sum is E
    rows: np.ndarray  # (E,) the row that each entry goes back to
    unrotate: bool = False
    key_weight: np.ndarray | None = None  # (R,) float32 where keys are summed with other weights than values
    v: np.ndarray | None = None  # (R, d) values in place of the layer's
    next_pos: int | None = None  # position of the token that comes next, where it is not the number of tokens seen
    threshold: float | None = None  # that the method came to

    @classmethod
    def keep(cls, layer, kept):
        """The Plan of an eviction: rows with kept (R,) true stay as they are, the others are dropped."""
        lengths = layer.count(kept)
        rows, dest = layer.ops.compact(kept, int(lengths.sum()))
        return cls(dest, np.ones_like(layer.size), layer.size[rows], layer.pos[rows], lengths, rows)

    def apply(self, layer):
        """The Entries of the Plan."""
        ops, n = layer.ops, len(self.size)
        v = ops.merge(layer.v_rows if self.v is None else self.v, self.dest, self.weight, n)
        weight = self.weight if self.key_weight is None else self.key_weight
        if self.unrotate:
            k = ops.merge_unrotated(layer.k_rows, layer.pos, self.dest, weight, self.pos, layer.cos, layer.sin)
        else:
            k = ops.merge(layer.k_rows, self.dest, weight, n)
        return Entries(k, v, np.log(self.size), self.pos, self.lengths)

    def write(self, layer, cache, layers, start):
        """Into the pages of a KVCache, after the first `start` (H,) of each head of `layers` (a slice), which hold the
        layer's rows there."""
        if self.unrotate or self.v is not None:
            assert layers.stop == layers.start + 1
            cache.write(layers.start, self.apply(layer), start)
        else:
            weights = self.weight if self.key_weight is None else self.key_weight, self.weight
            cache.rewrite(
                layers, start, self.dest, weights, Entries(None, None, np.log(self.size), self.pos, self.lengths)
            )


@dataclass(frozen=True)
class Budget:
    """How much of a sequence is kept: a share of the tokens seen, or a number of entries; an average over (layer, KV
    head) that counts sinks and window in."""

    share: float | None = None
    entries: int | None = None

    def per_head(self, seen):
        """Average entries of a head after `seen` tokens (a float)."""
        wanted = self.share * seen if self.entries is None else self.entries
        return min(max(wanted, 1.0), float(seen))

    def after(self, settled):
        """The Budget of what comes after `settled` (L, H) entries: the same share, or what is left of a number of
        entries, but SHORT at least, which is left whole anyway."""
        if self.entries is None or not settled.any():
            return self
        return Budget(entries=max(self.entries - int(np.ceil(settled.mean())), SHORT))

    def total(self, seen, n_heads):
        """Entries of n_heads heads together, at least one each."""
        return max(n_heads, round(self.per_head(seen) * n_heads))

    def protect(self, seen, sinks, window):
        """(sinks, window) that may be protected after `seen` tokens: where they would take more than half of the
        budget, they get half of it, sinks first; without that a small budget would hold nothing but the newest
        tokens."""
        half = int(self.per_head(seen) / 2)
        if sinks + window <= half:
            return sinks, window
        sinks = min(sinks, max(half // 2, half - window))
        return sinks, min(window, half - sinks)


class Ledger:
    """What a rule needs to spread a budget over the layers of one pass, which come one after another.

    `targets` are the entries of the layers seen so far; a later layer may lower what an earlier one was given, and then
    that is compressed again. So whatever the rule, the total is met exactly, and no more is held than it and a layer
    or two."""

    def __init__(self, total, rows, protected=0):
        self.total = total  # entries of all layers together
        self.rows = list(rows)  # (L,) rows of each layer
        self.protected = protected  # rows of each layer that stay whatever happens
        self.targets = []
        self.held = []  # entries that each layer seen holds now
        self.weights = []  # of the layers seen, where a rule shares out in proportion
        self.pool = []  # of each layer seen the scores that may be kept, where a rule cuts through them
        self.counts = defaultdict(list)  # for a rung of a ladder, the entries it makes in the layers where it was tried
        self.rung = 0  # that the last layer came to

    @property
    def left(self):
        """Entries that the layers to come may make."""
        return self.total - sum(self.targets)

    @property
    def to_come(self):
        """Layers to come, the next one among them."""
        return len(self.rows) - len(self.targets)

    @property
    def room(self):
        """Entries of all layers together beside the protected ones."""
        return max(self.total - self.protected * len(self.rows), 0)

    def bounded(self, entries):
        """`entries` for the next layer, or what is nearest to it and leaves the layers after it no more than they
        have."""
        rows, *later = self.rows[len(self.targets) :]
        return max(self.left - sum(later), min(entries, rows, self.left if not later else rows))

    def forecast(self, rung, count):
        """Entries that the next layer and those after it will make at `rung` of a ladder, which makes `count` in the
        next: the others are taken to resemble the layers seen."""
        self.counts[rung].append(count)
        return count + (self.to_come - 1) * sum(self.counts[rung]) / len(self.counts[rung])

    def shared(self, weights):
        """Targets of the layers seen so far if all room is theirs, in proportion to `weights`. None gets more than it
        still holds: what an earlier cut took does not come back."""
        most = np.array([*self.held, self.rows[len(self.held)]]) - self.protected
        return (self.protected + split(self.room, weights, most)).tolist()

    def fixed(self, weights):
        """Targets of the layers seen so far and the next, where the `weights` (L,) of all are known from the start."""
        rows = np.array(self.rows) - self.protected
        return (self.protected + split(self.room, weights, rows)).tolist()[: len(self.targets) + 1]


def others(scores, kept):
    """Scores that put the rows `kept` (R,) behind all others."""
    return np.where(kept, scores.dtype.type(-np.inf), scores)


def split(total, weights, most):
    """Whole numbers in proportion to `weights` (n,), none above `most` (n,); their sum is `total`, or that of `most`
    where that is less. What a bound takes from one goes to the others; fractions by the largest remainder, of equal
    ones to the first."""
    weights, most = np.asarray(weights, np.float64), np.asarray(most, np.int64)
    total, given = min(int(total), int(most.sum())), np.zeros(len(most))
    open_ = most > 0
    while open_.any():
        w = np.where(open_, weights, 0.0)
        w = w if w.sum() > 0 else open_.astype(float)  # nobody weighs anything: all alike
        given[open_] = ((total - given[~open_].sum()) * w / w.sum())[open_]
        full = open_ & (given >= most)
        if not full.any():
            break
        given[full], open_ = most[full], open_ & ~full
    whole = np.floor(given + 1e-9).astype(np.int64)
    by_remainder = np.argsort(-np.round(given - whole, 9), kind="stable")  # equal where they are on paper
    by_remainder = by_remainder[whole[by_remainder] < most[by_remainder]]
    whole[by_remainder[: total - whole.sum()]] += 1
    return whole
