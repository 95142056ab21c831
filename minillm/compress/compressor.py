"""When a sequence is compressed, and which of its rows: the step between fresh keys and values and the pages they end
in."""

import functools
from collections import deque
from typing import NamedTuple

import numpy as np

from minillm.compress.allocate import stay
from minillm.compress.ledger import Ledger
from minillm.compress.output import Output
from minillm.compress.plan import SHORT, Layer, Queries
from minillm.errors import MinillmError
from minillm.ops.numpy_planning import joined
from minillm.ops.pages import StoredRows

BLOCK_TOKENS = 2048  # of a prompt, read at a time where what is kept of a token is known as soon as it is read
PART = 32768  # rows that are merged at a time, if they are of several layers
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


class Labels(NamedTuple):
    """What is known of rows without their keys and values, heads one after another."""

    size: np.ndarray  # (R,) float32 tokens each stands for
    pos: np.ndarray  # (R,) int32
    lengths: np.ndarray  # (H,), on the host


class Compression:
    """One pass over the layers: `store` is called for each in turn, and `finish` after the last.

    Entries that an earlier pass made are settled where the method says so: they are not touched, unless the budget is a
    number of entries that they have used up. Rows are the tail (tokens stored one entry each), where nothing is settled
    all that is stored, and the new tokens."""

    def __init__(self, compressor, cache, new_ids, classes, sinks, end, coming=0, generated=False, asked=None):
        self.config, self.compressor, self.cache, self.new_ids = compressor.config, compressor, cache, new_ids
        self.ops, self.sinks, self.end = compressor.ops, sinks, end
        self.classes = compressor.ops.array(classes)
        self.seen = seen = len(classes)
        self.generated = generated
        self.cos, self.sin = compressor.rope.tables(np.arange(seen - cache.shift), seen - cache.shift)
        n_layers, n_heads = cache.lengths.shape
        self.settled = np.zeros_like(cache.lengths)  # (L, H) entries that stay as they are
        if self.config.spec.settles:
            self.settled = cache.lengths - cache.tail
        budget = self.config.budget
        if budget is not None:
            total = budget.total(seen + coming, cache.lengths.size)
            left = total - int(self.settled.sum())
            if left < cache.lengths.size * (seen - end + 1):  # the settled entries use it up: they are compressed again
                left, self.settled = total, np.zeros_like(self.settled)
        rows = (cache.lengths - self.settled + len(new_ids)).sum(axis=1)
        first = 0 if self.settled.any() else min(sinks, seen)
        self.ledger = None if budget is None else Ledger(left, rows.tolist(), n_heads * (seen - end + first))
        # What may be held beyond the targets before layers are cut again; what was generated is held already.
        self.slack = self._slack(rows.max()) if len(new_ids) else rows.sum()
        self.asked = asked  # [(L, Hq, d)] queries of the tokens generated
        # Of each layer (E,) what its entries score, where the method scores; until it is stored, what the last
        # compression left them.
        self.scores = [None] * n_layers if cache.scores is None else list(cache.scores)
        self.thresholds = np.full(n_layers, np.nan) if cache.thresholds is None else cache.thresholds.copy()
        self.next_pos = {}  # of each layer whose Plan says so
        self.labels = {}  # of the entries of each layer stored
        self.new = None  # size, pos (H, n) and numbers (H,) of the new tokens
        self.prompt = None  # Labels of a first prompt's rows: alike in every layer
        self.attributes = None, {}  # the pos of the rows that came last, and what else a Layer says of them

    @property
    def reads(self):
        """What the method looks at beside keys and values (see CacheConfig.reads)."""
        return self.config.reads

    def _slack(self, a_layer):
        """A layer of so many rows, or a slab, of which no part can be given back."""
        return max(a_layer, self.cache.pool.slab_entries)

    def store(self, index, k=None, v=None, queries=(), wo=None):
        """Compress the rows of layer `index`, its new keys and values k, v (H, n, d) among them, and write the result
        to the pages. queries: a list of Queries; wo: the Weight of the layer's output projection."""
        if self.asked:
            q = np.stack([q[index] for q in self.asked], axis=1)
            next_pos = self.seen - self.cache.shift
            queries = [Queries(q, np.arange(next_pos - q.shape[1], next_pos))]
        if wo is not None and index not in self.compressor.outputs:
            heads, d = self.cache.lengths.shape[1], self.cache.pool.head_dim
            self.compressor.outputs[index] = Output(wo, heads, d, self.ops)
        labels = self._labels(index, 0 if k is None else k.shape[1])
        layer = self._layer(index, labels, *self._rows(index, k, v), list(queries))
        layer.history, layer.predicted = self._history(index, labels), self._predicted(index, labels)
        self._put(layer, self.config.scores(layer), k, v)

    def _put(self, layer, scores, k, v):
        """Store a layer whose rows score so much, its new keys and values k, v among them."""
        if self.ledger is None:
            self._write(layer, scores, None)
            return
        targets = self.ledger.targets = self.config.targets(self.ledger, layer, scores)
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
        cache.advance(self.new_ids, self.seen - self.end)
        cache.scores = self.scores if self.config.remembers else None
        cache.thresholds = None if np.isnan(self.thresholds).all() else self.thresholds
        if self.next_pos:
            cache.shift = self.seen - max(self.next_pos.values())

    def _write(self, layer, scores, target):
        plan, stays = self.config.plan(layer, scores, target)
        self.cache.write(layer.index, plan.apply(layer), self.settled[layer.index])
        self.labels[layer.index] = Labels(plan.size, plan.pos, plan.lengths)
        if self.ledger is not None:
            self.ledger.held[layer.index : layer.index + 1] = [len(plan.size)]
        if scores is not None:
            self.scores[layer.index] = scores[stays]
        self.thresholds[layer.index] = layer.memo.get("tau", self.thresholds[layer.index])
        if plan.next_pos is not None:
            self.next_pos[layer.index] = plan.next_pos

    def _labels(self, index, n):
        """The Labels of a layer's rows: its entries after those that are settled and, after those of each head, n new
        tokens."""
        cache, n_heads = self.cache, len(self.settled[index])
        lengths = cache.lengths[index] - self.settled[index]
        if self.new is None:
            pos = np.arange(cache.position, cache.position + n, dtype=np.int32, like=self.classes)
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
        if not self.config.adds_up or self.scores[index] is None:
            return None
        n_heads = len(labels.lengths)
        n_new = (len(labels.pos) - len(self.scores[index])) // n_heads
        return self._scored(index, labels, np.zeros((n_heads, n_new), np.float32, like=self.classes))

    def _predicted(self, index, labels):
        """(R,) what the profile predicted of each row when its token was read; None where the method does not ask."""
        if not self.config.foresees:
            return None
        noted = np.exp(self.cache.noted(index))  # (H, tokens since the last compression)
        self.cache.predicted[index] = [noted[:, :0]]
        return self._scored(index, labels, noted)

    def _scored(self, index, labels, new):
        """(R,) the scores of the last compression's entries, and after those of each head `new` (H, n)."""
        if self.scores[index] is None:
            return new.ravel()
        return joined(labels.lengths - new.shape[1], self.scores[index], new)

    def _attributes(self, labels):
        """What a Layer says of its rows beside k, v and Labels: found once where the next layer's have the same pos."""
        if self.attributes[0] is not labels.pos:
            cache = self.cache
            token = labels.pos + cache.shift if cache.shift else labels.pos
            protected = (labels.pos < self.sinks) | (token >= self.end)
            untouched = cache.seen - cache.tail if cache.shift else 0
            classes = functools.partial(_classes_of, self.classes, labels.size, token, untouched)
            self.attributes = labels.pos, {"find_classes": classes, "protected": protected, "shared": {}}
        return self.attributes[1]

    def _layer(self, index, labels, k, v, queries=()):
        compressor, threshold = self.compressor, self.thresholds[index]
        return Layer(
            index=index,
            k_rows=k,
            v_rows=v,
            **labels._asdict(),
            **self._attributes(labels),
            cos=self.cos,
            sin=self.sin,
            ops=self.ops,
            queries=queries,
            generated=self.generated,
            threshold=None if np.isnan(threshold) else float(threshold),
            worth=None if compressor.worth is None else compressor.worth[index],
            output=compressor.outputs.get(index),
            scale=compressor.scale,
            attention_window=compressor.window,
        )


class OneCut(Compression):
    """The Compression of an allocation that is one cut through all layers.

    Tokens wait in pages as they were read. Where more is held than the budget and `slack`, and at the end, all that is
    known is cut: what is not among the best of the rows known so far cannot be among the best of all, so the result is
    that of one cut at the end. To the planning the layers that are cut are heads of one."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        for index in range(len(self.scores)) if self.config.foresees and self.cache.entries else ():
            self.labels[index] = self._stored_labels(index)  # layers to come are known as well: their scores stay
            self.scores[index] = self._predicted(index, self.labels[index])
        self.held = self._count()  # entries of the layers that are known
        self.wanted = self.held if self.ledger is None else self.ledger.total

    def _slack(self, a_layer):
        """As many as the slabs have room for that hold the budget, of each head a page that is not full, and a layer of
        so many rows."""
        if self.ledger is None:
            return super()._slack(a_layer)
        pool = self.cache.pool
        least = self.ledger.total + self.settled.size * pool.page_size
        return -(-(least + a_layer) // pool.slab_entries) * pool.slab_entries - least

    def _count(self):
        return sum(len(labels.pos) for labels in self.labels.values())

    def store(self, index, k=None, v=None, queries=(), wo=None):
        n_new = 0 if k is None else k.shape[0] * k.shape[1]
        if self.held + n_new - self.wanted > self.slack:
            self._cut(index, min(self.slack / 4, self.slack - n_new))
        super().store(index, k, v, queries, wo)

    def _put(self, layer, scores, k, v):
        if k is not None:
            first = self.cache.position
            self.cache.append(layer.index, k, v, np.arange(first, first + k.shape[1]))
        self.labels[layer.index], self.scores[layer.index] = Labels(layer.size, layer.pos, layer.lengths), scores
        self.held = self._count()
        if layer.index + 1 == len(self.scores):
            self._cut(layer.index + 1, 0)

    def _cut(self, n_stored, excess):
        """Compress layers, those that hold most too much first, until all that are known together hold at most `excess`
        too much. n_stored: layers whose new tokens are stored."""
        known = sorted(self.labels)
        labels, scores = self._joined(known), np.concatenate([self.scores[index] for index in known])
        layer = self._layer(known[0], labels, None, None)
        kept = self.config.into(layer, scores, self.ledger and self._target(n_stored)) >= 0
        rows = np.array([len(self.scores[index]) for index in known])
        too_many, ends = rows - self.ops.counts(kept, rows), np.cumsum(rows)
        order = np.argsort(-too_many, kind="stable")
        before = np.cumsum(too_many[order]) - too_many[order]  # that are gone when it is a layer's turn
        chosen = np.sort(order[(too_many[order] > 0) & (too_many.sum() - before > excess)])
        for first, last in self._parts(chosen, rows):
            part = slice(int(ends[first] - rows[first]), int(ends[last]))
            self._merge(known[first], known[last] + 1, scores[part], kept[part])
        self.held = self._count()
        self.wanted = self.held if self.ledger is None else self.wanted

    def _target(self, n_stored):
        """Entries of the layers that are known: all but what is protected in the others, and in layers to come."""
        n_layers, n_heads = self.settled.shape
        window = n_heads * min(self.seen - self.end, len(self.new_ids))
        coming = [window if index in self.labels else self.ledger.protected for index in range(n_stored, n_layers)]
        return self.ledger.total - sum(coming)

    def _parts(self, chosen, rows):
        """(first, last) of the layers `chosen` (n,), which ascend, that may be merged together: of consecutive ones as
        many as have PART rows, of which there are `rows` (L,), where the merge looks at one head at a time."""
        first = 0
        for i in range(1, len(chosen) + 1):
            together = i < len(chosen) and self.config.merge.by_head and chosen[i] == chosen[i - 1] + 1
            if not together or rows[chosen[first : i + 1]].sum() > PART:
                yield chosen[first], chosen[i - 1]
                first = i

    def _merge(self, first, end, scores, kept):
        """Merge what the layers `first` .. `end` - 1 hold, of which so many rows are kept, and write it."""
        layers, labels = slice(first, end), self._joined(range(first, end))
        layer = self._layer(first, labels, *self._rows(layers))
        plan, stays = self.config.merged(layer, scores, stay(kept))
        plan.write(layer, self.cache, layers, self.settled[layers].ravel())
        scores, lengths = scores[stays], plan.lengths.reshape(end - first, -1)
        ends = np.cumsum(lengths.sum(axis=1)).tolist()
        for i, (lo, hi) in enumerate(zip([0, *ends], ends, strict=False), first):
            self.labels[i] = Labels(plan.size[lo:hi], plan.pos[lo:hi], lengths[i - first])
            self.scores[i] = scores[lo:hi]
            self.thresholds[i] = layer.memo.get("tau", self.thresholds[i])

    def _joined(self, layers):
        """The Labels of several layers, one after another."""
        return Labels(*(np.concatenate(parts) for parts in zip(*(self.labels[i] for i in layers), strict=True)))


def _classes_of(classes, size, token, untouched):
    """(R,) uint8: the classes (seen,) of the tokens (R,) of rows that no Plan has touched, none of them before
    `untouched`: what is older may have moved."""
    known = size == 1
    if untouched:
        known = known & (token >= untouched)
    return np.where(known, classes[token * known], np.uint8(0))
