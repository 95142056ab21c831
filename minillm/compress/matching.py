"""Attention matching (Zweiger, Fu, Guo and Kim 2026, arXiv 2602.16284): what entries count for and what they hold is
fitted, so that queries get from them what they got from all the rows.

The queries are some of a second reading of the text, evenly spaced. Keys stay as they are. First the sizes: with them
what the entries have of each query's attention is to be what the rows had (least squares, kept between LEAST and MOST).
Then the values: what they add to the output is to be what the rows added. Each query counts as much as the text had of
its attention, and RIDGE holds back what the queries say little about."""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

RIDGE = 0.1  # of the mean over entries of the squares that are summed
LEAST, MOST = 0.05, 30.0  # tokens an entry may count for; more where it did before
WORK = 16e6  # products of a head's equations, at most: of the queries every so many-th is taken where entries are many


class Asked(NamedTuple):
    """Queries of a layer and what they got from its rows: Q queries of each of H heads, those of its group."""

    q: np.ndarray  # (H, Q, d) float32, rotated
    pos: np.ndarray  # (Q,) on the host
    lse: np.ndarray  # (H, Q) the log of the sum of exponentials over all that the query saw
    share: np.ndarray  # (H, Q) of that sum, what the rows make of it
    output: np.ndarray  # (H, Q, d) the mean of the values by the attention to the rows


def ask(queries, n, k, v, past, scale, window=None):
    """What n tokens of the second reading get from a text, all of which comes before them: from the entries of a layer,
    `past` (PagedLayer), and its new keys and values k, v (H, m, d). queries: a list of Queries; scale, window: of the
    model's attention."""
    ops, (n_heads, _, d) = past.pool.ops, k.shape
    pos, picked = np.concatenate([some.pos for some in queries]), _picked(queries, n)
    q, lse, first = [], [], 0
    for some in queries:
        here = ops.array(picked[(picked >= first) & (picked < first + len(some.pos))] - first)
        q.append(some.q[:, here])
        lse += [] if some.lse is None else [some.lse[:, here]]
        first += len(some.pos)
    q, pos = np.concatenate(q, axis=1), pos[picked]
    output, of_rows = ops.prefill_attention(q, k, v, past, scale, window, pos)
    lse = np.concatenate(lse, axis=1) if lse else of_rows
    output = ops.stored_rows(output.reshape(-1, d)).reshape(len(pos), -1, d).transpose(1, 0, 2)
    return Asked(
        q=ops.stored_rows(q.reshape(-1, d)).reshape(n_heads, -1, d),
        pos=np.tile(pos, len(q) // n_heads),
        lse=lse.reshape(n_heads, -1),
        share=np.exp(of_rows - lse).reshape(n_heads, -1),
        output=output.reshape(n_heads, -1, d),
    )


def _picked(queries, n):
    """Which of the tokens of all Queries, one after another, are asked: n of them evenly spaced (all, if there are
    fewer); of the text and of questions about it half of n each, where there are both."""
    asks = np.concatenate([np.full(len(some.pos), some.asks) for some in queries])
    kinds = [kind for kind in (np.flatnonzero(~asks), np.flatnonzero(asks)) if len(kind)]
    spaced = [np.linspace(0, len(kind) - 1, min(n // len(kinds), len(kind))).round().astype(int) for kind in kinds]
    return np.unique(np.concatenate([kind[some] for kind, some in zip(kinds, spaced, strict=True)]))


def matched(entries, asked, ops, scale, window=None):
    """Entries of a layer with sizes and values that are fitted to `asked`. scale, window: of the model's attention."""
    if not entries.lengths.any():
        return entries
    sizes, values, ends = [], [], np.cumsum(entries.lengths)[:-1].tolist()
    rows = ops.stored_rows(entries.k), ops.stored_rows(entries.v), np.exp(entries.log_size), entries.pos
    heads = zip(*(np.split(part, ends) for part in rows), strict=True)
    for head, (k, v, size, pos) in enumerate(heads):
        if not len(k):
            continue
        some = slice(None, None, _step(asked.q.shape[1], len(k)))
        share, output = asked.share[head][some, None], asked.output[head][some]
        had = (asked.q[head][some] * np.float32(scale)) @ k.T
        if window is not None:
            near = ops.array(asked.pos[some])[:, None] - pos < window
            had = np.where(near, had, np.float32(-1e30))
        had -= asked.lse[head][some, None]
        np.exp(np.minimum(had, -np.log(size), out=had), out=had)  # (Q, E) of the attention, were each of one token
        more = _least_squares(had, share - had @ size[:, None])[:, 0]
        size = np.minimum(np.maximum(size + more, np.float32(LEAST)), np.maximum(size, np.float32(MOST)))
        had *= size
        had *= share / np.maximum(had.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
        sizes.append(size)
        values.append(v + _least_squares(had, share * output - had @ v))
    return replace(entries, v=np.concatenate(values), log_size=np.log(np.concatenate(sizes)))


def _step(n_queries, n_entries):
    """Of which queries every so many-th makes equations of no more than WORK products: as many columns or rows as there
    are entries, or queries if they are fewer."""
    enough = WORK / n_entries**2 if n_entries**3 <= WORK else (WORK / n_entries) ** 0.5
    return max(1, math.ceil(n_queries / enough))


def _least_squares(a, b):
    """x (E, n) of the least |a x - b|^2 + ridge |x|^2 for a (Q, E), b (Q, n): by the smaller of the two systems of
    equations."""
    wide = a.shape[1] > a.shape[0]
    products = a @ a.T if wide else a.T @ a
    ridge = np.square(a).sum() * np.float32(RIDGE / a.shape[1]) + np.finfo(np.float32).tiny
    products.reshape(-1)[:: len(products) + 1] += ridge
    return a.T @ np.linalg.solve(products, b) if wide else np.linalg.solve(products, a.T @ b)
