"""Every backend keeps the contract: NumPy, each compiled path, CUDA on the emulator, and on a GPU where there is one.

All have the same names and arguments, and on random input the values of NumPy, whose own are held against float64 in
test_ops. Inputs are rounded to bf16 first, so that all are given the same. Tolerances are shares of the largest
value."""

import inspect
from dataclasses import replace

import emulator
import numpy as np
import pytest
from conftest import NO_COMPILER, cuda_device_or_skip

from minillm.cache.kv_cache import Entries, KVCache
from minillm.cache.page_pool import PagePool
from minillm.files.weights import Weight
from minillm.ops import contract, cpu_lib
from minillm.ops.cpu_ops import CpuOps
from minillm.ops.cuda_ops import CudaOps
from minillm.ops.numpy_ops import NUMPY, NumpyOps
from minillm.ops.pages import StoredRows, bf16_words, from_bf16

F32 = np.float32
SHARE = {"numpy": 0, "portable": 1e-5, "avx2": 1e-5, "avx512": 1e-2, "amx": 1e-2, "cuda": 4e-3}
BACKENDS = ["numpy", *(cpu_lib.available_paths() or ["compiled"]), "emulator", "gpu"]
GROUPS = (contract.Forward, contract.Pages, contract.Compression, contract.Planning, contract.Device)
HEADS, D = 2, 64


@pytest.fixture(scope="module", params=BACKENDS)
def ops(request):
    """A backend that has prepared a matrix, as it has of any model before anything else."""
    if request.param == "numpy":
        return NumpyOps()
    if request.param == "compiled":
        pytest.skip(NO_COMPILER)
    if request.param not in ("emulator", "gpu"):
        return CpuOps(request.param)
    if request.param == "emulator" and emulator.available():
        pytest.skip(emulator.available())
    ops = CudaOps(emulator.EmulatedDevice() if request.param == "emulator" else cuda_device_or_skip())
    ops.prepare(Weight.floats(np.ones((8, 8), F32)))
    return ops


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def normal(rng, *shape):
    return from_bf16(bf16_words(rng.standard_normal(shape, F32)))


def on_host(ops, value):
    """float32 or whole numbers in NumPy; of several values each."""
    if isinstance(value, tuple):
        return [on_host(ops, part) for part in value]
    words = getattr(value, "dtype", None) == np.uint16
    return np.asarray(ops.host(ops.stored_rows(value) if words else value))


def given(ops, value):
    """An argument as this backend has it. Segments, positions of queries, tables and weights stay on the host."""
    return ops.array(value) if isinstance(value, np.ndarray) else value


def close(ops, found, expected, share=None):
    share = SHARE[ops.name] if share is None else share
    for mine, exact in zip(found, expected, strict=True) if isinstance(expected, list) else [(found, expected)]:
        real = np.isfinite(exact)
        np.testing.assert_array_equal(mine[~real], exact[~real])
        if real.any():
            assert np.abs(np.float64(mine[real]) - exact[real]).max() <= share * np.abs(exact[real]).max()


def check(ops, name, *arguments, host=(), share=None, **keywords):
    """The operation on this backend and on NumPy. host: numbers and names of the arguments that stay on the host."""
    expected = on_host(NUMPY, getattr(NUMPY, name)(*(_copy(x) for x in arguments), **keywords))
    here = [x if i in host else given(ops, _copy(x)) for i, x in enumerate(arguments)]
    here_too = {word: x if word in host else given(ops, x) for word, x in keywords.items()}
    close(ops, on_host(ops, getattr(ops, name)(*here, **here_too)), expected, share)


def _copy(value):
    return value.copy() if isinstance(value, np.ndarray) else value


# the names


def test_every_name_with_the_same_arguments(ops):
    for group in GROUPS:
        for name, declared in vars(group).items():
            if name.startswith("_"):
                continue
            mine = inspect.getattr_static(type(ops), name)
            if not inspect.isfunction(declared):
                assert type(getattr(ops, name)) is type(declared), name
                continue
            arguments = [
                [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
                for function in (declared, mine)
            ]
            assert arguments[0] == arguments[1], name
            assert declared.__doc__, name
    assert isinstance(ops.name, str) and isinstance(ops, contract.Backend)


def test_nothing_is_left_undone(ops):
    """What the contract only declares is defined: `Backend` itself cannot do it."""
    declared = {
        name
        for group in GROUPS
        for name, function in vars(group).items()
        if inspect.isfunction(function) and "raise NotImplementedError" in inspect.getsource(function)
    }
    assert {"linear", "merge", "write_entries", "array"} <= declared
    assert not [name for name in declared if getattr(type(ops), name) is getattr(contract.Backend, name)]


# the forward pass


def test_linear_and_embed(ops, rng):
    matrix = normal(rng, 72, 64)
    weight, bias = Weight.floats(matrix), normal(rng, 72)
    for x in (normal(rng, 1, 64), normal(rng, 40, 64)):
        for more in ((), (bias,)):
            found = ops.linear(ops.array(x), ops.prepare(weight), *more)
            close(ops, on_host(ops, found), NUMPY.linear(x, weight, *more))
    ids = np.array([3, 0, 71, 3])
    close(ops, on_host(ops, ops.embed(ops.prepare(weight), ids)), NUMPY.embed(weight, ids))


def test_norm_and_activation(ops, rng):
    check(ops, "rms_norm", normal(rng, 5, 64), 1 + normal(rng, 64) / 8, 1e-5, host=(1,))
    check(ops, "glu", normal(rng, 5, 64), normal(rng, 5, 64), 1.0, 0.0)


@pytest.mark.parametrize("shape, table", [((3, 7, D), (7,)), ((4, 3, D), (4, 1)), ((7, D), (7,))])
def test_rope(ops, rng, shape, table):
    angle = rng.uniform(0, 6, (*table, D // 2))
    check(ops, "rope", normal(rng, *shape), np.cos(angle).astype(F32), np.sin(angle).astype(F32), host=(1, 2))


def stored(pool, lengths, seed=0):
    """A cache of one layer whose heads hold `lengths` entries, the newest of the newest token; the same ones on every
    backend."""
    rng, n, seen, array = np.random.default_rng(seed), sum(lengths), max(lengths), pool.ops.array
    cache = KVCache(pool, 1, len(lengths))
    pos = np.concatenate([np.arange(seen - length, seen, dtype=np.int32) for length in lengths])
    log_size, k, v = np.log(rng.integers(1, 9, n)).astype(F32), normal(rng, n, D), normal(rng, n, D)
    cache.write(0, Entries(*map(array, (k, v, log_size, pos)), np.array(lengths)))
    cache.advance([0] * seen)
    return cache


@pytest.mark.parametrize("dtype", ["auto", "int8", "k5v4", "q4"])
@pytest.mark.parametrize("window", [None, 20])
def test_attention(ops, rng, window, dtype):
    """Of a prompt, of queries anywhere, and of a token each of two sequences."""
    pools = [PagePool(one, D, dtype=dtype) for one in (ops, NUMPY)]
    caches = [[stored(pool, lengths) for pool in pools] for lengths in ([70, 33], [5, 40])]
    q, k, v = normal(rng, 2 * HEADS, 30, D), normal(rng, HEADS, 30, D), normal(rng, HEADS, 30, D)
    for q_pos in (None, np.arange(60, 90)):
        found, expected = (
            on_host(one, one.prefill_attention(*map(one.array, (q, k, v)), cache.layer(0), 0.125, window, q_pos))
            for one, cache in zip((ops, NUMPY), caches[0], strict=True)
        )
        close(ops, found, expected)
    q, found = normal(rng, 2, 2 * HEADS, D), []
    for one, of_one in zip((ops, NUMPY), zip(*caches, strict=True), strict=True):
        past = [replace(cache.layer(0), seen=cache.seen - 1) for cache in of_one]
        found.append(on_host(one, one.decode_attention(one.array(q), past, 0.125, window)))
    close(ops, *found)


# pages


@pytest.mark.parametrize("dtype", ["auto", "int8", "k5v4", "q4"])
def test_entries_and_their_rows(ops, rng, dtype):
    """Stored, read, gathered with new rows, and made into sums of themselves."""
    start = np.array([3, 32])
    caches = [stored(PagePool(one, D, dtype=dtype), [70, 33]) for one in (ops, NUMPY)]
    new, n = normal(rng, HEADS, 4, D), 68
    dest = np.concatenate([np.sort(rng.integers(0, 20, 67)), [20]])
    weights = [rng.uniform(0, 1, n).astype(F32) for _ in "kv"]
    read = []
    for one, cache in zip((ops, NUMPY), caches, strict=True):
        layer = cache.layer(0)
        read.append(on_host(one, tuple(one.gather(StoredRows(layer, start, field, one.array(new))) for field in "kv")))
        read[-1] += on_host(one, one.read_labels(layer, start))
        labels = one.array(np.zeros(21, F32)), one.array(np.arange(21, dtype=np.int32))
        entries = Entries(None, None, *labels, np.array([20, 1]))
        cache.rewrite(slice(0, 1), start, one.array(dest), [one.array(w) for w in weights], entries)
        after = cache.read(0).on_host(one)
        assert after.lengths.tolist() == [23, 33]
        read[-1] += [after.k, after.v, after.log_size, after.pos]
    close(ops, *read, share=ops.name != "numpy" and 2**-6)  # a sum is rounded to 16 or to 8 bits


# compression


def rows_of(rng, lengths):
    n = sum(lengths)
    pos = np.concatenate([np.sort(rng.choice(200, length, replace=False)) for length in lengths]).astype(np.int32)
    return normal(rng, n, D), np.array(lengths), np.log(rng.integers(1, 9, n)).astype(F32), pos


@pytest.mark.parametrize("lengths", [[60, 0], [33, 70]])
@pytest.mark.parametrize("window", [None, 50])
def test_scores(ops, rng, lengths, window):
    queries = normal(rng, 2 * HEADS, 9, D), *rows_of(rng, lengths), np.arange(195, 204), 0.125, window
    check(ops, "window_scores", *queries, host=(2, 5))
    for reduce in ("sum", "max"):
        check(ops, "column_scores", *queries, host=(2, 5), reduce=reduce, min_distance=3)
    lse = np.full((2 * HEADS, 9), 6, F32)
    check(ops, "column_scores", *queries, host=(2, 5), lse=lse)


def test_sums_of_rows(ops, rng):
    rows, _, _, pos = rows_of(rng, [40, 50])
    dest, weight = rng.integers(-1, 30, 90), rng.uniform(0.1, 1, 90).astype(F32)
    angle = np.arange(200)[:, None] * rng.uniform(0.01, 1, D // 2)
    tables = np.cos(angle).astype(F32), np.sin(angle).astype(F32)
    check(ops, "merge", rows, dest, weight, 30)
    check(ops, "unrotated", rows, pos, *tables, host=(2, 3))
    entry_pos = rng.integers(0, 200, 30).astype(np.int32)
    check(ops, "merge_unrotated", rows, pos, dest, weight, entry_pos, *tables, host=(5, 6))


def test_what_is_alike(ops, rng):
    """Rows are distinct and far from one another, so that every backend finds the same."""
    keys, rows = normal(rng, 90, D), np.arange(40)
    first = np.sort(rng.integers(0, 30, 40))
    last = np.minimum(first + 20, 50)
    check(ops, "nearest", keys, rows, np.arange(40, 90), first, last, host=(3, 4))
    keys = np.repeat(keys[:30], 3, axis=0) + normal(rng, 90, D) / 4
    rows, starts, lengths = np.arange(90), np.array([0, 40, 47]), np.array([40, 7, 43])
    made = [one.greedy_clusters(one.array(keys), one.array(rows), starts, lengths) for one in (ops, NUMPY)]
    taus = [0.3, 0.6, 0.95]
    assert made[0].counts(taus) == made[1].counts(taus)
    seeds, similarities = zip(*(on_host(one, of.assign(0.6)) for one, of in zip((ops, NUMPY), made, strict=True)))  # noqa: B905
    np.testing.assert_array_equal(*seeds)
    close(ops, *similarities)


# planning: whole numbers and float32 sums, the same everywhere


def test_planning(ops, rng):
    lengths, n = np.array([300, 0, 40, 1]), 341
    scores = rng.integers(0, 60, n).astype(F32)  # ties
    mask, pos = rng.random(n) < 0.3, np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    count, groups = int(mask.sum()), rng.integers(-1, 50, n)
    check(ops, "segment_ids", lengths, host=(0,), share=0)
    check(ops, "segment_count", mask, lengths, host=(1,), share=0)
    check(ops, "segment_sum", groups, scores, 50, share=1e-12)
    check(ops, "segment_topk", scores, lengths, np.array([100, 3, 40, 0]), host=(1, 2), share=0)
    check(ops, "nonzero", mask, count, share=0)
    check(ops, "compact", mask, count, share=0)
    for kind in ("max", "avg"):
        check(ops, "pooled", scores, lengths, 7, kind, host=(1,), share=1e-6)
    near = [on_host(one, one.neighbours(one.array(mask), one.array(pos), lengths, 5)) for one in (ops, NUMPY)]
    np.testing.assert_array_equal(near[0][~mask], near[1][~mask])
    size, protected = rng.integers(1, 5, n).astype(F32), mask & (rng.random(n) < 0.2)
    folded = []
    for one in (ops, NUMPY):
        rows = map(one.array, (scores, size, pos, mask, protected))
        dest, weight, *entries = on_host(one, one.fold(*rows, lengths, 16, 0.75))
        folded.append([dest, np.where(dest < 0, 0, weight), *entries])
    close(ops, *folded, share=1e-6)


def test_planning_through_the_host_is_what_a_new_backend_has(rng):
    """Arrays of a device that is not NumPy's: the defaults of the contract take them to the host and back."""
    if emulator.available():
        pytest.skip(emulator.available())

    class New(contract.Backend):
        device = emulator.EmulatedDevice()

        def array(self, values):
            return values if self.device.owns(values) else self.device.upload(np.asarray(values))

        def host(self, values):
            return values.get() if self.device.owns(values) else values

        def stored_rows(self, stored):
            return stored

    New.name = "numpy"
    test_planning(New(), rng)


# the device


def test_the_device(ops):
    values = np.arange(12, dtype=F32).reshape(3, 4)
    np.testing.assert_array_equal(ops.host(ops.array(values)), values)
    np.testing.assert_array_equal(ops.host(ops.concatenate([ops.array(values)] * 2)), np.concatenate([values] * 2))
    words = from_bf16(on_words(ops, ops.random_words((60, 64), 1)))
    assert abs(words.std() * 64**0.5 - 1) < 0.05
    assert ops.bandwidth(1 << 16, repeats=2) > 0
    free = ops.available_memory()
    assert free is None or free > 0
    ops.trim()


def on_words(ops, words):
    return np.asarray(ops.host(words))
