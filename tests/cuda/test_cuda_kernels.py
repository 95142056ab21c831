"""Each CUDA kernel against literal float64, on the emulator and, where there is one, on a GPU."""

import emulator
import gguf
import numpy as np
import pytest
from blocks import random_blocks
from cuda_words import REAL16, from_int8, from_words, packed, to_int8, to_words
from emulator import Kernel, cases
from head_sizes import LEVELS, SIZES, STORED
from literal import rotated
from oracle import rms_norm

from minillm.files.config import ACTIVATIONS
from minillm.files.formats import FORMATS
from minillm.files.weights import Weight
from minillm.ops import cuda_clusters, launch
from minillm.ops.cuda_ops import CudaOps
from minillm.ops.cuda_weights import CudaWeight
from minillm.ops.launch import planning
from minillm.ops.numpy_ops import NUMPY as numpy_ops
from minillm.ops.pages import PAGE_FORMATS

F32 = np.float32
REALS = cases(list(REAL16), races=["half"])
KINDS = cases([name for name, format in FORMATS.items() if format.device], races=["F16", "Q4_0"])


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.mark.parametrize("real16", REALS)
@pytest.mark.parametrize("n, dim", cases([(1, 4), (3, 36), (2, 576), (5, 1028), (1, 4096)], races=[(2, 576)]))
def test_rms_norm(device, rng, real16, n, dim):
    x, weight = rng.normal(size=(n, dim)).astype(F32) * F32(5), rng.normal(size=dim).astype(F32)
    x[0] *= F32(1e-4)
    out = device.empty((n, dim), np.uint16)
    launch.rms_norm(device, device.upload(x), device.upload(weight), 1e-5, out, real16)
    wide = x.astype(np.float64)
    exact = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(from_words(out.get(), real16), exact, rtol=REAL16[real16], atol=1e-7)


# products with few rows


def matrix(device, rng, kind, n_out, n_in):
    """A random CudaWeight, its values in float64, and the type of what it meets."""
    real16 = FORMATS[kind].device.real16
    if kind in ("F16", "BF16"):
        data = to_words(rng.normal(size=(n_out, n_in)), real16)
        values = from_words(data, real16)
    else:
        data = random_blocks(rng, kind, n_out, n_in, 0.3)
        values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    return CudaWeight.of(device, Weight(FORMATS[kind], data, values.shape), real16), np.float64(values), real16


def in_blocks(kind, n):
    """n or a little more, in whole blocks."""
    return -(-n // FORMATS[kind].block) * FORMATS[kind].block


def normed(x, weight, real16):
    """What the norm leaves, in float64, rounded as the kernels do."""
    wide = np.float64(x)
    out = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    return np.float64(from_words(to_words(out, real16), real16))


def silu(x):
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def gelu_tanh(x):
    """Hendrycks & Gimpel 2016, by its approximation."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def near(actual, exact, tolerance, least=0.0):
    """|actual - exact| <= tolerance * the largest |exact| of the row, or `least`"""
    assert actual.shape == exact.shape
    worst = np.abs(actual - exact) / np.maximum(np.abs(exact).max(axis=-1, keepdims=True), least)
    assert worst.max(initial=0) <= tolerance, worst.max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", cases([1, 2, 3, 8], races=[3]))
@pytest.mark.parametrize("n_in, n_out", cases([(32, 1), (96, 37), (1056, 66)], races=[(96, 37)]))
def test_gemv(device, rng, kind, rows, n_in, n_out):
    n_in = in_blocks(kind, n_in)
    weight, values, real16 = matrix(device, rng, kind, 2 * n_out, n_in)
    x, norm = rng.normal(size=(rows, n_in)).astype(F32) * F32(3), rng.normal(size=n_in).astype(F32)
    bias, y = rng.normal(size=2 * n_out).astype(F32), rng.normal(size=(rows, 2 * n_out)).astype(F32)
    on_device = [device.upload(a) for a in (x, norm, bias, y)]
    h, rounding = normed(x, norm, real16), REAL16[real16]

    words = to_words(x, real16)
    for add in (True, False):
        launch.gemv(device, device.upload(words), weight, on_device[3], add)
        near(on_device[3].get(), y * add + from_words(words, real16) @ values.T, 1e-5)

    out = device.empty(y.shape, np.float32)
    launch.norm_gemv(device, on_device[0], on_device[1], 1e-5, weight, out)
    near(out.get(), h @ values.T, 2 * rounding)  # a norm on the edge of two words may fall on either side
    out = device.empty(y.shape, np.uint16)
    launch.norm_gemv(device, on_device[0], on_device[1], 1e-5, weight, out)
    near(from_words(out.get(), real16), h @ values.T, 3 * rounding)
    wider = device.empty((rows, 2 * n_out + 7), np.uint16)
    wider.fill(5)
    launch.norm_gemv(device, on_device[0], on_device[1], 1e-5, weight, wider, 4)
    np.testing.assert_array_equal(wider.get()[:, 4:-3], out.get())
    assert (wider.get()[:, :4] == 5).all() and (wider.get()[:, -3:] == 5).all()

    for b, activation, exact in ((None, "gelu_tanh", gelu_tanh), (on_device[2], "silu", silu)):
        out = device.empty((rows, n_out), np.uint16)
        launch.norm_gemv_glu(device, on_device[0], on_device[1], 1e-5, weight, b, ACTIVATIONS[activation], out)
        gate, up = np.split(h @ values.T + (0 if b is None else bias), 2, axis=1)
        near(from_words(out.get(), real16), exact(gate) * up, 6 * rounding, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_matrix(device, rng, kind):
    n_in = in_blocks(kind, 1056)
    weight, values, real16 = matrix(device, rng, kind, 19, n_in)
    ids, out = np.array([18, 0, 0, 7], np.int32), device.empty((4, n_in), np.float32)
    launch.embed(device, weight, device.upload(ids), out)
    np.testing.assert_allclose(out.get(), values[ids], rtol=1e-6, atol=1e-6)
    out = device.empty((5, n_in), np.uint16)
    launch.dequantize(device, weight, 3, out)
    np.testing.assert_allclose(from_words(out.get(), real16), values[3:8], rtol=REAL16[real16], atol=1e-6)


@pytest.mark.parametrize("real16", REALS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation, exact", [("silu", silu), ("gelu_tanh", gelu_tanh)])
def test_glu(device, rng, real16, biased, activation, exact):
    words = to_words(rng.normal(size=(3, 2 * 2056)) * 8, real16)
    words[0, :6] = to_words([-1e4, 1e4, 0, -87, 89, -0.0], real16)
    bias, out = rng.normal(size=2 * 2056).astype(F32) * biased, device.empty((3, 2056), np.uint16)
    given = device.upload(words), device.upload(bias) if biased else None, ACTIVATIONS[activation]
    launch.glu(device, *given, out, real16)
    gate, up = np.split(np.float64(from_words(words, real16)) + bias, 2, axis=1)
    ours, expected = from_words(out.get(), real16), exact(gate) * up
    inside = np.abs(expected) < 60000
    np.testing.assert_allclose(ours[inside], expected[inside], rtol=REAL16[real16] * 1.1, atol=2e-6)


def test_norm_is_added(device, rng):
    y, x = rng.normal(size=(2, 3, 1028)).astype(F32) * F32(3)
    weight, out = rng.normal(size=1028).astype(F32), device.upload(x)
    launch.add_rms_norm(device, device.upload(y), device.upload(weight), 1e-3, out)
    np.testing.assert_allclose(out.get(), x + rms_norm(np.float64(y), weight, 1e-3), rtol=1e-6, atol=1e-6)


def test_bias_is_added(device, rng):
    x, bias = rng.normal(size=(3, 300)).astype(F32), rng.normal(size=300).astype(F32)
    y = device.upload(x)
    launch.add_bias(device, y, device.upload(bias))
    np.testing.assert_array_equal(y.get(), x + bias)


@pytest.mark.parametrize("n, at", [(3000, 0), (3000, 2999), (3001, 2999), (3003, 3000), (3003, 3002), (1, 0)])
def test_the_first_layer_that_is_not_finite(device, rng, n, at):
    x, bad = rng.normal(size=n).astype(F32), device.upload(np.array([99], np.int32))
    for layer, value in ((7, 1.0), (6, np.inf), (5, np.nan), (8, -np.inf)):
        x[at] = value
        launch.not_finite(device, device.upload(x), layer, bad)
        assert bad.get()[0] == {7: 99, 6: 6, 5: 5, 8: 5}[layer]


@pytest.mark.parametrize("real16", REALS)
def test_random_words(device, real16):
    """The same from any grid, in [-bound, bound), half of them on either side, and others by another seed."""
    first, again, other = (device.empty((5000,), np.uint16) for _ in range(3))
    launch.random_words(device, first, 1, 0.5, real16)
    launch.random_words(device, other, 2, 0.5, real16)
    words = from_words(first.get(), real16)
    assert words.min() >= -0.5 and words.max() <= 0.5 and abs(words.mean()) < 0.02
    assert np.count_nonzero(words == from_words(other.get(), real16)) < 100
    launch.random_words(device, again[:300], 1, 0.5, real16)
    np.testing.assert_array_equal(again[:300].get(), first[:300].get())


def test_rows_are_taken(device, rng):
    rows, index = rng.integers(0, 1 << 16, (9, 64)).astype(np.uint16), rng.integers(0, 9, 100).astype(np.int32)
    out = device.empty((100, 64), np.uint16)
    launch.take(device, device.upload(rows), device.upload(index), out)
    np.testing.assert_array_equal(out.get(), rows[index])


# rotation, pages


def test_the_page_of_the_newest_entry(device, rng):
    pages, last = np.full((3, 10, 9, 4), -1, np.int32), rng.integers(0, 99, (3, 10, 9)).astype(np.int32)
    lengths, on_device = rng.integers(1, 129, last.shape).astype(np.int32), device.upload(pages)
    launch.last_pages(device, on_device, device.upload(lengths), device.upload(last))
    for head in np.ndindex(last.shape):
        pages[head][(lengths[head] - 1) // 32] = last[head]
    np.testing.assert_array_equal(on_device.get(), pages)


def tables(rng, n, d, factor=1.0):
    angle = rng.uniform(-9, 9, (n, d // 2))
    return angle, (np.cos(angle) * factor).astype(F32), (np.sin(angle) * factor).astype(F32)


@pytest.mark.parametrize("real16", REALS)
@pytest.mark.parametrize(
    "d, n_heads, n_kv_heads, biased, normed",
    cases(
        [(64, 3, 3, False, False), (128, 8, 2, True, False), (64, 1, 1, True, True), (128, 3, 1, False, True)],
        races=[(64, 3, 3, False, True)],
    ),
)
def test_rope_split(device, rng, real16, d, n_heads, n_kv_heads, biased, normed):
    n, columns = 5, n_heads + 2 * n_kv_heads
    qkv = to_words(rng.normal(size=(n, columns * d)), real16)
    bias = rng.normal(size=columns * d).astype(F32)
    angle, cos, sin = tables(rng, n, d, 1.2)
    q, k, v = (device.empty((heads, n, d), np.uint16) for heads in (n_heads, n_kv_heads, n_kv_heads))
    norms = rng.normal(1, 0.3, (2, d)).astype(F32)
    how = device.upload(bias) if biased else None, [device.upload(norm) for norm in norms] if normed else (None, None)
    warmth = rng.uniform(1, 2, n).astype(F32)
    turn = device.upload(cos), device.upload(sin), device.upload(warmth) if normed else None
    launch.rope_split(device, device.upload(qkv), *how, 1e-3, *turn, q, k, v, real16)
    x = np.float64(from_words(qkv, real16)) + biased * bias
    x = x.reshape(n, columns, d).transpose(1, 0, 2)
    to_turn = x.copy()
    if normed:
        to_turn[:n_heads] = rms_norm(x[:n_heads], norms[0], 1e-3)
        to_turn[n_heads:] = rms_norm(x[n_heads:], norms[1], 1e-3)
    turned = rotated(to_turn, angle, 1.2)
    if normed:
        turned[:n_heads] *= warmth[:, None]
    whole = np.concatenate([turned[:-n_kv_heads], x[-n_kv_heads:]])
    expected = np.split(whole, [n_heads, n_heads + n_kv_heads])
    for ours, exact in zip((q, k, v), expected, strict=True):
        np.testing.assert_allclose(from_words(ours.get(), real16), exact, rtol=REAL16[real16], atol=2e-6)


class Pages:
    """Slabs on the device whose words the test reads and writes from the host, and page tables in no order."""

    def __init__(self, device, rng, d, lengths, slab_pages=5, dtype="float16"):
        lengths = np.asarray(lengths)  # (B, H)
        held = -(-lengths // 32)
        n_slabs = -(-(int(held.sum()) + 3) // slab_pages)
        layout = PAGE_FORMATS[dtype].layout(d)
        self.fields = [(int(np.prod(shape)), word) for shape, word in layout.values()]  # of a slab, one after another
        n_bytes = slab_pages * 32 * sum(n * np.dtype(word).itemsize for n, word in self.fields)
        self.device, self.slab_pages = device, slab_pages
        self.slabs = [device.upload(np.zeros(n_bytes, np.uint8)) for _ in range(n_slabs)]
        self.table = np.full((*lengths.shape, max(1, held.max())), -1, np.int32)
        ids = iter(rng.permutation(n_slabs * slab_pages))
        for head in np.ndindex(lengths.shape):
            self.table[head][: held[head]] = [next(ids) for _ in range(held[head])]
        addresses = np.array([slab.data.ptr for slab in self.slabs], np.uint64)
        self.seen = rng.integers(1000, 2000, len(lengths)).astype(np.int32)
        self.paged = launch.Paged(
            *(PAGE_FORMATS[dtype], device.upload(addresses), slab_pages, device.upload(self.table)),
            *(device.upload(lengths.astype(np.int32)), device.upload(self.seen)),
        )

    def entry(self, head, i):
        """k, v words, where rows have them two scales (1,), log s (1,), position (1,) of entry i of a head (b, h)."""
        slab, page = divmod(int(self.table[head][i // 32]), self.slab_pages)
        memory, at, n, out = self.slabs[slab].get(), page * 32 + i % 32, self.slab_pages * 32, []
        for size, word in self.fields:
            field, memory = np.split(memory, [n * size * np.dtype(word).itemsize])
            out.append(field.view(word).reshape(n, size)[at])
        return out


@pytest.mark.parametrize("real16, d", SIZES)
def test_rope_append(device, rng, real16, d):
    lengths, n_heads = np.array([[1, 33], [32, 70]]), 4
    pages = Pages(device, rng, d, lengths)
    qkv = to_words(rng.normal(size=(2, 8 * d)), real16)
    angle, cos, sin = tables(rng, 2, d)
    q = device.empty((2, n_heads, d), np.uint16)
    norms = rng.normal(1, 0.3, (2, d)).astype(F32)
    given = device.upload(qkv), None, [device.upload(norm) for norm in norms], 1e-3
    warmth = np.array([1.0, 1.5], F32)
    turn = device.upload(cos), device.upload(sin), device.upload(warmth)
    launch.rope_append(device, *given, *turn, q, pages.paged, real16)
    x = from_words(qkv, real16).reshape(2, 8, d)
    normed = np.concatenate([rms_norm(x[:, :4], norms[0], 1e-3), rms_norm(x[:, 4:], norms[1], 1e-3)], axis=1)
    turned, close = rotated(normed, angle[:, None]), {"rtol": REAL16[real16], "atol": 2e-6}
    np.testing.assert_allclose(from_words(q.get(), real16), turned[:, :4] * warmth[:, None, None], **close)
    for b, h in np.ndindex(lengths.shape):
        k, v, log_size, pos = pages.entry((b, h), lengths[b, h] - 1)
        np.testing.assert_allclose(from_words(k, real16), turned[b, 4 + h], **close)
        np.testing.assert_array_equal(from_words(v, real16), x[b, 6 + h])
        assert log_size == 0 and pos == pages.seen[b]
    touched = sum(np.count_nonzero(slab.get().view(np.uint16)) for slab in pages.slabs)
    assert touched <= lengths.size * (2 * d + 2)


def same_rows(stored, expected):
    """The same words of a row; a scale may be a word beside, where sums are of another order."""
    np.testing.assert_array_equal(stored[0], expected[0])
    assert abs(int(stored[1]) - int(expected[1])) <= 1


@pytest.mark.parametrize("dtype, real16, d", STORED)
def test_rope_append_in_fewer_bits(device, rng, dtype, real16, d):
    """What 16 bits would hold, in fewer: the words of both kinds of pages, given the same."""
    lengths, stored, format = np.array([[1, 33, 64], [32, 70, 2]]), {}, PAGE_FORMATS[dtype]
    qkv, (_, *turn) = to_words(rng.normal(size=(2, 9 * d)), real16), tables(rng, 2, d)
    qkv[0, 7 * d : 8 * d] = 0  # a value of zeros
    given = [device.upload(qkv), None, (None, None), 1e-5, *map(device.upload, turn), None]
    for name in ("float16", dtype):
        pages = Pages(device, rng, d, lengths, dtype=name)
        q = device.empty((2, 3, d), np.uint16)
        launch.rope_append(device, *given, q, pages.paged, real16)
        heads = list(np.ndindex(lengths.shape))
        stored[name] = q.get(), [pages.entry(head, lengths[head] - 1) for head in heads], pages
    np.testing.assert_array_equal(stored[dtype][0], stored["float16"][0])
    for head, wide, entry in zip(heads, stored["float16"][1], stored[dtype][1], strict=True):
        for field, rows in enumerate((format.k, format.v)):
            (words,), (scale,) = packed(wide[field][None], rows, real16)[0]
            same_rows((entry[field], entry[2 + field][0]), (words, scale))
        assert entry[4] == 0 and entry[5] == pages.seen[head[0]]
    touched = sum(np.count_nonzero(slab.get()) for slab in pages.slabs)
    assert touched <= lengths.size * format.entry_bytes(d)


@pytest.mark.parametrize("real16, d", SIZES)
@pytest.mark.parametrize(
    "start, lengths",
    cases([([0, 0, 0], [40, 0, 3]), ([31, 5, 64], [1, 32, 70]), ([0], [1])], races=[([31, 5, 64], [1, 32, 70])]),
)
def test_entries_in_and_out(device, rng, real16, d, start, lengths):
    start, lengths = np.array(start), np.array(lengths)
    n, pages = int(lengths.sum()), Pages(device, rng, d, [start + lengths])
    k, v = rng.integers(0, 1 << 16, (2, n, d)).astype(np.uint16)
    log_size, pos = rng.normal(size=n).astype(F32), rng.integers(0, 9999, n).astype(np.int32)
    first = np.append(0, np.cumsum(lengths)).astype(np.int32)
    at = pages.paged, device.upload(first), device.upload(start.astype(np.int32)), real16
    launch.write_entries(device, *(device.upload(a) for a in (k, v, log_size, pos)), *at)
    for head in range(len(lengths)):
        for i in range(lengths[head]):
            row = first[head] + i
            stored = pages.entry((0, head), start[head] + i)
            for ours, given in zip(stored, (k[row], v[row], log_size[row], pos[row]), strict=True):
                np.testing.assert_array_equal(ours, given)
    given = {"k": k, "v": v, "log_size": log_size, "pos": pos}
    for names in (["k", "v", "log_size", "pos"], ["v"], ["log_size", "pos"]):
        back = {name: device.empty(given[name].shape, given[name].dtype) for name in names}
        launch.read_entries(device, *at[:3], d, real16, **back)
        for name in names:
            np.testing.assert_array_equal(back[name].get(), given[name])


def rows_of_8_bits(rng, d, real16):
    """Rows that are rounded in every way: sizes from tiny to large, each leading 7 bits of the largest element, zeros,
    ties."""
    rows = rng.normal(size=(160, d)) * 10.0 ** rng.integers(-4, 4, (160, 1))
    rows[:128, 0] = np.sign(rows[:128, 0]) * np.arange(128, 256) / 32 * 2.0 ** rng.integers(-6, 6, 128)
    rows[:128, 1:] = np.clip(rows[:128, 1:], -1, 1) * np.abs(rows[:128, :1])
    rows[128:130], rows[130, 1:] = 0, 0
    rows[131], rows[132], rows[132, 5] = rng.integers(-127, 128, d), np.arange(d) - 30.5, 127
    return to_words(rows, real16)


@pytest.mark.parametrize("real16, d", SIZES)
def test_entries_in_8_bits(device, rng, d, real16):
    """By the letter; and what was read is stored as the same words."""
    lengths, start = np.array([100, 0, 60]), np.array([31, 0, 64])
    n, pages = int(lengths.sum()), Pages(device, rng, d, [start + lengths], dtype="int8")
    k, v = rows_of_8_bits(rng, d, real16), rows_of_8_bits(rng, d, real16)
    log_size, pos = rng.normal(size=n).astype(F32), rng.integers(0, 9999, n).astype(np.int32)
    first = np.append(0, np.cumsum(lengths)).astype(np.int32)
    at = pages.paged, device.upload(first), device.upload(start.astype(np.int32))
    expected = [to_int8(from_words(rows, real16)) for rows in (k, v)]
    given = [device.upload(rows) for rows in (k, v, log_size, pos)]
    for _ in range(2):
        launch.write_entries(device, *given, *at, real16)
        for head in range(len(lengths)):
            for i in range(lengths[head]):
                row = first[head] + i
                stored = pages.entry((0, head), start[head] + i)
                np.testing.assert_array_equal(stored[:2], [numbers[row] for numbers, _ in expected])
                np.testing.assert_array_equal(stored[2:4], [words[row : row + 1] for _, words in expected])
                assert stored[4:] == [log_size[row], pos[row]]
        back = [device.empty(rows.shape, rows.dtype) for rows in (k, v, log_size, pos)]
        names = dict(zip(("k", "v", "log_size", "pos"), back, strict=True))
        launch.read_entries(device, *at, d, real16, **names)
        for rows, (numbers, words) in zip(back, expected, strict=False):
            np.testing.assert_array_equal(rows.get(), to_words(from_int8(numbers, words), real16))
        given = back


@pytest.mark.parametrize("dtype, real16, d", LEVELS)
def test_entries_in_levels(device, rng, dtype, real16, d):
    """As NumPy packs and unpacks them; and what was read is stored as the same words."""
    lengths, start, format = np.array([40, 0, 30]), np.array([31, 0, 64]), PAGE_FORMATS[dtype]
    n, pages = int(lengths.sum()), Pages(device, rng, d, [start + lengths], dtype=dtype)
    k, v = (rng.normal(size=(n, d)) * 10.0 ** rng.integers(-2, 3, (n, 1)) for _ in "kv")
    k[3], v[:2], v[2, 1:] = 0, 0, 0
    k, v = (to_words(rows, real16) for rows in (k, v))
    log_size, pos = rng.normal(size=n).astype(F32), rng.integers(0, 9999, n).astype(np.int32)
    first = np.append(0, np.cumsum(lengths)).astype(np.int32)
    at = pages.paged, device.upload(first), device.upload(start.astype(np.int32))
    given = {"k": k, "v": v, "log_size": log_size, "pos": pos}
    expected = [packed(rows, format, real16)[0] for rows, format in ((k, format.k), (v, format.v))]
    for _ in range(2):
        launch.write_entries(device, *(device.upload(array) for array in given.values()), *at, real16)
        stored = [pages.entry((0, head), start[head] + i) for head in range(3) for i in range(lengths[head])]
        for row, entry in enumerate(stored):
            for field, (words, scales) in enumerate(expected):
                same_rows((entry[field], entry[2 + field][0]), (words[row], scales[row]))
            assert entry[4:] == [log_size[row], pos[row]]
        back = {name: device.empty(array.shape, array.dtype) for name, array in given.items()}
        launch.read_entries(device, *at, d, real16, **back)
        for field, name in enumerate("kv"):
            parts = [np.stack([entry[i] for entry in stored]) for i in (field, 2 + field)]
            rows = getattr(format, name).unpack([parts[0], parts[1][:, 0]], d)
            np.testing.assert_array_equal(back[name].get(), to_words(rows, real16))
        given = {name: array.get() for name, array in back.items()}


@pytest.mark.parametrize("real16, d", SIZES)
@pytest.mark.parametrize("n_rows, n_entries", cases([(1, 1), (70, 9), (33, 33), (40, 100)], races=[(40, 100)]))
def test_merge(device, rng, real16, d, n_rows, n_entries):
    """Entries of no row, of one, of many; rows that go nowhere."""
    words = to_words(rng.normal(size=(n_rows, d)), real16)
    rows, dest = np.float64(from_words(words, real16)), rng.integers(-1, n_entries, n_rows)
    weight, pos = rng.uniform(0.1, 1, n_rows).astype(F32), rng.integers(0, 50, n_rows).astype(np.int32)
    entry_pos = rng.integers(0, 50, n_entries).astype(np.int32)
    alone = np.flatnonzero((np.bincount(dest[dest >= 0], minlength=n_entries) == 1)[dest] & (dest >= 0))[::2]
    weight[alone], pos[alone] = 1, entry_pos[dest[alone]]  # copied, bit for bit
    order = np.argsort(np.where(dest < 0, n_entries, dest), kind="stable")[: (dest >= 0).sum()].astype(np.int32)
    first = np.append(0, np.cumsum(np.bincount(dest[dest >= 0], minlength=n_entries))).astype(np.int32)
    angle, cos, sin = tables(rng, 50, d, 1.1)
    up = device.upload
    out = device.empty((n_entries, d), np.uint16)
    launch.merge(device, up(words), up(order), up(first), up(weight), out, real16)
    exact = np.zeros((n_entries, d))
    np.add.at(exact, dest[dest >= 0], (rows * weight[:, None])[dest >= 0])
    np.testing.assert_allclose(from_words(out.get(), real16), exact, rtol=REAL16[real16], atol=1e-5)

    back = device.empty((n_rows, d), np.uint16)
    launch.unrotate(device, up(words), up(pos), up(cos), up(sin), up(np.full(d // 2, 1.1, F32)), back, real16)
    unrotated = rotated(rows, -angle[pos], 1 / 1.1)
    np.testing.assert_allclose(from_words(back.get(), real16), unrotated, rtol=REAL16[real16], atol=1e-5)
    keys = up(words), back, up(pos), up(order), up(first), up(weight), up(entry_pos), up(cos), up(sin)
    launch.merge_unrotated(device, *keys, out, real16)
    exact = np.zeros((n_entries, d))
    np.add.at(exact, dest[dest >= 0], (from_words(back.get(), real16) * weight[:, None])[dest >= 0])
    some = np.diff(first) > 0
    near(from_words(out.get(), real16)[some], rotated(exact, angle[entry_pos], 1.1)[some], 0.01)
    np.testing.assert_array_equal(out.get()[dest[alone]], words[alone])


@pytest.mark.parametrize("real16, d", SIZES)
def test_the_nearest_of_a_segment(device, rng, real16, d):
    """Of no candidates, of one, of many; of equal ones the first; rows of zeros are like nothing."""
    words = to_words(rng.normal(size=(40, d)), real16)
    words[7] = 0
    words[[3, 30]] = words[11]
    rows = np.float64(from_words(words, real16))
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    units = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    index, others = np.append(rng.permutation(40), 7), rng.permutation(np.append(np.arange(40), [11, 3, 7]))
    lo = rng.integers(0, len(others), len(index))
    hi = np.minimum(lo + rng.integers(0, 12, len(index)), len(others))
    lo[:3], hi[:3], lo[3], hi[3] = 0, len(others), 5, 5
    found, cosine = device.empty((len(index),), np.int32), device.empty((len(index),), F32)
    tables = (device.upload(table.astype(np.int32)) for table in (index, others, lo, hi))
    launch.nearest(device, device.upload(words), *tables, found, cosine, real16)
    ours, similarity = found.get(), cosine.get()
    for i, row in enumerate(index):
        candidates = others[lo[i] : hi[i]]
        cosines = [float(np.round(units[row] @ units[other], 9)) for other in candidates]
        expected = candidates[int(np.argmax(cosines))] if len(candidates) else -1
        assert ours[i] == expected
        assert similarity[i] == pytest.approx(max(cosines, default=0), abs=1e-4)


# what a Plan is made of


@pytest.mark.parametrize("lengths", cases([[1], [70, 0, 33], [3000, 5, 9000]], races=[[3000, 5, 9000]]))
def test_the_largest_of_each_segment(device, rng, lengths, monkeypatch):
    """Many that are equal, on both sides of zero, infinite; all, none and some of a segment."""
    monkeypatch.setattr(planning, "ROWS", 1000)  # several blocks
    ops, lengths = CudaOps(device), np.array(lengths)
    ends = np.cumsum(lengths)
    for values in (rng.normal(size=ends[-1]), rng.integers(-2, 3, ends[-1]) / 4, np.zeros(ends[-1])):
        scores = values.astype(F32)
        scores[rng.random(len(scores)) < 0.1] = -np.inf
        scores[rng.random(len(scores)) < 0.1] = -0.0
        for share in cases((-0.1, 0, 0.2, 0.9, 1, 2), races=(0.2,)):
            counts = np.floor(share * lengths).astype(int)
            expected = np.zeros(len(scores), bool)
            for n, end, count in zip(lengths, ends, counts, strict=True):
                best = sorted(range(end - n, end), key=lambda i: (-scores[i], i))
                expected[best[: max(count, 0)]] = True
            taken = ops.segment_topk(device.upload(scores), lengths, counts)
            assert taken.dtype == bool
            np.testing.assert_array_equal(taken.get(), expected)
            numbered = [found.get() for found in ops.compact(taken, int(expected.sum()))]
            for ours, numpys in zip(numbered, numpy_ops.compact(expected, int(expected.sum())), strict=True):
                np.testing.assert_array_equal(ours, numpys)
            assert ops.segment_count(taken, lengths).tolist() == numpy_ops.segment_count(expected, lengths).tolist()
            assert [part.sum() for part in np.split(expected, ends[:-1])] == ops.segment_count(taken, lengths).tolist()


def test_sums_over_groups(device, rng):
    """In the order of the rows, in float64: to the bit."""
    ops, values = CudaOps(device), rng.normal(size=300).astype(F32) * 10.0 ** rng.integers(-9, 9, 300)
    groups = rng.integers(-1, 400, 300)  # of several blocks
    groups[:100] = rng.integers(-1, 20, 100)
    expected = [0.0] * 402
    for group, value in zip(groups, values, strict=True):
        if group >= 0:
            expected[group] += float(value)
    found = ops.segment_sum(device.upload(groups), device.upload(values), 402)
    assert found.get().tolist() == expected
    assert ops.segment_ids([3, 0, 2]).get().tolist() == [0, 0, 0, 2, 2]


@pytest.mark.parametrize("width", cases([1, 2, 7, 40], races=[7]))
def test_neighbours_are_pooled(device, rng, width):
    lengths = np.array([30, 0, 1, 9, 260])
    scores, ends = rng.normal(size=300).astype(F32), np.cumsum(lengths)
    for kind in ("max", "avg"):
        exact = []
        for n, end in zip(lengths, ends, strict=True):
            for row in range(end - n, end):
                lo = row - width // 2
                around = scores[max(lo, end - n) : min(lo + width, end)]
                exact.append(around.max() if kind == "max" else np.float64(around).sum() / width)
        ours = CudaOps(device).pooled(device.upload(scores), lengths, width, kind).get()
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(numpy_ops.pooled(scores, lengths, width, kind), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", cases([0, 0.1, 0.6, 1], races=[0.1]))
def test_the_neighbour_that_stays(device, rng, share):
    lengths, reach = np.array([60, 0, 1, 230]), 5
    pos = np.concatenate([np.sort(rng.permutation(500)[:n]) for n in lengths]).astype(np.int32)
    stays, ends = rng.random(len(pos)) < share, np.cumsum(lengths)
    ours = CudaOps(device).neighbours(device.upload(stays), device.upload(pos), lengths, reach).get()
    numpys = numpy_ops.neighbours(stays, pos, lengths, reach)
    for n, end in zip(lengths, ends, strict=True):
        for row in np.arange(end - n, end)[~stays[end - n : end]]:
            near = [other for other in range(end - n, end) if stays[other] and abs(pos[other] - pos[row]) <= reach]
            expected = min(near, key=lambda other: (abs(pos[other] - pos[row]), other), default=-1)
            assert ours[row] == numpys[row] == expected


# clusters


@pytest.mark.parametrize("real16, d", SIZES)
@pytest.mark.parametrize(
    "kept", cases([512, 20, 0], races=[20])
)  # rows of segments whose cosines are kept; longer ones go another way
def test_greedy_clusters(device, rng, real16, d, kept, monkeypatch):
    monkeypatch.setattr(cuda_clusters, "KEPT_LENGTH", kept)
    lengths = np.array([1, 3, 70, 0, 33, 31, 2, 32])
    starts = np.cumsum(lengths) - lengths + np.arange(len(lengths))  # a row of no segment between two of them
    n = int((starts + lengths).max()) + 1
    words = to_words(rng.normal(size=(n, d)) + 1.2 * rng.normal(size=d), real16)
    words[5] = 0
    rows = np.float64(from_words(words, real16))
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    taus = [-1.1, 0.5, 0.6, 0.7, 1.0]
    segments = cuda_clusters.segments(device, device.upload(starts), device.upload(lengths))
    rows = device.upload(np.arange(n))
    clusters = cuda_clusters.GreedyClusters(device, real16, device.upload(words), rows, n, segments)
    counts = clusters.counts(taus)
    for tau, count in zip(taus, counts, strict=True):
        expected = np.arange(n)
        for start, length in zip(starts, lengths, strict=True):  # algorithm 1, literally
            free = list(range(start, start + length))
            while free:
                seed, *rest = free
                cosines = unit[rest] @ unit[seed]
                assert (np.abs(cosines - tau) > 1e-6).all()
                expected[[r for r, c in zip(rest, cosines, strict=True) if c > tau]] = seed
                free = [r for r, c in zip(rest, cosines, strict=True) if not c > tau]
        seed, similarity = (found.get() for found in clusters.assign(tau))
        np.testing.assert_array_equal(seed, expected)
        inside = np.concatenate([np.arange(s, s + length) for s, length in zip(starts, lengths, strict=True)])
        assert count == (expected == np.arange(n))[inside].sum()
        alone = expected == np.arange(n)
        np.testing.assert_allclose(similarity[~alone], (unit * unit[expected]).sum(axis=1)[~alone], atol=1e-5)
        assert (similarity[alone] == 1).all()
    assert counts[0] < counts[2] < counts[4]


def test_the_order_of_threads_does_not_matter(rng, monkeypatch):
    """Of the kernels whose threads work together; the emulator runs them forwards, backwards and shuffled."""
    if emulator.available():
        pytest.skip(emulator.available())
    device, results = emulator.EmulatedDevice(), []
    weight, _, real16 = matrix(device, rng, "Q4_0", 20, 96)
    x, norm = device.upload(rng.normal(size=(2, 96)).astype(F32)), device.upload(np.ones(96, F32))
    keys = device.upload(to_words(rng.normal(size=(60, 64)) + 1, "half"))
    scores = device.upload(rng.integers(0, 4, 60).astype(F32))
    for order in (0, 1, 2):
        monkeypatch.setattr(Kernel, "order", order)
        y, h = device.empty((2, 20), np.float32), device.empty((2, 96), np.uint16)
        launch.norm_gemv(device, x, norm, 1e-5, weight, y)
        launch.rms_norm(device, x, norm, 1e-5, h, "half")
        segments = cuda_clusters.segments(device, *(device.upload(np.array(table)) for table in ([0, 33], [33, 27])))
        clusters = cuda_clusters.GreedyClusters(device, "half", keys, device.upload(np.arange(60)), 60, segments)
        largest = CudaOps(device).segment_topk(scores, [40, 20], [11, 7])
        results.append([y.get(), h.get(), largest.get(), *(found.get() for found in clusters.assign(0.5))])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
