"""What becomes of the rows that do not stay: merge(layer, scores, into, **options) -> Plan. into (R,): see allocate."""

import numpy as np

from minillm.compress.cluster import ROPE
from minillm.compress.options import Option, Part, one_of
from minillm.compress.plan import Plan


def drop(layer, scores, into):
    """They are gone (eviction)."""
    return Plan.keep(layer, into == np.arange(len(into)))


def cores(layer, scores, into, rope, log_size):
    """SemantiCache (eqs. 2-4): a row that stays becomes the mean of itself and the rows that join it, weighted by their
    sizes, at their mean position, and of the size of them all; what joins none is dropped."""
    joined = into >= 0
    stays, dest = np.unique(into[joined], return_inverse=True)
    size = np.bincount(dest, layer.size[joined]).astype(np.float32)
    weight = np.zeros(len(into), np.float32)
    weight[joined] = layer.size[joined] / size[dest]
    pos = np.rint(np.bincount(dest, weight[joined] * layer.pos[joined])).astype(np.int32)
    lengths = np.bincount(layer.heads[stays], minlength=len(layer.lengths))
    places = np.full(len(into), -1)
    places[joined] = dest
    return Plan(places, weight, size if log_size else np.ones_like(size), pos, lengths, rope == "unrotated")


LOG_SIZE = Option(True, one_of(True, False), "count a core as often as it has tokens")

MERGES = {
    "drop": Part(drop, "they are dropped"),
    "cores": Part(cores, "averaged with the row they join", {"rope": ROPE, "log_size": LOG_SIZE}),
}
