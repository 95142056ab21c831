"""Layers of random rows, and what attention over them is, a query at a time in float64."""

import math

import numpy as np
from literal import FakeRope, make_layer

from minillm.compress.plan import Queries

F32 = np.float32


GROUPS = (1, 3, 4, 8)


def logits_of(layer, queries, own_keys=None):
    """(query head, i, the rows it sees, their logits and those of own_keys (H, m, d), seen as well) of Queries over the
    rows of a layer."""
    group = len(queries.q) // len(layer.lengths)
    for head, (n, end) in enumerate(zip(layer.lengths, np.cumsum(layer.lengths), strict=True)):
        for member in range(group):
            for i, at in enumerate(queries.pos):
                q = np.float64(queries.q[head * group + member, i])
                rows = [row for row in range(end - n, end) if layer.pos[row] <= at]
                logits = [q @ np.float64(layer.k[row]) * layer.scale + math.log(layer.size[row]) for row in rows]
                if own_keys is not None:
                    logits += [q @ np.float64(own_keys[head, j]) * layer.scale for j in range(i + 1)]
                yield head * group + member, i, rows, logits


def log_sums(layer, queries, own_keys):
    """lse (Hq, m) float32"""
    lse = np.full(queries.q.shape[:2], -np.inf, F32)
    for head, i, _, logits in logits_of(layer, queries, own_keys):
        top = max(logits)
        lse[head, i] = top + math.log(sum(math.exp(x - top) for x in logits))
    return lse


def layer_of(rng, lengths, *, group=1, merged=False, ties=False, d=6, n_queries=5, again=False, classes=True):
    """A Layer of heads of these lengths, with sinks, a window, delimiters and queries."""
    rope, heads, longest = FakeRope(d), [], max(lengths)
    for n in lengths:
        pos = np.arange(longest)[longest - n :] if n == longest or rng.random() < 0.5 else None
        pos = np.sort(rng.permutation(longest)[:n]) if pos is None else pos
        content = np.eye(d)[rng.integers(0, d, n)] + rng.normal(size=(n, d)) * 0.4
        k, v = rope.rotated(content, pos).astype(F32), rng.normal(size=(n, d)).astype(F32)
        if ties and n > 4:
            k[1::3], v[1::3] = k[0], v[0]
        size = rng.integers(1, 6, n) if merged else np.ones(n)
        kinds = np.where(rng.random(n) < 0.2, rng.integers(1, 4, n), 0) if classes else np.zeros(n)
        protected = (pos < 2) | (pos >= longest - 3)
        heads.append({"k": k, "v": v, "size": size, "pos": pos, "classes": kinds, "protected": protected})
    layer = make_layer(heads, rope, n_positions=longest + n_queries)
    q = rng.normal(size=(group * len(lengths), n_queries, d)).astype(F32)
    if again:
        layer.own = rng.normal(size=(len(lengths), n_queries, d))
        layer.queries = [Queries(q, longest + np.arange(n_queries))]
        layer.queries[0].lse = log_sums(layer, layer.queries[0], layer.own)
    else:
        layer.queries = [Queries(q, longest - n_queries + np.arange(n_queries))]
    return layer, rope


def options_of(part, **values):
    return {name: option.default for name, option in part.options.items()} | values


def kept_positions(cache):
    return [
        [cache.layer(i).read(h)[3].tolist() for h in range(cache.lengths.shape[1])] for i in range(len(cache.pages))
    ]
