"""Attention matching: sizes and values of entries by least squares, against a literal version in float64."""

from dataclasses import replace

import numpy as np
import pytest
from cuda_words import from_words, to_words
from layers import layer_of, log_sums
from small_models import compressor_of, config_of, ids_of, model_of, new_cache

from minillm.cache.kv_cache import Entries, KVCache
from minillm.cache.page_pool import PagePool
from minillm.compress import compression, matching
from minillm.compress.matching import ask, matched
from minillm.compress.plan import Queries
from minillm.compress.reading import extend
from minillm.ops.cuda_ops import CudaOps

F32 = np.float32


def literal_ask(layer, n):
    """Of each head: queries, positions, logs of sums, shares, outputs, query by query."""
    group, found = len(layer.queries[0].q) // len(layer.lengths), []
    pos = np.concatenate([x.pos for x in layer.queries])
    q, lse = (np.concatenate([getattr(x, name) for x in layer.queries], axis=1) for name in ("q", "lse"))
    asks, tokens = [x.asks for x in layer.queries for _ in x.pos], []
    for kind in set(asks):  # as many of the text as of questions about it
        of_kind, some = [i for i, other in enumerate(asks) if other == kind], n // len(set(asks))
        at = np.linspace(0, len(of_kind) - 1, min(some, len(of_kind)))
        tokens += {of_kind[round(float(i))] for i in at}
    tokens.sort()
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


def ask_layer(layer, tokens, new=0):
    """`ask` of a layer's rows, which lie in pages, but for the last `new` of each head."""
    ops, d, ends = layer.ops, layer.k.shape[1], np.cumsum(layer.lengths)
    stored = np.ones(len(layer.pos), bool)
    for end in ends:
        stored[end - new : end] = False
    stored, coming = (ops.array(np.flatnonzero(some).astype(np.int32)) for some in (stored, ~stored))
    seen = int(layer.queries[0].pos[0]) - new
    rows = layer.k, layer.v, np.log(layer.size), layer.pos
    cache = KVCache(PagePool(ops, d), 1, len(layer.lengths))
    cache.write(0, Entries(*(part[stored] for part in rows), layer.lengths - new))
    k, v = (part[coming].reshape(len(layer.lengths), new, d) for part in rows[:2])
    past = replace(cache.layer(0), seen=seen)
    return ask(layer.queries, tokens, k, v, past, layer.scale, layer.attention_window)


def match_layer(entries, asked, layer):
    """`matched` with what a layer says of the model."""
    return matched(entries, asked, layer.ops, layer.scale, layer.attention_window)


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
        had = np.minimum(had, 1 / size)  # no part of an attention is more than all of it
        if layer.attention_window:
            had[np.array(pos)[:, None] - entries.pos[lo:hi] >= layer.attention_window] = 0
        more, most = least_squares(had, (share - had @ size)[:, None])[:, 0], np.maximum(size, matching.MOST)
        size = np.clip(size + more, matching.LEAST, most)
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


def in_blocks(queries, sizes, asks=()):
    """In blocks of these sizes; asks: the numbers of those that are of questions."""
    ends, blocks = np.cumsum(sizes), []
    for number, (lo, hi) in enumerate(zip([0, *ends], ends, strict=False)):
        blocks.append(Queries(queries.q[:, lo:hi], queries.pos[lo:hi], queries.lse[:, lo:hi], number in asks))
    return blocks


@pytest.mark.parametrize("asks", [(), (1,)])
@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize(("n", "tokens", "work"), [(60, 40, 1e9), (60, 7, 1e9), (60, 400, 1e9), (60, 40, 20000)])
def test_literal(n, tokens, work, window, asks, monkeypatch):
    """More entries than queries and fewer; ragged heads; queries in blocks, of questions too; sizes of earlier entries,
    some below 1; a model's window; queries left out where entries are many."""
    monkeypatch.setattr(matching, "WORK", work)
    rng = np.random.default_rng(tokens)
    layer, _ = layer_of(rng, [n, 9, n - 7], group=2, again=True, merged=True, d=8, n_queries=40)
    layer = with_sizes(layer, np.where(rng.random(len(layer.size)) < 0.2, 0.3, layer.size))
    layer.attention_window, layer.queries = window, in_blocks(layer.queries[0], [24, 16], asks)
    asked, literal = ask_layer(layer, tokens), literal_ask(layer, tokens)
    few = min(tokens // 2, 24) + min(tokens // 2, 16) if asks else min(tokens, 40)
    assert asked.q.shape == (3, 2 * few, 8)
    for head, (q, pos, lse, share, output) in enumerate(literal):
        np.testing.assert_array_equal(asked.q[head], q.astype(F32))
        np.testing.assert_array_equal(asked.pos, pos)
        for name, expected in (("lse", lse), ("share", share), ("output", output)):
            np.testing.assert_allclose(getattr(asked, name)[head], expected, rtol=1e-4, atol=1e-5, err_msg=name)
    entries = entries_of(layer, 0.5, rng)
    made = match_layer(entries, asked, layer)
    log_size, v = literal_matched(entries, literal, layer)
    np.testing.assert_allclose(made.log_size, log_size, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(made.v, v, rtol=1e-3, atol=2e-3)
    np.testing.assert_array_equal(made.k, entries.k)
    np.testing.assert_array_equal(made.pos, entries.pos)


def with_sizes(layer, size):
    """The same rows, each of which stands for so many tokens, and what the second reading's queries saw of them."""
    layer = replace(layer, size=size.astype(F32), computed={})
    layer.own = np.random.default_rng(0).normal(size=(len(layer.lengths), len(layer.queries[0].pos), layer.k.shape[1]))
    layer.queries[0].lse = log_sums(layer, layer.queries[0], layer.own)
    return layer


def test_new_tokens_are_rows_like_those_in_pages():
    rng = np.random.default_rng(6)
    layer, _ = layer_of(rng, [50, 50], group=2, again=True, d=8, n_queries=30)
    layer.attention_window = 70
    for part, expected in zip(ask_layer(layer, 20, new=23), ask_layer(layer, 20), strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 0.3, 0.05, 7, 80])
def test_all_rows_stay_as_they_are(size):
    rng = np.random.default_rng(1)
    layer, _ = layer_of(rng, [50, 20], group=2, again=True, d=8, n_queries=30)
    layer = with_sizes(layer, np.full(len(layer.size), size))
    entries = entries_of(layer, 1, rng)
    made = match_layer(entries, ask_layer(layer, 30), layer)
    np.testing.assert_allclose(made.log_size, entries.log_size, atol=1e-4)
    np.testing.assert_allclose(made.v, entries.v, atol=1e-4)


def test_a_head_may_hold_nothing():
    rng = np.random.default_rng(5)
    layer, _ = layer_of(rng, [30, 30], group=2, again=True, d=8, n_queries=30)
    entries = entries_of(layer, 0.5, rng)
    part = slice(15, None)
    alone = Entries(*(getattr(entries, name)[part] for name in ("k", "v", "log_size", "pos")), np.array([0, 15]))
    made, both = (match_layer(some, ask_layer(layer, 30), layer) for some in (alone, entries))
    for name in ("v", "log_size"):
        np.testing.assert_array_equal(getattr(made, name), getattr(both, name)[part])
    nothing = Entries(*(getattr(entries, name)[:0] for name in ("k", "v", "log_size", "pos")), np.array([0, 0]))
    assert not len(match_layer(nothing, ask_layer(layer, 30), layer).v)


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
    made = match_layer(entries, ask_layer(layer, 200), layer)
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
    entries, others = entries_of(layer, 0.2, rng), ask_layer(layer, 300)
    made = match_layer(entries, ask_layer(layer, 150), layer)
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
        **{"ops": ops, "k_rows": words[0], "v_rows": words[1], "computed": {}, "shared": {}},
        **{name: up(getattr(layer, name)) for name in ("size", "pos", "protected")},
        queries=[Queries(words[2], queries.pos, up(queries.lse.astype(F32)))],
    )
    entries_there = Entries(
        *(up(to_words(rows, "bf16")) for rows in (entries.k, entries.v)),
        *(up(np.ascontiguousarray(x)) for x in (entries.log_size.astype(F32), entries.pos)),
        entries.lengths,
    )
    made, made_there = (
        match_layer(entries, ask_layer(layer, 16), layer),
        match_layer(entries_there, ask_layer(there, 16), there),
    )
    for name, atol in (("log_size", 1e-3), ("v", 0.02)):  # what was got is bf16 there
        np.testing.assert_allclose(ops.host(getattr(made_there, name)), getattr(made, name), rtol=1e-3, atol=atol)


@pytest.mark.parametrize("budget", [0.3, 60])
def test_a_prompt_and_a_later_turn_are_fitted(budget, monkeypatch):
    """What is stored is what is stored without, fitted to what each layer was asked."""
    model, asked = model_of(config_of()), []
    monkeypatch.setattr(compression, "ask", lambda *arguments: asked.append(ask(*arguments)) or asked[-1])
    fitted = compressor_of(model, "hindsight", budget, match=40)
    plain, cache = compressor_of(model, "hindsight", budget, match=0), new_cache(model)
    for turn, n in enumerate((200, 150)):
        other, before = cache.fork(), len(asked)
        extend(model, ids_of(n, turn), other, plain)
        assert len(asked) == before
        extend(model, ids_of(n, turn), cache, fitted)
        assert len(asked) == before + 2
        for index in range(2):
            expected, stored = (
                matched(other.read(index), asked[before + index], model.ops, model.scale),
                cache.read(index),
            )
            for name in ("k", "pos", "lengths", "v", "log_size"):
                np.testing.assert_allclose(getattr(stored, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
            assert np.abs(stored.v - other.read(index).v).max() > 0.05
