"""A settled prefix: later cuts leave its entries alone, so that forks share its pages for good."""

import numpy as np
import pytest
from literal import NEEDS
from small_models import compressor_of, config_of, ids_of, model_of, new_cache

from minillm.cache import state as cache_state
from minillm.compress.methods import METHODS
from minillm.compress.reading import extend, recompress


def prefix(method, budget=0.4):
    """A model, a compressor and a cache that holds a settled text of 300 tokens."""
    model = model_of(config_of())
    compressor = compressor_of(model, method, None if method == "full" else budget, **NEEDS.get(method, {}))
    cache = new_cache(model)
    extend(model, ids_of(300), cache, compressor)
    cache.settle()
    return model, compressor, cache


def entries(cache, upto):
    """Of each head of each layer its first `upto` (L, H) entries."""
    heads = np.ndindex(cache.lengths.shape)
    return [[part[: upto[at]] for part in cache.layer(at[0]).read(at[1])] for at in heads]


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_later_cuts_leave_it_alone(method):
    model, compressor, cache = prefix(method)
    settled, before = cache.settled.copy(), entries(cache, cache.settled)
    fork = cache.fork()
    extend(model, ids_of(400, 1), fork, compressor)
    for token in ids_of(40, 2):
        model.decode([token], [fork])
        if compressor.due(fork):
            recompress(model, fork, compressor)
    same(entries(fork, settled), before)
    same(entries(cache, settled), before)
    if method != "full":
        since = fork.lengths - settled
        assert since.sum() < 0.9 * since.size * 440  # what came after it was compressed by itself


@pytest.mark.parametrize("budget", [0.4, 40])
@pytest.mark.parametrize("method", ["foresight", "kvzip", "snapkv"])
def test_what_comes_after_it_has_a_budget_of_its_own(method, budget):
    model, compressor, cache = prefix(method, budget)
    extend(model, ids_of(400, 1), cache, compressor)
    since = cache.lengths - cache.settled
    assert since.sum() == since.size * (160 if budget == 0.4 else 128)


@pytest.mark.parametrize("method", ["foresight", "kvzip", "semanticache", "full"])
def test_a_question_takes_the_pages_of_its_tokens_and_no_more(method):
    model, compressor, cache = prefix(method)
    size = cache.pool.page_size
    for n in (1, 5, 28, 100):
        fork, before = cache.fork(), cache.pool.bytes_in_use
        extend(model, ids_of(n, n), fork, compressor)
        taken = (cache.pool.bytes_in_use - before) // cache.pool.page_bytes
        assert taken == (-(-(cache.lengths % size + n) // size)).sum()
        assert taken <= cache.lengths.size * (-(-n // size) + 1)
        fork.clear()
        assert cache.pool.bytes_in_use == before


def test_it_is_in_what_is_saved():
    model, compressor, cache = prefix("foresight")
    extend(model, ids_of(30, 1), cache, compressor)
    other = new_cache(model)
    cache_state.restore(other, cache_state.state(cache))
    assert other.settled_tokens == 300
    np.testing.assert_array_equal(other.settled, cache.settled)
    for one in (cache, other):
        extend(model, ids_of(200, 2), one, compressor)
    same(entries(other, other.lengths), entries(cache, cache.lengths))


def test_retrieval_heads_take_what_came_after_it_and_no_more():
    """Razor on one layer after another: a retrieval head's share is of the rows that there are."""

    def since(settled):
        model = model_of(config_of())
        compressor, cache = compressor_of(model, "razor", 0.5, retrieval_heads="0:0"), new_cache(model)
        if settled:
            extend(model, ids_of(900), cache, compressor)
            cache.settle()
        extend(model, ids_of(500, 1), cache, compressor)
        return (cache.lengths - cache.settled).tolist()

    assert since(True) == since(False)


def test_a_window_longer_than_what_came_after_it():
    """What is left for the next pass is of the tokens since, so that a file of it is taken up again."""
    model = model_of(config_of())
    compressor, cache = compressor_of(model, "foresight", threshold=0.05, window=200), new_cache(model)
    extend(model, ids_of(300), cache, compressor)
    cache.settle()
    extend(model, ids_of(150, 1), cache, compressor)
    other = new_cache(model)
    cache_state.restore(other, cache_state.state(cache))
    assert other.left.tail == cache.left.tail <= 150
