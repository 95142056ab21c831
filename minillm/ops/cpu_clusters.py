"""Greedy seed-based clustering (SemantiCache, algorithm 1) in C: the interface of numpy_clusters."""

from ctypes import byref

import numpy as np

from minillm.ops import cpu_lib
from minillm.ops.cpu_lib import floats, pointer

TAUS = 16  # that one reading of the keys can count for


class GreedyClusters:
    """Segments of rows, and their clusters for any tau.

    keys (R, d); rows (C,): segment m is rows[starts[m] : starts[m] + lengths[m]]; rotation: (pos, cos, sin). What a
    cluster is, numpy_clusters says. Of cosines nothing is kept: to read the keys again costs less."""

    AROUND = 1  # taus on either side of one that are counted with it

    def __init__(self, keys, rows, starts, lengths, rotation=None):
        keys = floats(keys)
        rows, starts, lengths = (np.ascontiguousarray(a, np.int64) for a in (rows, starts, lengths))
        pos, cos, sin = rotation or (None, None, None)
        if rotation:
            pos, cos, sin = np.ascontiguousarray(pos, np.int32), floats(cos), floats(sin)
            assert len(pos) == len(keys) and pos.max(initial=0) < len(cos) and 2 * cos.shape[1] == keys.shape[1]
        assert rows.max(initial=-1) < len(keys) and (starts + lengths).max(initial=0) <= len(rows)
        self.n_rows, self.arrays = len(keys), (keys, rows, starts, lengths, pos, cos, sin)  # which the struct points to
        self.segments = cpu_lib.Segments(*(pointer(a) for a in self.arrays), keys.shape[1], len(starts))
        self.assigned = {}  # tau -> number of clusters, seed, similarity: of the tau asked for last

    def counts(self, taus):
        """For each of `taus` the number of clusters of all segments together."""
        if len(taus) == 1:
            return [self._assigned(taus[0])[0]]  # whoever counts for one tau will ask whose they are
        counts = []
        for lo in range(0, len(taus), TAUS):
            counts += self._run(taus[lo : lo + TAUS], None, None)
        return counts

    def assign(self, tau):
        """seed (R,) int64: the row that is the seed of each row's cluster; a row of no segment is its own seed.
        similarity (R,): cosine of each row with its seed, 1 for seeds."""
        return self._assigned(tau)[1:]

    def _assigned(self, tau):
        if tau not in self.assigned:
            seed, similarity = np.arange(self.n_rows), np.ones(self.n_rows, np.float32)
            (count,) = self._run([tau], seed, similarity)
            self.assigned = {tau: (count, seed, similarity)}
        return self.assigned[tau]

    def _run(self, taus, seed, similarity):
        taus, counts = np.array(taus, np.float32), np.empty(len(taus), np.int64)
        results = pointer(counts), pointer(seed), pointer(similarity)
        cpu_lib.library().clusters(byref(self.segments), pointer(taus), len(taus), *results)
        return counts.tolist()
