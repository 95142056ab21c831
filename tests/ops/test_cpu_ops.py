"""The compiled kernels, on every path of this machine, against NumPy in float64 and the reference backend.

Tolerances of x W^T are shares of |x| |w|. float32: 1e-6. bf16 operands (many rows on avx512 and amx) err by up to 2^-9
a factor, random signs leave less: 4e-3. Activations of 16 bits (few rows of blocks) err by 1 / 65,000 of the largest of
32: 1e-4."""

import os
import threading
import weakref
from dataclasses import replace

import gguf
import numpy as np
import pytest
from blocks import BLOCKS, random_blocks
from compiled import PATHS, cpu_ops
from literal import NEAREST, FakeRope, check_nearest, gated, prefill

from minillm.cache.kv_cache import Entries, KVCache, PagedLayer
from minillm.cache.page_pool import PagePool
from minillm.errors import UsageError
from minillm.files.config import ACTIVATIONS
from minillm.files.formats import FLOATS, FORMATS
from minillm.files.weights import Weight
from minillm.ops import cpu_lib
from minillm.ops.cpu_ops import CpuOps
from minillm.ops.numpy_ops import NUMPY as numpy_ops
from minillm.ops.pages import BFLOAT16, FLOAT32, StoredRows

KINDS = [*(format.name for format in FLOATS), *BLOCKS]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Each path in turn, which `cpu_ops` takes."""
    monkeypatch.setattr(cpu_ops.lib, "path", request.param)
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def normal(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def weight(rng, kind, n_out, n_in, scale=1.0):
    """A random Weight, its values about `scale` large."""
    if kind in ("F32", "F16"):
        data = (normal(rng, n_out, n_in) * np.float32(scale)).astype({"F32": np.float32, "F16": np.float16}[kind])
    elif kind == "BF16":
        data = ((normal(rng, n_out, n_in) * np.float32(scale)).view(np.uint32) >> 16).astype(np.uint16)
    else:
        data = random_blocks(rng, kind, n_out, n_in, scale)
    return Weight(FORMATS[kind], data, (n_out, n_in))


def close(actual, expected, tolerance):
    """|actual - expected| <= tolerance * the largest |expected|."""
    assert actual.shape == expected.shape and np.isfinite(actual).all()
    assert np.abs(actual - expected).max(initial=0) <= tolerance * max(np.abs(expected).max(initial=0), 1e-30)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 33, 300])
def test_linear(path, rng, kind, n):
    block = FORMATS[kind].block
    for n_out, n_in in [(1, 32), (37, 96), (64, 160), (130, 576)]:
        n_in = n_in + 7 if kind not in BLOCKS else -(-n_in // block) * block
        w, x, bias = weight(rng, kind, n_out, n_in, 0.1), normal(rng, n, n_in), normal(rng, n_out)
        exact = x.astype(np.float64) @ w.rows(0, n_out).astype(np.float64).T
        share = 4e-3 if n > 4 and path in ("avx512", "amx") else 1e-4 if kind in BLOCKS else 1e-6
        norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w.rows(0, n_out), axis=1)
        allowed = share * norms + 1e-6
        assert (np.abs(cpu_ops.linear(x, w) - exact) <= allowed).all()
        assert (np.abs(cpu_ops.linear(x, cpu_ops.prepare(w), bias) - exact - bias) <= allowed).all()


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("n", [1, 4])
def test_whole_activations_are_exact(path, rng, kind, n):
    """Activations that are whole numbers up to 127 * 256, one of them that in each block, lose nothing but a last bit
    where the low half is -128: only float32 sums are left."""
    w, x = weight(rng, kind, 48, 256), rng.integers(-32512, 32513, (n, 256)).astype(np.float32)
    x[x % 256 == 128] += 1
    x[:, ::32] = 32512
    exact = x.astype(np.float64) @ w.rows(0, 48).astype(np.float64).T
    close(cpu_ops.linear(x, w), exact, 2e-6)


@pytest.mark.parametrize("kind", ["Q8_0", "BF16"])
def test_linear_of_huge_tiny_and_zero_rows(path, rng, kind):
    w, x = weight(rng, kind, 40, 64), normal(rng, 4, 64) * np.float32([[1e20], [1e-20], [0], [1]])
    exact = x.astype(np.float64) @ w.rows(0, 40).astype(np.float64).T
    for rows in (slice(0, 4), slice(0, 1), slice(1, 2), slice(2, 3)):
        for row, expected in zip(cpu_ops.linear(x[rows], w), exact[rows], strict=True):
            close(row, expected, 2e-2)


@pytest.mark.parametrize("n", [1, 100])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_visible(path, rng, n, bad):
    for kind in KINDS:
        x = normal(rng, n, 256)
        x[-1, 5] = bad
        y = cpu_ops.linear(x, weight(rng, kind, 40, 256))
        assert not np.isfinite(y[-1]).any() and np.isfinite(y[:-1]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_embed_and_rows_are_the_stored_values(path, rng, kind):
    w, ids = weight(rng, kind, 50, 512), np.array([0, 49, 7, 7, 16, 15])
    np.testing.assert_allclose(cpu_ops.embed(w, ids), w.rows(0, 50)[ids], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(cpu_ops.prepare(w).rows(14, 19), w.rows(14, 19), rtol=1e-6, atol=1e-7)
    with pytest.raises(IndexError):
        cpu_ops.embed(w, [50])


@pytest.mark.parametrize(
    "kind", [name for name, format in FORMATS.items() if format.is_float or format.kind is not None]
)
def test_what_a_matrix_takes_is_known_before(path, rng, kind):
    w = Weight(FORMATS[kind], weight(rng, kind, 37, 768).data, (37, 768))
    assert cpu_ops.held_bytes(FORMATS[kind], w.shape) == cpu_ops.prepare(w).nbytes


# relative root mean square error of what is made of formats that are not kept, of random blocks
REMADE = {"IQ4_NL": 0, "MXFP4": 0, "Q3_K": 0, "IQ4_XS": 3e-4, "Q2_K": 6e-3}


@pytest.mark.parametrize("kind, share", REMADE.items())
def test_other_formats_become_kept_ones(path, rng, kind, share):
    """Those of whole numbers and one scale lose nothing, but for IQ4_XS the last bits of a scale; the others are
    rounded a second time."""
    assert set(REMADE) == {name for name, format in FORMATS.items() if format.becomes and format.kind is not None}
    w = Weight(FORMATS[kind], random_blocks(rng, kind, 37, 768, 1.0), (37, 768))
    exact = np.float64(gguf.dequantize(w.data, gguf.GGMLQuantizationType[kind]))
    made = cpu_ops.prepare(w)
    assert made.format is FORMATS[FORMATS[kind].becomes]
    error = np.sqrt(((made.rows(0, 37) - exact) ** 2).mean() / (exact**2).mean())
    assert error == 0 if share == 0 else share / 3 < error < share
    x = normal(rng, 3, 768)
    close(cpu_ops.linear(x, w), x.astype(np.float64) @ exact.T, max(share, 4e-3 if path in ("avx512", "amx") else 1e-4))


def test_scales_of_every_size_are_rounded_to_nearest(path, rng):
    """A scale of IQ4_XS is a half times a whole number, held as a half: subnormal and infinite ones too."""
    blocks, halves = rng.integers(0, 256, (4096, 136), np.uint8), rng.integers(0, 65536, 4096).astype(np.uint16)
    halves[np.isnan(halves.view(np.float16))] = 0x3C00
    blocks[:, :2] = halves[:, None].view(np.uint8)
    w = Weight(FORMATS["IQ4_XS"], blocks, (4096, 256))
    low, high = blocks[:, 4:8, None] >> np.array([0, 4], np.uint8) & 15, blocks[:, 2:4].copy().view(np.uint16)
    scale = low.reshape(-1, 8) | (high >> np.arange(0, 16, 2, dtype=np.uint16) & 3) << 4
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        d = (d * (scale.astype(np.float32) - 32)).astype(np.float16).astype(np.float32)
        values = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)
        nibbles = blocks[:, 8:].reshape(-1, 8, 1, 16) >> np.array([0, 4], np.uint8)[:, None] & 15
        expected = (values[nibbles].reshape(-1, 8, 32) * d[:, :, None]).reshape(-1, 256)
    np.testing.assert_array_equal(cpu_ops.prepare(w).rows(0, 4096), expected)


@pytest.mark.parametrize("n, dim", [(1, 1), (3, 17), (5, 576), (70, 1000)])
def test_rms_norm(path, rng, n, dim):
    x, w = normal(rng, n, dim) * np.float32(3), normal(rng, dim)
    x[0] *= 1e-6
    wide = x.astype(np.float64)
    exact = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * w
    for row, expected in zip(cpu_ops.rms_norm(x, w, 1e-5), exact, strict=True):
        close(row, expected, 1e-6)


@pytest.mark.parametrize("d", [2, 12, 64, 100])
def test_rope(path, rng, d):
    for shape, table in [
        ((3, 7, d), (7, d // 2)),
        ((2, 3, d), (2, 1, d // 2)),
        ((9, d), (9, d // 2)),
        ((0, d), (0, d // 2)),
    ]:
        x, cos, sin = normal(rng, *shape), normal(rng, *table), normal(rng, *table)
        np.testing.assert_allclose(cpu_ops.rope(x, cos, sin), numpy_ops.rope(x, cos, sin), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_glu(path, rng, activation):
    gate, up = normal(rng, 3, 20001) * np.float32(10), normal(rng, 3, 20001)
    gate[0, :6] = [-1e4, 1e4, 0, -87, 88, -0.0]
    exact = gated(activation, gate, up)
    assert cpu_ops.glu(gate, up, *ACTIVATIONS[activation]) is gate
    np.testing.assert_allclose(gate, exact, rtol=3e-6, atol=1e-30 if activation == "silu" else 1e-6)


STORES = {
    "f32": (numpy_ops, "auto"),
    "bf16": (cpu_ops, "auto"),
    "int8": (cpu_ops, "int8"),
    "k5v4": (cpu_ops, "k5v4"),
    "q4": (cpu_ops, "q4"),
}  # backend and dtype of pages


def paged(rng, store, lengths, d, page_size=32, seen=None, merged=True, scale=1.0):
    """A PagedLayer whose heads hold `lengths` entries on pages that do not lie together, some entries of size > 1."""
    ops, dtype = STORES[store]
    pool = PagePool(ops, d, page_size, slab_bytes=7 * page_size * FLOAT32.entry_bytes(d), dtype=dtype)
    cache = KVCache(pool, 1, len(lengths))
    for head, length in enumerate(lengths):
        cache._resize(0, head, 0, length)
    pages, used = rng.permutation(len(pool.refs)).astype(np.int32), 0
    for head, n in enumerate(cache.n_pages()[0]):
        cache._new_pages()[0, head, :n] = pages[used : used + n]
        used += n
    pool.refs[:] = np.isin(np.arange(len(pages)), pages[:used])
    layer = cache.layer(0)
    layer.seen = seen if seen is not None else max(lengths, default=0) * 2
    for head, length in enumerate(lengths):
        positions = np.sort(rng.choice(layer.seen, length, replace=False)) if length else np.zeros(0, int)
        done = 0
        for run in layer.runs(head):
            n = len(run["pos"])
            for field in "kv":
                values = normal(rng, n, d) * np.float32(scale)
                format = getattr(pool.format, field)
                for part, stored in zip(format.parts(d), format.pack(values), strict=True):
                    run[field + part][:] = stored
            run["log_size"][:] = np.log(rng.integers(1, 50, n)) if merged else 0
            run["pos"][:] = positions[done : done + n]
            done += n
    layer.cache = cache  # keeps the pages
    return layer


def attend(q, k, v, log_size, visible, scale):
    """One query (d,) in float64."""
    k, v, logits = k[visible].astype(np.float64), v[visible].astype(np.float64), log_size[visible].astype(np.float64)
    logits = logits + k @ q.astype(np.float64) * scale
    p = np.exp(logits - logits.max())
    return p @ v / p.sum()


def entries(layer, head):
    return layer.read(head)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    "d, group, lengths, page_size",
    [
        (64, 3, (1, 700, 33), 32),
        (12, 1, (5, 1), 1),
        (128, 4, (40, 2000), 32),
        (80, 7, (31,), 5),
        (20, 2, (64, 300), 48),
    ],
)
@pytest.mark.parametrize("window", [None, 50])
def test_decode_attention(path, rng, store, d, group, lengths, page_size, window):
    batch = [paged(rng, store, lengths, d, page_size), paged(rng, store, lengths[::-1], d, page_size)]
    for layer in batch:  # the entry of the token itself
        for head in range(len(lengths)):
            list(layer.runs(head))[-1]["pos"][-1] = layer.seen
    batch[1].pool, batch[1].pages = (
        batch[0].pool,
        batch[0].pages,
    )  # one pool: the second sequence shares pages with the first
    batch[1].lengths, batch[1].seen = np.maximum(batch[0].lengths // 2, 1), batch[0].seen // 2
    q = normal(rng, 2, group * len(lengths), d)
    got = cpu_ops.decode_attention(q, batch, 0.3, window).reshape(q.shape)
    for b, layer in enumerate(batch):
        for head in range(q.shape[1]):
            k, v, log_size, pos = entries(layer, head // group)
            visible = pos > layer.seen - window if window else slice(None)
            if np.any(visible) if window else True:
                close(got[b, head], attend(q[b, head], k, v, log_size, visible, 0.3), 2e-5)


@pytest.mark.parametrize("size", [1e-12, 1e3, 1e7])
def test_logits_of_any_size(path, rng, size):
    layer = paged(rng, "f32", (90, 300), 64, merged=False)
    q, d = normal(rng, 1, 6, 64) * np.float32(size), 64
    got = cpu_ops.decode_attention(q, [layer], 0.125).reshape(6, d)
    new = normal(rng, 6, 3, d) * np.float32(size), normal(rng, 2, 3, d), normal(rng, 2, 3, d)
    prefill, lse = cpu_ops.prefill_attention(*new, layer, 0.125)
    assert np.isfinite(prefill).all() and np.isfinite(lse).all()
    for head in range(6):
        k, v, log_size, _ = entries(layer, head // 3)
        logits = k.astype(np.float64) @ q[0, head] * 0.125
        if (
            size < 1 or np.diff(np.sort(logits)[-2:]) > 1e-5 * np.abs(logits).max()
        ):  # float32 knows which is the largest
            close(got[head], attend(q[0, head], k, v, log_size, slice(None), 0.125), 1e-3 if size > 1 else 1e-5)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    "d, group, lengths, n",
    [(64, 3, (0, 0), 200), (64, 3, (0, 130), 1), (12, 2, (33, 1, 0), 37), (128, 4, (200,), 65), (80, 1, (7, 64), 150)],
)
@pytest.mark.parametrize("window", [None, 40])
def test_prefill_attention(path, rng, store, d, group, lengths, n, window):
    layer = paged(rng, store, lengths, d, seen=300)
    q, k, v = normal(rng, group * len(lengths), n, d), normal(rng, len(lengths), n, d), normal(rng, len(lengths), n, d)
    got, lse = cpu_ops.prefill_attention(q, k, v, layer, d**-0.5, window)
    got = got.reshape(n, -1, d)
    tolerance = 2e-2 if path in ("avx512", "amx") else 1e-5
    for head in range(len(q)):
        k_past, v_past, log_size, pos = entries(layer, head // group)
        keys, values = np.concatenate([k_past, k[head // group]]), np.concatenate([v_past, v[head // group]])
        log_size = np.append(log_size, np.zeros(n, np.float32))
        pos = np.append(pos, layer.seen + np.arange(n))
        for i in range(0, n, 13):
            visible = np.arange(len(pos)) <= len(k_past) + i
            if window:
                visible &= pos > layer.seen + i - window
            close(got[i, head], attend(q[head, i], keys, values, log_size, visible, d**-0.5), tolerance)
            logits = (keys.astype(np.float64) @ q[head, i] * d**-0.5 + log_size)[visible]
            assert abs(lse[head, i] - np.log(np.exp(logits).sum())) <= tolerance


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("lengths, m", [((0, 130), 0), ((33, 0), 150), ((0, 0), 40), ((200, 64), 1)])
@pytest.mark.parametrize("window", [None, 60])
def test_queries_at_any_positions(path, rng, store, lengths, m, window):
    """Before, among and after the new tokens, more than a task has; with a window some see nothing."""
    d, group, seen = 64, 3, 300
    layer = paged(rng, store, lengths, d, seen=seen)
    q_pos = np.sort(rng.choice(np.arange(seen, seen + m + 90), 70, replace=False))
    q, k, v = normal(rng, group * len(lengths), 70, d), normal(rng, len(lengths), m, d), normal(rng, len(lengths), m, d)
    past = [entries(layer, head) for head in range(len(lengths))]
    out, lse = prefill(q, k, v, past, seen, d**-0.5, window, q_pos=q_pos)
    got, got_lse = cpu_ops.prefill_attention(q, k, v, layer, d**-0.5, window, q_pos)
    tolerance = 2e-2 if path in ("avx512", "amx") else 1e-5
    np.testing.assert_array_equal(np.isfinite(got_lse), np.isfinite(lse))
    close(got, out, tolerance)
    np.testing.assert_allclose(got_lse, lse, rtol=0, atol=tolerance)


@pytest.mark.parametrize("n, d, n_entries", [(0, 8, 0), (1, 64, 1), (5, 7, 3), (3000, 64, 900), (4000, 12, 1)])
def test_merge(path, rng, n, d, n_entries):
    rows, dest, w = normal(rng, n, d), rng.integers(-1, n_entries, n) if n else np.zeros(0, int), normal(rng, n)
    exact = np.zeros((n_entries, d))
    np.add.at(exact, dest[dest >= 0], (rows.astype(np.float64) * w[:, None])[dest >= 0])
    np.testing.assert_allclose(cpu_ops.merge(rows, dest, w, n_entries), exact, rtol=1e-5, atol=1e-4)


WRITERS = [(numpy_ops, "f32"), (numpy_ops, "int8"), (cpu_ops, "f32"), (cpu_ops, "bf16"), (cpu_ops, "int8")]
ANY_ROWS = [*WRITERS, (numpy_ops, "q4"), (cpu_ops, "q4"), (cpu_ops, "k5v4")]
ROWS = [
    ((70, 0, 33), (0, 0, 0), 5),
    ((70, 1, 32), (40, 1, 0), None),
    ((0, 0), (0, 0), 3),
    ((9,), (9,), 0),
    ((64,), (3,), 1),
]


@pytest.mark.parametrize("ops, store", ANY_ROWS)
@pytest.mark.parametrize("lengths, start, n", ROWS)
def test_rows_are_merged_where_they_lie(path, rng, ops, store, lengths, start, n):
    """Stored after the first `start` of each head, and then n new ones: as when they are one array."""
    d, start = 12, np.array(start)
    layer, rope = paged(rng, store, lengths, d), FakeRope(d)
    new = None if n is None else normal(rng, len(lengths), n, d)
    for i, field in enumerate("kv"):
        rows = StoredRows(layer, start, field, new)
        heads = [layer.read(head, first)[i] for head, first in enumerate(start)]
        heads = heads if new is None else [np.concatenate(parts) for parts in zip(heads, new, strict=True)]
        together = np.concatenate(heads)
        assert rows.shape == together.shape and rows.lengths.tolist() == [len(head) for head in heads]
        np.testing.assert_array_equal(ops.gather(rows), together)
        dest, w = rng.integers(-1, 20, len(together)), normal(rng, len(together))
        np.testing.assert_array_equal(ops.merge(rows, dest, w, 20), ops.merge(together, dest, w, 20))
        pos, entry_pos = (rng.integers(0, 500, m).astype(np.int32) for m in (len(together), 20))
        rest = pos, dest, w, entry_pos, *rope.tables(np.arange(500), 500)
        np.testing.assert_array_equal(ops.merge_unrotated(rows, *rest), ops.merge_unrotated(together, *rest))


@pytest.mark.parametrize("ops, store", WRITERS)
@pytest.mark.parametrize("lengths, start", [((70, 0, 33), (0, 0, 0)), ((70, 33, 64), (69, 33, 32)), ((3, 5), (3, 0))])
def test_entries_into_pages_and_out_of_them(path, rng, ops, store, lengths, start):
    d, start = 7, np.array(start)
    layer = paged(rng, store, lengths, d)
    before = [layer.read(head) for head in range(len(lengths))]
    counts = layer.lengths - start
    n = int(counts.sum())
    k, v = (rng.integers(-99, 99, (n, d)).astype(np.float32) for _ in "kv")  # bf16 keeps them, and so does
    k[:, 3] = v[:, 4] = 127  # int8 with a scale of 1
    entries = Entries(k, v, normal(rng, n), rng.integers(0, 999, n).astype(np.int32), counts)
    ops.write_entries(layer, start, entries)
    for name, got in zip(("log_size", "pos"), ops.read_labels(layer, start), strict=True):
        np.testing.assert_array_equal(got, getattr(entries, name))
    ends = np.cumsum(counts)
    for head, end in enumerate(ends):
        rows = slice(end - counts[head], end)
        written = entries.k[rows], entries.v[rows], entries.log_size[rows], entries.pos[rows]
        for got, old, new in zip(layer.read(head), before[head], written, strict=True):
            np.testing.assert_array_equal(got, np.concatenate([old[: start[head]], new]))


@pytest.mark.parametrize("ops, store", ANY_ROWS)
@pytest.mark.parametrize(
    "lengths, start, left", [((70, 0, 33), (0, 0, 0), (20, 0, 33)), ((9, 64, 70), (9, 3, 40), (0, 40, 7))]
)
@pytest.mark.parametrize("d", [12, 64])
def test_entries_become_sums_of_themselves(path, rng, ops, store, lengths, start, left, d):
    """In any order, each in its head: what is read out of the pages then are the sums of what was read before."""
    layer, start, left = paged(rng, store, lengths, d), np.array(start), np.array(left)
    before = [[a.copy() for a in layer.read(head)] for head in range(len(lengths))]
    first, counts = np.cumsum(left) - left, layer.lengths - start
    dest = [rng.integers(at, at + max(n, 1), count) for n, count, at in zip(left, counts, first, strict=True)]
    dest = [np.where(rng.random(len(of)) < (0.2 if n else 2), -1, of) for n, of in zip(left, dest, strict=True)]
    weights = [normal(rng, int(counts.sum())) * (rng.random(int(counts.sum())) < 0.7) for _ in "kv"]
    n = int(left.sum())
    entries = Entries(None, None, normal(rng, n), rng.integers(0, 999, n).astype(np.int32), left)
    ops.rewrite(layer, start, np.concatenate(dest), [w.astype(np.float32) for w in weights], entries)
    after, row = replace(layer, lengths=start + left), 0
    for head, (lo, m) in enumerate(zip(first, left, strict=True)):
        own, got = slice(row, row + counts[head]), after.read(head)
        row = own.stop
        for i, w in enumerate(weights):
            sums = np.zeros((m, d))
            for r, to in enumerate(dest[head]):
                if to >= 0:
                    sums[to - lo] += np.float64(w[own][r]) * before[head][i][start[head] + r]
            np.testing.assert_array_equal(got[i][: start[head]], before[head][i][: start[head]])
            error = {"f32": 1e-6, "bf16": 4e-3, "int8": 1e-2, "k5v4": 0.25, "q4": 0.25}[store]
            close(got[i][start[head] :], sums, error)
        for i, label in ((2, entries.log_size), (3, entries.pos)):
            np.testing.assert_array_equal(got[i][start[head] :], label[lo : lo + m])


@pytest.mark.parametrize("case", range(40))
def test_planning_is_numpy_s(case):
    """Bit for bit, segments of no rows and ties among them."""
    rng = np.random.default_rng(case)
    lengths = rng.integers(0, 60, rng.integers(1, 5))
    n = int(lengths.sum())
    scores = rng.integers(-2, 3, n).astype(np.float32) * np.float32(-0.0) if case == 0 else normal(rng, n)
    scores[rng.random(n) < 0.3] = rng.choice([-np.inf, 0, -0.0, 1])
    pos = np.concatenate([np.sort(rng.permutation(100)[:m]) for m in lengths]).astype(np.int32)
    mask, reach = rng.random(n) < rng.random(), int(rng.integers(1, 20))
    most = rng.integers(-1, 70, len(lengths))
    same = np.testing.assert_array_equal
    same(cpu_ops.segment_topk(scores, lengths, most), numpy_ops.segment_topk(scores, lengths, most))
    same(cpu_ops.segment_count(mask, lengths), numpy_ops.segment_count(mask, lengths))
    for ours, numpys in zip(cpu_ops.compact(mask, mask.sum()), numpy_ops.compact(mask, mask.sum()), strict=True):
        same(ours, numpys)
    near = [of.neighbours(mask, pos, lengths, reach) for of in (cpu_ops, numpy_ops)]
    same(near[0][~mask], near[1][~mask])
    size, scores = rng.choice(np.float32([1, 1.3, 2]), n), np.abs(np.nan_to_num(scores))
    rows = scores, size, pos, mask, mask & (rng.random(n) < 0.2), lengths, reach, 0.75
    ours, numpys = cpu_ops.fold(*rows), numpy_ops.fold(*rows)
    for i in (0, 2, 3):
        same(ours[i], numpys[i])
    same(ours[1][ours[0] >= 0], numpys[1][ours[0] >= 0])


@pytest.mark.parametrize("n_keys, n, m, d", NEAREST)
def test_the_nearest_of_a_segment(path, rng, n_keys, n, m, d):
    check_nearest(cpu_ops, rng, n_keys, n, m, d, first_of_equals=True)


@pytest.mark.parametrize("ops", [numpy_ops, cpu_ops], ids=["numpy", "c"])
@pytest.mark.parametrize("n, d, n_entries, factor", [(0, 8, 0, 1), (1, 64, 1, 1), (5, 6, 3, 1.3), (3000, 64, 900, 1.1)])
def test_merge_unrotated(path, rng, ops, n, d, n_entries, factor):
    """Every other row alone at its own place is copied, bit for bit."""
    dest, w = rng.integers(-1, n_entries, n) if n else np.zeros(0, int), normal(rng, n)
    pos, entry_pos = rng.integers(0, 500, n).astype(np.int32), rng.integers(0, 500, n_entries).astype(np.int32)
    alone = np.flatnonzero((np.bincount(dest[dest >= 0], minlength=n_entries + 1) == 1)[dest] & (dest >= 0))[::2]
    w[alone], pos[alone] = 1, entry_pos[dest[alone]]
    rope = FakeRope(d, factor=factor)
    rows = np.float32(rope.rotated(normal(rng, n, d), pos))
    exact = np.zeros((n_entries, d))
    np.add.at(exact, dest[dest >= 0], (rope.undone(rows, pos) * w[:, None])[dest >= 0])
    got = ops.merge_unrotated(rows, pos, dest, w, entry_pos, *rope.tables(np.arange(500), 500))
    np.testing.assert_allclose(got, rope.rotated(exact, entry_pos), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[dest[alone]], rows[alone])


def test_equal_keys_are_not_more_alike_than_one(path, rng):
    keys = np.repeat(rng.normal(size=(500, 64)).astype(np.float32), 2, axis=0)
    for length in (2, 1000):
        starts = np.arange(0, len(keys), length)
        clusters = cpu_ops.greedy_clusters(keys, np.arange(len(keys)), starts, np.full(len(starts), length))
        assert clusters.counts([1.0, 0.9999]) == [len(keys), len(keys) // 2]


@pytest.mark.parametrize("ops", [numpy_ops, cpu_ops], ids=["numpy", "c"])
@pytest.mark.parametrize("d, rotated", [(16, False), (16, True), (80, True), (7, False)])
def test_greedy_clusters(path, rng, ops, d, rotated):
    lengths = np.array([1, 3, 70, 0, 600, 31, 2, 16, 33])
    starts = np.cumsum(lengths) - lengths + np.arange(len(lengths))  # one of no segment between two of them
    n_rows = int((starts + lengths).max()) + 100
    rows = np.sort(rng.permutation(n_rows)[:-90])
    content, pos = normal(rng, n_rows, d) + 2 * normal(rng, d), rng.integers(0, 900, n_rows).astype(np.int32)
    content[rows[5]] = 0
    rope, rotation, keys = FakeRope(d, factor=1.2), None, content
    if rotated:
        keys, rotation = np.float32(rope.rotated(content, pos)), (pos, *rope.tables(np.arange(900), 900))
        content = rope.undone(keys, pos)
    clusters = ops.greedy_clusters(keys, rows, starts, lengths, rotation)
    unit = content.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-300)
    taus = [0.31, *np.linspace(0.6, 0.95, 7), 1.01, -1.1]
    counts = clusters.counts(taus)
    for tau, count in zip(taus, counts, strict=True):
        seed, similarity = clusters.assign(tau)
        sure = np.zeros(n_rows, bool)  # rows of segments in which float32 has no doubt
        expected = np.arange(n_rows)
        for start, length in zip(starts, lengths, strict=True):  # algorithm 1, literally
            segment = free = rows[start : start + length]
            margin = 1.0
            while len(free):
                first, rest = free[0], free[1:]
                cosines = unit[rest] @ unit[first]
                margin = min(margin, np.abs(cosines - tau).min(initial=1))
                expected[rest[cosines > tau]] = first
                free = rest[~(cosines > tau)]
            sure[segment] = margin > 1e-6
        np.testing.assert_array_equal(seed[sure], expected[sure])
        assert sure.sum() > 100
        inside = np.concatenate([rows[a : a + n] for a, n in zip(starts, lengths, strict=True)])
        assert count == (seed == np.arange(n_rows))[inside].sum()
        outside = np.setdiff1d(np.arange(n_rows), inside)
        np.testing.assert_array_equal(seed[outside], outside)
        alone = seed == np.arange(n_rows)
        assert (similarity[alone] == 1).all()
        np.testing.assert_allclose(similarity[~alone], (unit * unit[seed]).sum(1)[~alone], atol=1e-5)
    assert len(set(counts)) > 3


def test_bf16_pages_round_to_nearest_even(path):
    """1 + 2^-8 lies between two bf16 numbers, as does 1 + 3 * 2^-8; ties go to the even one."""
    slab = cpu_ops.new_slab(2, 4, 2, BFLOAT16)
    rows = np.float32([[1 + 2**-8, 1 + 3 * 2**-8], [-1 - 2**-8, 1 + 2**-8 + 2**-20], [np.inf, -0.0]])
    pool = PagePool(cpu_ops, 2, 4)
    pool.slabs.append(slab)
    layer = PagedLayer(pool, np.array([[1]], np.int32), np.array([3]), 3)
    cpu_ops.write_entries(layer, np.array([0]), Entries(rows, rows, np.zeros(3), np.arange(3), np.array([3])))
    expected = np.float32([[1, 1 + 2**-6], [-1, 1 + 2**-7], [np.inf, -0.0]])
    np.testing.assert_array_equal(BFLOAT16.k.floats(slab.fields["k"][1, :3]), expected)
    assert sum(field.nbytes for field in slab.fields.values()) == len(slab.memory) == 2 * 4 * BFLOAT16.entry_bytes(2)


@pytest.mark.parametrize("d", [1, 12, 64, 100])
@pytest.mark.parametrize("ops", [numpy_ops, cpu_ops], ids=["numpy", "c"])
def test_rows_of_8_bits(path, rng, ops, d):
    """As the definition says, number by number; and what was read is stored as the same words."""
    k, v = normal(rng, 2, 40, d) * np.float32(10.0) ** rng.integers(-9, 9, (2, 40, 1)).astype(np.float32)
    k[3], v[5, : d // 2], k[7] = 0, 0, rng.integers(-127, 128, d)
    k[8], k[9] = np.arange(d) + 0.5, 127  # ties
    for values in (k, v):
        values[7:9, 0] = 127
    layer, start = paged(rng, "int8", (40,), d), np.array([0])
    words = []
    for _ in range(2):
        ops.write_entries(layer, start, Entries(k, v, np.zeros(40), np.arange(40), np.array([40])))
        runs = list(layer.runs(0))
        words.append({name: np.concatenate([run[name] for run in runs]) for name in runs[0]})
        given, (k, v, *_) = (k, v), layer.read(0)
        if len(words) == 1:
            for rows, name in zip(given, "kv", strict=True):
                for row, got, scale in zip(rows, words[0][name], words[0][f"{name}_scale"], strict=True):
                    expected, word = literal_int8(row.tolist())
                    assert scale == word and got.tolist() == expected
    for name in words[0]:
        np.testing.assert_array_equal(words[0][name], words[1][name])


def literal_int8(row):
    """A row in Python's numbers: whole numbers, and the word of their scale."""
    largest = np.float32(max(map(abs, row))) / np.float32(127)
    word, rest = divmod(int(largest.view(np.uint32)), 1 << 16)
    word += rest > 1 << 15 or (rest == 1 << 15 and word % 2)
    scale = float(np.uint32(word << 16).view(np.float32))
    return [round(float(np.float32(x) / np.float32(scale))) if scale else 0 for x in row], word


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same(rng, threads):
    w, x = weight(rng, "Q4_1", 200, 64), normal(rng, 40, 64)
    layer, q = paged(rng, "bf16", (500, 20), 64), normal(rng, 1, 4, 64)
    expected = cpu_ops.linear(x, w), cpu_ops.decode_attention(q, [layer], 0.1)
    some = CpuOps(cpu_ops.name, threads)
    for _ in range(50):
        np.testing.assert_array_equal(some.linear(x, w), expected[0])
        np.testing.assert_allclose(some.decode_attention(q, [layer], 0.1), expected[1], rtol=1e-5, atol=1e-6)
    assert cpu_lib.library().functions["set_threads"](threads) == threads


def test_backends_of_one_process_have_paths_and_threads_of_their_own(rng):
    """By turns, and from two Python threads at once: each gives, bit for bit, what it gives alone."""
    w, x, library, seen = weight(rng, "Q4_1", 200, 64), normal(rng, 3, 64), cpu_lib.library(), set()
    backends = [CpuOps("portable", 1), CpuOps(PATHS[0], 3)]
    expected = [some.linear(x, w) for some in backends]
    if PATHS[0] != "portable":  # elsewhere activations of 16 bits meet the blocks
        assert not np.array_equal(*expected)

    def many(some, alone):
        for _ in range(200):
            seen.add((some.name, np.array_equal(some.linear(x, w), alone)))

    workers = [threading.Thread(target=many, args=pair) for pair in zip(backends, expected, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert seen == {("portable", True), (PATHS[0], True)}
    for some in backends:
        some.linear(x, w)
        assert (library.path, library.threads) == (some.name, some.lib.threads)


def test_a_forked_child_computes_without_the_threads(rng):
    w, x = weight(rng, "Q4_1", 200, 64), normal(rng, 40, 64)
    expected = cpu_ops.linear(x, w)
    for _ in range(20):  # a thread may be busy, falling asleep or asleep
        cpu_ops.linear(x, w)
        if not (child := os.fork()):
            alone = cpu_lib.library().functions["set_threads"](1) == 1 and (cpu_ops.linear(x, w) == expected).all()
            os._exit(0 if alone else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_an_arena_goes_back_with_its_last_array():
    arrays = [cpu_lib.huge_pages(n) for n in (1, 100, cpu_lib.ARENA_BYTES + 1, 64, 7)]
    for i, array in enumerate(arrays):
        assert array.ctypes.data % 64 == 0 and not array.any()
        array[:] = i + 1
    assert all((array == i + 1).all() for i, array in enumerate(arrays))
    arena = weakref.ref(arrays[2].base)
    del array, arrays[2:]
    assert arena() is None and (arrays[1] == 2).all()


def test_a_path_that_cannot_be_had_is_refused(monkeypatch):
    monkeypatch.setenv("MINILLM_CPU", "sse9")
    with pytest.raises(UsageError, match="MINILLM_CPU=sse9 .* portable"):
        cpu_lib.choose_path()
    monkeypatch.setenv("MINILLM_CPU", "numpy")
    assert cpu_lib.choose_path() == "numpy"
