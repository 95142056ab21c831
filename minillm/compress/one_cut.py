"""One cut through all layers and heads: layers wait whole until there are too many rows, and are cut together."""

import numpy as np

from minillm.compress.allocate import stay
from minillm.compress.compression import Compression, Labels
from minillm.compress.plan import Rows

PART = 32768  # rows that are merged at a time, if they are of several layers


class OneCut(Compression):
    """The Compression of an allocation that is one cut through all layers.

    Tokens wait in pages as they were read. Where more is held than the budget and `slack`, and at the end, all that is
    known is cut: what is not among the best of the rows known so far cannot be among the best of all, so the result is
    that of one cut at the end. So no more is held than the budget, a layer and a slab, but in a later turn of a method
    that reads again: what layers to come still hold of earlier turns is not scored yet, and comes to it. To the
    planning the layers that are cut are heads of one."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        for index in range(len(self.scores)) if self.config.predicts and self.cache.entries else ():
            self.labels[index] = self._stored_labels(index)  # layers to come are known as well: their scores stay
            self.scores[index] = self._take_predicted(index, self.labels[index])
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

    def store(self, index, k=None, v=None, queries=(), hidden=None):
        n_new = 0 if k is None else k.shape[0] * k.shape[1]
        if self.held + n_new - self.wanted > self.slack:
            self._cut(index, min(self.slack / 4, self.slack - n_new))
        super().store(index, k, v, queries, hidden)

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
        together = Rows(protected=self._attributes(labels)["protected"], lengths=labels.lengths, ops=self.ops)
        kept = self.recipe.into(together, scores, self.ledger and self._target(n_stored)).rows >= 0
        rows = np.array([len(self.scores[index]) for index in known])
        too_many, ends = rows - self.ops.segment_count(kept, rows), np.cumsum(rows)
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
        window = n_heads * min(self.seen - self.part.end, self.part.n_new)
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
        plan = self.recipe.merged(layer, scores, stay(kept))
        plan.write(layer, self.cache, layers, self.settled[layers].ravel())
        scores, lengths = scores[plan.rows], plan.lengths.reshape(end - first, -1)
        ends = np.cumsum(lengths.sum(axis=1)).tolist()
        for i, (lo, hi) in enumerate(zip([0, *ends], ends, strict=False), first):
            self.labels[i] = Labels(plan.size[lo:hi], plan.pos[lo:hi], lengths[i - first])
            self.scores[i] = scores[lo:hi]
            self._note_threshold(i, plan)

    def _joined(self, layers):
        """The Labels of several layers, one after another."""
        return Labels(*(np.concatenate(parts) for parts in zip(*(self.labels[i] for i in layers), strict=True)))
