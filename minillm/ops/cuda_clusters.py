"""Greedy seed-based clustering (SemantiCache, algorithm 1) on the device: the interface of numpy_clusters."""

import numpy as np

from minillm.ops import launch

KEPT_LENGTH = 512  # segments up to this length keep the cosines of their pairs; 1024 at most (see clusters.cu)
KEPT_COSINES = 256 << 20  # all of them together


class GreedyClusters:
    """Segments of rows, and their clusters for any tau.

    keys (R, d) of the device; starts, lengths (M,): segment m is rows starts[m] : starts[m] + lengths[m]. What a
    cluster is, numpy_clusters says."""

    def __init__(self, device, real16, keys, starts, lengths):
        self.device, self.real16, self.n_rows = device, real16, len(keys)
        starts, lengths = (np.ascontiguousarray(a, np.int32) for a in (starts, lengths))
        squares = np.where(lengths <= KEPT_LENGTH, lengths.astype(np.int64) ** 2, 0)
        ends = np.cumsum(squares)
        place = np.where((lengths <= KEPT_LENGTH) & (ends <= KEPT_COSINES), ends - squares, -1)
        self.some_long, upload = bool((place < 0).any()), self.device.upload
        self.unit = self.device.empty(keys.shape, np.float32)
        launch.unit_rows(self.device, keys, self.unit, self.real16)
        self.starts, self.lengths, self.place = upload(starts), upload(lengths), upload(place)
        self.kept = self.device.empty(int(squares[place >= 0].sum()), np.float32)
        tables = self.starts, self.lengths, self.place
        launch.keep_cosines(self.device, self.unit, *tables, self.kept, self.real16)
        self.counts = {}  # tau -> clusters

    def count(self, tau):
        """The number of clusters of all segments together."""
        return self.counts_of([tau])[0]

    def counts_of(self, taus):
        """`count` of each of several taus, those not known yet in one launch."""
        new = [tau for tau in taus if tau not in self.counts]
        if new:
            self.counts |= zip(new, self._run(new, None, None).tolist(), strict=True)
        return [self.counts[tau] for tau in taus]

    def assign(self, tau):
        """seed (R,) int64, similarity (R,), on the host."""
        seed = self.device.upload(np.arange(self.n_rows, dtype=np.int32))
        similarity = self.device.upload(np.ones(self.n_rows, np.float32))
        self._run([tau], seed, similarity)
        return seed.get().astype(np.int64), similarity.get()

    def _run(self, taus, seed, similarity):
        upload, shape = self.device.upload, (len(taus), self.n_rows)
        counts, taken = upload(np.zeros(len(taus), np.int32)), None
        if self.some_long:
            taken = self.device.empty(shape, np.uint8)
            taken.fill(0)
        tables = self.starts, self.lengths, self.place, upload(np.array(taus, np.float32))
        launch.clusters(self.device, self.unit, self.kept, *tables, counts, seed, similarity, taken, self.real16)
        return counts.get()
