"""Greedy seed-based clustering (SemantiCache, algorithm 1) of many segments at once, in NumPy.

Segments of similar length form a bucket; the comparisons `similarity > tau` of a row are the bits of machine words,
so that a step of the greedy scan costs a few word operations for a whole bucket."""

import numpy as np

from minillm.ops.contract import Clusters

SIMILARITIES = 4 << 20  # that exist at a time; where there are more, they are computed anew for every tau, in blocks


class GreedyClusters(Clusters):
    """keys (C, d), compared as they are: those of `rows` (C,) of n_rows. See Backend.greedy_clusters."""

    AROUND = 1

    def __init__(self, keys, rows, starts, lengths, n_rows):
        self.n_rows, self.rows = n_rows, rows
        norms = np.sqrt(np.einsum("rd,rd->r", keys, keys))[:, None]
        self.unit = np.divide(keys, norms, out=np.zeros_like(keys), where=norms > 0)
        # Widths 8, 16, 32, 64 fit one word; longer ones take several words of 64 bits.
        widths = np.where(lengths > 64, -(-lengths // 64) * 64, 8 << np.searchsorted([8, 16, 32], lengths))
        keep = int((widths.astype(np.int64) ** 2).sum()) <= SIMILARITIES
        self.buckets = []
        for width in np.unique(widths[lengths > 0]).tolist():
            members = np.flatnonzero((widths == width) & (lengths > 0))
            rows = starts[members, None] + np.arange(width)  # (m, width)
            real = np.arange(width) < lengths[members, None]
            rows[~real] = 0
            similarities = self._similarities(rows, real, slice(None)) if keep else None
            self.buckets.append((rows, real, similarities))

    def _similarities(self, rows, real, which):
        """(m, which, width) cosines of the rows `which` of each segment with all its rows; -inf where there is no
        row."""
        unit = self.unit[rows]
        cosines = np.minimum(unit[:, which] @ unit.transpose(0, 2, 1), 1)  # rounded, it may be more
        cosines[np.broadcast_to(~real[:, None, :], cosines.shape)] = -np.inf
        return cosines

    def _absorbed(self, bucket, tau):
        """Run the scan: yields, for each row i of the bucket's segments, (is i a seed (m,) 0/1, members of its
        cluster as words (m, words))."""
        rows, real, similarities = bucket
        m, width = rows.shape
        word = np.dtype(f"uint{min(width, 64)}")
        bits = word.itemsize * 8
        step = max(1, SIMILARITIES // (m * width))
        blocks = [slice(lo, lo + step) for lo in range(0, width, step)]
        free = np.packbits(real, axis=1, bitorder="little").view(word)  # (m, words)
        for block in blocks:
            cosines = self._similarities(rows, real, block) if similarities is None else similarities[:, block]
            similar = np.packbits(cosines > tau, axis=2, bitorder="little").view(word).transpose(1, 0, 2)
            for i, row in enumerate(np.ascontiguousarray(similar), block.start):
                own_word, own_bit = i // bits, word.type(i % bits)
                seed = (free[:, own_word] >> own_bit) & word.type(1)
                taken = row & free
                taken *= seed[:, None]
                taken[:, own_word] |= seed << own_bit
                free ^= taken
                yield seed, taken

    def counts(self, taus):
        return [
            sum(int(seed.sum(dtype=np.int64)) for bucket in self.buckets for seed, _ in self._absorbed(bucket, tau))
            for tau in taus
        ]

    def assign(self, tau):
        number = np.arange(len(self.rows))  # of each one's seed among `rows`
        for bucket in self.buckets:
            rows, real, _ = bucket
            width = rows.shape[1]
            for i, (_, taken) in enumerate(self._absorbed(bucket, tau)):
                members = np.unpackbits(taken.view(np.uint8), axis=1, count=width, bitorder="little").view(bool)
                number[rows[members]] = np.broadcast_to(rows[:, i, None], rows.shape)[members]
        seed, similarity = np.arange(self.n_rows), np.ones(self.n_rows, np.float32)
        seed[self.rows] = self.rows[number]
        similarity[self.rows] = np.einsum("rd,rd->r", self.unit, self.unit[number])
        similarity[seed == np.arange(self.n_rows)] = 1.0
        return seed, similarity
