"""Attention kernels in CUDA against literal float64 on the same rounded inputs."""

import numpy as np
import pytest
from cuda_words import REAL16, from_words, packed, to_words
from emulator import Kernel, cases
from head_sizes import PAGES, SIZES

from minillm.ops import launch
from minillm.ops.cuda_ops import CudaOps
from minillm.ops.numpy_ops import NUMPY as numpy_ops
from minillm.ops.pages import PAGE_FORMATS, hadamard
from minillm.ops.pages import PAGE_SIZE as PAGE

REALS = cases(list(REAL16), races=["half"])
DTYPES = "float16", "int8", "k5v4"  # of pages: that of the 16-bit floats, whichever it is, whole numbers and levels
TYPES = [(dtype, real16) for dtype in DTYPES for real16 in (REALS if dtype != "k5v4" else ["half"])]


@pytest.fixture
def rng():
    return np.random.default_rng(5)


class Stored:
    """Random entries of B sequences with lengths (B, H), in pages on a device and as they are on the host. Pages lie in
    any order over several slabs, positions in any order; what no entry fills is NaN."""

    def __init__(
        self, device, rng, lengths, head_dim, real16, seen, *, size=1.0, values=1.0, slab_pages=5, dtype="float16"
    ):
        lengths = np.array(lengths, np.int32)
        n_pages = -(-lengths // PAGE)
        n_slabs = -(-(int(n_pages.sum()) + 2) // slab_pages)
        ids = rng.permutation(n_slabs * slab_pages).astype(np.int32)
        format, n_slab = PAGE_FORMATS[dtype], slab_pages * PAGE
        fields = {  # 0xff: NaN where words are floats
            name: np.full((n_slabs, n_slab, int(np.prod(row)) * np.dtype(word).itemsize), 0xFF, np.uint8)
            for name, (row, word) in format.layout(head_dim).items()
        }
        pages = np.full((*lengths.shape, int(n_pages.max()) + 1), 1 << 30, np.int32)
        self.heads = {}  # (sequence, head) -> k, v (m, d), log_size, pos (m,)
        for (b, h), length in np.ndenumerate(lengths):
            held, ids = np.split(ids, [n_pages[b, h]])
            pages[b, h, : len(held)] = held
            log_size = np.log(rng.integers(1, 40, length)).astype(np.float32)
            pos = rng.integers(0, max(seen[b], 1), length).astype(np.int32)
            stored, exact = {"log_size": log_size, "pos": pos}, []
            for field, rows, scale in (("k", format.k, size), ("v", format.v, values)):
                words = to_words(rng.normal(size=(length, head_dim)) * scale, real16)
                parts, read = packed(words, rows, real16)
                stored |= {field + part: array for part, array in zip(rows.parts(head_dim), parts, strict=True)}
                exact.append(read)
            entry = np.arange(length)
            slab, page = np.divmod(held[entry // PAGE], slab_pages)
            for name, array in stored.items():
                n_bytes = fields[name].shape[2]
                fields[name][slab, page * PAGE + entry % PAGE] = array.view(np.uint8).reshape(length, n_bytes)
            self.heads[b, h] = *exact, log_size, pos
        self.slabs = [
            device.upload(np.concatenate([field[i].reshape(-1) for field in fields.values()])) for i in range(n_slabs)
        ]
        self.paged = launch.Paged(
            format,
            device.upload(np.array([slab.data.ptr for slab in self.slabs], np.uint64)),
            slab_pages,
            device.upload(pages),
            device.upload(lengths),
            device.upload(np.array(seen, np.int32)),
        )


def softmax_values(logits, v, unit, turned=0.0):
    """softmax(logits) v in float64, the log of the sum, and how far a kernel may be off: the rounding of p and of the
    result to `unit`, that of p to multiples of half's smallest number, and that of logits to float32. Zeros and
    -infinity if nothing is visible. turned: where rows are stored transformed, how far logits may be off by the
    rounding of the transformed query."""
    if not (logits > -np.inf).any():
        return np.zeros(v.shape[1]), -np.inf, np.zeros(v.shape[1])
    top = logits.max()
    p = np.exp(logits - top)
    p /= p.sum()
    out, mass = p @ v.astype(np.float64), p @ np.abs(v).astype(np.float64)
    if turned:  # p is rounded where it meets the transformed values: a sum of such errors comes back
        mass = np.full_like(mass, np.linalg.norm(p @ np.abs(hadamard(v).astype(np.float64))))
    largest = np.abs(logits[logits > -np.inf]).max()
    allowed = unit * (mass + np.abs(out)) + (2**-21 * largest + 1e-6 + 2 * turned) * mass
    return out, top + np.log(np.exp(logits - top).sum()), allowed + 2**-25 * np.abs(v).sum(axis=0) * p.max()


def close(found, exact, allowed):
    assert np.isfinite(found).all()
    assert (np.abs(found - exact) <= allowed).all(), f"off by {np.abs(found - exact).max()}, allowed {allowed.max()}"


def check_decode(device, rng, lengths, group, head_dim, real16, *, window=0, size=1.0, values=1.0, dtype="float16"):
    """-> the words of the result"""
    lengths = np.array(lengths)
    batch, n_kv_heads = lengths.shape
    seen = lengths.max(axis=1) * 2
    stored = Stored(device, rng, lengths, head_dim, real16, seen, size=size, values=values, dtype=dtype)
    q = to_words(rng.normal(size=(batch, n_kv_heads * group, head_dim)) * size, real16)
    scale = head_dim**-0.5
    starts = device.empty((1, batch * n_kv_heads + 1), np.int32)
    launch.decode_plan(device, stored.paged.lengths.reshape(1, batch, n_kv_heads), starts)
    space = launch.decode_space(device, batch * n_kv_heads, group, head_dim, PAGE_FORMATS[dtype])
    out = device.empty(q.shape, np.uint16)
    launch.decode_attention(device, device.upload(q), stored.paged, starts[0], space, out, scale, window, real16)
    found, wide = from_words(out.get(), real16), from_words(q, real16).astype(np.float64)
    for (b, h), (k, v, log_size, pos) in stored.heads.items():
        visible = (pos > seen[b] - window) if window else np.ones(len(pos), bool)
        for head in range(h * group, (h + 1) * group):
            logits = np.where(visible, k.astype(np.float64) @ wide[b, head] * scale + log_size, -np.inf)
            turned = 0.0
            if PAGE_FORMATS[dtype].k.turned and len(k):
                parts = np.abs(hadamard(wide[b, head][None]) * hadamard(k.astype(np.float64)))
                turned = REAL16[real16] * scale * parts.sum(axis=1).max()
            exact, _, allowed = softmax_values(logits, v, REAL16[real16], turned)
            close(found[b, head], exact, allowed)
    return out.get()


LENGTHS = [
    [[1]],
    [[31, 32, 33]],
    [[700, 0, 16]],  # one head holds nearly everything
    [[0, 0, 5, 0, 64, 0]],
    [[0, 0]],
    [[90, 3], [0, 0], [257, 40]],
    [[7] * 40],  # more items than lanes, fewer pages than warps
]


@pytest.mark.parametrize("dtype, real16", TYPES)
@pytest.mark.parametrize("lengths", cases(LENGTHS, races=[[[90, 3], [0, 0], [257, 40]]]))
def test_decode_lengths(device, rng, lengths, real16, dtype):
    check_decode(device, rng, lengths, 3, 64, real16, dtype=dtype)


@pytest.mark.parametrize("dtype, real16, head_dim", PAGES)
@pytest.mark.parametrize("group", cases([1, 17], races=[17]))
def test_decode_groups(device, rng, group, dtype, real16, head_dim):
    """In one tile of queries and in two."""
    check_decode(device, rng, [[130, 20]], group, head_dim, real16, dtype=dtype)


@pytest.mark.parametrize("group", cases([3, 4, 8], races=[]))
def test_decode_groups_in_a_tile(device, rng, group):
    check_decode(device, rng, [[130, 20]], group, 64, "half")


@pytest.mark.parametrize("dtype, real16", TYPES)
@pytest.mark.parametrize("size", cases([1e-3, 1.0, 12.0], races=[]))
def test_decode_logit_sizes(device, rng, size, real16, dtype):
    check_decode(device, rng, [[150, 33]], 4, 64, real16, size=size, dtype=dtype)


@pytest.mark.parametrize("values", [1e-3, 1e4])
def test_decode_value_sizes(device, rng, values):
    """What a weight becomes by a value's scale stays within half."""
    check_decode(device, rng, [[150, 33]], 4, 64, "half", values=values, dtype="int8")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", cases([1, 40, 10_000], races=[40]))
def test_decode_window(device, rng, window, dtype):
    check_decode(device, rng, [[200, 65], [3, 120]], 2, 64, "half", window=window, dtype=dtype)


@pytest.mark.parametrize("processors", cases([1, 3, 40], races=[3]))
def test_decode_any_grid(device, rng, processors, monkeypatch):
    monkeypatch.setattr(device, "processors", processors)
    check_decode(device, rng, [[300, 0, 90], [64, 2, 31]], 2, 64, "half")


def test_decode_plan(device, rng):
    lengths = rng.integers(0, 200, (3, 5, 9)).astype(np.int32)
    starts = device.empty((3, 46), np.int32)
    launch.decode_plan(device, device.upload(lengths), starts)
    pages = -(-lengths.reshape(3, 45) // PAGE)
    np.testing.assert_array_equal(starts.get(), np.concatenate([np.zeros((3, 1), int), pages.cumsum(axis=1)], axis=1))


def check_prefill(device, rng, lengths, n, group, head_dim, real16, *, window=0, size=1.0, at=None):
    """lengths: stored entries of each KV head; at: how far behind the first of n new tokens queries are, if they are
    not those tokens'. -> the words of the result"""
    n_kv_heads, seen = len(lengths), 2 * max(lengths) + 3
    q_pos = seen + np.arange(n, dtype=np.int32) if at is None else seen + np.array(at, np.int32)
    stored = Stored(device, rng, [lengths], head_dim, real16, [seen], size=size)
    q = to_words(rng.normal(size=(n_kv_heads * group, len(q_pos), head_dim)) * size, real16)
    k, v = (to_words(rng.normal(size=(n_kv_heads, n, head_dim)) * s, real16) for s in (size, 1))
    out, lse = device.empty((len(q_pos), len(q), head_dim), np.uint16), device.empty(q.shape[:2], np.float32)
    scale = head_dim**-0.5
    upload, given = device.upload, None if at is None else device.upload(q_pos)
    new = upload(q), upload(k), upload(v)
    launch.prefill_attention(device, *new, stored.paged, out, lse, scale, window, real16, given)
    found, found_lse = from_words(out.get(), real16), lse.get()
    wide, k, v = (from_words(x, real16).astype(np.float64) for x in (q, k, v))
    for head in range(len(q)):
        old_k, old_v, log_size, old_pos = stored.heads[0, head // group]
        keys, values = np.concatenate([old_k, k[head // group]]), np.concatenate([old_v, v[head // group]])
        pos = np.append(old_pos, np.arange(seen, seen + n))
        bias = np.append(log_size, np.zeros(n))
        for i, place in enumerate(q_pos):
            visible = (pos <= place) & (pos > place - (window or 1 << 30))
            if not visible.any():
                assert (found[i, head] == 0).all() and found_lse[head, i] == -np.inf
                continue
            logits = np.where(visible, keys @ wide[head, i] * scale + bias, -np.inf)
            exact, exact_lse, allowed = softmax_values(logits, values, REAL16[real16])
            close(found[i, head], exact, allowed)
            np.testing.assert_allclose(found_lse[head, i], exact_lse, rtol=2e-6, atol=2e-5)
    return out.get()


@pytest.mark.parametrize("real16", REALS)
@pytest.mark.parametrize("window", cases([0, 60], races=[60]))
@pytest.mark.parametrize("lengths, n", cases([([70, 3], 0), ([0, 0], 90), ([130, 0], 1)], races=[([70, 3], 0)]))
def test_queries_at_any_positions(device, rng, lengths, n, window, real16):
    """Among and after the new tokens, more than a block has; with a window some see nothing."""
    at = np.sort(rng.choice(n + 190, 140, replace=False))
    check_prefill(device, rng, lengths, n, 2, 64, real16, window=window, at=at)


@pytest.mark.parametrize("real16", REALS)
@pytest.mark.parametrize("n", cases([1, 63, 65, 130], races=[130]))
@pytest.mark.parametrize("lengths", cases([[0, 0], [1, 33], [150, 0]], races=[[1, 33]]))
def test_prefill_lengths(device, rng, lengths, n, real16):
    check_prefill(device, rng, lengths, n, 1, 64, real16)


@pytest.mark.parametrize("real16, head_dim", SIZES)
@pytest.mark.parametrize("group", cases([1, 3], races=[3]))
def test_prefill_groups(device, rng, group, real16, head_dim):
    check_prefill(device, rng, [70], 37, group, head_dim, real16)


@pytest.mark.parametrize("real16, head_dim", SIZES[2:])
def test_prefill_of_several_blocks(device, rng, real16, head_dim):
    """Of fewer queries each where heads are large, over pages and new tokens with a window."""
    check_prefill(device, rng, [70], 130, 1, head_dim, real16, window=90)


@pytest.mark.parametrize("real16", REALS)
@pytest.mark.parametrize("size", cases([1e-3, 12.0], races=[]))
def test_prefill_logit_sizes(device, rng, size, real16):
    check_prefill(device, rng, [40, 10], 80, 1, 64, real16, size=size)


@pytest.mark.parametrize("lengths", cases([[0], [90]], races=[[90]]))
@pytest.mark.parametrize("window", cases([1, 30, 64, 200, 1000], races=[64]))
def test_prefill_window(device, rng, window, lengths):
    check_prefill(device, rng, lengths, 200, 1, 64, "half", window=window)


class Scores:
    """Queries and ragged rows on a device, and in float64 what each query gives to each row."""

    def __init__(self, device, rng, lengths, n, group, head_dim, real16, *, window=0, size=1.0, splits=1):
        self.device, self.real16, self.window, self.scale = device, real16, window, head_dim**-0.5
        total, n_heads = sum(lengths), group * len(lengths)
        seen = max(lengths)
        q, keys = (to_words(rng.normal(size=(m, head_dim)) * size, real16) for m in (n_heads * n, total))
        self.log_size = np.log(rng.integers(1, 50, total)).astype(np.float32)
        self.pos = rng.integers(0, seen + n, total).astype(np.int32)
        self.q_pos = np.arange(seen, seen + n, dtype=np.int32)
        starts = np.append(0, np.cumsum(lengths)).astype(np.int32)
        upload = device.upload
        self.rows = launch.Rows(
            upload(keys), upload(self.log_size), upload(self.pos), upload(starts), int(max(lengths))
        )
        self.q, self.q_at = upload(q.reshape(n_heads, n, head_dim)), upload(self.q_pos)
        self.lse = device.empty((splits, n_heads, n), np.float32)
        self.p, self.exact_lse = np.zeros((group, n, total)), np.full((n_heads, n), -np.inf)
        wide, keys = from_words(q, real16).astype(np.float64).reshape(n_heads, n, -1), from_words(keys, real16)
        self.largest_logit = 1.0
        for head in range(n_heads):
            rows = slice(*starts[head // group : head // group + 2])
            for i in range(n):
                logits = keys[rows] @ wide[head, i] * self.scale + self.log_size[rows]
                far = self.q_pos[i] - self.pos[rows]
                seen_rows = (far >= 0) & (far < (window or 1 << 30))
                if seen_rows.any():
                    top = logits[seen_rows].max()
                    self.exact_lse[head, i] = top + np.log(np.exp(logits[seen_rows] - top).sum())
                    self.p[head % group, i, rows] = np.where(seen_rows, np.exp(logits - self.exact_lse[head, i]), 0)
                    self.largest_logit = max(self.largest_logit, np.abs(logits).max())

    @property
    def rtol(self):
        return 2**-20 * self.largest_logit + 4e-6

    def find_lse(self):
        launch.score_lse(self.device, self.q, self.rows, self.q_at, self.lse, self.scale, self.window, self.real16)

    def check_lse(self):
        top = self.lse.get().max(axis=0)
        with np.errstate(invalid="ignore"):
            found = top + np.log(np.exp(self.lse.get() - top).sum(axis=0))
        found = np.where(top == -np.inf, -np.inf, found)
        np.testing.assert_allclose(found, self.exact_lse, rtol=2e-6, atol=2e-5)

    def check_window_scores(self):
        out = self.device.empty(self.p.shape, np.float32)
        launch.window_scores(
            self.device, self.q, self.rows, self.q_at, self.lse, out, self.scale, self.window, self.real16
        )
        np.testing.assert_allclose(out.get(), self.p, rtol=self.rtol, atol=1e-30)
        return out.get()

    def check_column_scores(self, reduce, min_distance=0):
        out = self.device.empty((len(self.p), self.p.shape[2]), np.float32)
        arguments = self.scale, self.window, reduce is np.max, min_distance, self.real16
        launch.column_scores(self.device, self.q, self.rows, self.q_at, self.lse, out, *arguments)
        counts = self.pos <= self.q_pos[:, None] - min_distance
        np.testing.assert_allclose(out.get(), reduce(self.p * counts, axis=1), rtol=self.rtol, atol=1e-30)
        return out.get()


@pytest.mark.parametrize("real16", REALS)
@pytest.mark.parametrize("group, n", cases([(1, 1), (3, 50), (4, 32), (8, 5)], races=[(3, 50)]))
@pytest.mark.parametrize("lengths", cases([[1], [0, 64, 129], [200, 0, 7]], races=[[0, 64, 129]]))
def test_scores(device, rng, lengths, group, n, real16):
    case = Scores(device, rng, lengths, n, group, 64, real16)
    case.find_lse()
    case.check_lse()
    case.check_window_scores()
    case.check_column_scores(np.sum)
    case.check_column_scores(np.max, min_distance=1)


@pytest.mark.parametrize("window", cases([1, 50, 1000], races=[50]))
@pytest.mark.parametrize("min_distance", cases([0, 40, 100_000], races=[40]))
def test_scores_of_many_queries(device, rng, window, min_distance):
    case = Scores(device, rng, [300, 130], 270, 1, 128, "bf16", window=window)
    case.find_lse()
    case.check_lse()
    case.check_column_scores(np.sum, min_distance)
    case.check_column_scores(np.max, min_distance)
    case.check_window_scores()


@pytest.mark.parametrize("real16, head_dim", SIZES[2:])
def test_scores_of_other_head_sizes(device, rng, real16, head_dim):
    case = Scores(device, rng, [70, 0, 130], 140, 1, head_dim, real16, splits=2)
    case.find_lse()
    case.check_lse()
    case.check_window_scores()
    case.check_column_scores(np.sum)
    case.check_column_scores(np.max, min_distance=1)


@pytest.mark.parametrize("size", cases([1e-3, 10.0], races=[10.0]))
@pytest.mark.parametrize("splits", cases([2, 5], races=[2]))
def test_scores_in_splits(device, rng, splits, size):
    case = Scores(device, rng, [260, 30, 0], 20, 2, 64, "half", size=size, splits=splits)
    case.find_lse()
    case.check_lse()
    case.check_window_scores()
    case.check_column_scores(np.sum)


def test_scores_with_the_lse_of_prefill(device, rng):
    """Fresh keys in order, causal: what prefill_attention returns is what the second pass needs."""
    case = Scores(device, rng, [90, 90], 90, 2, 64, "half")
    case.rows.pos.set(np.tile(case.q_pos, 2))
    case.rows.log_size.fill(0)
    none = Stored(device, rng, [[0, 0]], 64, "half", [90]).paged
    case.find_lse()
    k = case.rows.keys.reshape(2, 90, 64)
    out, lse = device.empty((90, 4, 64), np.uint16), device.empty((4, 90), np.float32)
    launch.prefill_attention(device, case.q, k, k, none, out, lse, case.scale, 0, "half")
    np.testing.assert_allclose(lse.get(), case.lse.get()[0], rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("window", cases([None, 20], races=[]))
def test_scores_through_the_contract(device, rng, window, monkeypatch):
    """CudaOps and NumPy on the same rounded inputs, heads of any lengths and rows enough for several splits."""
    ops, lengths, n = CudaOps(device), np.array([1300, 0, 40]), 33
    ops.real16 = "half"
    monkeypatch.setattr(device, "processors", 8)
    rounded = lambda *shape: from_words(to_words(rng.normal(size=shape), "half"), "half")  # noqa: E731
    q, keys = rounded(6, n, 64), rounded(1340, 64)
    log_size, pos = np.log(rng.integers(1, 9, 1340)).astype(np.float32), rng.integers(0, 1300, 1340).astype(np.int32)
    arguments = q, keys, lengths, log_size, pos, np.arange(1280, 1280 + n), 0.125, window
    close = {"rtol": 2e-5, "atol": 1e-7}
    np.testing.assert_allclose(ops.window_scores(*arguments).get(), numpy_ops.window_scores(*arguments), **close)
    for how in ({"reduce": "sum"}, {"reduce": "max", "min_distance": 3}):
        exact = numpy_ops.column_scores(*arguments, **how)
        np.testing.assert_allclose(ops.column_scores(*arguments, **how).get(), exact, **close)
        lse = device.upload(rng.normal(size=(6, n)).astype(np.float32))
        exact = numpy_ops.column_scores(*arguments, **how, lse=lse.get())
        np.testing.assert_allclose(ops.column_scores(*arguments, **how, lse=lse).get(), exact, **close)


@pytest.mark.parametrize("pos", cases([0, 126, 127, 128, 256], races=[]))
def test_queries_that_see_a_row_at_the_edges_of_tiles(device, rng, pos):
    """One row gets 1 from every query that sees it: their number, for windows and distances around 128 queries."""
    ops, one, q_pos = CudaOps(device), np.ones(1, np.float32), np.arange(257)
    ops.real16 = "half"
    q, key = rng.normal(size=(1, 257, 64)), rng.normal(size=(1, 64))
    for window in (1, 2, 128, 129, 130):
        for distance in (0, 1, 127, 128, 129):
            arguments = q, key, [1], one, np.array([pos]), q_pos, 1.0, window
            found = ops.column_scores(*arguments, min_distance=distance).get()[0, 0]
            far = q_pos - pos
            assert abs(found - np.count_nonzero((far >= distance) & (far >= 0) & (far < window))) < 1e-3


def test_scores_of_nothing(device):
    ops, none, rows = CudaOps(device), np.zeros(0, np.int32), np.zeros((0, 64), np.float32)
    ops.real16 = "half"
    q = np.zeros((4, 3, 64), np.float32)
    assert ops.window_scores(q, rows, [0, 0], none, none, np.arange(3), 1.0).shape == (2, 3, 0)
    keys, five = np.zeros((5, 64), np.float32), np.zeros(5, np.int32)
    assert not ops.column_scores(q[:, :0], keys, [5, 0], five, five, none, 1.0).get().any()


@pytest.fixture
def thread_orders(device, monkeypatch):
    """What a function returns in each order in which the emulator can run threads."""

    def results(function):
        if device.name != "emulator":
            pytest.skip("a GPU chooses its own order")
        for order in range(3):
            monkeypatch.setattr(Kernel, "order", order)
            monkeypatch.setattr(Kernel, "seed", 7)
            yield function()

    return results


def test_the_order_of_threads_does_not_matter(device, thread_orders):
    def all_kernels():
        rng = np.random.default_rng
        decode = [check_decode(device, rng(1), [[100, 3]], 2, 64, "half", dtype=dtype) for dtype in DTYPES]
        prefill = check_prefill(device, np.random.default_rng(1), [70], 70, 1, 64, "half")
        case = Scores(device, np.random.default_rng(1), [70, 30], 40, 2, 64, "half")
        case.find_lse()
        scores = case.check_window_scores(), case.check_column_scores(np.sum)
        return np.concatenate([part.reshape(-1) for part in (*decode, prefill, *scores)])

    first, *others = thread_orders(all_kernels)
    for other in others:
        np.testing.assert_array_equal(other, first)
