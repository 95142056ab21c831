"""Each eviction method that looks at the newest queries, against its literal implementation in float64: which rows of a
layer stay, and what becomes of a prompt over all layers."""

import literal_methods as literal
import numpy as np
import pytest
from literal import FakeRope, make_layer
from sequences import F32, Sequence, positions
from small_models import bare_compressor, bare_model

from minillm.cache.kv_cache import KVCache
from minillm.cache.page_pool import PagePool
from minillm.compress.allocate import leveled
from minillm.compress.config import CacheConfig
from minillm.compress.plan import Queries
from minillm.files.weights import Weight
from minillm.ops.numpy_ops import NUMPY as numpy_ops
from minillm.ops.numpy_planning import segment_topk
from minillm.ops.pages import FLOAT32
from minillm.output_projection import OutputProjection

D, SCALE = 6, 0.7
GROUPS = [1, 3, 4, 8]


def snapkv(rows, total):
    return literal.uniform(literal.snapkv(rows), total)


def adakv(alpha):
    return lambda rows, total: literal.adaptive(literal.snapkv(rows), total, alpha)


def criticalkv(alpha=1.0, first_stage=0.5, order=1):
    def method(rows, total):
        effect = literal.value_effect(rows, order)
        return literal.critical(literal.snapkv(rows), effect, total, alpha, first_stage)

    return method


def laprox(**options):
    return lambda rows, total: literal.flat(literal.laprox(rows, **options), total)


METHODS = {  # name -> (CacheConfig, literal: Rows, entries beside the protected ones -> kept of each head, ties hold)
    "snapkv": (CacheConfig("snapkv"), snapkv, True),
    "snapkv avg": (
        CacheConfig("snapkv", pooling="avg", pool=4),
        lambda rows, total: literal.uniform(literal.snapkv(rows, 4, "avg"), total),
        False,
    ),
    "snapkv max": (
        CacheConfig("snapkv", group="max"),
        lambda rows, total: literal.uniform(literal.snapkv(rows, group="max"), total),
        True,
    ),
    "h2o": (CacheConfig("h2o"), lambda rows, total: literal.uniform(literal.h2o(rows), total), False),
    "kvzip": (CacheConfig("kvzip"), lambda rows, total: literal.flat(literal.kvzip(rows), total), True),
    "adakv": (CacheConfig("adakv"), adakv(0.2), True),
    "adakv normalize": (
        CacheConfig("adakv", normalize=True),
        lambda rows, total: literal.adaptive(literal.snapkv(rows), total, normalize=True),
        False,
    ),
    "adakv 0": (CacheConfig("adakv", alpha=0), adakv(0), True),
    "adakv 0.5": (CacheConfig("adakv", alpha=0.5), adakv(0.5), True),
    "criticalkv": (CacheConfig("criticalkv"), criticalkv(), False),
    "criticalkv l2": (
        CacheConfig("criticalkv", value_norm="l2", alpha=0.2, first_stage=0.3),
        criticalkv(0.2, 0.3, 2),
        False,
    ),
    "cake": (CacheConfig("cake"), lambda rows, total: literal.uniform(literal.cake(rows), total), False),
    "lava": (CacheConfig("lava"), lambda rows, total: literal.adaptive(literal.lava(rows), total), True),
    "tova": (CacheConfig("tova"), lambda rows, total: literal.uniform(literal.tova(rows), total), True),
    "laprox": (CacheConfig("laprox"), laprox(), False),
    "laprox mean_attn": (
        CacheConfig("laprox", gqa="mean_attn", norm=False),
        laprox(gqa="mean_attn", norm=False),
        False,
    ),
    "laprox frobenius": (CacheConfig("laprox", gqa="frobenius"), laprox(gqa="frobenius"), False),
}


def random_rows(rng, group, lengths, sinks, window, n_queries, *, ties=False):
    """(Layer, literal.Rows) of the same random layer. lengths: rows of each KV head: sinks, window and some of the text
    between, the same in all heads if they are as long.
    ties: keys are few and of whole numbers, so that what is equal on paper is equal."""
    seen, n_heads = max(lengths) + 3, len(lengths)
    numbers = (lambda *shape: rng.integers(-1, 2, shape)) if ties else (lambda *shape: rng.normal(size=shape))
    heads = []
    for n in lengths:
        middle = sinks + np.sort(rng.permutation(seen - window - sinks)[: n - window - sinks])
        pos = np.concatenate([range(sinks), middle, range(seen - window, seen)]).astype(int)
        if len(set(lengths)) == 1 and heads:
            pos = heads[0]["pos"]
        k = numbers(n, D)[rng.integers(0, n, n) % 5] if ties else numbers(n, D)
        columns = {"k": k.astype(F32), "v": rng.normal(size=(n, D)).astype(F32), "size": np.ones(n), "pos": pos}
        protected = (pos < sinks) | (pos >= seen - window)
        heads.append(columns | {"classes": np.zeros(n), "protected": protected})
    q, q_pos = numbers(group * n_heads, n_queries, D).astype(F32), np.arange(seen - n_queries, seen)
    wo = rng.normal(size=(15, group * n_heads * D)).astype(F32)
    layer = make_layer(heads, FakeRope(D))
    layer.queries, layer.scale = [Queries(q, q_pos)], 1.0 if ties else SCALE
    layer.output = OutputProjection(Weight.floats(wo), n_heads, D, numpy_ops)
    return layer, literal.Rows(heads, q, q_pos, wo, layer.scale)


def kept_rows(config, layer, target):
    """Which of the rows of each head that compete stay."""
    recipe = config.resolve()
    stays = recipe.plan(layer, recipe.scores(layer), target).rows
    assert len(stays) == max(target, np.count_nonzero(layer.protected))
    assert set(np.flatnonzero(layer.protected)) <= set(stays)
    is_kept = np.isin(layer.free, stays)
    return [np.flatnonzero(is_kept[layer.heads[layer.free] == head]).tolist() for head in range(len(layer.lengths))]


@pytest.mark.parametrize("name", METHODS)
def test_the_rows_kept_are_those_of_the_literal_method(name):
    config, method, ties_hold = METHODS[name]
    rng, n_near, n_nothing = np.random.default_rng(0), 0, 0
    for case in range(80):
        group, n_heads = GROUPS[case % 4], int(rng.integers(1, 4))
        window, sinks = (0, 0) if name == "tova" else (int(rng.integers(0, 5)), int(rng.integers(0, 3)))
        shortest = window + sinks + 1
        lengths = [int(rng.choice([shortest, 12, 30]))] * n_heads
        if name != "tova" and rng.random() < 0.3:  # tova goes by tokens: there every head holds the same ones
            lengths = rng.integers(shortest, 31, n_heads).tolist()
        layer, rows = random_rows(rng, group, lengths, sinks, window, 5, ties=ties_hold and case % 3 == 0)
        room = int(rng.integers(0, len(layer.free) + 1))
        try:
            expected = method(rows, room)
        except literal.Near:
            n_near += 1
            continue
        assert kept_rows(config, layer, np.count_nonzero(layer.protected) + room) == expected, case
        n_nothing += any(not head for head in expected) and room > 0
    assert n_near < 8 and n_nothing > 3


@pytest.mark.parametrize("name", METHODS)
def test_identical_query_heads_are_the_method_without_groups(name):
    """Oracle 12: G equal query heads (and equal W_O^h) give what one gives."""
    config, rng = METHODS[name][0], np.random.default_rng(1)
    for group in GROUPS[1:]:
        layer, rows = random_rows(rng, 1, [25, 25], 2, 4, 5)
        of_group, _ = random_rows(rng, group, [25, 25], 2, 4, 5)
        wo = np.repeat(np.float32(rows.wo).reshape(15, 2, 1, D), group, axis=2).reshape(15, -1)
        for field in ("k", "v", "pos", "protected", "scale"):
            setattr(of_group, field, getattr(layer, field))
        of_group.queries = [Queries(np.repeat(layer.queries[0].q, group, axis=0), layer.queries[0].pos)]
        of_group.output = OutputProjection(Weight.floats(wo), 2, D, numpy_ops)
        for target in (13, 20, 31):
            assert kept_rows(config, of_group, target) == kept_rows(config, layer, target)


def test_the_ends_of_the_mixture_of_adakv():
    """Oracle 6: alpha = 1 is SnapKV, alpha = 0 the best of all heads, row by row."""
    rng = np.random.default_rng(2)
    for case in range(60):
        layer, _ = random_rows(rng, GROUPS[case % 4], [20] * int(rng.integers(1, 6)), 1, 3, 4, ties=case % 3 == 0)
        target = int(rng.integers(np.count_nonzero(layer.protected), len(layer.pos) + 1))
        for alpha, other in ((1.0, CacheConfig("snapkv")), (0.0, CacheConfig("snapkv", allocate="layer"))):
            found = kept_rows(CacheConfig("adakv", alpha=alpha), layer, target)
            assert found == kept_rows(other, layer, target)


def test_one_query_and_no_group_make_laprox_attention_times_the_norm_of_what_is_added():
    """Oracle 5: p = a |v W_O|, the same by every way to look at a group."""
    layer, rows = random_rows(np.random.default_rng(3), 1, [30, 22], 0, 4, 1)
    for gqa in ("product_mean", "mean_attn", "frobenius"):
        config = CacheConfig("laprox", gqa=gqa, norm=False, pool=1)
        found, at = config.resolve().scores(layer), 0
        for g, (v, a) in enumerate(zip(rows.v, rows.a, strict=True)):
            expected = a[0] * [np.linalg.norm(value @ rows.w_o(g)) for value in v]
            np.testing.assert_allclose(found[at : at + len(v)], expected, rtol=1e-4, atol=1e-7)
            at += len(v) + 4


@pytest.mark.parametrize("dim", [3, 15, 40])  # less than d, less and more than G d
def test_norms_and_inner_products_through_the_output_projection(dim):
    """Oracle 5: by factors of W_O^h and written out."""
    rng = np.random.default_rng(4)
    lengths, v = np.array([1500, 0, 3]), rng.normal(size=(1503, D)).astype(F32)
    wo = rng.normal(size=(dim, 9 * D)).astype(F32)
    output = OutputProjection(Weight.floats(wo), 3, D, numpy_ops)
    l1, l2, inner = output.norms(v, lengths, "l1"), output.norms(v, lengths, "l2"), output.inner(v, lengths)
    for row in (0, 1023, 1024, 1499, 1500, 1502):
        first = 0 if row < 1500 else 6
        moved = [np.float64(wo[:, h * D : (h + 1) * D]) @ v[row] for h in range(first, first + 3)]
        np.testing.assert_allclose(l1[:, row], [abs(x).sum() for x in moved], rtol=1e-5)
        np.testing.assert_allclose(l2[:, row], [np.sqrt(x @ x) for x in moved], rtol=1e-5)
        np.testing.assert_allclose(inner[:, :, row], np.array(moved) @ np.transpose(moved), rtol=1e-4, atol=1e-4)


# prompts


class Prompt:
    """A random prompt of `n` tokens in several layers, compressed layer by layer through the pages."""

    def __init__(self, config, rng, *, n_layers, n_heads, group, n, spread=1.0):
        self.config, self.n, self.n_heads, self.n_layers = config, n, n_heads, n_layers
        sharpness = spread ** rng.normal(size=n_layers)  # layers that differ
        self.q = [(rng.normal(size=(group * n_heads, n, D)) * s).astype(F32) for s in sharpness]
        self.k, self.v = rng.normal(size=(2, n_layers, n_heads, n, D)).astype(F32)
        self.wo = rng.normal(size=(n_layers, 15, group * n_heads * D)).astype(F32)
        pool = PagePool(numpy_ops, D, 8, 16 * 8 * FLOAT32.entry_bytes(D))
        self.cache = KVCache(pool, n_layers, n_heads)
        compressor = bare_compressor(config, bare_model(FakeRope(D), self.wo, n_heads, SCALE))
        recipe, self.targets = compressor.recipe, []
        targets = recipe.targets
        recipe.targets = lambda *arguments: self.targets.append(targets(*arguments)) or self.targets[-1]
        compression = compressor.begin(self.cache, np.zeros(n, np.int64))
        self.protected = compression.ledger.protected // n_heads  # rows of a head
        self.end, self.sinks = compression.part.end, compression.part.sinks
        for layer in range(n_layers):
            queries = [Queries(self.q[layer], np.arange(n))]
            compression.store(layer, self.k[layer], self.v[layer], queries)
        compression.finish()
        self.total = config.budget.total(n, n_layers * n_heads)

    def rows(self, layer, kept, n_queries):
        """literal.Rows of a layer of which `kept` (positions of each head) is left."""
        heads = []
        for head, pos in enumerate(kept):
            protected = (pos < self.sinks) | (pos >= self.end)
            k, v = self.k[layer, head, pos], self.v[layer, head, pos]
            heads.append({"k": k, "v": v, "pos": pos, "protected": protected})
        q, q_pos = self.q[layer][:, -n_queries:], np.arange(self.n - n_queries, self.n)
        return literal.Rows(heads, q, q_pos, self.wo[layer], SCALE)

    def whole(self, layer, n_queries):
        return self.rows(layer, [np.arange(self.n)] * self.n_heads, n_queries)

    def found(self, layer):
        """Positions of the entries of each head."""
        return [self.cache.layer(layer).read(head)[3].tolist() for head in range(self.n_heads)]

    def expected(self, layer, kept, chosen):
        """Positions of the protected rows and of those `chosen` among the others, of rows at `kept`."""
        out = []
        for pos, of_head in zip(kept, chosen, strict=True):
            protected = (pos < self.sinks) | (pos >= self.end)
            out.append(np.sort(np.concatenate([pos[protected], pos[~protected][of_head]])))
        return out

    def check_total(self):
        assert self.cache.entries == self.cache.lengths.sum() == self.total


PROMPTS = [(1, 1, 3, 140), (4, 2, 1, 150), (5, 3, 4, 131), (3, 2, 8, 200)]  # layers, KV heads, group, tokens


@pytest.mark.parametrize("budget", [0.12, 0.5, 0.93, 17])
@pytest.mark.parametrize("method", ["snapkv", "pyramidkv"])
def test_layers_whose_budgets_are_known_from_the_start(method, budget):
    rng = np.random.default_rng(5)
    for n_layers, n_heads, group, n in PROMPTS:
        prompt = Prompt(CacheConfig(method, budget), rng, n_layers=n_layers, n_heads=n_heads, group=group, n=n)
        prompt.check_total()
        room, free = prompt.total - prompt.protected * n_layers * n_heads, n_heads * (n - prompt.protected)
        if method == "pyramidkv":
            counts = literal.pyramid_layers(room, n_layers, n_heads, n, prompt.protected, 20)
        else:
            counts = literal.proportional(room, [1] * n_layers, [free] * n_layers)
        assert prompt.targets[-1] == [count + n_heads * prompt.protected for count in counts]
        assert counts == sorted(counts, reverse=True)
        whole = [np.arange(n)] * n_heads
        for layer, count in enumerate(counts):
            rows = prompt.whole(layer, 8 if method == "pyramidkv" else 32)
            chosen = literal.uniform(literal.snapkv(rows), count)
            for found, expected in zip(prompt.found(layer), prompt.expected(layer, whole, chosen), strict=True):
                np.testing.assert_array_equal(found, expected)


def test_the_pyramid():
    """From 195 to 5 around a mean of 100; no more than there is; flat where there is little to drop or beta is 1."""

    def targets(n_layers, n, budget, **options):
        config = CacheConfig("pyramidkv", budget, **options)
        return Prompt(config, np.random.default_rng(0), n_layers=n_layers, n_heads=1, group=1, n=n).targets[-1]

    assert targets(3, 600, 108) == [195 + 8, 100 + 8, 5 + 8]
    assert targets(3, 195, 105) == [187 + 8, 97 + 8, 7 + 8]  # 2 x 97 - 97 / 20 are more than 195 - 8
    assert targets(3, 150, 108) == [108, 108, 108]
    assert targets(3, 600, 108, beta=1) == [108, 108, 108]


@pytest.mark.parametrize("beta, n", [(1, 300), (20, 200)])
def test_a_flat_pyramid_is_snapkv(beta, n):
    """Oracle 7."""
    rng = np.random.default_rng
    shape = {"n_layers": 3, "n_heads": 2, "group": 3, "n": n}
    pyramid = Prompt(CacheConfig("pyramidkv", 0.55, beta=beta), rng(6), **shape)
    snapkv = Prompt(CacheConfig("snapkv", 0.55, window=8, queries=8), rng(6), **shape)
    assert [pyramid.found(layer) for layer in range(3)] == [snapkv.found(layer) for layer in range(3)]


@pytest.mark.parametrize("budget", [0.12, 0.5, 0.93, 17])
@pytest.mark.parametrize("method", ["cake", "lava"])
def test_cascades_are_those_of_a_literal_recomputation(method, budget):
    """The budgets of all layers seen, again with each new one; earlier layers are cut down from what they hold."""
    rng, seldom = np.random.default_rng(7), 0
    for n_layers, n_heads, group, n in [*PROMPTS, (12, 1, 2, 130)]:
        shape = {"n_layers": n_layers, "n_heads": n_heads, "group": group, "n": n, "spread": 2.0}
        prompt = Prompt(CacheConfig(method, budget), rng, **shape)
        prompt.check_total()
        fixed, free = n_heads * prompt.protected, n_heads * (n - prompt.protected)
        kept, weights = [], []
        for layer, targets in enumerate(prompt.targets):
            rows = prompt.whole(layer, 32)
            weights.append(
                literal.cake_preference(rows) if method == "cake" else literal.lava_entropy(literal.lava(rows))
            )
            room = prompt.total - fixed * n_layers
            expected = literal.proportional(room, weights, [free] * (layer + 1))
            assert abs(np.array(targets) - fixed - expected).max() <= 1
            assert sum(targets) == min(room, free * (layer + 1)) + fixed * (layer + 1)
            kept.append([np.arange(n)] * n_heads)
            cut = [layer]
            held = [sum(map(len, of_layer)) for of_layer in kept[:-1]] + [targets[layer]]
            if layer == n_layers - 1 or sum(held) - sum(targets) > n * n_heads:
                seldom += layer < n_layers - 1
                cut = range(layer + 1)
            for i in cut:
                if sum(map(len, kept[i])) == targets[i]:
                    continue
                scores = (literal.cake if method == "cake" else literal.lava)(prompt.whole(i, 32))
                history = [(pos >= prompt.sinks) & (pos < prompt.end) for pos in kept[i]]
                scores = [s[pos[h] - prompt.sinks] for s, pos, h in zip(scores, kept[i], history, strict=True)]
                share = literal.uniform if method == "cake" else literal.adaptive
                kept[i] = prompt.expected(i, kept[i], share(scores, targets[i] - fixed))
        for layer in range(n_layers):
            for found, expected in zip(prompt.found(layer), kept[layer], strict=True):
                np.testing.assert_array_equal(found, expected)
    assert seldom or budget == 0.93


@pytest.mark.parametrize("options", [{}, {"gqa": "frobenius"}, {"norm": False}])
@pytest.mark.parametrize("budget", [0.05, 0.35, 0.93, 17])
def test_laprox_streamed_is_one_cut_through_the_whole_model(budget, options):
    """Oracle 5: the layers come one after another, the result is that of a flat top-K over all of them."""
    rng, n_near = np.random.default_rng(8), 0
    for n_layers, n_heads, group, n in PROMPTS:
        shape = {"n_layers": n_layers, "n_heads": n_heads, "group": group, "n": n, "spread": 1.5}
        prompt = Prompt(CacheConfig("laprox", budget, **options), rng, **shape)
        prompt.check_total()
        of_layers = [literal.laprox(prompt.whole(layer, 32), **options) for layer in range(n_layers)]
        room = prompt.total - prompt.protected * n_layers * n_heads
        try:
            chosen = literal.flat([head for of_layer in of_layers for head in of_layer], room)
        except literal.Near:
            n_near += 1
            continue
        whole = [np.arange(n)] * n_heads
        for layer in range(n_layers):
            expected = prompt.expected(layer, whole, chosen[layer * n_heads : (layer + 1) * n_heads])
            for found, of_head in zip(prompt.found(layer), expected, strict=True):
                np.testing.assert_array_equal(found, of_head)
    assert n_near < 2


# options


def test_an_option_can_be_set_to_the_default_of_its_part():
    """Also where the method's own default is another."""
    assert CacheConfig("criticalkv").options["alpha"] == 1.0
    assert CacheConfig("criticalkv", alpha=0.2).options["alpha"] == 0.2
    for name in ("criticalkv", "cake", "tova", "pyramidkv"):
        for option, spec in CacheConfig.option_table(name).items():
            assert CacheConfig(name, **{option: spec.default}).options[option] == spec.default


# turns and generation


@pytest.mark.parametrize("method", ["snapkv", "pyramidkv", "adakv", "criticalkv", "cake", "lava", "tova", "laprox"])
@pytest.mark.parametrize("budget", [0.06, 0.4, 50])
def test_budgets_are_met_over_turns(method, budget):
    """Oracle 9, and what is kept is the text's own keys and values, bit for bit."""
    sequence = Sequence(CacheConfig(method, budget), n_layers=3, n_heads=2)
    for n in (150, 1, 40, 300):
        sequence.read(n)
        sequence.check_entries(budget) if budget >= 1 else sequence.check_kept(budget)
    for layer, head in np.ndindex(3, 2):
        k, v, log_size, pos = sequence.cache.layer(layer).read(head)
        assert pos.tolist() == sorted(set(pos.tolist())) and not log_size.any()
        np.testing.assert_array_equal(k, sequence.k[layer, head, pos])
        np.testing.assert_array_equal(v, sequence.v[layer, head, pos])


@pytest.mark.parametrize("allocate", ["preference", "entropy", "adaptive", "shared", "pyramid", "critical"])
def test_allocations_go_with_any_score(allocate):
    for method in ("random", "streaming", "h2o", "laprox"):
        sequence = Sequence(CacheConfig(method, 0.3, allocate=allocate), n_layers=3)
        for n in (150, 60):
            sequence.read(n).check_kept(0.3)


@pytest.mark.parametrize("method", ["cake", "tova"])
@pytest.mark.parametrize("recompress", [1, 64])
def test_a_generation_keeps_its_budget(method, recompress):
    sequence = Sequence(CacheConfig(method, 40, recompress=recompress), n_layers=2).read(200)
    times = 0
    for compressed in sequence.generate(128):
        if compressed:
            times += 1
            sequence.check_entries(40)
        if method == "tova":
            assert all(positions(sequence, layer, 0) == positions(sequence, layer, 1) for layer in range(2))
        assert len(sequence.cache.left.queries) <= (1 if method == "tova" else 32)
    assert times == 128 // recompress


def test_tova_drops_at_each_step_what_the_newest_query_wants_least():
    config = CacheConfig("tova", 30, recompress=1)
    sequence = Sequence(config, n_layers=1).read(140)
    asked = []
    draw = sequence._queries
    sequence._queries = lambda n: asked.append(draw(n)) or asked[-1]
    kept = positions(sequence, 0, 0)
    for step, _ in enumerate(sequence.generate(60)):
        kept.append(140 + step)
        heads = [{"k": sequence.k[0, h, kept], "v": sequence.v[0, h, kept], "pos": np.array(kept)} for h in range(2)]
        heads = [{**head, "protected": np.zeros(31, bool)} for head in heads]
        rows = literal.Rows(heads, asked[-1][0], [140 + step], sequence.model.blocks[0].wo.data, 1.0)
        kept = [kept[j] for j in literal.cut(literal.tova(rows)[0], 30)]
        assert positions(sequence, 0, 0) == positions(sequence, 0, 1) == kept


def test_the_best_of_many_with_ties():
    rng = np.random.default_rng(0)
    for n in (1, 9, 60):
        scores = rng.integers(-2, 3, n).astype(F32)
        scores[rng.random(n) < 0.2] = -np.inf
        for count in (-1, 0, 1, n // 2, n, n + 3):
            expected = sorted(sorted(range(n), key=lambda i: (-scores[i], i))[: max(count, 0)])
            assert np.flatnonzero(segment_topk(scores, [n], [count])).tolist() == expected


def test_heads_are_filled_level_by_level():
    """One row at a time to the head that has fewest and takes more, of equal ones the first."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        held, most = rng.integers(0, 7, (2, rng.integers(1, 6)))
        for room in range(int(most.sum()) + 3):
            taken = [0] * len(held)
            for _ in range(room):
                if open_ := [h for h in range(len(held)) if taken[h] < most[h]]:
                    taken[min(open_, key=lambda h: held[h] + taken[h])] += 1
            assert leveled(held, most, room).tolist() == taken
