"""Greedy seed-based clustering (SemantiCache, algorithm 1) on the device: the interface of numpy_clusters."""

import numpy as np

from minillm.ops import launch

KEPT_LENGTH = 512  # segments up to this length keep the cosines of their pairs; 1024 at most (see clusters.cu)
KEPT_COSINES = 256 << 20  # all of them together


class GreedyClusters:
    """Segments of rows, and their clusters for any tau.

    keys (C, d) of the device, compared as they are: those of `rows` (C,) of n_rows; starts, lengths (M,): segment m is
    the keys starts[m] : starts[m] + lengths[m]. What a cluster is, numpy_clusters says."""

    def __init__(self, device, real16, keys, rows, n_rows, starts, lengths):
        self.device, self.real16, self.rows, self.n_rows = device, real16, rows, n_rows
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

    def counts(self, taus):
        """For each of `taus` the number of clusters of all segments together, in one launch."""
        return self._run(taus, None, None).tolist()

    def assign(self, tau):
        """seed (n_rows,) int64, similarity (n_rows,), on the host."""
        number = self.device.upload(np.arange(len(self.rows), dtype=np.int32))  # of each one's seed among `rows`
        cosine = self.device.upload(np.ones(len(self.rows), np.float32))
        self._run([tau], number, cosine)
        seed, similarity = np.arange(self.n_rows), np.ones(self.n_rows, np.float32)
        seed[self.rows], similarity[self.rows] = self.rows[number.get()], cosine.get()
        return seed, similarity

    def _run(self, taus, seed, similarity):
        upload, shape = self.device.upload, (len(taus), len(self.rows))
        counts, taken = upload(np.zeros(len(taus), np.int32)), None
        if self.some_long:
            taken = self.device.empty(shape, np.uint8)
            taken.fill(0)
        tables = self.starts, self.lengths, self.place, upload(np.array(taus, np.float32))
        launch.clusters(self.device, self.unit, self.kept, *tables, counts, seed, similarity, taken, self.real16)
        return counts.get()
