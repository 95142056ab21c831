"""Greedy seed-based clustering (SemantiCache, algorithm 1) in C: see numpy_clusters."""

from ctypes import byref

import numpy as np

from minillm.ops import cpu_lib
from minillm.ops.contract import Clusters
from minillm.ops.cpu_lib import floats, pointer, pointing, whole

TAUS = 16  # that one reading of the keys can count for


class GreedyClusters(Clusters):
    """See Backend.greedy_clusters. Of cosines nothing is kept: to read the keys again costs less."""

    AROUND = 1

    def __init__(self, lib, keys, rows, starts, lengths, rotation=None):
        self.lib = lib
        keys = floats(keys)
        rows, starts, lengths = whole(rows), whole(starts), whole(lengths)
        pos, cos, sin = rotation or (None, None, None)
        if rotation:
            pos, cos, sin = np.ascontiguousarray(pos, np.int32), floats(cos), floats(sin)
            assert len(pos) == len(keys) and pos.max(initial=0) < len(cos) and 2 * cos.shape[1] == keys.shape[1]
        assert rows.max(initial=-1) < len(keys) and (starts + lengths).max(initial=0) <= len(rows)
        arrays = {"keys": keys, "rows": rows, "starts": starts, "lengths": lengths, "pos": pos, "cos": cos, "sin": sin}
        self.n_rows, self.arrays = len(keys), arrays  # which the struct points to
        self.segments = cpu_lib.Segments(**pointing(arrays), d=keys.shape[1], n_segments=len(starts))
        self.assigned = {}  # tau -> number of clusters, seed, similarity: of the tau asked for last

    def counts(self, taus):
        if len(taus) == 1:
            return [self._assigned(taus[0])[0]]  # whoever counts for one tau will ask whose they are
        counts = []
        for lo in range(0, len(taus), TAUS):
            counts += self._run(taus[lo : lo + TAUS], None, None)
        return counts

    def assign(self, tau):
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
        self.lib.clusters(byref(self.segments), pointer(taus), len(taus), *results)
        return counts.tolist()
