"""Plan: what becomes of each row of a layer. Budget: how many entries a layer may keep. Layer: what a method may look
at."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from minillm.cache import Entries

SHORT = 128  # sequences up to this length are left whole: there is nothing to gain, and much to lose


@dataclass
class Layer:
    """The rows of one layer that may be compressed, heads one after another (R rows in all).

    A row is a token that is stored as one entry, or an entry that an earlier Plan made (size > 1)."""

    index: int
    k: np.ndarray  # (R, d) rotated at pos
    v: np.ndarray  # (R, d)
    size: np.ndarray  # (R,) float32, tokens each row stands for
    pos: np.ndarray  # (R,) int32
    classes: np.ndarray  # (R,) uint8 DelimiterClass of each row's token
    protected: np.ndarray  # (R,) bool: sinks and window; they stay as they are
    lengths: np.ndarray  # (H,) rows of each head
    cos: np.ndarray  # (seen, d/2) rotation of every position
    sin: np.ndarray
    ops: object  # the backend

    @cached_property
    def heads(self):
        """(R,) the KV head of each row."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def rotate(self, keys, pos):
        return self.ops.rope(keys, self.cos[pos], self.sin[pos])

    @cached_property
    def k_unrotated(self):
        """(R, d) keys with the rotation undone: what RoPE was applied to."""
        norm = np.float32(self.cos[0, 0] ** 2)  # yarn scales cos and sin: position 0 shows by how much
        return self.ops.rope(self.k, self.cos[self.pos] / norm, -self.sin[self.pos] / norm)


@dataclass
class Plan:
    """Each row goes to one entry of its head, or to none: entry = sum of weight x row (idea 1 of the house).

    Keys of an entry with several rows are summed as they are stored, or (`unrotate`) with RoPE undone, and then
    rotated to the position of the entry. An entry with one row of weight 1 is that row, bit for bit."""

    dest: np.ndarray  # (R,) int64: entry of the layer, heads one after another; -1: dropped
    weight: np.ndarray  # (R,) float32
    size: np.ndarray  # (E,) float32, tokens each entry stands for
    pos: np.ndarray  # (E,) int32
    lengths: np.ndarray  # (H,) entries of each head; the sum is E
    unrotate: bool = False

    @classmethod
    def keep(cls, layer, kept):
        """The Plan of an eviction: rows with kept (R,) true stay as they are, the others are dropped."""
        dest = np.where(kept, np.cumsum(kept) - 1, -1)
        lengths = np.bincount(layer.heads[kept], minlength=len(layer.lengths))
        return cls(dest, np.ones(len(kept), np.float32), layer.size[kept], layer.pos[kept], lengths)

    def apply(self, layer):
        """The Entries of the Plan."""
        merge, n = layer.ops.merge, len(self.size)
        v = merge(layer.v, self.dest, self.weight, n)
        if self.unrotate:
            k = self._merge_unrotated(layer)
        else:
            k = merge(layer.k, self.dest, self.weight, n)
        return Entries(k, v, np.log(self.size), self.pos, self.lengths)

    def _merge_unrotated(self, layer):
        """Keys (E, d): summed with RoPE undone, then rotated to the entry's position; what is one row is copied."""
        n_rows = np.bincount(self.dest[self.dest >= 0], minlength=len(self.size))
        copied = (self.dest >= 0) & (self.weight == 1)
        copied &= (n_rows[self.dest] == 1) & (self.pos[self.dest] == layer.pos)
        made = np.ones(len(self.size), bool)
        made[self.dest[copied]] = False
        number = np.where(made, np.cumsum(made) - 1, -1)  # of an entry among those that are made
        dest = np.where(self.dest >= 0, number[self.dest], -1)
        summed = layer.ops.merge(layer.k_unrotated, dest, self.weight, int(made.sum()))
        k = np.empty((len(self.size), layer.k.shape[1]), np.float32)
        k[made] = layer.rotate(summed, self.pos[made])
        k[self.dest[copied]] = layer.k[copied]
        return k


@dataclass(frozen=True)
class Budget:
    """How much of a sequence is kept: a share of the tokens seen, or a number of entries; an average over (layer, KV
    head) that counts sinks and window in."""

    share: float | None = None
    entries: int | None = None

    def per_head(self, seen):
        """Average entries of a head after `seen` tokens (a float)."""
        wanted = self.share * seen if self.entries is None else self.entries
        return min(max(wanted, 1.0), float(seen))

    def total(self, seen, n_heads):
        """Entries of n_heads heads together, at least one each."""
        return max(n_heads, round(self.per_head(seen) * n_heads))

    def protect(self, seen, sinks, window):
        """(sinks, window) that may be protected after `seen` tokens: where they would take more than half of the
        budget, they get half of it, sinks first; without that a small budget would hold nothing but the newest
        tokens."""
        half = int(self.per_head(seen) / 2)
        if sinks + window <= half:
            return sinks, window
        sinks = min(sinks, max(half // 2, half - window))
        return sinks, min(window, half - sinks)


class Ledger:
    """The entries that the layers of one pass may make together, spent layer by layer.

    A method that measures what each layer needs says how many entries a rung of its ladder (a setting, from fine to
    coarse) would make there; the forecast for a rung assumes that the layers to come resemble those seen. So layers
    that compress badly get more, no layer is held in full, and the total is met exactly."""

    def __init__(self, total, rows):
        self.left, self.rows = total, list(rows)  # rows of each layer still to come
        self.counts = []  # for each rung, the entries it made in the layers seen where it was tried

    def bounded(self, entries):
        """`entries` for the next layer, or what is nearest to it and leaves the layers after it no more than they
        have."""
        rows, later = self.rows[0], self.rows[1:]
        return max(self.left - sum(later), min(entries, rows, self.left if not later else rows))

    def even(self):
        """Entries of the next layer if what is left is spread evenly."""
        return self.bounded(round(self.left / len(self.rows)))

    def forecast(self, rung, count):
        """Entries that this layer and those to come will make at `rung`, which makes `count` in this layer."""
        if rung == len(self.counts):
            self.counts.append([])
        self.counts[rung].append(count)
        return count + (len(self.rows) - 1) * sum(self.counts[rung]) / len(self.counts[rung])

    def spend(self, entries):
        """The next layer has made so many entries."""
        self.left -= entries
        self.rows.pop(0)
