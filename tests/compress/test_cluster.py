"""SemantiCache: greedy clustering, chunks and cores against literal float64, and budgets that are met exactly."""

import numpy as np
import pytest
from literal import FakeRope, check_entries, chunks_between_delimiters, greedy_seeds, make_layer, semanticache

from minillm.compress import cluster, merge
from minillm.compress.config import CacheConfig
from minillm.ops import numpy_clusters
from minillm.ops.numpy_ops import NUMPY as numpy_ops

F32 = np.float32
SENTENCE, CLAUSE, BLANK, SPECIAL = 1, 2, 3, 4


def plan_at(layer, tau, rope="unrotated", chunking="delimiter", log_size=True):
    """The Plan at any tau."""
    layer.computed.clear()
    into = cluster.seeds(layer, None, None, tau, rope, chunking).rows
    return merge.cores(layer, None, into, rope, log_size)


def entries_of(layer, **options):
    return CacheConfig("semanticache", **options).resolve().plan(layer, None, None).apply(layer)


# greedy seed-based clustering


def literal_clusters(keys, starts, lengths, tau):
    """seed (R,) by the double loop, segment by segment, and which rows lie in a segment without a doubtful
    comparison."""
    seed, sure = np.arange(len(keys)), np.zeros(len(keys), bool)
    for start, length in zip(starts, lengths, strict=True):
        rows = slice(start, start + length)
        inner, near = greedy_seeds(keys[rows], tau)
        seed[rows] = start + np.array(inner, int)
        sure[rows] = not near
    return seed, sure


def clusters_of(keys, starts, lengths):
    """GreedyClusters whose segments are slices of the keys."""
    return numpy_ops.greedy_clusters(keys, np.arange(len(keys)), starts, lengths)


def check_clusters(keys, starts, lengths, taus):
    keys, starts, lengths = keys.astype(F32), np.asarray(starts), np.asarray(lengths)
    clusters = clusters_of(keys, starts, lengths)
    in_segment = np.zeros(len(keys), bool)
    for start, length in zip(starts, lengths, strict=True):
        in_segment[start : start + length] = True
    norms = np.linalg.norm(np.float64(keys), axis=1)
    for tau in taus:
        seed, similarity = clusters.assign(tau)
        expected, sure = literal_clusters(keys, starts, lengths, tau)
        assert sure[in_segment].mean() > 0.99  # nearly all of them are compared
        np.testing.assert_array_equal(seed[sure], expected[sure])
        own = np.arange(len(keys))
        np.testing.assert_array_equal(seed[~in_segment], own[~in_segment])
        assert clusters.counts([tau, 0.4]) == [np.count_nonzero((seed == own) & in_segment), *clusters.counts([0.4])]
        product = norms * norms[seed]
        cosine = np.divide((np.float64(keys) * keys[seed]).sum(axis=1), product, np.zeros(len(keys)), where=product > 0)
        np.testing.assert_allclose(similarity, np.where(seed == own, 1.0, cosine), atol=1e-6)


def segments_of(rng, lengths):
    """starts of segments of these lengths in a random order, with rows of no segment between some; how many rows."""
    starts, row = np.zeros(len(lengths), int), 0
    for m in rng.permutation(len(lengths)):
        row += int(rng.integers(0, 3)) * int(rng.random() < 0.3)
        starts[m] = row
        row += lengths[m]
    return starts, row + 2


TAUS = [-2.0, -1.0, -0.5, 0.0, 0.3, 0.7, 0.9, 1.0, 2.0]


@pytest.mark.parametrize("d", [1, 2, 3, 8])
def test_clusters_of_random_keys(d):
    """Thousands of cases: 400 segments x 9 taus for each d; some keys are zero, some are multiples of others."""
    rng = np.random.default_rng(d)
    lengths = rng.integers(0, 14, 400)
    starts, n = segments_of(rng, lengths)
    keys = rng.normal(size=(n, d))
    keys[rng.random(n) < 0.1] = 0
    again = rng.random(n) < 0.2
    keys[again] = np.roll(keys, 1, axis=0)[again] * rng.choice([-2.0, 0.5, 4.0], (again.sum(), 1))
    # Of one dimension every cosine is -1, 0 or 1, and those of +-1 are never sure.
    taus = [tau for tau in TAUS if abs(tau) != 1] if d == 1 else TAUS
    taus = [tau + 1e-4 if abs(tau) == 1 else tau for tau in taus]
    check_clusters(keys, starts, lengths, taus)


def test_a_similarity_of_exactly_tau_is_not_enough():
    """Keys along axes, of norms that are powers of two: every cosine is -1, 0 or 1 without rounding."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 12, 300)
    starts, n = segments_of(rng, lengths)
    keys = np.zeros((n, 3), F32)
    keys[np.arange(n), rng.integers(0, 3, n)] = rng.choice([-4.0, -1.0, 0.0, 0.5, 2.0], n)
    clusters = clusters_of(keys, starts, lengths)
    for tau in (-1.0, 0.0, 1.0):
        expected = np.arange(n)
        for start, length in zip(starts, lengths, strict=True):
            free = list(range(start, start + length))
            while free:
                first, *rest = free
                signs = [float(np.sign(keys[first] @ keys[row])) for row in rest]
                for row, cosine in zip(rest, signs, strict=True):
                    if cosine > tau:
                        expected[row] = first
                free = [row for row, cosine in zip(rest, signs, strict=True) if not cosine > tau]
        np.testing.assert_array_equal(clusters.assign(tau)[0], expected)
        assert clusters.counts([tau])[0] == sum(
            len(set(expected[s : s + m])) for s, m in zip(starts, lengths, strict=True)
        )


def test_tau_below_and_above_every_cosine():
    keys = np.random.default_rng(0).normal(size=(100, 4)).astype(F32)
    keys[10:20] = 0
    keys[50:60] = keys[50]
    clusters = clusters_of(keys, np.array([0, 40]), np.array([40, 60]))
    assert clusters.counts([-1.01])[0] == 2 and clusters.counts([1.01])[0] == 100
    np.testing.assert_array_equal(clusters.assign(-1.01)[0], [0] * 40 + [40] * 60)
    np.testing.assert_array_equal(clusters.assign(1.01)[0], np.arange(100))


@pytest.mark.parametrize("d", [3, 8, 48, 64, 100, 128])
def test_equal_keys_are_not_more_alike_than_one(d):
    """Rounded, the cosine of a key with itself is now and then 1.0000001: tau = 1 must leave it alone all the same."""
    keys = np.repeat(np.random.default_rng(d).normal(size=(500, d)).astype(F32), 2, axis=0)
    for length in (2, 100):
        starts = np.arange(0, len(keys), length)
        clusters = clusters_of(keys, starts, np.full(len(starts), length))
        assert clusters.counts([1.0])[0] == len(keys)
        assert clusters.counts([0.99999])[0] == len(keys) // 2


@pytest.mark.parametrize("similarities", [4 << 20, 5000, 1])
def test_clusters_of_long_segments(similarities, monkeypatch):
    """One word of bits and several, with similarities kept and computed again a few rows at a time."""
    monkeypatch.setattr(numpy_clusters, "SIMILARITIES", similarities)
    rng = np.random.default_rng(0)
    lengths = np.array([1, 8, 9, 16, 17, 32, 33, 63, 64, 65, 128, 129, 150, 0])
    starts, n = segments_of(rng, lengths)
    check_clusters(rng.normal(size=(n, 3)), starts, lengths, [-2.0, 0.2, 0.8, 2.0])


def test_clusters_of_a_segment_beyond_a_thousand_rows(monkeypatch):
    monkeypatch.setattr(numpy_clusters, "SIMILARITIES", 100_000)
    keys = np.random.default_rng(0).normal(size=(1100, 3))
    check_clusters(keys, [0, 5], [0, 1090], [0.97])


def test_clusters_of_nothing():
    none = np.zeros(0, np.int64)
    clusters = clusters_of(np.zeros((3, 2), F32), none, none)
    assert clusters.counts([0.5])[0] == 0
    np.testing.assert_array_equal(clusters.assign(0.5)[0], [0, 1, 2])
    assert len(clusters_of(np.zeros((0, 2), F32), none, none).assign(0.5)[0]) == 0


# chunks and cores


def random_head(rng, n, rope, *, delimiters=0.15, sinks=4, window=10, merged=0.1, first_pos=0):
    """A head as in literal.make_layer: text with delimiters, some rows merged before; keys near a few directions."""
    pos = first_pos + np.arange(n)
    content = rng.normal(size=(6, rope.head_dim))[rng.integers(0, 6, n)] + 0.35 * rng.normal(size=(n, rope.head_dim))
    classes = np.where(rng.random(n) < delimiters, rng.choice([SENTENCE, CLAUSE, BLANK, SPECIAL], n), 0)
    size = np.where((rng.random(n) < merged) & (classes == 0), rng.integers(2, 9, n), 1)
    protected = (np.arange(n) < sinks) | (np.arange(n) >= n - window)
    k = rope.rotated(content, pos).astype(F32)
    v = rng.normal(size=(n, rope.head_dim)).astype(F32)
    return {"k": k, "v": v, "size": size, "pos": pos, "classes": classes, "protected": protected}


@pytest.mark.parametrize("rope_option", ["unrotated", "cached"])
@pytest.mark.parametrize("factor", [1.0, 1.4])  # yarn scales cos and sin, and with them the stored keys
@pytest.mark.parametrize("tau", [0.5, 0.7, 0.9])
def test_cores_are_the_means_of_clusters_between_delimiters(rope_option, factor, tau):
    rng = np.random.default_rng(1)
    rope, unrotate = FakeRope(8, factor=factor), rope_option == "unrotated"
    heads = [random_head(rng, 120, rope), random_head(rng, 70, rope, delimiters=0), random_head(rng, 3, rope)]
    heads[1]["protected"][[20, 41, 42]] = True  # a protected row ends a chunk wherever it is
    layer = make_layer(heads, rope)
    entries = entries_of(layer, tau=tau, rope=rope_option)
    clusters = [
        semanticache(head, chunks_between_delimiters(head, cluster.MAX_CHUNK), tau, rope, unrotate=unrotate)
        for head in heads
    ]
    assert 10 < sum(map(len, clusters)) < 190  # of 193 rows
    check_entries(entries, heads, clusters, rope, unrotate=unrotate)
    for h, head in enumerate(heads):  # merging loses no token
        first = entries.lengths[:h].sum()
        sizes = np.exp(np.float64(entries.log_size[first : first + entries.lengths[h]]))
        np.testing.assert_allclose(sizes.sum(), head["size"].sum(), rtol=1e-6)


@pytest.mark.parametrize("chunking", ["fixed:16", "fixed:1", "fixed:1000", "none"])
def test_chunks_of_a_fixed_width(chunking):
    """The paper's table 4: delimiters are tokens as others are; special tokens and protected rows stay outside."""
    rng = np.random.default_rng(2)
    rope = FakeRope(8)
    heads = [random_head(rng, 100, rope, delimiters=0.3), random_head(rng, 41, rope, delimiters=0.3)]
    layer = make_layer(heads, rope)
    entries = entries_of(layer, tau=0.7, chunking=chunking)
    width = 10**9 if chunking == "none" else int(chunking[6:])
    clusters = []
    for head in heads:
        chunks = {}
        for row in range(len(head["pos"])):
            if not head["protected"][row] and head["classes"][row] != SPECIAL:
                chunks.setdefault(row // width, []).append(row)
        clusters.append(semanticache(head, list(chunks.values()), 0.7, rope, unrotate=True))
    check_entries(entries, heads, clusters, rope, unrotate=True)


def test_a_long_chunk_is_split():
    rng = np.random.default_rng(3)
    rope, longest = FakeRope(4), cluster.MAX_CHUNK
    head = random_head(rng, 2 * longest + 50, rope, delimiters=0, sinks=0, window=0, merged=0)
    layer = make_layer([head], rope)
    entries = plan_at(layer, -1.1, "unrotated").apply(layer)
    np.testing.assert_allclose(np.exp(entries.log_size), [longest, longest, 50], rtol=1e-6)


def test_tau_below_every_cosine_gives_one_core_a_chunk():
    rng = np.random.default_rng(4)
    rope = FakeRope(6)
    heads = [random_head(rng, 150, rope), random_head(rng, 80, rope)]
    for head in heads:
        head["k"][20:40] = 0  # of no direction: similar to nothing above a cosine of 0
    layer = make_layer(heads, rope)
    for rope_option in ("unrotated", "cached"):
        plan = plan_at(layer, -1.001, rope_option)
        for h, head in enumerate(heads):
            chunks = [chunk for chunk in chunks_between_delimiters(head, cluster.MAX_CHUNK) if chunk]
            outside = np.count_nonzero(head["protected"] | (head["classes"] > 0))
            assert plan.lengths[h] == outside + len(chunks)


@pytest.mark.parametrize("rope_option", ["unrotated", "cached"])
def test_tau_above_every_cosine_changes_nothing(rope_option):
    rng = np.random.default_rng(5)
    rope = FakeRope(6, factor=1.2)
    heads = [random_head(rng, 90, rope), random_head(rng, 33, rope)]
    heads[0]["k"][10:30] = heads[0]["k"][10]  # equal as they are stored
    layer = make_layer(heads, rope)
    entries = plan_at(layer, 1.001, rope_option).apply(layer)
    for name in ("k", "v", "pos"):
        np.testing.assert_array_equal(getattr(entries, name), getattr(layer, name))
    np.testing.assert_allclose(np.exp(entries.log_size), layer.size, rtol=1e-6)
    assert entries.lengths.tolist() == [90, 33]


def test_tau_one_of_the_configuration_changes_nothing():
    rng = np.random.default_rng(6)
    rope = FakeRope(16)
    heads = [random_head(rng, 200, rope, merged=0)]
    layer = make_layer(heads, rope)
    entries = entries_of(layer, tau=1)
    np.testing.assert_array_equal(entries.k, layer.k)


def test_without_log_size_a_core_counts_once():
    rng = np.random.default_rng(7)
    rope = FakeRope(8)
    head = random_head(rng, 80, rope, merged=0)
    layer = make_layer([head], rope)
    entries = entries_of(layer, tau=0.6, log_size=False)
    clusters = semanticache(head, chunks_between_delimiters(head, cluster.MAX_CHUNK), 0.6, rope, unrotate=True)
    check_entries(entries, [head], [clusters], rope, unrotate=True, log_size=False)
    assert len(entries.pos) < 70 and not entries.log_size.any()


# budgets of one layer


def budget_plan(layer, target, **options):
    return CacheConfig("semanticache", 0.5, **options).resolve().plan(layer, None, target)


def rows_at(entries, h, positions):
    """Which entries of head h stand for one token at each of `positions`: exactly one each."""
    first = int(entries.lengths[:h].sum())
    pos = entries.pos[first : first + entries.lengths[h]]
    single = entries.log_size[first : first + entries.lengths[h]] == 0
    found = [np.flatnonzero((pos == p) & single) for p in positions]
    return np.array([first + rows[0] if len(rows) else -1 for rows in found])


@pytest.mark.parametrize("chunking", ["delimiter", "fixed:32", "none"])
@pytest.mark.parametrize("delimiters", [0.0, 0.12, 1.0])
def test_a_budget_is_met_exactly(chunking, delimiters):
    """From a handful of entries to all, where the floor of the printed algorithm lies above the budget and below."""
    rng = np.random.default_rng(8)
    rope = FakeRope(8)
    heads = [random_head(rng, n, rope, delimiters=delimiters, merged=0) for n in (129, 60, 81)]
    layer = make_layer(heads, rope)
    n = len(layer.pos)
    protected = np.count_nonzero(layer.protected)
    for step, target in enumerate((protected + 3, protected + 17, n // 3, n // 2, n - 1, n)):
        entries = budget_plan(layer, target, rope=("unrotated", "cached")[step % 2], chunking=chunking).apply(layer)
        assert entries.lengths.sum() == len(entries.pos) == len(entries.k) == target
        assert np.isfinite(entries.k).all() and np.isfinite(entries.v).all()
        for h, head in enumerate(heads):
            first = int(entries.lengths[:h].sum())
            sizes = np.exp(entries.log_size[first : first + entries.lengths[h]])
            np.testing.assert_allclose(sizes.sum(), 1.0 * len(head["pos"]), rtol=1e-5)
            guarded = np.flatnonzero(head["protected"])
            stay = rows_at(entries, h, guarded)
            assert (stay >= 0).all()
            np.testing.assert_array_equal(entries.k[stay], head["k"][guarded])
            np.testing.assert_array_equal(entries.v[stay], head["v"][guarded])


@pytest.mark.parametrize("keys", ["equal", "orthogonal", "zero", "opposite", "tiny", "huge"])
@pytest.mark.parametrize("rope_option", ["unrotated", "cached"])
def test_a_budget_is_met_on_degenerate_keys(keys, rope_option):
    rng = np.random.default_rng(9)
    n = 150
    rope = FakeRope(n if keys == "orthogonal" else 8)
    head = random_head(rng, n, rope, merged=0)
    content = {
        "equal": lambda: np.ones((n, 8)),
        "orthogonal": lambda: np.eye(n),
        "zero": lambda: np.zeros((n, 8)),
        "opposite": lambda: np.ones((n, 8)) * rng.choice([-1, 1], (n, 1)),
        "tiny": lambda: rng.normal(size=(n, 8)) * 1e-18,
        "huge": lambda: rng.normal(size=(n, 8)) * 1e15,
    }[keys]()
    head["k"] = (content if rope_option == "cached" else rope.rotated(content, head["pos"])).astype(F32)
    layer = make_layer([head], rope)
    for share in (0.15, 0.5, 1.0):
        entries = budget_plan(layer, round(share * n), rope=rope_option).apply(layer)
        assert len(entries.pos) == round(share * n)
        assert np.isfinite(entries.k).all()
        np.testing.assert_allclose(np.exp(np.float64(entries.log_size)).sum(), n, rtol=1e-5)


def test_a_budget_with_room_leaves_delimiters_and_special_tokens_as_they_are():
    """Where delimiters and one core a chunk fit, no entry reaches over a delimiter."""
    rng = np.random.default_rng(10)
    rope = FakeRope(8)
    heads = [random_head(rng, 300, rope, merged=0) for _ in range(2)]
    layer = make_layer(heads, rope)
    chunks = [chunks_between_delimiters(head, cluster.MAX_CHUNK) for head in heads]
    # the number of clusters at 0.5, the lowest tau of the paper, is where chunks begin to be widened
    floor = sum(len(semanticache(h, c, 0.5, rope, unrotate=True)) for h, c in zip(heads, chunks, strict=True))
    for target in (floor, floor + 1, floor + 25, (floor + 600) // 2, 599):
        plan = budget_plan(layer, target)
        entries = plan.apply(layer)
        assert len(entries.pos) == target
        row = 0
        for h, head in enumerate(heads):
            dest = plan.dest[row : row + 300]
            row += 300
            outside = np.flatnonzero(head["protected"] | (head["classes"] > 0))
            assert (np.bincount(plan.dest)[dest[outside]] == 1).all()
            np.testing.assert_array_equal(entries.k[dest[outside]], head["k"][outside])
            np.testing.assert_array_equal(entries.v[dest[outside]], head["v"][outside])
            home = {r: number for number, chunk in enumerate(chunks[h]) for r in chunk}
            for e in np.unique(dest):
                assert len({home.get(r, -r - 1) for r in np.flatnonzero(dest == e)}) == 1


def test_special_tokens_stay_as_long_as_anything_else_can_go():
    """Far below the floor of the delimiters: special tokens are the structure of a chat."""
    rng = np.random.default_rng(11)
    rope = FakeRope(8)
    head = random_head(rng, 400, rope, delimiters=0.4, merged=0)
    head["classes"][head["classes"] == SPECIAL] = SENTENCE
    head["classes"][[50, 51, 120, 300]] = SPECIAL
    layer = make_layer([head], rope)
    plan = budget_plan(layer, 40)
    entries = plan.apply(layer)
    assert len(entries.pos) == 40
    special = np.flatnonzero(head["classes"] == SPECIAL)
    np.testing.assert_array_equal(entries.k[plan.dest[special]], head["k"][special])
    assert (np.bincount(plan.dest)[plan.dest[special]] == 1).all()


def test_a_plan_keeps_heads_apart_and_in_order():
    rng = np.random.default_rng(12)
    rope = FakeRope(8)
    heads = [random_head(rng, n, rope, merged=0) for n in (140, 90, 200)]
    layer = make_layer(heads, rope)
    for target in (60, 120, 300):
        plan = budget_plan(layer, target)
        ends = np.cumsum(plan.lengths)
        for h, rows in enumerate(np.split(plan.dest, np.cumsum([140, 90]))):
            assert rows.min() == ends[h] - plan.lengths[h] and rows.max() == ends[h] - 1
            window = rows[-10:]  # the tail of a cache: the newest tokens are the last entries, one each
            np.testing.assert_array_equal(window, np.arange(ends[h] - 10, ends[h]))


def test_the_closest_keys_are_merged_first():
    """At one budget the tokens merged are more alike than tokens of the same chunk are by chance."""
    rng = np.random.default_rng(13)
    rope = FakeRope(16)
    head = random_head(rng, 400, rope, delimiters=0.05, merged=0)
    layer = make_layer([head], rope)
    plan = budget_plan(layer, 200)
    keys = rope.undone(head["k"], head["pos"])
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    together = plan.dest[:, None] == plan.dest
    np.fill_diagonal(together, False)
    similar = keys @ keys.T
    assert similar[together].mean() > similar.mean() + 0.5


def test_the_members_least_like_their_seed_are_set_free():
    """One seed e, ten keys of cosine 0.95 with it and ten of 0.9, all of them less like one another: the count falls
    from 11 to 1 at once, and a budget of 5 is filled up with four of the farther ones."""
    rope, n = FakeRope(22), 21
    content = np.zeros((n, 22))
    content[0, 0] = 1
    for i in range(1, n):
        near = 0.95 if i % 2 else 0.9
        content[i, 0], content[i, i] = near, np.sqrt(1 - near**2)
    none, pos = np.zeros(n, int), np.arange(n)
    k = rope.rotated(content, pos)
    head = {"k": k, "v": k, "size": none + 1, "pos": pos, "classes": none, "protected": none}
    plan = budget_plan(make_layer([head], rope), 5)
    together = np.flatnonzero(plan.dest == plan.dest[0])
    assert plan.lengths.tolist() == [5] and len(together) == 17
    assert set(range(1, n, 2)) <= set(together.tolist())
