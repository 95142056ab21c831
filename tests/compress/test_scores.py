"""window_scores and column_scores, the reference and every compiled path, against literal loops in float64."""

import math

import numpy as np
import pytest

from minillm.ops import cpu_lib
from minillm.ops.cpu_ops import CpuOps
from minillm.ops.numpy_ops import NUMPY as numpy_ops

PATHS = ["numpy", *cpu_lib.available_paths()]
BF16 = ("avx512", "amx")  # the operands of q.k are bf16 there: a logit errs by up to 2^-8 of |q| |k|


@pytest.fixture(params=PATHS)
def ops(request):
    """The backend, with `ops.close` in the accuracy that its path has."""
    if request.param == "numpy":
        return numpy_ops
    return CpuOps(request.param)


@pytest.fixture
def tolerance(request):
    """Of a probability, as a share of itself and of 1."""
    path = request.node.callspec.params["ops"]
    return {"rtol": 3e-2, "atol": 3e-4} if path in BF16 else {"rtol": 2e-5, "atol": 1e-7}


@pytest.fixture
def rng():
    return np.random.default_rng(11)


class Case:
    """Random queries and rows. lengths: rows of each KV head; their positions are in any order, repeated too."""

    def __init__(self, rng, group, lengths, n, d, *, size=1.0, past=None, merged=True):
        n_rows = sum(lengths)
        seen = max(lengths, default=0) * 2 if past is None else past
        self.q = (rng.standard_normal((group * len(lengths), n, d)) * size).astype(np.float32)
        self.keys = rng.standard_normal((n_rows, d)).astype(np.float32)
        self.lengths = np.array(lengths)
        sizes = rng.integers(1, 50, n_rows) if merged else np.ones(n_rows)
        self.log_size = np.log(sizes).astype(np.float32)
        self.pos = rng.integers(0, seen + n, n_rows).astype(np.int32)
        self.q_pos = np.arange(seen, seen + n).astype(np.int32)
        self.scale = d**-0.5

    @property
    def arguments(self):
        return self.q, self.keys, self.lengths, self.log_size, self.pos, self.q_pos, self.scale

    def probabilities(self, window=None):
        """(G, n, R) float64 and the logs of the sums (Hq, n), query by query and row by row; nothing is shared with the
        code under test."""
        group = len(self.q) // len(self.lengths)
        p, lse = np.zeros((group, len(self.q_pos), len(self.pos))), np.full(self.q.shape[:2], -np.inf)
        head_of = [head for head, length in enumerate(self.lengths) for _ in range(length)]
        for g in range(group):
            for i, query_at in enumerate(self.q_pos):
                for head in range(len(self.lengths)):
                    query = self.q[head * group + g, i].astype(np.float64)
                    logits = {}
                    for row, (at, of) in enumerate(zip(self.pos, head_of, strict=True)):
                        if of == head and at <= query_at and (window is None or at > query_at - window):
                            product = float(self.keys[row].astype(np.float64) @ query)
                            logits[row] = product * self.scale + float(self.log_size[row])
                    if logits:
                        top = max(logits.values())
                        total = sum(math.exp(x - top) for x in logits.values())
                        lse[head * group + g, i] = top + math.log(total)
                        for row, x in logits.items():
                            p[g, i, row] = math.exp(x - top) / total
        return p, lse

    def reduced(self, p, reduce, min_distance):
        """(G, R) from the probabilities."""
        out = np.zeros((p.shape[0], p.shape[2]))
        for row, at in enumerate(self.pos):
            counted = [i for i, query_at in enumerate(self.q_pos) if query_at - at >= min_distance]
            for g in range(len(p)):
                column = [p[g, i, row] for i in counted]
                out[g, row] = sum(column) if reduce == "sum" else max(column, default=0.0)
        return out


CASES = [  # group, rows of each KV head, queries, d
    (1, (1,), 1, 8),
    (3, (130, 1, 0, 33), 40, 64),
    (4, (257,), 33, 12),
    (8, (7, 128), 5, 80),
    (1, (31, 300), 97, 16),
    (2, (0, 0), 3, 20),
]


@pytest.mark.parametrize("group, lengths, n, d", CASES)
@pytest.mark.parametrize("window", [None, 40])
def test_window_scores_are_the_softmax(ops, tolerance, rng, group, lengths, n, d, window):
    case = Case(rng, group, lengths, n, d)
    got, (expected, _) = ops.window_scores(*case.arguments, window), case.probabilities(window)
    assert got.dtype == np.float32 and got.shape == expected.shape == (group, n, sum(lengths))
    np.testing.assert_allclose(got, expected, **tolerance)
    np.testing.assert_array_equal(got[expected == 0], 0)


@pytest.mark.parametrize("group, lengths, n, d", CASES)
@pytest.mark.parametrize("window, min_distance", [(None, 0), (40, 0), (None, 25), (60, 25)])
def test_column_scores_reduce_the_softmax(ops, tolerance, rng, group, lengths, n, d, window, min_distance):
    case = Case(rng, group, lengths, n, d)
    p, lse = case.probabilities(window)
    for reduce in ("sum", "max"):
        expected = case.reduced(p, reduce, min_distance)
        got = ops.column_scores(*case.arguments, window, reduce=reduce, min_distance=min_distance)
        assert got.dtype == np.float32 and got.shape == expected.shape == (group, sum(lengths))
        np.testing.assert_allclose(got, expected, **tolerance)
        np.testing.assert_array_equal(got[expected == 0], 0)
        known = ops.column_scores(*case.arguments, window, reduce=reduce, min_distance=min_distance, lse=lse)
        np.testing.assert_allclose(known, expected, **tolerance)


def test_a_prompt_over_blocks_of_queries_and_rows(ops, tolerance, rng):
    """Rows and queries of one prompt, whose positions ascend: most blocks need no mask, or are not looked at."""
    n, d, group = 700, 16, 3
    q, keys = rng.standard_normal((2 * group, n, d), np.float32), rng.standard_normal((2 * n, d), np.float32)
    pos = np.tile(np.arange(n), 2)
    arguments = (q, keys, np.array([n, n]), np.zeros(2 * n, np.float32), pos, np.arange(n), 0.25)
    for window, min_distance in [(None, 0), (None, 64), (150, 0)]:
        expected = np.zeros((group, n, 2 * n))
        for head in range(2 * group):
            logits = q[head].astype(np.float64) @ keys[head // group * n :][:n].astype(np.float64).T * 0.25
            distance = np.arange(n)[:, None] - np.arange(n)
            logits[(distance < 0) | (distance >= (window or n))] = -np.inf
            p = np.exp(logits - logits.max(axis=1, keepdims=True))
            p = np.where(distance >= min_distance, p / p.sum(axis=1, keepdims=True), 0)
            expected[head % group, :, head // group * n :][:, :n] = p
        for reduce in ("sum", "max"):
            got = ops.column_scores(*arguments, window, reduce=reduce, min_distance=min_distance)
            np.testing.assert_allclose(got, getattr(expected, reduce)(axis=1), **tolerance)
        if not min_distance:
            np.testing.assert_allclose(ops.window_scores(*arguments, window), expected, **tolerance)


def test_sums_over_all_rows_count_the_queries(ops, rng):
    """Every query gives 1 in all, so the sums add up to the queries: also in bf16, whose error is in both passes."""
    case = Case(rng, 3, (400, 77), 150, 64, past=500)
    for got in (ops.column_scores(*case.arguments), ops.window_scores(*case.arguments).sum(axis=1)):
        heads = np.add.reduceat(got.astype(np.float64), [0, 400], axis=1)
        np.testing.assert_allclose(heads, 150, rtol=2e-5)


def test_rows_at_the_end_of_a_head_count_in_the_normaliser_only(ops, tolerance, rng):
    """The second pass of KVCompose and KVzip: its own keys stand behind the context's, and are sliced off."""
    case = Case(rng, 2, (60,), 30, 32, past=40, merged=False)
    case.pos = np.append(np.arange(30), np.arange(40, 70)).astype(np.int32)
    p, _ = case.probabilities()
    got = ops.column_scores(*case.arguments, reduce="max")[:, :30]
    np.testing.assert_allclose(got, p.max(axis=1)[:, :30], **tolerance)
    assert (p[:, :, :30].sum(axis=2) < 0.9).any()


@pytest.mark.parametrize("size", [1e-12, 1e3, 1e7])
def test_logits_of_any_size(ops, rng, size):
    case = Case(rng, 3, (90, 200), 20, 64, size=size, past=400)
    p = ops.window_scores(*case.arguments)
    assert np.isfinite(p).all()
    np.testing.assert_allclose(np.add.reduceat(p, [0, 90], axis=2), 1, rtol=1e-4)
    np.testing.assert_allclose(ops.column_scores(*case.arguments), p.sum(axis=1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ops.column_scores(*case.arguments, reduce="max"), p.max(axis=1), rtol=1e-4, atol=1e-6)
    expected, _ = case.probabilities()
    if size < 1:
        np.testing.assert_allclose(p, expected, rtol=1e-4)
    else:  # one row takes it all, the same one where it leads by more than the products are rounded
        leads = np.sort(expected, axis=2)[:, :, -1] == 1.0
        clear = leads & (p.max(axis=2) == 1.0)
        assert clear.mean() > 0.5
        assert (p.argmax(axis=2) == expected.argmax(axis=2))[clear].mean() > 0.95


def test_a_query_that_sees_nothing_gives_nothing(ops, rng):
    case = Case(rng, 2, (50, 3), 10, 16)
    case.pos[:] = 1000
    case.pos[:50:5] = 0
    lse = case.probabilities()[1]
    for got in (ops.column_scores(*case.arguments), ops.column_scores(*case.arguments, lse=lse)):
        assert np.isfinite(got).all() and (got[:, 50:] == 0).all() and (got[:, :50:5] > 0).all()
    assert (ops.window_scores(*case.arguments)[:, :, 50:] == 0).all()


def test_groups_of_one_query_head_are_many_kv_heads(ops, rng):
    """With identical query heads the GQA group gives what each KV head alone would."""
    case = Case(rng, 1, (70, 40), 50, 64)
    alone = ops.column_scores(*case.arguments)
    case.q = np.repeat(case.q, 4, axis=0)
    np.testing.assert_array_equal(ops.column_scores(*case.arguments), np.repeat(alone, 4, axis=0))
