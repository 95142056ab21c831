"""A whole small model on the CUDA backend, on the emulator and where there is one on a GPU, against the NumPy backend
with the same stored weights: the wiring of kernels, pages, plans and graphs."""

from dataclasses import replace
from types import SimpleNamespace

import emulator
import numpy as np
import pytest
from cuda_words import from_words, to_words
from twins import SHARE, SMALL, Twins

from minillm.cache import state as cache_state
from minillm.cache.kv_cache import KVCache
from minillm.compress.methods import METHODS
from minillm.compress.plan import Queries
from minillm.compress.reading import extend, recompress
from minillm.errors import MinillmError
from minillm.files.config import RopeConfig
from minillm.files.formats import FORMATS
from minillm.profile import worth

DTYPES = "auto", "int8", "k5v4"  # of pages
GEMMA = {  # all that tells a Gemma 3 from the others
    **{"head_dim": 256, "n_heads": 2, "n_kv_heads": 1, "qk_norm": True, "output_norms": True, "tied_head": True},
    **{"activation": "gelu_tanh", "embedding_scale": 8.0, "attention_scale": 0.05, "sliding_window": 40, "full": (1,)},
    "local_rope": RopeConfig(theta=500.0),
}


@pytest.fixture
def ids():
    return np.random.default_rng(5).integers(0, SMALL.vocab_size, 400).tolist()


@pytest.mark.parametrize("kind", SHARE)
def test_prompt_and_decode(device, ids, kind):
    twins = Twins(device, kind=kind)
    pair = twins.caches()
    twins.close(twins.extend(ids[:37], pair))
    for token in ids[37:42]:
        twins.close(twins.decode([token], [pair]))


def test_matrices_of_several_formats_stay_what_they_are(device, ids):
    """As llama.cpp makes a file in Q4_K_M: the values finer than queries and keys; and here gate and up differ, too.
    Launched, captured and replayed, of more sequences than a kernel for few rows takes at once."""
    others = {"v_proj": "Q6_K", "up_proj": "Q5_K", "embed_tokens": "Q6_K", "lm_head": "BF16", "o_proj": "F32"}
    twins = Twins(device, kind="Q4_K", others=others)
    layer = twins.models[0].runner.layers[0]
    assert [(first, weight.format.name) for first, weight in layer.wqkv] == [(0, "Q4_K"), (384, "Q6_K")]
    assert [(first, weight.format.name) for first, weight in layer.w_gate_up] == [(0, "Q4_K"), (256, "Q5_K")]
    pairs = [twins.caches() for _ in range(9)]
    for i, pair in enumerate(pairs):
        twins.close(twins.extend(ids[i : i + 2 + i], pair))
    for step in range(3):
        twins.close(twins.decode(ids[step : step + 9], pairs))


@pytest.mark.parametrize(
    "first, others, real16", [("BF16", "Q4_0", "half"), ("F16", "BF16", "bf16"), ("BF16", "F16", "half")]
)
def test_most_of_the_matrices_decide_the_16_bit_type(device, ids, first, others, real16):
    """And not the first one. Blocks are never widened for it."""
    twins = Twins(device, kind=others, others={"embed_tokens": first})
    model = twins.models[0]
    assert model.ops.real16 == real16
    assert {name for weight in model.blocks[0].weights if (name := getattr(weight, "format", None))} == {
        FORMATS[others].device
    }
    pair = twins.caches()
    twins.close(twins.extend(ids[:20], pair))
    for token in ids[20:23]:
        twins.close(twins.decode([token], [pair]))


SHAPES = {
    "mha": {"n_heads": 3, "n_kv_heads": 3},
    "gqa3-d80": {"n_heads": 6, "head_dim": 80},
    "gqa3-d128-window": {"n_heads": 6, "head_dim": 128, "sliding_window": 40},
    "mqa-biases-tied": {
        **{"n_heads": 8, "n_kv_heads": 1, "qkv_bias": True, "o_bias": True, "mlp_bias": True, "tied_head": True}
    },
    "families": {  # what one family or another has
        **{"qkv_bias": True, "qk_norm": True, "rotated_dim": 48, "unrotated": (0,), "sliding_window": 40, "full": (1,)},
        **{"attention_scale": 0.2, "embedding_scale": 3.0, "temperature": 0.5, "logit_scale": 0.5},
        "rope": RopeConfig(original_context=16),
    },
    "gemma": GEMMA,
    "gelu-and-biases": {"activation": "gelu_tanh", "o_bias": True, "mlp_bias": True},
    "norms-behind-biases": {"output_norms": True, "o_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize(
    "shape, dtype",
    [
        *[(shape, dtype) for shape in ("mha", "gqa3-d128-window", "mqa-biases-tied") for dtype in ("auto", "int8")],
        *[("gqa3-d80", "auto"), ("gqa3-d80", "int8"), ("families", "auto"), ("families", "k5v4")],
        *[("gemma", "auto"), ("gemma", "k5v4"), ("gelu-and-biases", "auto"), ("norms-behind-biases", "auto")],
    ],
)
def test_shapes_of_model(device, ids, shape, dtype):
    config = replace(SMALL, **SHAPES[shape])
    twins = Twins(device, config, kind="BF16" if config.head_dim > 80 else "F16", dtype=dtype)
    pair = twins.caches()
    twins.close(twins.extend(ids[:50], pair))
    twins.close(twins.extend(ids[50:61], pair))  # a later turn, over stored entries
    for token in ids[61:64]:
        twins.close(twins.decode([token], [pair]))


@pytest.mark.parametrize("batch, dtype", [(2, "k5v4"), (9, "auto"), (9, "int8")])
def test_a_batch_of_sequences(device, ids, batch, dtype):
    """Of different lengths; more of them than a kernel for few rows takes at once; and then fewer."""
    twins = Twins(device, kind="BF16" if dtype == "int8" else "F16", dtype=dtype)
    pairs = [twins.caches() for _ in range(batch)]
    for i, pair in enumerate(pairs):
        twins.extend(ids[i : i + 1 + 9 * i], pair)
    for step in range(3):
        twins.close(twins.decode(ids[step : step + batch], pairs))
    twins.close(twins.decode(ids[: batch - 1], pairs[1:]))


def test_heads_that_there_are_no_kernels_for_are_refused(device):
    for head_dim in (48, 72, 272):
        with pytest.raises(MinillmError, match=f"heads of {head_dim} elements.* multiples of 16 from 64 to 256"):
            Twins(device, replace(SMALL, head_dim=head_dim))


@pytest.mark.parametrize(
    "options",
    [
        {"cache": "semanticache", "tau": 0.1},
        {"cache": "semanticache", "budget": 0.3},
        {"cache": "semanticache", "budget": 0.3, "rope": "cached"},
        {"cache": "semanticache", "budget": 20},
        {"cache": "semanticache", "tau": 0.2, "chunking": "none"},
        {"cache": "streaming", "budget": 0.25},
        {"cache": "foresight", "budget": 0.3, "dtype": "int8"},
        {"cache": "semanticache", "budget": 0.3, "dtype": "int8", "shape": "gqa3-d80"},
        {"cache": "foresight", "budget": 0.3, "dtype": "k5v4", "shape": "gemma", "kind": "BF16"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_compressed_caches(device, ids, options):
    """Keys differ by the rounding of 16 bits, and so a cosine may fall on the other side of tau: a few entries."""
    options = dict(options)
    config = replace(SMALL, **SHAPES.get(options.pop("shape", None), {}))
    twins = Twins(device, config, recompress=8, **options)
    pair = twins.caches()
    twins.extend(ids[:150], pair)
    near = lambda: np.abs(pair[0].lengths - pair[1].lengths).max() <= 3  # noqa: E731
    assert near() and pair[0].kept < 0.6 and np.isclose(pair[0].entries, pair[1].entries, rtol=0.01)
    for token in ids[150:152]:
        twins.close(twins.decode([token], [pair]), 10)
    twins.close(twins.extend(ids[152:190], pair), 10)
    for model, cache, compressor in zip(twins.models, pair, twins.compressors, strict=True):
        recompress(model, cache, compressor)
    assert near()
    twins.close(twins.decode([ids[190]], [pair]), 10)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("full", "semanticache")])
def test_every_method(device, ids, method):
    """As many entries in every head or nearly, most of them the same, and an answer goes on over them."""
    needed = {"retrieval_heads": "0:0"} if method == "razor" else {}
    twins = Twins(device, cache=method, budget=0.4, recompress=4, **needed)
    pair = twins.caches()
    twins.extend(ids[:140], pair)
    assert abs(pair[0].entries - pair[1].entries) <= 8 and pair[0].kept < 0.5
    shared = total = 0
    for layer in range(SMALL.n_layers):
        ours, expected = (cache.read(layer).on_host(cache.pool.ops) for cache in pair)
        ends = [np.cumsum(e.lengths)[:-1] for e in (ours, expected)]
        for a, b in zip(np.split(ours.pos, ends[0]), np.split(expected.pos, ends[1]), strict=True):
            shared, total = shared + len(np.intersect1d(a, b)), total + len(b)
    assert shared >= 0.9 * total
    for token in ids[140:146]:
        logits = twins.decode([token], [pair])
        assert np.isfinite(logits[0]).all()
    for model, cache, compressor in zip(twins.models, pair, twins.compressors, strict=True):
        if compressor.due(cache):
            recompress(model, cache, compressor)
    assert abs(pair[0].entries - pair[1].entries) <= 8


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0"])  # projections become 16-bit words of one type or the other
def test_predicted_scores(device, ids, kind):
    """Of a prompt in two parts and of the tokens of a batch: launched, captured and replayed; and a batch that asks for
    none, for which another graph is made."""
    twins = Twins(device, replace(SMALL, n_heads=6, n_kv_heads=3), kind, "foresight", budget=0.3)
    pairs = [twins.caches() for _ in "ab"]
    for pair, n in zip(pairs, (40, 7), strict=True):
        twins.extend(ids[:n], pair)
        twins.extend(ids[n : n + 5], pair)
    for token in ids[50:54]:
        twins.decode([token, 3], pairs)
    assert twins.models[0].runner.step.graph
    for pair, n in zip(pairs, (49, 16), strict=True):
        noted = [cache_state.state(cache)["predicted"] for cache in pair]
        assert noted[0].shape == (SMALL.n_layers, 3, n) and noted[0].dtype == np.float32
        twins.close(noted, 2)
        for cache in pair:
            cache.left.predicted = None
    twins.close(twins.decode([1, 2], pairs))
    assert not twins.models[0].runner.step.predicts


def test_a_prompt_that_is_read_in_blocks(device, ids, monkeypatch):
    """The first block's logits do not hang on what is dropped; hidden states of all of them are joined."""
    monkeypatch.setattr("minillm.compress.compressor.BLOCK_TOKENS", 64)
    twins = Twins(device, cache="foresight", budget=0.4)
    pair = twins.caches()
    logits = twins.extend(ids[:200], pair)
    assert logits[0].shape == logits[1].shape == (200, SMALL.vocab_size)
    twins.close([rows[:64] for rows in logits])
    assert abs(pair[0].entries - pair[1].entries) <= 8 and pair[0].kept < 0.5


def test_heads_are_tried_as_in_numpy(device, ids, monkeypatch):
    """What a profile learns of a model: the loss after a compressed text, and what a head's entries change of it."""
    monkeypatch.setattr(worth, "TOKENS", 200)
    twins = Twins(device, cache="foresight", budget=0.3)
    trials = []
    for model, pool in zip(twins.models, twins.pools, strict=True):
        llm = SimpleNamespace(
            model=model, config=SMALL, new_cache=lambda pool=pool: KVCache(pool, SMALL.n_layers, SMALL.n_kv_heads)
        )
        trials.append(worth.Trial(llm, ids[:240], [5, 6]))
    ours, expected = trials
    assert ours.base == pytest.approx(expected.base, rel=0.01)
    assert np.abs(ours.lengths - expected.lengths).max() <= 2
    for index, head in ((0, 1), (1, 0)):
        (lost, entries), (expected_lost, expected_entries) = (trial.tried(index, head) for trial in trials)
        assert abs(entries - expected_entries) <= 2 and expected_entries > 10
        assert lost == pytest.approx(expected_lost, abs=0.01)


@pytest.mark.parametrize("tau", [0.3, None])
def test_the_entries_of_a_plan(device, tau):
    """The same rows through both backends: the same clusters, and sums up to the rounding of 16 bits. Cached keys,
    whose cosines do not depend on how a rotation rounds."""
    twins = Twins(device, cache="semanticache", rope="cached", **({"tau": tau} if tau else {"budget": 0.3}))
    twins.models[0].ops.real16 = "bf16"
    rng, n = np.random.default_rng(1), 300
    k, v = rng.normal(size=(2, 2, n, 64)) + 2 * rng.normal(size=64)
    k, v = (from_words(to_words(rows, "bf16"), "bf16") for rows in (k, v))
    ids, pair = rng.integers(0, SMALL.vocab_size, n).tolist(), twins.caches()
    rows = (device.upload(to_words(k, "bf16")), device.upload(to_words(v, "bf16"))), (k, v)
    for cache, compressor, (k, v) in zip(pair, twins.compressors, rows, strict=True):
        compression = compressor.begin(cache, ids)
        for layer in range(SMALL.n_layers):
            compression.store(layer, k, v)
    for layer in range(SMALL.n_layers):
        ours, expected = (cache.read(layer).on_host(cache.pool.ops) for cache in pair)
        for name in ("lengths", "pos", "log_size"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name))
        for name in "kv":
            np.testing.assert_allclose(getattr(ours, name), getattr(expected, name), rtol=2**-8, atol=1e-6)
    assert (ours.log_size > 0).any()


@pytest.mark.parametrize("method, waits", [("streaming", 2), ("snapkv", 2), ("foresight", 3)])
def test_a_layer_is_planned_on_the_device(device, method, waits):
    """Of what is planned for a layer, in a first block and in a later one, the host asks for numbers of rows alone."""
    if not isinstance(device, emulator.EmulatedDevice):
        pytest.skip("counted on the emulator")
    twins, rng = Twins(device, cache=method, budget=0.3), np.random.default_rng(2)
    twins.models[0].ops.real16 = "bf16"
    cache, compressor = twins.caches()[0], twins.compressors[0]
    words = lambda heads, n: device.upload(to_words(rng.normal(size=(heads, n, 64)), "bf16"))  # noqa: E731
    for n, coming in ((150, 30), (30, 0)):
        compression = compressor.begin(cache, rng.integers(0, SMALL.vocab_size, n).tolist(), coming)
        queries = [Queries(words(4, n), np.arange(cache.seen, cache.seen + n))] if method == "snapkv" else []
        for layer in range(SMALL.n_layers):
            k, v, predicted = words(2, n), words(2, n), rng.normal(size=(2, n)).astype(np.float32)
            if method == "foresight":
                cache.left.predicted[layer].append(device.upload(predicted))
            device.waits.clear()
            device.bytes_down.clear()
            compression.store(layer, k, v, queries)
            last = layer + 1 == SMALL.n_layers  # when others may be cut again
            assert last or (sum(device.waits.values()) <= waits and max(device.bytes_down, default=0) <= 16)
        compression.finish()


def test_few_waits_on_the_way_down_the_ladder(device):
    """Where keys are all unlike, the first layer of a pass asks for the counts of every rung: of all taus at once, and
    for each coarser chunking how many rows, chunks and cosines it has, and how many clusters. The second knows."""
    if not isinstance(device, emulator.EmulatedDevice):
        pytest.skip("counted on the emulator")
    twins, rng = Twins(device, cache="semanticache", budget=0.2), np.random.default_rng(2)
    twins.models[0].ops.real16, cache = "bf16", twins.caches()[0]
    compression = twins.compressors[0].begin(cache, rng.integers(0, SMALL.vocab_size, 330).tolist())
    waits = []
    for layer in range(2):
        device.waits.clear()
        compression.store(layer, *(device.upload(to_words(rng.normal(size=(2, 330, 64)), "bf16")) for _ in "kv"), [])
        waits.append(sum(device.waits.values()))
    assert waits[0] <= 50 and waits[1] <= 3


def test_positions_that_were_moved_up(device, ids):
    twins = Twins(device, replace(SMALL, sliding_window=20))
    pair = twins.caches()
    twins.extend(ids[:30], pair)
    for cache in pair:
        cache.left.shift = 4
    for token in ids[30:33]:
        twins.close(twins.decode([token], [pair]))
    for cache in pair:
        assert (cache.read(1).on_host(cache.pool.ops).pos.reshape(2, -1)[:, -3:] == [26, 27, 28]).all()


def test_pages_that_a_sliding_window_has_left_are_given_back(device, ids):
    """While a graph goes on: against a NumPy cache that keeps everything."""
    twins = Twins(device, replace(SMALL, sliding_window=20))
    gives, keeps = twins.caches()
    gives.window = 20
    twins.close(twins.extend(ids[:90], [gives, keeps]))
    for token in ids[90:132]:  # pages begin at 96 and 128
        twins.close(twins.decode([token], [[gives, keeps]]))
        assert (gives.lengths < 20 + 32).all() and (keeps.lengths == keeps.seen).all()
    assert gives.pool.bytes_in_use <= 2 * gives.lengths.size * gives.pool.page_bytes
    assert twins.models[0].runner.step.graph


@pytest.mark.parametrize("kind, dtype", [("BF16", "int8"), ("F16", "k5v4")])
def test_entries_in_fewer_bits_that_stay_are_the_same_words(device, ids, kind, dtype):
    """However often their layer is compressed again."""
    twins = Twins(device, kind=kind, cache="streaming", budget=60, recompress=8, dtype=dtype)
    pair = twins.caches()
    cache, model, compressor = pair[0], twins.models[0], twins.compressors[0]

    def words():
        found = {}
        for layer, head in np.ndindex(cache.lengths.shape):
            for run in cache.layer(layer).runs(head):
                k, v, k_scale, v_scale, pos = (run[name].get() for name in ("k", "v", "k_scale", "v_scale", "pos"))
                for i, at in enumerate(pos.tolist()):
                    found[layer, head, at] = (*k[i].tolist(), *v[i].tolist(), k_scale[i], v_scale[i])
        return found

    twins.extend(ids[:150], pair)
    before = words()
    for token in ids[150:182]:
        model.decode([token], [cache])
        if compressor.due(cache):
            recompress(model, cache, compressor)
    after = words()
    stayed = before.keys() & after.keys()
    assert len(stayed) >= 80 and len(after.keys() - stayed) > 30
    assert all(before[key] == after[key] for key in stayed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_session_is_saved_forked_trimmed_and_restored(device, ids, dtype):
    twins = Twins(device, dtype=dtype)
    pair = twins.caches()
    cache, model = pair[0], twins.models[0]
    twins.extend(ids[:100], pair)
    state = cache_state.state(cache)
    assert state["k"].dtype == {"auto": np.uint16, "int8": np.int8, "k5v4": np.uint8}[dtype]
    fork = cache.fork()
    other = KVCache(cache.pool, SMALL.n_layers, SMALL.n_kv_heads)
    expected = model.decode([1], [cache])
    np.testing.assert_array_equal(model.decode([1], [fork]), expected)  # on pages of its own
    cache.clear()
    cache_state.restore(other, state)
    fork.clear()
    cache.pool.trim()
    np.testing.assert_array_equal(model.decode([1], [other]), expected)


@pytest.mark.parametrize("dtype", ["auto", "k5v4"])
def test_nothing_is_allocated_while_tokens_are_generated(device, ids, dtype):
    """The first step launches kernel by kernel, the second is captured; the others are the graph, and its memory."""
    if not isinstance(device, emulator.EmulatedDevice):
        pytest.skip("counted on the emulator")
    twins = Twins(device, dtype=dtype)
    pair = twins.caches()
    twins.extend(ids[:30], pair)
    twins.close(twins.decode([ids[30]], [pair]))
    twins.close(twins.decode([ids[31]], [pair]))
    before = device.allocations
    for token in ids[32:68]:  # new pages on the way: at 32 and 64
        twins.close(twins.decode([token], [pair]))
    assert device.allocations == before and twins.models[0].runner.step.graph


def test_without_graphs_decoding_goes_on_and_says_so_once(device, ids, monkeypatch, capsys):
    def refuse(launches):
        raise MinillmError("no CUDA graph could be captured (not here)")

    monkeypatch.setattr(device, "capture", refuse)
    twins = Twins(device)
    pair = twins.caches()
    twins.extend(ids[:10], pair)
    for token in ids[10:14]:
        twins.close(twins.decode([token], [pair]))
    assert capsys.readouterr().err.count("no CUDA graph could be captured (not here)") == 1


def test_a_damaged_layer_is_named(device, ids):
    twins = Twins(device)
    pair = twins.caches()
    twins.extend(ids[:10], pair)
    model = twins.models[0]
    words = model.runner.layers[1].w_down.words
    damaged = words.get().view(np.uint16)
    damaged[:, 3] = to_words(np.float32([np.nan]), "half")
    words.set(damaged.view(np.uint8))
    for _ in range(3):  # launched, captured, replayed
        with pytest.raises(MinillmError, match="layer 1"):
            model.decode([1], [pair[0]])
    with pytest.raises(MinillmError, match="layer 1"):
        extend(model, ids[:5], pair[0])
