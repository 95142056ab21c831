"""Rows in pages, number by number: what is stored of them, and that it is stored as the same words again."""

import numpy as np
import pytest

from minillm.cache.kv_cache import Entries, KVCache
from minillm.cache.page_pool import PagePool
from minillm.ops import cpu_lib
from minillm.ops.cpu_ops import CpuOps
from minillm.ops.numpy_ops import NUMPY

BACKENDS = {"numpy": NUMPY} | {path: CpuOps(path) for path in cpu_lib.available_paths()}
UPPER = {  # levels of a Gaussian of variance 1 (Max 1960, table I), those above zero
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
    5: [
        0.0659,
        0.1981,
        0.3314,
        0.4668,
        0.6050,
        0.7473,
        0.8947,
        1.049,
        1.212,
        1.387,
        1.577,
        1.788,
        2.029,
        2.319,
        2.692,
        3.263,
    ],
}


def hadamard(d):
    """(d, d) in float64: blocks of Sylvester's matrices, normalised."""
    block, made = d & -d, np.ones((1, 1))
    while len(made) < block:
        made = np.block([[made, made], [made, -made]])
    return np.kron(np.eye(d // block), made / np.sqrt(block))


def literal_levels(row, bits):
    """A row in float64: the levels it is at, and its scale before that is rounded to bf16. Also how far from a tie the
    nearest of its elements is."""
    upper = [round(127 * level / UPPER[bits][-1]) for level in UPPER[bits]]
    levels = [*(-level for level in reversed(upper)), *upper]
    turned = hadamard(len(row)) @ np.asarray(row, np.float64)
    largest = abs(turned).max()
    units = turned * 127 / largest if largest else turned
    distances = np.sort(abs(units[:, None] - np.array(levels)), axis=1)
    at = np.array([min(levels, key=lambda level: (abs(unit - level), level)) for unit in units])
    return at, turned @ at / (at @ at), (distances[:, 1] - distances[:, 0]).min()


def decoded(stored, bits, d):
    """Bytes of a row -> the number of each element's level, bit by bit."""
    low = [stored[i // 32 * 16 + i % 16] >> i % 32 // 16 * 4 & 15 for i in range(d)]
    if bits == 4:
        return low
    first = -(-d // 32) * 16
    return [low[i] + (stored[first + i // 8] >> i % 8 & 1) * 16 for i in range(d)]


def bf16(word):
    return float(np.uint32(int(word) << 16).view(np.float32))


@pytest.mark.parametrize("d", [1, 12, 64, 80, 96, 100, 128])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, bits", [("q4", (4, 4)), ("k5v4", (5, 4))])
def test_rows_of_levels(backend, dtype, bits, d):
    """As the definition says, and what was read is stored as the same words; the rows of a page that is not full."""
    ops, rng, n = BACKENDS[backend], np.random.default_rng(d), 45
    k, v = rng.standard_normal((2, n, d)).astype(np.float32) * np.float32(10.0) ** rng.integers(
        -9, 9, (2, n, 1)
    ).astype(np.float32)
    k[3], v[5, : d // 2], k[7], v[7] = 0, 0, 1, hadamard(d)[-1] * 5  # v[7]: all in one element, once transformed
    k[8:20] = rng.standard_cauchy((12, d)) ** 3
    cache = KVCache(PagePool(ops, d, dtype=dtype), 1, 1)
    stored = []
    for _ in range(2):
        labels = np.zeros(n, np.float32), np.arange(n, dtype=np.int32)
        cache.write(0, Entries(k, v, *labels, np.array([n])), np.array([0]))
        runs = list(cache.layer(0).runs(0))
        stored.append({name: np.concatenate([run[name] for run in runs]) for name in runs[0]})
        given, (k, v, *_) = (k, v), cache.layer(0).read(0)
        gathered = cache.read(0)
        for read, rows in zip((k, v), (gathered.k, gathered.v), strict=True):
            np.testing.assert_allclose(rows, read, rtol=1e-5, atol=1e-5 * abs(read).max())
        if len(stored) == 1:
            for field, rows, read, width in zip("kv", given, (k, v), bits, strict=True):
                check_rows(rows, stored[0][field], stored[0][f"{field}_scale"], read, width)
    for name in stored[0]:
        np.testing.assert_array_equal(stored[0][name], stored[1][name])


def check_rows(rows, packed, scales, read, bits):
    """Rows given; what is stored of them; what is read out of that."""
    d = rows.shape[1]
    for row, own, word, found in zip(rows, packed, scales, read, strict=True):
        levels, scale, clear = literal_levels(row, bits)
        numbers = decoded(own.tolist(), bits, d)
        upper = [round(127 * level / UPPER[bits][-1]) for level in UPPER[bits]]
        table = [*(-level for level in reversed(upper)), *upper]
        if clear > 1e-3:
            assert [table[number] for number in numbers] == levels.tolist()
            assert abs(bf16(word) - scale) <= scale * 2**-8
        exact = hadamard(d) @ (np.array([table[number] for number in numbers]) * bf16(word))
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6 * abs(exact).max())
        assert ((found - row) ** 2).sum() <= (0.25 if bits == 4 else 0.1) * (row.astype(np.float64) ** 2).sum()
