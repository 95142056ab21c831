"""One pass over the layers of a sequence: rows in, entries out, a layer at a time."""

import functools
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minillm.compress.matching import ask, matched
from minillm.compress.plan import Budget, Layer, Ledger, Queries
from minillm.ops.numpy_planning import joined
from minillm.ops.pages import StoredRows


class Labels(NamedTuple):
    """What is known of rows without their keys and values, heads one after another."""

    size: np.ndarray  # (R,) float32 tokens each stands for
    pos: np.ndarray  # (R,) int32
    lengths: np.ndarray  # (H,), on the host


@dataclass(frozen=True)
class Pass:
    """What one pass over the layers compresses."""

    n_new: int  # tokens that are read in it, the last ones
    token_ids: np.ndarray  # (seen,) of all tokens, these among them
    budget: Budget | None  # of what comes after the settled entries
    sinks: int  # first tokens that stay
    end: int  # tokens from this number on stay
    coming: int = 0  # tokens that are read right after these, which the budget counts already
    generated: bool = False  # whether it is of tokens that were generated
    asked: deque | None = None  # (L, Hq, d) queries of each of these


class Compression:
    """One pass over the layers: `store` is called for each in turn, and `finish` after the last.

    Entries that an earlier pass made are settled where the method says so: they are not touched, unless the budget is a
    number of entries that they have used up. Rows are the tail (tokens stored one entry each), where nothing is settled
    all that is stored, and the new tokens."""

    def __init__(self, compressor, cache, part):
        self.compressor, self.recipe, self.config = compressor, compressor.recipe, compressor.config
        self.cache, self.part, self.ops = cache, part, compressor.ops
        self.seen = seen = len(part.token_ids)
        self.rotations = compressor.model.rotations(np.arange(seen - cache.left.shift), seen - cache.left.shift)
        n_layers, n_heads = cache.lengths.shape
        self.settled = cache.settled  # (L, H) entries that stay as they are
        if self.config.spec.settles:
            self.settled = cache.lengths - cache.left.tail
        budget = part.budget
        if budget is not None:
            total = budget.total(seen + part.coming - cache.settled_tokens, cache.lengths.size)
            left = total - int((self.settled - cache.settled).sum())
            if left < cache.lengths.size * (seen - part.end + 1):  # what passes settled uses it up: compress that again
                left, self.settled = total, cache.settled
        rows = (cache.lengths - self.settled + part.n_new).sum(axis=1)
        first = 0 if self.settled.any() else min(part.sinks, seen)
        self.ledger = None if budget is None else Ledger(left, rows.tolist(), n_heads * (seen - part.end + first))
        # What may be held beyond the targets before layers are cut again; what was generated is held already.
        self.slack = self._slack(rows.max()) if part.n_new else rows.sum()
        # Of each layer (E,) what its entries score, where the method scores; until it is stored, what the last
        # compression left them.
        last = cache.left
        self.scores = [None] * n_layers if last.scores is None else list(last.scores)
        self.thresholds = np.full(n_layers, np.nan) if last.thresholds is None else last.thresholds.copy()
        self.next_pos = {}  # of each layer whose Plan says so
        self.labels = {}  # of the entries of each layer stored
        self.new = None  # size, pos (H, n) and numbers (H,) of the new tokens
        self.prompt = None  # Labels of a first prompt's rows: alike in every layer
        self.matching = {}  # of each layer what it is asked, where the method fits entries to that
        self.attributes = None, {}  # the pos of the rows that came last, and what else a Layer says of them

    @property
    def reads(self):
        """What the method looks at beside keys and values (see CacheConfig.reads)."""
        return self.config.reads

    def _slack(self, a_layer):
        """A layer of so many rows, or a slab, of which no part can be given back."""
        return max(a_layer, self.cache.pool.slab_entries)

    def store(self, index, k=None, v=None, queries=(), hidden=None):
        """Compress the rows of layer `index`, its new keys and values k, v (H, n, d) among them, and write the result
        to the pages. queries: a list of Queries; hidden (n, dim): normed hidden states of the new tokens."""
        if self.part.asked:
            q = np.stack([q[index] for q in self.part.asked], axis=1)
            next_pos = self.seen - self.cache.left.shift
            queries = [Queries(q, np.arange(next_pos - q.shape[1], next_pos))]
        labels = self._labels(index, 0 if k is None else k.shape[1])
        queries = [some for some in queries if self.compressor.asked or not some.asks]
        layer = self._layer(index, labels, *self._rows(index, k, v), queries=queries, hidden=hidden)
        layer.history, layer.predicted = self._history(index, labels), self._take_predicted(index, labels)
        later = queries if self.reads == "again" else [some for some in queries if some.asks]
        if (n := self.config.options.get("match")) and later and not self.cache.settled_tokens:
            model = self.compressor.model
            self.matching[index] = ask(later, n, k, v, self.cache.layer(index), model.scale, model.blocks[index].window)
        self._put(layer, self.recipe.scores(layer), k, v)

    def _put(self, layer, scores, k, v):
        """Store a layer whose rows score so much, its new keys and values k, v among them."""
        if self.ledger is None:
            self._write(layer, scores, None)
            return
        targets = self.ledger.targets = self.recipe.targets(self.ledger, layer, scores)
        self._write(layer, scores, targets[layer.index])
        last = layer.index + 1 == len(self.cache.lengths)
        if last or sum(self.ledger.held) - sum(targets) > self.slack:
            self._cut_again(-np.inf if last else self.slack / 2)

    def _cut_again(self, excess):
        """Compress layers that hold more than their targets once more, those that hold most too much first, until all
        together hold at most `excess` too much."""
        held, targets = self.ledger.held, self.ledger.targets
        for earlier in np.argsort(np.subtract(targets, held), kind="stable").tolist():
            if held[earlier] <= targets[earlier] or sum(held) - sum(targets) <= excess:
                break
            layer = self._layer(earlier, self.labels[earlier], *self._rows(earlier))
            self._write(layer, self.scores[earlier], targets[earlier])

    def finish(self):
        """All layers are stored: the tokens count as read."""
        cache = self.cache
        for index, asked in self.matching.items():
            self._match(index, asked)
        cache.advance(self.part.token_ids[self.seen - self.part.n_new :], self.seen - self.part.end)
        cache.left.scores = self.scores if self.config.remembers else None
        cache.left.thresholds = None if np.isnan(self.thresholds).all() else self.thresholds
        if self.next_pos:
            cache.left.shift = self.seen - max(self.next_pos.values())

    def _write(self, layer, scores, target):
        plan = self.recipe.plan(layer, scores, target)
        self.cache.write(layer.index, plan.apply(layer), self.settled[layer.index])
        self.labels[layer.index] = Labels(plan.size, plan.pos, plan.lengths)
        if self.ledger is not None:
            self.ledger.held[layer.index : layer.index + 1] = [len(plan.size)]
        if scores is not None:
            self.scores[layer.index] = scores[plan.rows]
        self._note_threshold(layer.index, plan)
        if plan.next_pos is not None:
            self.next_pos[layer.index] = plan.next_pos

    def _note_threshold(self, index, plan):
        if plan.threshold is not None:
            self.thresholds[index] = plan.threshold

    def _match(self, index, asked):
        """Fit the entries of a layer to what it was asked."""
        start, model = self.settled[index], self.compressor.model
        entries = matched(self.cache.read(index, start), asked, self.ops, model.scale, model.blocks[index].window)
        self.cache.write(index, entries, start)

    def _labels(self, index, n):
        """The Labels of a layer's rows: its entries after those that are settled and, after those of each head, n new
        tokens."""
        cache, n_heads = self.cache, len(self.settled[index])
        lengths = cache.lengths[index] - self.settled[index]
        if self.new is None:
            pos = self.ops.array(np.arange(cache.position, cache.position + n, dtype=np.int32))
            ones = np.ones_like(pos, np.float32, shape=(n_heads, n))
            self.new = Labels(ones, np.tile(pos, (n_heads, 1)), np.full(n_heads, n))
        if not lengths.any():
            if self.prompt is None:
                self.prompt = Labels(self.new.size.ravel(), self.new.pos.ravel(), self.new.lengths)
            return self.prompt
        known = self.labels.get(index) or self._stored_labels(index)
        if not n:
            return known
        size, pos = joined(lengths, known.size, self.new.size), joined(lengths, known.pos, self.new.pos)
        return Labels(size, pos, lengths + n)

    def _stored_labels(self, index):
        """The Labels of a layer's entries after those that are settled."""
        log_size, pos = self.ops.read_labels(self.cache.layer(index), self.settled[index])
        return Labels(np.exp(log_size), pos, self.cache.lengths[index] - self.settled[index])

    def _rows(self, index, k=None, v=None):
        """The keys and values of the same rows; k, v (H, n, d): those of the new tokens. Or of several layers (a
        slice)."""
        past, start = self.cache.layer(index), self.settled[index].ravel()
        if k is not None and not (past.lengths - start).any():  # a first prompt: they are all there is
            return k.reshape(-1, k.shape[2]), v.reshape(-1, v.shape[2])
        return StoredRows(past, start, "k", k), StoredRows(past, start, "v", v)

    def _history(self, index, labels):
        """(R,) what an earlier pass left each row, 0 for the tokens after it; None where it left nothing."""
        if not self.config.remembers or self.scores[index] is None:
            return None
        n_heads = len(labels.lengths)
        n_new = (len(labels.pos) - len(self.scores[index])) // n_heads
        return self._scored(index, labels, self.ops.array(np.zeros((n_heads, n_new), np.float32)))

    def _take_predicted(self, index, labels):
        """(R,) what the profile predicted of each row when its token was read, which the cache notes no more then; None
        where the method does not ask."""
        if not self.config.predicts:
            return None
        noted = np.exp(self.cache.left.noted(index, self.ops))  # (H, tokens since the last compression)
        self.cache.left.predicted[index] = [noted[:, :0]]
        return self._scored(index, labels, noted)

    def _scored(self, index, labels, new):
        """(R,) the scores of the last compression's entries, and after those of each head `new` (H, n)."""
        if self.scores[index] is None:
            return new.ravel()
        return joined(labels.lengths - new.shape[1], self.scores[index], new)

    def _attributes(self, labels):
        """What a Layer says of its rows beside k, v and Labels: found once where the next layer's have the same pos."""
        if self.attributes[0] is not labels.pos:
            part, left = self.part, self.cache.left
            token = labels.pos + left.shift if left.shift else labels.pos
            protected = (labels.pos < part.sinks) | (token >= part.end)
            untouched = self.cache.seen - left.tail if left.shift else 0
            classes = self.compressor.classes[part.token_ids]
            find = functools.partial(_tokens_of, self.ops, part.token_ids, classes, labels.size, token, untouched)
            self.attributes = labels.pos, {"find_tokens": find, "protected": protected, "shared": {}}
        return self.attributes[1]

    def _layer(self, index, labels, k, v, **more):
        compressor, threshold = self.compressor, self.thresholds[index]
        block = compressor.model.blocks[index]
        cos, sin = self.rotations[block.rope]
        return Layer(
            index=index,
            k_rows=k,
            v_rows=v,
            **labels._asdict(),
            **self._attributes(labels),
            cos=cos,
            sin=sin,
            ops=self.ops,
            generated=self.part.generated,
            threshold=None if np.isnan(threshold) else float(threshold),
            worth=None if compressor.worth is None else compressor.worth[index],
            output=compressor.model.projections[index],
            block=block,
            scale=compressor.model.scale,
            attention_window=block.window,
            **more,
        )


def _tokens_of(ops, token_ids, classes, size, token, untouched):
    """(R,) the ids, and the classes, of the tokens number `token` (R,) of rows that no Plan has touched, none of them
    before `untouched`: what is older may have moved. token_ids, classes (seen,): of all tokens, on the host."""
    known = size == 1
    if untouched:
        known = known & (token >= untouched)
    of_rows = (ops.array(of_all)[token * known] for of_all in (token_ids, classes))
    return tuple(np.where(known, found, found.dtype.type(no)) for found, no in zip(of_rows, (-1, 0), strict=True))
