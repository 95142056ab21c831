"""Greedy seed-based clustering (SemantiCache, algorithm 1) on the device: see numpy_clusters."""

from dataclasses import dataclass

import numpy as np

from minillm.ops import launch
from minillm.ops.contract import Clusters

KEPT_LENGTH = 512  # segments up to this length keep the cosines of their pairs; 1024 at most (see clusters.cu)
KEPT_COSINES = 256 << 20  # all of them together


@dataclass
class Segments:
    """Where the keys of each of M segments begin and how many there are, as clusters.cu reads it: device arrays."""

    starts: object  # (M,) int32
    lengths: object  # (M,) int32
    place: object  # (M,) int64: of the cosines that are kept, where those of a segment begin; -1: they are not kept
    n_kept: int  # all cosines that are kept
    some_long: bool  # whether there are segments whose cosines are not kept


def segments(device, starts, lengths):
    """Segments from starts, lengths (M,) of the device."""
    short = lengths <= KEPT_LENGTH
    squares = np.where(short, lengths.astype(np.int64) * lengths, 0)
    ends = np.cumsum(squares)
    kept = short & (ends <= KEPT_COSINES)
    n_kept, n_long = np.stack([np.where(kept, squares, 0).sum(), np.count_nonzero(~kept)]).tolist()
    place = np.where(kept, ends - squares, -1)
    return Segments(starts.astype(np.int32), lengths.astype(np.int32), place, n_kept, n_long > 0)


class GreedyClusters(Clusters):
    """keys (C, d) of the device, compared as they are: those of `rows` (C,) of n_rows. See Backend.greedy_clusters."""

    AROUND = 8  # taus on either side of one that are counted with it: a launch and a wait cost more than all of them

    def __init__(self, device, real16, keys, rows, n_rows, segments):
        self.device, self.real16, self.rows, self.n_rows, self.segments = device, real16, rows, n_rows, segments
        self.unit, self.kept = device.empty(keys.shape, np.float32), device.empty(segments.n_kept, np.float32)
        launch.unit_rows(device, keys, self.unit, real16)
        launch.keep_cosines(device, self.unit, *self._tables, self.kept, real16)

    @property
    def _tables(self):
        return self.segments.starts, self.segments.lengths, self.segments.place

    def counts(self, taus):
        return self._run(taus, None, None).tolist()

    def assign(self, tau):
        number = np.arange(len(self.rows), dtype=np.int32, like=self.unit)  # of each one's seed among `rows`
        cosine = np.ones_like(self.unit, shape=len(self.rows))
        self._run([tau], number, cosine)
        seed = np.arange(self.n_rows, like=self.unit)
        similarity = np.ones_like(self.unit, shape=self.n_rows)
        seed[self.rows], similarity[self.rows] = self.rows[number], cosine
        return seed, similarity

    def _run(self, taus, seed, similarity):
        """counts (taus,) int32 of the device."""
        counts, taken = np.zeros(len(taus), np.int32, like=self.unit), None
        if self.segments.some_long:
            taken = np.zeros((len(taus), len(self.rows)), np.uint8, like=self.unit)
        tables = *self._tables, self.device.upload(np.array(taus, np.float32))
        launch.clusters(self.device, self.unit, self.kept, *tables, counts, seed, similarity, taken, self.real16)
        return counts
