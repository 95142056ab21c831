"""Plans, budgets and configurations, and what becomes of a sequence as it is read and generated: counts, bits and
attention against literal float64."""

import numpy as np
import pytest
from literal import NEEDS, FakeRope, attend, check_entries, chunks_between_delimiters, make_layer, semanticache
from paths import ROOT
from sequences import F32, Sequence, positions
from small_models import CLASSES_OF_14

from minillm.cache.kv_cache import KVCache
from minillm.cache.page_pool import PagePool
from minillm.compress.cluster import MAX_CHUNK
from minillm.compress.config import CacheConfig
from minillm.compress.methods import METHODS, methods_markdown, methods_table
from minillm.compress.plan import SHORT, Budget, Plan
from minillm.errors import UsageError
from minillm.ops.numpy_ops import NUMPY as numpy_ops
from minillm.ops.pages import FLOAT32

# plans


def random_layer(rng, lengths, *, factor=1.0):
    rope = FakeRope(6, factor=factor)
    heads = []
    for n in lengths:
        pos = np.sort(rng.permutation(200)[:n])
        k, v = rope.rotated(rng.normal(size=(n, 6)), pos).astype(F32), rng.normal(size=(n, 6)).astype(F32)
        none = np.zeros(n, int)
        heads.append({"k": k, "v": v, "size": none + 1, "pos": pos, "classes": none, "protected": none})
    return make_layer(heads, rope, n_positions=200), rope


@pytest.mark.parametrize("unrotate", [False, True])
@pytest.mark.parametrize("factor", [1.0, 1.4])  # yarn scales cos and sin
def test_a_plan_is_a_weighted_sum_rotated_to_its_position(unrotate, factor):
    rng = np.random.default_rng(0)
    layer, rope = random_layer(rng, [40, 25], factor=factor)
    lengths, dest = np.array([9, 14]), []
    for n, first, rows in ((9, 0, 40), (14, 9, 25)):
        some = np.concatenate([np.arange(n), rng.integers(-1, n, rows - n)])
        dest.append(np.where(some < 0, -1, some + first)[rng.permutation(rows)])
    dest = np.concatenate(dest)
    members = [np.flatnonzero(dest == e) for e in range(23)]
    weight = rng.uniform(0.1, 1, 65).astype(F32)
    pos = rng.integers(0, 200, 23).astype(np.int32)
    for e, rows in enumerate(members):
        if len(rows) == 1:
            weight[rows], pos[e] = 1, layer.pos[rows[0]]
    size = rng.integers(1, 9, 23).astype(F32)
    entries = Plan(dest, weight, size, pos, lengths, None, unrotate).apply(layer)
    for e, rows in enumerate(members):
        w = np.float64(weight[rows])
        k = rope.undone(layer.k[rows], layer.pos[rows]) if unrotate else np.float64(layer.k[rows])
        k = rope.rotated(w @ k, pos[e]) if unrotate else w @ k
        np.testing.assert_allclose(entries.k[e], k, rtol=0, atol=1e-5)
        np.testing.assert_allclose(entries.v[e], w @ np.float64(layer.v[rows]), rtol=0, atol=5e-6)
    np.testing.assert_allclose(np.exp(entries.log_size), size, rtol=1e-6)
    np.testing.assert_array_equal(entries.pos, pos)
    assert entries.lengths.tolist() == [9, 14]
    assert sum(len(rows) == 1 for rows in members) > 2 and (dest < 0).any()


def test_a_plan_weighs_an_entry_of_one_row_too():
    """As the docstring has it: entry = sum of weight x row, at the entry's position."""
    layer, rope = random_layer(np.random.default_rng(0), [3])
    dest, weight, pos = np.array([0, 1, -1]), np.array([0.5, 1, 1], F32), layer.pos[:2] + np.array([0, 5], np.int32)
    entries = Plan(dest, weight, np.ones(2, F32), pos, np.array([2]), None, unrotate=True).apply(layer)
    np.testing.assert_allclose(entries.v, layer.v[:2] * weight[:2, None], atol=1e-6)
    content = rope.undone(layer.k[:2], layer.pos[:2])
    np.testing.assert_allclose(entries.k, rope.rotated(content * weight[:2, None], pos), atol=1e-5)


def test_eviction_is_full_attention_under_a_mask():
    rng = np.random.default_rng(0)
    layer, _ = random_layer(rng, [60, 60, 60])
    kept = rng.random(180) < 0.4
    kept[::60] = True
    entries = Plan.keep(layer, kept).apply(layer)
    pool = PagePool(numpy_ops, 6, 4, 7 * 4 * FLOAT32.entry_bytes(6))
    cache = KVCache(pool, 1, 3)
    cache.write(0, entries)
    cache.advance(range(200))
    q = rng.normal(size=(1, 6, 6)).astype(F32)
    for window in (None, 90):
        expected = np.zeros((6, 6))
        for head in range(6):
            rows = slice(head // 2 * 60, head // 2 * 60 + 60)
            mask = np.where(kept[rows], 0.0, -np.inf)  # the full cache, with minus infinity where nothing was kept
            expected[head] = attend(q[0, head], (layer.k[rows], layer.v[rows], mask, layer.pos[rows]), 0.4, 200, window)
        decoded = numpy_ops.decode_attention(q, [cache.layer(0)], 0.4, window)
        np.testing.assert_allclose(decoded, expected.reshape(1, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("log_size", [True, False])
def test_merging_equal_tokens_changes_nothing_if_they_are_counted(log_size):
    """m copies of a token in a chunk become one core with log m; without it attention forgets how many they were."""
    rng = np.random.default_rng(0)
    layer, _ = random_layer(rng, [90])
    copies = rng.integers(0, 12, 90)
    layer.k_rows, layer.v_rows = layer.k_rows[copies], layer.v_rows[copies]
    config = CacheConfig("semanticache", tau=0.9999, rope="cached", log_size=log_size)
    entries = config.resolve().plan(layer, None, None).apply(layer)
    assert len(entries.pos) == len(set(copies))
    worst = 0.0
    for _ in range(20):
        q = rng.normal(size=6)
        merged = attend(q, (entries.k, entries.v, entries.log_size, entries.pos), 0.4, 200)
        worst = max(worst, abs(merged - attend(q, (layer.k, layer.v, np.zeros(90), layer.pos), 0.4, 200)).max())
    assert worst < 1e-6 if log_size else worst > 0.05


# budgets


def test_budget_totals():
    assert Budget(share=0.3).total(1000, 3) == 900
    assert Budget(share=0.3).total(1001, 3) == 901  # 900.9
    assert Budget(share=1.0).total(777, 5) == 777 * 5
    assert Budget(share=0.001).total(200, 4) == 4  # one entry each
    assert Budget(entries=64).total(1000, 3) == 192
    assert Budget(entries=64).total(50, 3) == 150  # no more than there is
    assert Budget(entries=1).total(50, 3) == 3


def test_a_budget_protects_no_more_than_half_of_it_and_no_more_than_was_asked():
    for budget in (*(Budget(share=x) for x in (0.05, 0.2, 0.5, 1.0)), *(Budget(entries=n) for n in (2, 7, 64, 4000))):
        for seen in (129, 300, 5000):
            for asked in ((4, 32), (0, 32), (4, 0), (0, 0), (200, 10), (10, 3000)):
                sinks, window = budget.protect(seen, *asked)
                assert 0 <= sinks <= asked[0] and 0 <= window <= asked[1]
                half = budget.per_head(seen) / 2
                assert sinks + window <= max(1, half)
                if sum(asked) <= half:
                    assert (sinks, window) == asked
                elif half >= 2 and asked[1]:
                    assert window >= 1


# a prompt


@pytest.mark.parametrize("method", ["semanticache", "streaming", "random"])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.77, 1.0])
def test_a_share_is_met_exactly(method, share):
    for n, n_heads in ((129, 1), (129, 3), (310, 2)):
        sequence = Sequence(CacheConfig(method, share), n_layers=1, n_heads=n_heads, d=4).read(n)
        sequence.check_kept(share)
        assert sequence.cache.seen == n
        sequence.check_newest(min(32, round(share * n / 4)))
        if method == "semanticache":
            sequence.check_sizes()


def test_a_share_of_a_long_prompt_is_met_exactly():
    for share, delimiters in ((0.05, 0.12), (0.35, 1.0)):
        sequence = Sequence(CacheConfig("semanticache", share), n_layers=1, delimiters=delimiters).read(2000)
        sequence.check_kept(share)
        sequence.check_newest(32)
        sequence.check_sizes()


@pytest.mark.parametrize("keys", ["random", "equal", "zero", "orthogonal"])
def test_a_share_is_met_on_degenerate_keys(keys):
    for share in (0.05, 0.5):
        for option in ({}, {"rope": "cached"}, {"chunking": "none"}):
            config = CacheConfig("semanticache", share, **option)
            d = 130 if keys == "orthogonal" else 8
            sequence = Sequence(config, n_layers=1, d=d, keys=keys).read(130)
            sequence.check_kept(share)
            sequence.check_sizes()


@pytest.mark.parametrize("method", ["semanticache", "streaming", "random"])
@pytest.mark.parametrize("entries", [1, 2, 9, 40, 5000])
def test_a_number_of_entries_is_met_exactly(method, entries):
    sequence = Sequence(CacheConfig(method, entries), n_layers=1, n_heads=3, d=4).read(200)
    sequence.check_entries(entries)
    sequence.read(150)
    sequence.check_entries(entries)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_short_sequences_are_left_whole(method):
    sequence = Sequence(CacheConfig(method, 0.2, **NEEDS.get(method, {})))
    for n in (SHORT - 40, 10, 30):
        sequence.read(n)
        assert (sequence.cache.lengths == sequence.cache.seen).all()
        sequence.check_newest(sequence.cache.seen)
    assert sequence.cache.seen == SHORT
    sequence.read(1)
    sequence.check_kept(0.2)


def test_the_full_method_keeps_everything():
    for config in (CacheConfig("full"), CacheConfig("semanticache", "full")):
        sequence = Sequence(config).read(300)
        assert not any(sequence.generate(300))
        sequence.check_newest(600)
        assert (sequence.cache.lengths == 600).all()


@pytest.mark.parametrize("option", [{}, {"rope": "cached"}])
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_turns_with_tau_are_the_printed_algorithm(option, factor):
    """A prompt and a second turn, through the pages, with sinks and window kept: entry by entry."""
    config = CacheConfig("semanticache", tau=0.7, **option)
    sequence = Sequence(config, factor=factor, seed=3).read(180)
    unrotate = not option
    clusters = {}
    for lo, seen in ((0, 180), (148, 300)):
        for layer in range(2):
            rows = [sequence.head_rows(layer, head, lo, seen, 4, seen - 32) for head in range(2)]
            for head in range(2):
                found = semanticache(
                    rows[head],
                    chunks_between_delimiters(rows[head], MAX_CHUNK),
                    0.7,
                    sequence.rope,
                    unrotate=unrotate,
                )
                # What was protected at the first turn stands alone no longer, what was settled stays as it is.
                before = [c for c in clusters.get((layer, head), []) if max(c) < lo]
                clusters[layer, head] = before + [[row + lo for row in c] for c in found]
            whole = [sequence.head_rows(layer, head, 0, seen, 0, 0) for head in range(2)]
            entries = sequence.cache.read(layer)
            of_layer = [clusters[layer, head] for head in range(2)]
            check_entries(entries, whole, of_layer, sequence.rope, unrotate=unrotate)
        sequence.check_newest(32)
        if seen == 180:
            assert sequence.cache.kept < 0.9
            sequence.read(120)
    sequence.check_sizes()


def test_sinks_and_window_can_be_given_up():
    config = CacheConfig("semanticache", tau=-1.0, sinks=0, window=0)
    sequence = Sequence(config, delimiters=0.0, keys="equal").read(MAX_CHUNK)
    assert (sequence.cache.lengths == 1).all()  # one core a head


# eviction


@pytest.mark.parametrize("sinks, window", [(4, 32), (0, 32), (10, 0)])
def test_streaming_keeps_the_first_and_the_newest(sinks, window):
    sequence = Sequence(CacheConfig("streaming", 0.45, sinks=sinks, window=window), n_heads=3).read(401)
    sequence.check_kept(0.45)
    assert np.ptp(sequence.cache.lengths) <= 1
    for layer in range(2):
        for head in range(3):
            newest = list(range(401 - (sequence.cache.lengths[layer, head] - sinks), 401))
            assert positions(sequence, layer, head) == [*range(sinks), *newest]
            entries = sequence.cache.layer(layer).read(head)
            np.testing.assert_array_equal(entries[0], sequence.k[layer, head][entries[3]])
            np.testing.assert_array_equal(entries[1], sequence.v[layer, head][entries[3]])
            assert not entries[2].any()


def test_streaming_over_many_turns_is_a_sliding_window():
    sequence = Sequence(CacheConfig("streaming", 100)).read(150)
    for n in (60, 1, 33, 400):
        sequence.read(n)
        seen = sequence.cache.seen
        for layer, head in np.ndindex(2, 2):
            assert positions(sequence, layer, head) == [0, 1, 2, 3, *range(seen - 96, seen)]
    for compressed in sequence.generate(700):
        if compressed:
            found = positions(sequence, 1, 1)
            assert len(found) == 100 and found[:4] == [0, 1, 2, 3] and found[-1] == sequence.cache.seen - 1


def test_random_keeps_any_tokens_and_the_same_every_time():
    def kept(seed):
        sequence = Sequence(CacheConfig("random", 0.3), seed=seed).read(600)
        return {(layer, head): positions(sequence, layer, head) for layer, head in np.ndindex(2, 2)}

    rows = kept(0)
    assert rows == kept(1)  # neither keys nor values count
    assert len({tuple(found) for found in rows.values()}) == 4
    for found in rows.values():
        assert len(found) == 180 == len(set(found))
        assert found == sorted(found)
        assert found[:4] == [0, 1, 2, 3] and found[-32:] == list(range(568, 600))
        assert 220 < np.mean(found[4:-32]) < 352  # of 286: five standard errors of a uniform choice


# layers that differ


UNLIKE = [
    ("equal", "random"),
    ("equal", "equal", "text", "random"),
    ("random", "zero", "text", "equal"),
]


@pytest.mark.parametrize("keys", UNLIKE, ids="-".join)
@pytest.mark.parametrize("budget", [0.1, 0.95, 20, 150])
def test_a_budget_is_met_exactly_over_layers_that_differ(keys, budget):
    """In a first prompt, in later turns, and where everything is compressed again."""
    sequence = Sequence(CacheConfig("semanticache", budget), n_layers=len(keys), keys=keys)
    for n in (160, 1, 30, 250, 5):
        sequence.read(n)
        sequence.check_entries(budget) if budget >= 1 else sequence.check_kept(budget)
        sequence.check_sizes()
        assert (sequence.cache.lengths >= 1).all()
        sequence.check_newest(min(sequence.cache.left.tail, 32))


# later turns and long generations


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_settled_entries_stay_bit_for_bit_and_the_share_is_met(share):
    sequence = Sequence(CacheConfig("semanticache", share)).read(400)
    for n in (100, 37, 250, 64):
        cache = sequence.cache
        before = [[cache.layer(i).read(h) for h in range(2)] for i in range(2)]
        settled = cache.lengths - cache.left.tail
        before = [[[np.array(x[: settled[i, h]]) for x in before[i][h]] for h in range(2)] for i in range(2)]
        sequence.read(n)
        sequence.check_kept(share)
        for i, h in np.ndindex(2, 2):
            after = cache.layer(i).read(h)
            for old, new in zip(before[i][h], after, strict=True):
                np.testing.assert_array_equal(new[: len(old)].view(np.uint32), old.view(np.uint32))
        sequence.check_newest(32)
        sequence.check_sizes()


@pytest.mark.parametrize("n_heads", [1, 2])
def test_a_share_is_met_by_turns_of_any_length(n_heads):
    """To within one entry a head: read token by token, the window that a small budget allows may grow by one, and then
    there is nothing to compress."""
    rng = np.random.default_rng(0)
    sequence = Sequence(CacheConfig("semanticache", 0.35), n_heads=n_heads)
    for n in (60, 60, 20, 1, 1, 1, 2, 90, *rng.integers(1, 30, 12).tolist(), 500, 1):
        sequence.read(n)
        share = 0.35 if sequence.cache.seen > SHORT else 1.0
        assert abs(sequence.cache.kept - share) * sequence.cache.seen <= 1
        sequence.check_sizes()


def test_a_share_is_met_after_every_compression_of_a_generation():
    sequence = Sequence(CacheConfig("semanticache", 0.3, recompress=64), n_layers=1).read(300)
    times = 0
    for compressed in sequence.generate(400):
        if compressed:
            times += 1
            sequence.check_kept(0.3)
            sequence.check_sizes()
            sequence.check_newest(32)
    assert 400 / 64 * 0.6 < times < 400 / 64 * 1.5  # not after every token


PUNCTUATION = {
    "often": 0.12,
    "never": 0.0,
    "seldom": lambda pos: pos % 200 == 0,
    "always": 1.0,
}


@pytest.mark.parametrize(
    "entries, punctuation", [(40, "often"), (40, "never"), (40, "seldom"), (400, "seldom"), (400, "always")]
)
def test_a_number_of_entries_keeps_a_long_generation_flat(entries, punctuation):
    """After every compression exactly the budget, between two of them no more than what was generated since; and the
    memory of the second half is that of the first."""
    config = CacheConfig("semanticache", entries)
    sequence = Sequence(config, n_layers=1, d=4, delimiters=PUNCTUATION[punctuation]).read(300)
    sequence.check_entries(entries)
    most = [0, 0]
    for step, compressed in enumerate(sequence.generate(1800)):
        if compressed and sequence.cache.seen > entries:
            sequence.check_entries(entries)
        most[step >= 900] = max(most[step >= 900], sequence.pool.bytes_held)
    assert most[1] <= most[0]
    sequence.check_sizes()
    sequence.check_newest(10)


def test_what_a_method_is_shown_of_a_second_turn():
    """Where the settled entries have used up the budget all rows come again: cores with their sizes, which are no
    delimiters whatever stands at their position, then the tokens since, stored and new."""
    config = CacheConfig("semanticache", 60, window=16)
    sequence = Sequence(config, n_heads=3).read(200)
    stored = [sequence.cache.read(layer) for layer in range(2)]
    shown, plan = [], sequence.compressor.recipe.plan

    def noted(layer, *rest):
        shown.append(layer)
        assert len(layer.k) == len(layer.v)  # they are read here: the pages are written anew after this
        return plan(layer, *rest)

    sequence.compressor.recipe.plan = noted
    sequence.read(100)
    assert [layer.index for layer in shown] == [0, 1]
    cores_at_delimiters = 0
    for layer, old in zip(shown, stored, strict=True):
        assert layer.lengths.tolist() == [n + 100 for n in old.lengths]
        for name in ("k", "v", "pos"):
            rows = np.split(getattr(layer, name), np.cumsum(layer.lengths)[:-1])
            for head, before in enumerate(np.split(getattr(old, name), np.cumsum(old.lengths)[:-1])):
                new = np.arange(200, 300) if name == "pos" else getattr(sequence, name)[layer.index, head, 200:]
                np.testing.assert_array_equal(rows[head], np.concatenate([before, new]))
        sizes = np.split(layer.size, np.cumsum(layer.lengths)[:-1])
        np.testing.assert_allclose([part.sum() for part in sizes], 300, rtol=1e-5)
        core, of_token = layer.size > 1.5, CLASSES_OF_14[np.array(sequence.ids)[layer.pos]]
        cores_at_delimiters += np.count_nonzero(of_token[core])
        np.testing.assert_array_equal(layer.classes, np.where(core, 0, of_token))
        np.testing.assert_array_equal(layer.protected, (layer.pos < 4) | (layer.pos >= 284))
    assert cores_at_delimiters


def test_generated_text_is_compressed_up_to_its_last_delimiter():
    """A chunk that is still being written is left alone, and so is the window."""
    sequence = Sequence(
        CacheConfig("semanticache", tau=0.5, recompress=100, window=20), delimiters=lambda p: p in (340,)
    )
    sequence.read(300)
    assert sequence.cache.left.tail == 20
    compressed = [sequence.cache.seen for now in sequence.generate(101) if now]
    assert compressed == [400]  # 100 tokens older than the window
    assert sequence.cache.left.tail == 401 - 341
    sequence.check_newest(60)
    entries = sequence.cache.layer(0).read(0)
    delimiter = np.flatnonzero(entries[3] == 340)
    assert len(delimiter) == 1 and entries[2][delimiter] == 0
    np.testing.assert_array_equal(entries[0][delimiter[0]], sequence.k[0, 0, 340])


def test_recompress_zero_is_never():
    sequence = Sequence(CacheConfig("semanticache", 0.5, recompress=0)).read(200)
    assert not any(sequence.generate(600))
    assert (sequence.cache.lengths.sum(axis=1) == 200 + 1200).all()


def test_seen_goes_on_after_compression():
    sequence = Sequence(CacheConfig("semanticache", 50)).read(300)
    assert sequence.cache.seen == 300 and sequence.cache.token_ids == sequence.ids
    next(sequence.generate(1))
    assert positions(sequence, 0, 0)[-1] == 300  # the position of the next token is what was seen, not what is stored


# configurations


@pytest.mark.parametrize(
    "arguments, options, words",
    [
        (("semanticash",), {}, "'semanticash'.*semanticache"),
        (("semanticache",), {"taau": 0.5}, "'taau'.*tau"),
        (("streaming",), {"tau": 0.5}, "'tau'.*: positions, score, allocate, merge"),
        (("full",), {"rope": "cached"}, "'rope'"),
        (("semanticache", 0.5), {"tau": 0.7}, "budget.*tau"),
        (("semanticache", "full"), {"tau": 0.7}, "budget.*tau"),
        (("full", 0.5), {}, "budget"),
        (("full", 64), {}, "budget"),
        *((("semanticache", budget), {}, "budget") for budget in (0, 0.0, -0.1, 1.5, -3, True, "half", float("nan"))),
        *((("semanticache",), {"tau": tau}, "^tau: ") for tau in (2, -1.5, "0.5", float("nan"), True)),
        *((("semanticache",), {"rope": x}, "^rope: .*unrotated, cached") for x in ("post", True)),
        *((("semanticache",), {"chunking": x}, "^chunking: ") for x in ("fixed", "fixed:0", "fixed:-3", "global", 64)),
        *((("semanticache",), {"delimiters": x}, "^delimiters: ") for x in ("", 5)),
        (("semanticache",), {"log_size": "no"}, "^log_size: "),
        *((("streaming",), {"window": x}, "^window: ") for x in (-1, 2.5, "32", True, float("inf"))),
        *((("streaming",), {"sinks": x}, "^sinks: ") for x in (-1, 0.5)),
        *((("streaming",), {"recompress": x}, "^recompress: ") for x in (-1, 0.5)),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_by_name(arguments, options, words):
    with pytest.raises(UsageError, match=words):
        CacheConfig(*arguments, **options)


def test_defaults():
    config = CacheConfig()
    assert config.method is None and config.budget == Budget(share=0.3)
    assert (config.window, config.sinks, config.recompress) == (8, 4, 256)
    config = CacheConfig("semanticache")
    assert config.budget == Budget(share=0.5)
    assert (config.window, config.sinks, config.recompress) == (32, 4, 256)
    assert config.options["rope"] == "unrotated" and config.options["tau"] is None
    assert CacheConfig("streaming", 1).budget == Budget(entries=1)
    assert CacheConfig("streaming", 1.0).budget == Budget(share=1.0)
    assert CacheConfig("semanticache", tau=0.7).budget is None
    assert CacheConfig("semanticache", tau=1).options["tau"] == 1.0


def test_a_configuration_does_not_change():
    config = CacheConfig("snapkv", 0.3, queries=16)
    with pytest.raises(AttributeError, match="replace"):
        config.sinks = 2
    assert config == CacheConfig("snapkv", 0.3, queries=16) and hash(config) == hash(config.replace(sinks=config.sinks))
    assert config != config.replace(budget=0.2) and config.replace(budget=0.2).options["queries"] == 16
    assert CacheConfig("snapkv", budget=1) != CacheConfig("snapkv", budget=1.0)  # an entry a head, and all of them
    assert CacheConfig("snapkv", budget="full").replace(dtype="int8").as_dict()["dtype"] == "int8"


def test_no_tau_may_be_said_aloud():
    """What as_dict gives can be given back."""
    assert CacheConfig("semanticache", tau=None).budget == Budget(share=0.5)
    for config in (CacheConfig(), CacheConfig("streaming", 64), CacheConfig("semanticache", tau=0.6, rope="cached")):
        assert CacheConfig(**config.as_dict()).as_dict() == config.as_dict()


def test_options_of_two_configurations_are_apart():
    one, two = CacheConfig("semanticache", 0.2, rope="cached"), CacheConfig("semanticache", 0.2)
    assert one.as_dict() != two.as_dict() and two.options["rope"] == "unrotated"
    assert "0.2" in repr(one) and "'cached'" in repr(one) and repr(one).startswith("CacheConfig('semanticache'")


def test_the_table_of_the_readme_is_made_from_the_methods():
    readme = ROOT / "README.md"
    assert f"\n{methods_markdown()}\n" in readme.read_text(encoding="utf-8")


def test_the_table_names_every_method_option_and_paper():
    table = methods_table()
    for name, method in METHODS.items():
        line = next(line for line in table.splitlines() if line.startswith(name + " "))
        assert method.summary in line and method.paper in line
        assert all(f"    {option} = " in table for option in CacheConfig.option_table(name) if option != "delimiters")
