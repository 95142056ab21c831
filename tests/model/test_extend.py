"""Reading on over a compressed cache: extend and Model.decode against a literal float64 pass over the entries that are
stored, and what an interruption leaves behind."""

import numpy as np
import pytest
from small_models import compressor_of, config_of, ids_of, literal_extend, model_of, new_cache, same

from minillm.cache import state as cache_state
from minillm.cache.kv_cache import KVCache
from minillm.compress.reading import extend, recompress
from minillm.errors import MinillmError
from minillm.ops.numpy_ops import NUMPY as numpy_ops
from minillm.ops.numpy_ops import NumpyOps

SETTINGS = {
    "full": ("full", None, {}),
    "semanticache 30 %": ("semanticache", 0.3, {}),
    "semanticache 60 entries": ("semanticache", 60, {}),
    "semanticache tau": ("semanticache", None, {"tau": 0.6, "rope": "cached"}),
    "streaming": ("streaming", 0.4, {}),
    "random": ("random", 0.4, {}),
}


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("setting", SETTINGS)
def test_reading_on_over_a_compressed_cache(setting, window):
    """Three turns; each one's logits are those of attention over exactly what the turn before left stored."""
    method, budget, options = SETTINGS[setting]
    model = model_of(config_of(sliding_window=window))
    cache, compressor = new_cache(model), compressor_of(model, method, budget, **options)
    for turn, n in enumerate((150, 9, 12)):
        ids = ids_of(n, turn)
        expected = literal_extend(model, ids, cache) if turn else None
        logits = model.logits(extend(model, ids, cache, compressor))
        if turn:
            same(logits, expected)
            assert (cache.kept < 0.9) == (method != "full")
    expected = literal_extend(model, [7], cache)
    same(model.decode([7], [cache]), expected)
    assert cache.seen == 150 + 9 + 12 + 1


def test_a_prompt_is_read_with_full_attention_before_it_is_compressed():
    model = model_of(config_of())
    ids = ids_of(140)
    plain = extend(model, ids, new_cache(model))
    np.testing.assert_array_equal(extend(model, ids, new_cache(model), compressor_of(model, budget=0.2)), plain)
    same(model.logits(plain)[[0, 70, 139]], literal_extend(model, ids, new_cache(model))[[0, 70, 139]])


def test_a_prompt_in_parts_is_a_prompt():
    model = model_of(config_of())
    ids = ids_of(90)
    whole_cache = new_cache(model)
    whole = model.logits(extend(model, ids, whole_cache))
    for parts in ((0, 50, 90), (0, 1, 2, 33, 90)):
        cache = new_cache(model)
        rows = [model.logits(extend(model, ids[lo:hi], cache)) for lo, hi in zip(parts[:-1], parts[1:], strict=True)]
        same(np.concatenate(rows), whole, 5e-5)
        assert cache.token_ids == ids and (cache.lengths == 90).all()
        for index in range(2):
            same(cache.read(index).k, whole_cache.read(index).k, 5e-5)
            np.testing.assert_array_equal(cache.read(index).pos, whole_cache.read(index).pos)


def test_decode_is_extend_by_one_token():
    model = model_of(config_of())
    one, other = new_cache(model), new_cache(model)
    compressor = compressor_of(model, budget=0.3)
    for cache in (one, other):
        extend(model, ids_of(160), cache, compressor)
    for token in ids_of(12, 1):
        same(model.decode([token], [one]), model.logits(extend(model, [token], other)), 5e-5)
    assert one.token_ids == other.token_ids and (one.lengths == other.lengths).all()
    same(cache_state.state(one)["k"], cache_state.state(other)["k"], 5e-5)


def test_a_batch_is_its_sequences():
    """Sequences of different lengths, full and compressed, one of them a fork, decoded together and one by one."""
    model = model_of(config_of())
    pool = new_cache(model).pool

    def caches():
        found = [KVCache(pool, 2, 2) for _ in range(3)]
        extend(model, ids_of(5), found[0])
        extend(model, ids_of(150), found[1], compressor_of(model, budget=0.25))
        extend(model, ids_of(140, 1), found[2], compressor_of(model, "streaming", budget=0.5))
        return [*found, found[1].fork()]

    together, apart = caches(), caches()
    for step in range(6):
        tokens = ids_of(4, step)
        logits = model.decode(tokens, together)
        for row, token, cache in zip(logits, tokens, apart, strict=True):
            same(row, model.decode([token], [cache])[0], 5e-5)
    for one, two in zip(together, apart, strict=True):
        assert one.token_ids == two.token_ids
        same(cache_state.state(one)["v"], cache_state.state(two)["v"], 5e-5)


def test_recompression_during_generation_keeps_to_the_budget():
    model = model_of(config_of())
    cache, compressor = new_cache(model), compressor_of(model, budget=80, recompress=40)
    extend(model, ids_of(150), cache, compressor)
    for step, token in enumerate(ids_of(200, 1)):
        if step % 50 == 49:
            expected = literal_extend(model, [token], cache)
            same(model.decode([token], [cache]), expected)
        else:
            model.decode([token], [cache])
        if compressor.due(cache):
            recompress(model, cache, compressor)
        assert cache.entries <= 2 * 2 * (80 + 40 + 32)
    assert cache.seen == 350


# what an interruption leaves behind


class Interrupted(BaseException):
    """As Ctrl-C is."""


def interrupting(at, name):
    """The operations of the backend, of which the `at`-th call of `name` raises."""
    calls = iter(range(1000))

    def operation(*arguments):
        if next(calls) == at:
            raise Interrupted
        return getattr(numpy_ops, name)(*arguments)

    ops = NumpyOps()
    setattr(ops, name, operation)
    return ops


def same_state(cache, state):
    for name, array in cache_state.state(cache).items():
        np.testing.assert_array_equal(array, state[name])


@pytest.mark.parametrize("at, name", [(0, "embed"), (0, "prefill_attention"), (1, "prefill_attention"), (1, "glu")])
def test_an_interrupted_extend_leaves_the_cache_as_it_was(at, name):
    model = model_of(config_of())
    cache = new_cache(model)
    extend(model, ids_of(150), cache, compressor_of(model, budget=0.5))
    fork = cache.fork()
    state = {name: array.copy() for name, array in cache_state.state(fork).items()}
    model.ops = interrupting(at, name)
    with pytest.raises(Interrupted):
        extend(model, ids_of(20), cache, compressor_of(model, budget=0.5))
    same_state(cache, state)
    same_state(fork, state)
    assert cache.pool.bytes_in_use == fork.bytes_in_use == cache.bytes_in_use  # all of it shared


@pytest.mark.parametrize(
    "at, name",
    [
        (0, "embed"),
        (0, "decode_attention"),
        (1, "decode_attention"),
        *((at, "linear") for at in (3, 10, 13)),
        (14, "linear"),  # the output head: 7 in each layer come before it
        (4, "rms_norm"),  # the last norm
    ],
)
def test_an_interrupted_decode_leaves_the_caches_as_they_were(at, name):
    model = model_of(config_of())
    one = new_cache(model)
    two = KVCache(one.pool, 2, 2)
    extend(model, ids_of(150), one, compressor_of(model, budget=0.5))
    extend(model, ids_of(8), two)  # full pages: the next token needs new ones
    three = two.fork()
    states = [{name: array.copy() for name, array in cache_state.state(cache).items()} for cache in (one, two, three)]
    in_use = one.pool.bytes_in_use
    model.ops = interrupting(at, name)
    with pytest.raises(Interrupted):
        model.decode([1, 2], [one, two])
    for cache, state in zip((one, two, three), states, strict=True):
        same_state(cache, state)
    assert one.pool.bytes_in_use == in_use
    model.ops = numpy_ops
    expected = literal_extend(model, [1], one), literal_extend(model, [2], two)
    same(model.decode([1, 2], [one, two]), np.concatenate(expected))


def test_pages_that_a_sliding_window_has_left_are_given_back():
    """Logits are those over a cache that keeps everything, through turns, tokens, an interruption, a fork and a file;
    what is held is the window and less than a page more."""
    model = model_of(config_of(sliding_window=6))
    keeps = new_cache(model)
    gives = KVCache(keeps.pool, 2, 2, window=6)

    def check():
        assert (gives.lengths <= 6 + 3).all() and gives.left.tail == gives.lengths.min() and gives.seen == keeps.seen
        assert keeps.pool.bytes_in_use == keeps.bytes_in_use + gives.bytes_in_use

    for i, n in enumerate((3, 50, 2, 1)):
        ids = ids_of(n, i)
        same(model.logits(extend(model, ids, gives)), model.logits(extend(model, ids, keeps)), 5e-5)
        check()
    for token in range(13):
        state = {name: array.copy() for name, array in cache_state.state(gives).items()}
        model.ops = interrupting(14, "linear")
        with pytest.raises(Interrupted):
            model.decode([token], [gives])
        same_state(gives, state)
        model.ops = numpy_ops
        logits = model.decode([token, token], [keeps, gives])
        same(logits[1], logits[0], 5e-5)
        check()
    fork, restored = gives.fork(), KVCache(keeps.pool, 2, 2, window=6)
    cache_state.restore(restored, cache_state.state(gives))
    for token in range(9):
        logits = model.decode([token] * 4, [keeps, gives, fork, restored])
        same(logits, np.tile(logits[0], (4, 1)), 5e-5)
    fork.clear()
    restored.clear()
    check()


def test_damaged_weights_are_named_and_nothing_is_lost():
    model = model_of(config_of())
    cache = new_cache(model)
    extend(model, ids_of(10), cache)
    model.blocks[1].w_down.data[3, 3] = np.nan
    with pytest.raises(MinillmError, match="layer 1.*model.layers.1"):
        model.decode([1], [cache])
    assert cache.seen == 10 and (cache.lengths == 10).all()
    with pytest.raises(MinillmError, match="layer 1.*model.layers.1"):
        extend(model, [1, 2], cache)
    assert cache.seen == 10 and (cache.lengths == 10).all()


def test_progress_is_told_after_every_layer():
    model, told = model_of(config_of(n_layers=3)), []
    extend(model, ids_of(5), new_cache(model), progress=lambda *step: told.append(step))
    assert told == [(1, 3), (2, 3), (3, 3)]
