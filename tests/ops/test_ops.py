"""The operations of the NumPy backend against literal float64."""

import tracemalloc
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from literal import NEAREST, attend, check_nearest, gated, paged_layer, prefill, random_entries, rotated

from minillm import ops
from minillm.errors import UsageError
from minillm.files.config import ACTIVATIONS
from minillm.files.formats import FORMATS
from minillm.files.weights import Weight
from minillm.ops import cpu_lib
from minillm.ops.numpy_ops import NUMPY as numpy_ops
from minillm.ops.numpy_ops import ROW_BLOCK, NumpyOps
from minillm.ops.pages import FLOAT32, PAGE_FORMATS

F32 = np.float32


def close(actual, expected, atol=2e-5):
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=atol)


def close_each(actual, expected, atol=2e-5):
    for ours, theirs in zip(actual, expected, strict=True):
        close(ours, theirs, atol)


def f32(array):
    return Weight.floats(np.ascontiguousarray(array, F32))


def stored_weight(kind, rng, n_out, n_in):
    """A Weight as it lies in a file, and its values in float64 by another way than minillm's."""
    values = rng.normal(size=(n_out, n_in)).astype(F32)
    if kind == "F32":
        return f32(values), np.float64(values)
    if kind == "F16":
        return Weight(FORMATS[kind], values.astype(np.float16), values.shape), np.float64(values.astype(np.float16))
    if kind == "BF16":
        words = (values.view(np.uint32) >> 16).astype(np.uint16)
        return Weight(FORMATS[kind], words, values.shape), np.float64((words.astype(np.uint32) << 16).view(F32))
    import gguf

    quant = gguf.GGMLQuantizationType[kind]
    blocks = gguf.quants.quantize(values, quant)
    return Weight(FORMATS[kind], blocks, values.shape), np.float64(gguf.quants.dequantize(blocks, quant))


# linear layers and what surrounds them


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("tile_bytes", [4 << 20, 4 * 64 * 5])  # all rows at once; 5 rows of 23 at a time
def test_linear_of_every_stored_kind(kind, tile_bytes, monkeypatch):
    monkeypatch.setattr("minillm.ops.numpy_ops.LINEAR_BYTES", tile_bytes)
    rng = np.random.default_rng(0)
    weight, values = stored_weight(kind, rng, 23, 64)
    x, bias = rng.normal(size=(7, 64)).astype(F32), rng.normal(size=23).astype(F32)
    close(numpy_ops.linear(x, weight), x @ values.T)
    close(numpy_ops.linear(x, weight, bias), x @ values.T + bias)
    close(numpy_ops.linear(x[:1], weight, bias), x[:1] @ values.T + bias)


def test_linear_asks_a_weight_for_rows_and_nothing_else(monkeypatch):
    """A kind it does not know is widened by the weight itself, in tiles that never exceed LINEAR_BYTES."""
    monkeypatch.setattr("minillm.ops.numpy_ops.LINEAR_BYTES", 4 * 8 * 3)
    rng = np.random.default_rng(0)
    values, asked = rng.normal(size=(10, 8)).astype(F32), []

    def rows(lo, hi):
        asked.append((lo, hi))
        return values[lo:hi]

    weight = SimpleNamespace(format="unheard of", shape=values.shape, rows=rows)
    x = rng.normal(size=(2, 8)).astype(F32)
    close(numpy_ops.linear(x, weight), np.float64(x) @ values.T)
    assert asked == [(0, 3), (3, 6), (6, 9), (9, 10)]


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q4_1"])
def test_embed_takes_repeated_ids_in_any_order(kind):
    weight, values = stored_weight(kind, np.random.default_rng(0), 11, 32)
    ids = [3, 0, 3, 10, 1, 0]
    np.testing.assert_array_equal(numpy_ops.embed(weight, ids), values[ids].astype(F32))
    np.testing.assert_array_equal(numpy_ops.embed(weight, np.array([7])), values[[7]].astype(F32))


def test_rms_norm():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=40).astype(F32)
    # rows from where eps is everything to where it is nothing
    x = (rng.normal(size=(6, 40)) * np.array([0, 1e-6, 1e-3, 1, 1e4, 1e15])[:, None]).astype(F32)
    for eps in (1e-5, 1e-2):
        expected = np.float64(x)
        expected = expected / np.sqrt((expected**2).sum(axis=1, keepdims=True) / 40 + eps) * weight
        close(numpy_ops.rms_norm(x, weight, eps), expected, atol=1e-12)


def test_rope_turns_the_halves_and_back():
    rng = np.random.default_rng(0)
    x, angle = rng.normal(size=(3, 5, 8)).astype(F32), rng.uniform(-9, 9, (5, 4))
    cos, sin = np.cos(angle).astype(F32), np.sin(angle).astype(F32)
    turned = numpy_ops.rope(x, cos, sin)
    close(turned, rotated(x, angle), atol=2e-6)
    close(numpy_ops.rope(turned, cos, -sin), x, atol=2e-6)
    close(numpy_ops.rope(x, F32(1.3) * cos, F32(1.3) * sin), rotated(x, angle, 1.3), atol=3e-6)


def test_rope_broadcasts_one_position_a_sequence():
    """Decode: x (B, heads, d), cos and sin (B, 1, d/2)."""
    rng = np.random.default_rng(1)
    x, angle = rng.normal(size=(4, 3, 6)).astype(F32), rng.uniform(-9, 9, (4, 1, 3))
    close(numpy_ops.rope(x, np.cos(angle).astype(F32), np.sin(angle).astype(F32)), rotated(x, angle), atol=2e-6)


def test_swiglu_at_every_size_of_input():
    gate = np.array([0, -0.0, 1e-30, -1e-30, 1, -1, 20, -20, 80, -80, 87, -87, 89, -89, 1e4, -1e4, 3e38, -3e38], F32)
    up = np.linspace(-1, 1, len(gate)).astype(F32)
    expected = gated("silu", gate, up)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = gate.copy()
        out = numpy_ops.glu(given, up, *ACTIVATIONS["silu"])
    close(out, expected, atol=1e-30)
    assert out is given  # the wide middle of an MLP exists once


def test_geglu_is_gelu_by_tanh():
    gate = np.concatenate([np.linspace(-9, 9, 1001), [-1e4, 1e4, 0, 80, -80]]).astype(F32)
    up = np.linspace(-1, 1, len(gate)).astype(F32)
    close(numpy_ops.glu(gate.copy(), up, *ACTIVATIONS["gelu_tanh"]), gated("gelu_tanh", gate, up), atol=1e-6)


# prefill attention


def new_tokens(rng, n_heads, n_kv_heads, n, d):
    q = rng.normal(size=(n_heads, n, d)).astype(F32)
    k, v = rng.normal(size=(2, n_kv_heads, n, d)).astype(F32)
    return q, k, v


def nothing(n_kv_heads, d):
    return [(np.zeros((0, d)), np.zeros((0, d)), np.zeros(0), np.zeros(0, np.int32))] * n_kv_heads


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("row_block", [256, 7, 1])
def test_prefill_of_a_prompt(group, row_block, monkeypatch):
    monkeypatch.setattr("minillm.ops.numpy_ops.ROW_BLOCK", row_block)
    rng = np.random.default_rng(group)
    for n in (1, 6, 7, 8, 23):
        q, k, v = new_tokens(rng, 2 * group, 2, n, 4)
        past = nothing(2, 4)
        for window in (None, 1, 5, 23):
            got = numpy_ops.prefill_attention(q, k, v, paged_layer(past, 0), 0.5, window)
            close_each(got, prefill(q, k, v, past, 0, 0.5, window))


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("row_block", [256, 5])
def test_prefill_over_stored_entries(group, row_block, monkeypatch):
    """Heads of 0, 1 and many entries, sizes above 1, positions in no order; windows that hide the whole past, a part of
    it, a part of the prompt, or nothing."""
    monkeypatch.setattr("minillm.ops.numpy_ops.ROW_BLOCK", row_block)
    rng = np.random.default_rng(group)
    seen, d, scale = 60, 6, 0.3
    past = [random_entries(rng, m, d, seen) for m in (0, 1, 30)]
    for n in (1, 5, 12):
        q, k, v = new_tokens(rng, 3 * group, 3, n, d)
        for window in (None, 1, 3, 11, 25, 50, 100):
            layer = paged_layer(past, seen, rng=rng)
            got = numpy_ops.prefill_attention(q, k, v, layer, scale, window)
            close_each(got, prefill(q, k, v, past, seen, scale, window))


@pytest.mark.parametrize("m", [0, 1, 12])
@pytest.mark.parametrize("row_block", [256, 3])
def test_queries_at_any_positions(m, row_block, monkeypatch):
    """Before, among and after the new tokens; with a window some see nothing."""
    monkeypatch.setattr("minillm.ops.numpy_ops.ROW_BLOCK", row_block)
    rng, seen, d = np.random.default_rng(m), 40, 6
    past = [random_entries(rng, length, d, seen) for length in (0, 1, 30)]
    q_pos = np.sort(rng.choice(np.arange(seen - 3, seen + 30), 10, replace=False))
    _, k, v = new_tokens(rng, 6, 3, m, d)
    q = rng.normal(size=(6, len(q_pos), d)).astype(F32)
    for window in (None, 1, 4, 20, 60):
        layer = paged_layer(past, seen, rng=rng)
        with np.errstate(all="raise", under="ignore"):
            got = numpy_ops.prefill_attention(q, k, v, layer, 0.3, window, q_pos)
        close_each(got, prefill(q, k, v, past, seen, 0.3, window, q_pos=q_pos))
    assert window is not None and not np.isfinite(numpy_ops.prefill_attention(q, k, v, layer, 0.3, 1, q_pos)[1]).all()


def test_prefill_longer_than_a_block():
    rng = np.random.default_rng(0)
    assert ROW_BLOCK < 300
    q, k, v = new_tokens(rng, 2, 1, 300, 4)
    past = [random_entries(rng, 9, 4, 40)]
    rows = [0, 1, 254, 255, 256, 257, 298, 299]
    for window in (None, 270):
        out, lse = numpy_ops.prefill_attention(q, k, v, paged_layer(past, 40), 0.5, window)
        close_each((out[rows], lse[:, rows]), prefill(q, k, v, past, 40, 0.5, window, rows))


def integers(rng, shape, size):
    return np.rint(rng.normal(size=shape) * size).astype(F32)


@pytest.mark.parametrize("size, atol", [(100, 5e-3), (1000, 1e-5)])
def test_prefill_with_huge_logits(size, atol):
    """Integers, so that float32 has q.k exactly, up to 1e5 or 1e7 and of both signs. With the smaller ones log s
    decides between entries of the same key; next to the larger ones float32 cannot resolve it, and it is 0."""
    rng = np.random.default_rng(0)
    q, k, v = integers(rng, (4, 10, 4), size), integers(rng, (2, 10, 4), size), integers(rng, (2, 10, 4), 1)
    past = []
    for _, v_past, log_size, pos in [random_entries(rng, 8, 4, 20) for _ in range(2)]:
        k_past = integers(rng, (8, 4), size)
        k_past[5] = k_past[2] = k_past[0] * 2  # often the nearest to a query
        past.append((k_past, v_past, log_size if size == 100 else np.zeros(8, F32), pos))
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        got = numpy_ops.prefill_attention(q, k, v, paged_layer(past, 20), 1.0)
    close_each(got, prefill(q, k, v, past, 20, 1.0), atol)


def test_prefill_never_holds_all_scores():
    """2048 x 2048 scores of two heads would be 32 MiB; a block of them is 4."""
    rng = np.random.default_rng(0)
    q, k, v = new_tokens(rng, 2, 1, 2048, 4)
    layer = paged_layer(nothing(1, 4), 0)
    tracemalloc.start()
    numpy_ops.prefill_attention(q, k, v, layer, 0.5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


# decode attention


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("scattered", [False, True])
def test_decode_over_pages(group, scattered):
    """A batch of sequences whose heads hold from one entry to several slabs of pages, in any order of pages."""
    rng = np.random.default_rng(group)
    d, scale = 6, 0.4
    batch, layers = [], []
    for seen, lengths in ((50, (1, 20, 49)), (1, (1, 1, 1)), (90, (4, 5, 88)), (30, (8, 12, 3))):
        heads = [random_entries(rng, m, d, seen) for m in lengths]
        for head in heads:
            head[3][-1] = seen  # the token itself, stored before it is asked about
            head[2][-1] = 0
        batch.append((seen, heads))
        layers.append(paged_layer(heads, seen, rng=rng if scattered else None))
    assert len(layers[0].pool.slabs) > 3
    q = rng.normal(size=(len(batch), 3 * group, d)).astype(F32)
    for window in (None, 1, 7, 40):
        out = numpy_ops.decode_attention(q, layers, scale, window)
        assert out.shape == (len(batch), 3 * group * d)
        expected = [
            [attend(q[b, h], heads[h // group], scale, seen, window) for h in range(3 * group)]
            for b, (seen, heads) in enumerate(batch)
        ]
        close(out, np.reshape(expected, (len(batch), -1)))


def test_decode_leaves_the_stored_entries_alone():
    rng = np.random.default_rng(0)
    heads = [random_entries(rng, 10, 4, 20) for _ in range(2)]
    layer = paged_layer(heads, 20, rng=rng)
    q = rng.normal(size=(1, 4, 4)).astype(F32)
    first = numpy_ops.decode_attention(q, [layer], 0.5)
    kept_q = q.copy()
    np.testing.assert_array_equal(numpy_ops.decode_attention(q, [layer], 0.5), first)
    np.testing.assert_array_equal(q, kept_q)
    for h, head in enumerate(heads):
        for stored, given in zip(layer.read(h), head, strict=True):
            np.testing.assert_array_equal(stored, given)


def test_decode_with_huge_logits():
    rng = np.random.default_rng(0)
    _, v, _, pos = random_entries(rng, 30, 4, 40)
    heads = [(integers(rng, (30, 4), 1000), v, np.zeros(30, F32), pos)]
    q = integers(rng, (1, 2, 4), 1000)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        out = numpy_ops.decode_attention(q, [paged_layer(heads, 40, rng=rng)], 1.0)
    close(out, np.reshape([attend(q[0, h], heads[0], 1.0, 40) for h in range(2)], (1, -1)), 1e-5)


# pages and merge


def test_a_slab_is_what_it_is_counted_as():
    slab = numpy_ops.new_slab(3, 8, 6, FLOAT32)
    shapes = {"k": (3, 8, 6), "v": (3, 8, 6), "log_size": (3, 8), "pos": (3, 8)}
    for i, (name, shape) in enumerate(shapes.items()):
        field = slab.fields[name]
        assert field.shape == shape and field.dtype == (np.int32 if name == "pos" else F32)
        field[:] = i + 1
    assert [np.unique(slab.fields[name]).tolist() for name in shapes] == [[1], [2], [3], [4]]  # no overlap
    assert sum(slab.fields[name].nbytes for name in shapes) == len(slab.memory) == 3 * 8 * FLOAT32.entry_bytes(6)


@pytest.mark.parametrize("dropped", [0.0, 0.3, 1.0])
def test_merge_is_a_weighted_sum(dropped):
    rng = np.random.default_rng(0)
    for n_rows, n_entries in ((1, 1), (50, 7), (200, 190), (500, 3), (4, 9)):
        rows = rng.normal(size=(n_rows, 5)).astype(F32)
        dest = np.where(rng.random(n_rows) < dropped, -1, rng.integers(0, n_entries, n_rows))
        weight = rng.uniform(0, 1, n_rows).astype(F32)
        expected = np.zeros((n_entries, 5))
        for r in range(n_rows):
            if dest[r] >= 0:
                expected[dest[r]] += np.float64(weight[r]) * np.float64(rows[r])
        close(numpy_ops.merge(rows, dest, weight, n_entries), expected)


def test_merge_of_nothing():
    none = np.zeros(0, np.int64)
    for n_entries in (0, 3):
        out = numpy_ops.merge(np.zeros((0, 5), F32), none, np.zeros(0, F32), n_entries)
        np.testing.assert_array_equal(out, np.zeros((n_entries, 5)))
    assert numpy_ops.merge(np.ones((2, 5), F32), np.array([-1, -1]), np.ones(2, F32), 0).shape == (0, 5)


def test_merge_of_many_rows_into_one_keeps_its_precision():
    n = 5000
    rows = np.random.default_rng(0).normal(3, 1, (n, 2)).astype(F32)
    out = numpy_ops.merge(rows, np.zeros(n, np.int64), np.full(n, 1 / n, F32), 1)
    np.testing.assert_allclose(out, np.float64(rows).mean(axis=0, keepdims=True), rtol=5e-5)


def test_merge_copies_a_row_of_weight_one():
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(40, 3)) * 10.0 ** rng.integers(-30, 30, (40, 1))).astype(F32)
    dest = rng.permutation(40)
    out = numpy_ops.merge(rows, dest, np.ones(40, F32), 40)
    np.testing.assert_array_equal(out[dest], rows)


@pytest.mark.parametrize("n_keys, n, m, d", NEAREST)
def test_the_nearest_of_a_segment(n_keys, n, m, d, monkeypatch):
    monkeypatch.setattr("minillm.ops.numpy_ops.NEAREST_ROWS", 16)
    check_nearest(numpy_ops, np.random.default_rng(n), n_keys, n, m, d, first_of_equals=False)


@pytest.mark.parametrize("dtype, largest", [("float16", 65504.0), ("bfloat16", 3.3895313892515355e38)])
def test_all_words_of_16_bits_come_back(dtype, largest):
    words = np.arange(1 << 16, dtype=np.uint16)
    values = PAGE_FORMATS[dtype].k.floats(words)
    finite = np.isfinite(values)
    assert values.dtype == np.float32 and values[finite].max() == largest and values[words == 0] == 0
    np.testing.assert_array_equal(PAGE_FORMATS[dtype].k.words(values[finite]), words[finite])


def test_the_choice_of_a_backend():
    assert ops.backend("auto").name == ops.backend("cpu").name == "numpy"
    with pytest.raises(UsageError, match="'gpu'.*cpu"):
        ops.backend("gpu")


def test_without_compiled_kernels_numpy_is_used_and_said_once(monkeypatch, capsys):
    monkeypatch.delenv("MINILLM_CPU")
    monkeypatch.setattr(cpu_lib, "library", lambda: None)
    ops.say_once.cache_clear()
    assert isinstance(ops.backend("auto"), NumpyOps) and ops.backend("cpu").name == "numpy"
    assert capsys.readouterr().err.count("install a C compiler") == 1
