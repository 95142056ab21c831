"""Greedy seed-based clustering (SemantiCache, algorithm 1) in C: the interface of numpy_clusters."""

from ctypes import byref

import numpy as np

from minillm.ops import cpu_lib
from minillm.ops.cpu_lib import floats, pointer

KEPT_LENGTH = 512  # cosines of segments up to this length are kept for the next tau ...
KEPT_COSINES = 16 << 20  # ... as long as all of them together are no more


class GreedyClusters:
    """Segments of rows, and their clusters for any tau.

    keys (R, d); starts, lengths (M,): segment m is rows starts[m] : starts[m] + lengths[m], and clusters stay inside
    it. Scanning a segment, a row without a cluster becomes a seed and absorbs every later free row whose cosine
    similarity with the seed is greater (strictly) than tau. A key of norm zero is similar to nothing (cosine 0)."""

    def __init__(self, keys, starts, lengths):
        self.lib, keys = cpu_lib.library(), floats(keys)
        self.n_rows, d = keys.shape
        starts, lengths = (np.ascontiguousarray(a, np.int64) for a in (starts, lengths))
        squares = np.where(lengths <= KEPT_LENGTH, lengths**2, 0)
        ends = np.cumsum(squares)
        place = np.where((lengths <= KEPT_LENGTH) & (ends <= KEPT_COSINES), ends - squares, -1)
        unit, kept = np.empty_like(keys), np.empty(int(squares[place >= 0].sum()), np.float32)
        self.arrays = unit, starts, lengths, place, kept  # the struct holds addresses only
        self.lib.unit_rows(pointer(keys), self.n_rows, d, pointer(unit))
        self.segments = cpu_lib.Segments(*(pointer(a) for a in self.arrays), d, len(starts))
        self.counts = np.empty(len(starts), np.int64)
        self.lib.keep_cosines(byref(self.segments))

    def count(self, tau):
        """The number of clusters of all segments together."""
        return self.lib.clusters(byref(self.segments), tau, pointer(self.counts), None, None)

    def assign(self, tau):
        """seed (R,) int64: the row that is the seed of each row's cluster; a row of no segment is its own seed.
        similarity (R,): cosine of each row with its seed, 1 for seeds."""
        seed, similarity = np.arange(self.n_rows), np.ones(self.n_rows, np.float32)
        self.lib.clusters(byref(self.segments), tau, pointer(self.counts), pointer(seed), pointer(similarity))
        return seed, similarity
