"""Greedy seed-based clustering (SemantiCache, algorithm 1) in C: the interface of numpy_clusters."""

from ctypes import byref

import numpy as np

from minillm.ops import cpu_lib
from minillm.ops.cpu_lib import floats, pointer

TAUS = 16  # that one reading of the keys can count for


class GreedyClusters:
    """Segments of rows, and their clusters for any tau.

    keys (R, d); rows (C,): segment m is rows[starts[m] : starts[m] + lengths[m]]; rotation: (pos, cos, sin). What a
    cluster is, numpy_clusters says. Nothing is kept: a reading of the keys costs less than its cosines in memory."""

    def __init__(self, keys, rows, starts, lengths, rotation=None):
        keys, (rows, starts, lengths) = floats(keys), (np.ascontiguousarray(a, np.int64) for a in (rows, starts, lengths))
        pos, cos, sin = rotation or (None, None, None)
        if rotation:
            pos, cos, sin = np.ascontiguousarray(pos, np.int32), floats(cos), floats(sin)
            assert len(pos) == len(keys) and pos.max(initial=0) < len(cos) and 2 * cos.shape[1] == keys.shape[1]
        assert rows.max(initial=-1) < len(keys) and (starts + lengths).max(initial=0) <= len(rows)
        self.n_rows, self.arrays = len(keys), (keys, rows, starts, lengths, pos, cos, sin)  # which the struct points to
        self.segments = cpu_lib.Segments(*(pointer(a) for a in self.arrays), keys.shape[1], len(starts))

    def counts(self, taus):
        """For each of `taus` the number of clusters of all segments together."""
        counts = []
        for lo in range(0, len(taus), TAUS):
            counts += self._run(np.array(taus[lo : lo + TAUS], np.float32), None, None)
        return counts

    def assign(self, tau):
        """seed (R,) int64: the row that is the seed of each row's cluster; a row of no segment is its own seed.
        similarity (R,): cosine of each row with its seed, 1 for seeds."""
        seed, similarity = np.arange(self.n_rows), np.ones(self.n_rows, np.float32)
        self._run(np.array([tau], np.float32), seed, similarity)
        return seed, similarity

    def _run(self, taus, seed, similarity):
        counts, tables = np.empty(len(taus), np.int64), (byref(self.segments), pointer(taus), len(taus))
        cpu_lib.library().clusters(*tables, pointer(counts), pointer(seed), pointer(similarity))
        return counts.tolist()
