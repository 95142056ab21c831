"""How many entries each layer and each head may keep: an Allocation.

heads(layer, scores, target, **options) -> into (R,) int64: which rows of a layer become entries, `target` of them: a
row whose into is itself stays, one with another row's number of its head joins that, -1: it has no place.

layers(ledger, layer, scores, **options) -> the targets of the layers seen so far, this one the last."""

from dataclasses import dataclass

import numpy as np

from minillm.compress import cluster
from minillm.compress.options import Part


@dataclass(frozen=True)
class Allocation:
    summary: str
    heads: Part
    layers: Part

    @property
    def options(self):
        return self.heads.options | self.layers.options


def stay(kept):
    """The `into` of rows that stay (R,) bool, the others have no place."""
    return np.where(kept, np.arange(len(kept)), -1)


# heads


def per_head(layer, scores, target):
    """The same number of rows in every head (the first heads take one more where it does not divide; what a head does
    not have goes to the others): the protected ones and, of the others, those with the best scores; of equal ones the
    earlier."""
    n_heads = len(layer.lengths)
    protected = np.bincount(layer.heads[layer.protected], minlength=n_heads)
    free = layer.free[np.argsort(-scores[layer.free], kind="stable")]  # best first
    free = free[np.argsort(layer.heads[free], kind="stable")]  # head by head
    n_free = layer.lengths - protected
    rank = np.arange(len(free)) - np.repeat(np.cumsum(n_free) - n_free, n_free)  # of a row in its head
    rank += protected[layer.heads[free]]
    turn = np.argsort(rank, kind="stable")  # one of each head, in turn
    kept = layer.protected.copy()
    kept[free[turn[: max(target - int(protected.sum()), 0)]]] = True
    return stay(kept)


def across_heads(layer, scores, target):
    """The best rows of all heads together, beside the protected ones; of equal ones the earlier."""
    kept = layer.protected.copy()
    best = layer.free[np.argsort(-scores[layer.free], kind="stable")]
    kept[best[: max(target - np.count_nonzero(kept), 0)]] = True
    return stay(kept)


# layers


def even(ledger, layer, scores):
    """The same for every layer."""
    return [*ledger.targets, ledger.bounded(round(ledger.left / ledger.to_come))]


def one_cut(ledger, layer, scores):
    """As many as each layer has among the best of all rows of all layers, beside the protected ones; of equal ones the
    earlier. What is not among the best of the layers seen so far cannot be among the best of all: so the layers seen
    are cut as new ones come, and the result is that of one cut at the end."""
    index = len(ledger.targets)
    best, whose = ledger.pool
    best = np.append(best, scores[layer.free])
    whose = np.append(whose, np.full(len(layer.free), index))
    if len(best) > ledger.room:
        order = np.argsort(-best, kind="stable")[: ledger.room]
        order.sort()  # layers stay in order, so that ties go to the earlier
        best, whose = best[order], whose[order]
    ledger.pool = best, whose
    return (ledger.protected + np.bincount(whose, minlength=index + 1)).tolist()


PER_HEAD = Part(per_head, "the same number in every head")
ACROSS_HEADS = Part(across_heads, "the best of a layer, whichever head")
EVEN = Part(even, "the same number in every layer")

ALLOCATIONS = {
    "even": Allocation("the same number in every head of every layer", PER_HEAD, EVEN),
    "layer": Allocation("the best of each layer, whichever head", ACROSS_HEADS, EVEN),
    "global": Allocation(
        "the best of the whole model: one cut through all layers and heads",
        ACROSS_HEADS,
        Part(one_cut, "the best of all layers"),
    ),
    "clusters": Allocation(
        "clusters of similar keys between delimiters, as many as fit at one threshold for all layers",
        Part(cluster.seeds, "one entry a cluster", cluster.OPTIONS),
        Part(cluster.spread, "what one threshold gives each", cluster.OPTIONS),
    ),
}
