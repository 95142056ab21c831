"""OutputProjection: what a value does to the residual stream, through W_O."""

from functools import cached_property

import numpy as np

BLOCK = 1024  # rows whose products with W_O exist at a time


class OutputProjection:
    """The output projection of one layer, a query head at a time: v W_O^h is what a row with the value v adds to the
    residual stream for each unit of attention that query head h gives it.

    wo: Weight (dim, Hq * d). Factors of W_O are made when they are first asked for and kept: Hq d^2 floats, G times
    that for `inner`."""

    def __init__(self, wo, n_kv_heads, head_dim, ops):
        self.wo, self.head_dim, self.ops = wo, head_dim, ops
        self.n_heads = wo.shape[1] // head_dim
        self.group = self.n_heads // n_kv_heads

    def norms(self, v, lengths, order):
        """(G, R) float32: |v W_O^h| of each row for the query heads h of its group. v (R, d), rows of the H KV heads
        one after another, `lengths` of them each. order: "l1" or "l2"."""
        out = np.empty((self.group, len(v)), np.float32, like=v)
        for head in range(self.n_heads):
            matrix = self._factors[head] if order == "l2" else self.ops.array(self._matrix(head))
            kv_head, g = divmod(head, self.group)
            end = int(lengths[: kv_head + 1].sum())
            for lo in range(end - int(lengths[kv_head]), end, BLOCK):
                rows = slice(lo, min(lo + BLOCK, end))
                out[g, rows] = np.linalg.norm(v[rows] @ matrix, 1 if order == "l1" else 2, axis=1)
        return out

    def inner(self, v, lengths):
        """(G, G, R) float32: the inner products of v W_O^h and v W_O^h' of each row, h and h' of its group."""
        out = np.empty((self.group, self.group, len(v)), np.float32, like=v)
        starts = np.cumsum(lengths) - lengths
        for kv_head, (start, n) in enumerate(zip(starts, lengths, strict=True)):
            for lo in range(start, start + n, BLOCK):
                rows = slice(lo, min(lo + BLOCK, start + n))
                moved = v[rows] @ self._group_factors[kv_head]  # (G, rows, rank)
                out[:, :, rows] = np.einsum("grk,hrk->ghr", moved, moved)
        return out

    def _matrix(self, head):
        """W_O^h (d, dim), on the host."""
        columns = np.zeros((self.head_dim, self.wo.shape[1]), np.float32)
        columns[:, head * self.head_dim :][:, : self.head_dim] = np.eye(self.head_dim)
        return self.ops.host(self.ops.linear(self.ops.array(columns), self.wo))

    @cached_property
    def _factors(self):
        """For each query head R (d, <= d) with R R^T = W_O^h W_O^h^T: |v W_O^h| = |v R|, dim / d times cheaper."""
        factors = (np.linalg.qr(self._matrix(head).T, mode="r").T for head in range(self.n_heads))
        return [self.ops.array(factor) for factor in factors]

    @cached_property
    def _group_factors(self):
        """For each KV head (G, d, rank): the W_O^h of its group in one basis of the space that they reach together."""
        factors = []
        for first in range(0, self.n_heads, self.group):
            stacked = np.concatenate([self._matrix(head) for head in range(first, first + self.group)])
            factor = np.linalg.qr(stacked.T, mode="r").T
            factors.append(self.ops.array(factor.reshape(self.group, self.head_dim, -1)))
        return factors
