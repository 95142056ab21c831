"""Attention matching: sizes and values of entries by least squares, against a literal version in float64."""

from dataclasses import replace

import numpy as np
import pytest
from cuda_words import from_words, to_words
from test_methods_merging import layer_of

from minillm.cache import Entries
from minillm.compress import matching
from minillm.compress.matching import ask, matched
from minillm.compress.plan import Queries
from minillm.ops.cuda_ops import CudaOps

F32 = np.float32


def literal_ask(layer, n):
    """Of each head: queries, positions, logs of sums, shares, outputs, query by query."""
    group, found = len(layer.queries[0].q) // len(layer.lengths), []
    pos = np.concatenate([x.pos for x in layer.queries])
    q, lse = (np.concatenate([getattr(x, name) for x in layer.queries], axis=1) for name in ("q", "lse"))
    tokens = sorted({round(float(i)) for i in np.linspace(0, len(pos) - 1, min(n, len(pos)))})
    ends = np.cumsum(layer.lengths)
    for head, (lo, hi) in enumerate(zip([0, *ends], ends, strict=False)):
        rows = []
        for g in range(group):
            for t in tokens:
                x = q[head * group + g, t].astype(float)
                logits = np.array([x @ layer.k[r] * layer.scale + np.log(layer.size[r]) for r in range(lo, hi)])
                if layer.attention_window:
                    logits[pos[t] - layer.pos[lo:hi] >= layer.attention_window] = -np.inf
                total = np.log(np.exp(logits).sum())
                output = sum(np.exp(logits[r - lo] - total) * layer.v[r].astype(float) for r in range(lo, hi))
                all_seen = lse[head * group + g, t]
                rows.append((x, pos[t], all_seen, np.exp(total - all_seen), output))
        found.append([np.array(part) for part in zip(*rows, strict=True)])
    return found


def least_squares(a, b):
    """min |a x - b|^2 + ridge |x|^2 as one system with more rows."""
    ridge = (matching.RIDGE / a.shape[1] * np.square(a).sum()) ** 0.5
    rows = np.vstack([a, ridge * np.eye(a.shape[1])]), np.vstack([b, np.zeros((a.shape[1], b.shape[1]))])
    return np.linalg.lstsq(*rows, rcond=None)[0]


def every(n_queries, n_entries):
    """The least s for which every s-th query makes no more products than there may be."""
    for s in range(1, n_queries + 1):
        n = n_queries / s
        if n * n_entries * min(n, n_entries) <= matching.WORK:
            return s
    return n_queries


def literal_matched(entries, asked, layer):
    sizes, values, ends = [], [], np.cumsum(entries.lengths)
    for (q, pos, lse, share, output), lo, hi in zip(asked, [0, *ends], ends, strict=False):
        k, v, size = (x[lo:hi].astype(float) for x in (entries.k, entries.v, np.exp(entries.log_size)))
        q, pos, lse, share, output = (part[:: every(len(q), len(k))] for part in (q, pos, lse, share, output))
        had = [[np.exp(x @ row * layer.scale - of_all) for row in k] for x, of_all in zip(q, lse, strict=True)]
        had = np.array(had)
        if layer.attention_window:
            had[np.array(pos)[:, None] - entries.pos[lo:hi] >= layer.attention_window] = 0
        size = np.clip(size + least_squares(had, (share - had @ size)[:, None])[:, 0], matching.LEAST, matching.MOST)
        has = had * size
        has *= (share / has.sum(axis=1))[:, None]
        sizes.append(size)
        values.append(v + least_squares(has, share[:, None] * output - has @ v))
    return np.log(np.concatenate(sizes)), np.concatenate(values)


def entries_of(layer, share, rng):
    """A part of each head's rows, as entries."""
    kept = np.concatenate([np.sort(rng.permutation(n)[: max(int(n * share), 1)]) for n in layer.lengths])
    lengths = np.array([max(int(n * share), 1) for n in layer.lengths])
    rows = kept + np.repeat(np.cumsum(layer.lengths) - layer.lengths, lengths)
    log_size = np.log(layer.size[rows])
    return Entries(layer.k[rows], layer.v[rows], log_size, layer.pos[rows], lengths)


def in_blocks(queries, sizes):
    ends = np.cumsum(sizes)
    parts = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
    return [Queries(queries.q[:, part], queries.pos[part], queries.lse[:, part]) for part in parts]


@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize(("n", "tokens", "work"), [(60, 40, 1e9), (60, 7, 1e9), (60, 400, 1e9), (60, 40, 20000)])
def test_literal(n, tokens, work, window, monkeypatch):
    """More entries than queries and fewer; ragged heads; queries in blocks; sizes of earlier entries; a model's window;
    queries left out where entries are many."""
    monkeypatch.setattr(matching, "WORK", work)
    rng = np.random.default_rng(tokens)
    layer, _ = layer_of(rng, [n, 9, n - 7], group=2, again=True, merged=True, d=8, n_queries=40)
    layer.attention_window, layer.queries = window, in_blocks(layer.queries[0], [24, 16])
    asked, literal = ask(layer, tokens), literal_ask(layer, tokens)
    assert asked.q.shape == (3, 2 * min(tokens, 40), 8)
    for head, (q, pos, lse, share, output) in enumerate(literal):
        np.testing.assert_array_equal(asked.q[head], q.astype(F32))
        np.testing.assert_array_equal(asked.pos, pos)
        for name, expected in (("lse", lse), ("share", share), ("output", output)):
            np.testing.assert_allclose(getattr(asked, name)[head], expected, rtol=1e-4, atol=1e-5, err_msg=name)
    entries = entries_of(layer, 0.5, rng)
    made = matched(entries, asked, layer)
    log_size, v = literal_matched(entries, literal, layer)
    np.testing.assert_allclose(made.log_size, log_size, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(made.v, v, rtol=1e-3, atol=2e-3)
    np.testing.assert_array_equal(made.k, entries.k)
    np.testing.assert_array_equal(made.pos, entries.pos)


def test_all_rows_stay_as_they_are():
    rng = np.random.default_rng(1)
    layer, _ = layer_of(rng, [50, 20], group=2, again=True, d=8, n_queries=30)
    entries = entries_of(layer, 1, rng)
    made = matched(entries, ask(layer, 30), layer)
    np.testing.assert_allclose(made.log_size, entries.log_size, atol=1e-4)
    np.testing.assert_allclose(made.v, entries.v, atol=1e-4)


def test_a_head_may_hold_nothing():
    rng = np.random.default_rng(5)
    layer, _ = layer_of(rng, [30, 30], group=2, again=True, d=8, n_queries=30)
    entries = entries_of(layer, 0.5, rng)
    part = slice(15, None)
    alone = Entries(*(getattr(entries, name)[part] for name in ("k", "v", "log_size", "pos")), np.array([0, 15]))
    made, both = (matched(some, ask(layer, 30), layer) for some in (alone, entries))
    for name in ("v", "log_size"):
        np.testing.assert_array_equal(getattr(made, name), getattr(both, name)[part])
    nothing = Entries(*(getattr(entries, name)[:0] for name in ("k", "v", "log_size", "pos")), np.array([0, 0]))
    assert not len(matched(nothing, ask(layer, 30), layer).v)


def test_one_of_two_alike_stands_for_both(monkeypatch):
    """Rows in pairs of the same key: the one that is kept comes to count for two, and to hold the mean of their
    values, where nothing holds it back."""
    monkeypatch.setattr(matching, "RIDGE", 1e-3)
    rng = np.random.default_rng(2)
    layer, _ = layer_of(rng, [40], group=3, again=True, d=16, n_queries=200)
    k, v = layer.k.copy(), layer.v.copy()
    k[1::2] = k[::2]
    layer = replace(layer, k_rows=k, v_rows=v, scale=0.5)
    entries = Entries(k[::2], v[::2], np.zeros(20, F32), layer.pos[::2], np.array([20]))
    made = matched(entries, ask(layer, 200), layer)
    assert abs(np.exp(made.log_size) - 2).max() < 0.3
    mean = (v[::2] + v[1::2]) / 2
    assert np.linalg.norm(made.v - mean) < 0.15 * np.linalg.norm(entries.v - mean)


def error(entries, asked, layer):
    """The squared error of what entries give to the queries, each by its share."""
    lost, ends = 0.0, np.cumsum(entries.lengths)
    for head, (lo, hi) in enumerate(zip([0, *ends], ends, strict=False)):
        logits = asked.q[head] @ entries.k[lo:hi].T * layer.scale + entries.log_size[lo:hi]
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        given = weights @ entries.v[lo:hi] / weights.sum(axis=1, keepdims=True)
        lost += np.square(asked.share[head][:, None] * (given - asked.output[head])).sum()
    return lost


def test_other_queries_get_more_of_what_they_got():
    """Fitted to some tokens of a reading, entries give others more of what the rows gave."""
    rng = np.random.default_rng(3)
    layer, _ = layer_of(rng, [80, 80], group=3, again=True, d=16, n_queries=300)
    entries, others = entries_of(layer, 0.2, rng), ask(layer, 300)
    made = matched(entries, ask(layer, 150), layer)
    assert error(made, others, layer) < 0.6 * error(entries, others, layer)


def test_a_gpu_makes_what_numpy_makes(device):
    ops, rng = CudaOps(device), np.random.default_rng(4)
    ops.real16 = "bf16"
    layer, _ = layer_of(rng, [70, 1, 65], group=3, again=True, d=64, n_queries=40)
    k, v = (from_words(to_words(rows, "bf16"), "bf16") for rows in (layer.k_rows, layer.v_rows))
    layer, queries = replace(layer, k_rows=k, v_rows=v, attention_window=90), layer.queries[0]
    layer.queries = [Queries(from_words(to_words(queries.q, "bf16"), "bf16"), queries.pos, queries.lse)]
    entries = entries_of(layer, 0.5, rng)
    up = device.upload
    words = [up(to_words(rows, "bf16")) for rows in (layer.k, layer.v, queries.q)]
    there = replace(
        layer,
        **{"ops": ops, "k_rows": words[0], "v_rows": words[1], "memo": {}, "shared": {}},
        **{name: up(getattr(layer, name)) for name in ("size", "pos", "protected")},
        queries=[Queries(words[2], queries.pos, up(queries.lse.astype(F32)))],
    )
    entries_there = Entries(
        *(up(to_words(rows, "bf16")) for rows in (entries.k, entries.v)),
        *(up(np.ascontiguousarray(x)) for x in (entries.log_size.astype(F32), entries.pos)),
        entries.lengths,
    )
    made, made_there = matched(entries, ask(layer, 16), layer), matched(entries_there, ask(there, 16), there)
    for name in ("log_size", "v"):
        np.testing.assert_allclose(ops.host(getattr(made_there, name)), getattr(made, name), rtol=1e-3, atol=1e-3)
