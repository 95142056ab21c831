"""What a request is promised is the most that it ever holds, whatever the method: looked at when pages are taken."""

import pytest
from small_models import compressor_of, config_of, ids_of, model_of, new_cache

from minillm.engine.admission import promise
from minillm.engine.request import Request
from minillm.engine.scheduler import Scheduler
from minillm.sampling import SamplingParams

METHODS = {
    "full": {},
    "snapkv": {"budget": 0.3},
    "h2o": {"budget": 60, "recompress": 20},
    "streaming": {"budget": 0.4, "recompress": 16},
    "semanticache": {"budget": 0.4, "recompress": 16},
    "kvzip": {"budget": 0.3},
    "hindsight": {"budget": 0.3},
    "foresight": {"budget": 0.2, "recompress": 16},
}


@pytest.fixture(scope="module")
def model():
    return model_of(config_of())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("turns, prompt, n", [(1, 300, 20), (1, 30, 100), (3, 150, 20)])
def test_no_promise_is_broken(method, turns, prompt, n, model, monkeypatch):
    cache, compressor, scheduler = new_cache(model), compressor_of(model, method, **METHODS[method]), Scheduler()
    pool, most, unread = cache.pool, [], []
    alloc = pool.alloc

    def noted(n):
        pages = alloc(n)
        most.append(pool.pages_in_use)
        return pages

    monkeypatch.setattr(pool, "alloc", noted)
    for turn in range(turns):
        unread += ids_of(prompt, seed=turn)
        request = Request(model, compressor, cache, unread, SamplingParams(max_tokens=n))
        promised = promise(request)
        scheduler.submit(request)
        while not request.over:
            scheduler.step()
        assert request.state == "done" and len(request.token_ids) == n
        assert max(most) <= promised
        most.clear()


def test_a_prediction_with_a_budget_is_promised_less_than_a_full_cache(model):
    cache, ids = new_cache(model), ids_of(3000)
    compressors = compressor_of(model, "foresight", 0.1), None
    less, whole = (promise(Request(model, c, cache, list(ids), SamplingParams(max_tokens=100))) for c in compressors)
    assert less < 0.7 * whole


@pytest.mark.parametrize("method", METHODS)
def test_parts_that_settle_are_promised_for(method, model, monkeypatch):
    """A prompt in three parts, each of them kept by a fork: what is its own and what has settled is never more than
    what was promised at first, and what is left of the promise gets less."""
    cache, compressor, scheduler = new_cache(model), compressor_of(model, method, **METHODS[method]), Scheduler()
    pool, most, forks, left = cache.pool, [], [], []
    alloc = pool.alloc

    def noted(n):
        pages = alloc(n)
        most.append(pool.pages_in_use)
        return pages

    monkeypatch.setattr(pool, "alloc", noted)
    monkeypatch.setattr(pool, "limit_pages", 100_000)
    request = Request(model, compressor, cache, ids_of(900), SamplingParams(max_tokens=40))
    request.settles = (300, 650)
    promised = promise(request)

    def settled(cache):
        forks.append(cache.fork())
        left.append(pool.promises[cache])

    request.settled = settled
    scheduler.submit(request)
    while not request.over:
        scheduler.step()
    assert request.state == "done" and [fork.seen for fork in forks] == [300, 650] and cache.seen == 939
    assert cache.settled_tokens == 650 and not pool.promises
    assert max(most) <= promised and promised > left[0] > left[1]


@pytest.mark.parametrize("method", METHODS)
def test_one_of_several_answers_is_promised_for(method, model, monkeypatch):
    """Three answers to a prompt in two parts come, together or in turn, within what the request that read it was
    promised."""
    cache, compressor, scheduler = new_cache(model), compressor_of(model, method, **METHODS[method]), Scheduler()
    pool, most = cache.pool, []
    alloc = pool.alloc

    def noted(n):
        pages = alloc(n)
        most.append(pool.pages_in_use)
        return pages

    monkeypatch.setattr(pool, "alloc", noted)
    params = SamplingParams(max_tokens=30)
    read = Request(model, compressor, cache, ids_of(500))
    read.settles, read.answers = (300,), (params,) * 3
    monkeypatch.setattr(pool, "limit_pages", promised := promise(read))
    scheduler.submit(read)
    while not read.over:
        scheduler.step()
    caches = [cache, cache.fork(), cache.fork()]
    answers = [Request(model, compressor, one, [], params) for one in caches]
    for one in answers:
        one.hidden = read.hidden[-1:]
    scheduler.submit(*answers)
    while scheduler.requests:
        scheduler.step()
        assert answers[0].state != "waiting"
        for one in answers:
            if one.over:
                one.cache.clear()
    assert [len(one.token_ids) for one in answers] == [30] * 3
    assert max(most) <= promised and not pool.promises
