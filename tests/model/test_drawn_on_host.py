"""Answers whose tokens are drawn on the host, on every backend: by the formulas, of the model's own logits; those of
others in the same batch are what they are alone."""

import numpy as np
import pytest
import tiny_chat
from small_models import config_of, ids_of, model_of
from test_sampling import literal_answer, literal_logprobs
from twins import SMALL, Twins

from minillm import LLM, CacheConfig, SamplingParams, UsageError
from minillm.cache.kv_cache import KVCache
from minillm.cache.page_pool import PagePool
from minillm.compress.reading import extend
from minillm.engine.engine import Engine
from minillm.engine.request import Request
from minillm.ops import cpu_lib
from minillm.ops.numpy_ops import NUMPY

PATHS = ["numpy", *cpu_lib.available_paths()[:1], "emulator"]
BIAS = {3: 1.5, 7: -100.0, 11: 0.5}
ASKED = {
    "plain": SamplingParams(max_tokens=12),
    "presence": SamplingParams(max_tokens=12, presence_penalty=3.0, logprobs=3),
    "frequency": SamplingParams(max_tokens=12, frequency_penalty=2.5, logit_bias=BIAS),
}


@pytest.fixture(params=PATHS)
def model(request):
    """-> (Model, PagePool) of a random model."""
    if request.param == "emulator":
        emulator = pytest.importorskip("emulator")
        if reason := emulator.available():
            pytest.skip(reason)
        twins = Twins(emulator.EmulatedDevice())
        return twins.models[0], twins.pools[0]
    if request.param == "numpy":
        ops = NUMPY
    else:
        from minillm.ops.cpu_ops import CpuOps

        ops = CpuOps(request.param)
    config = config_of(head_dim=SMALL.head_dim)
    return model_of(config, ops), PagePool(ops, config.head_dim, slab_bytes=1 << 20)


def requests_of(model, pool, names):
    """Requests for an answer each, together; they are done."""
    config = model.config
    found = []
    for i, name in enumerate(names):
        cache = KVCache(pool, config.n_layers, config.n_kv_heads)
        found.append(Request(model, None, cache, ids_of(9, seed=i), ASKED[name]))
    Engine().run(found)
    for request in found:
        if request.error is not None:
            raise request.error
    return found


def rows_of(model, request, i):
    """Logits (n, vocab) that each token of an answer was drawn from, of a model that reads it anew."""
    cache = KVCache(request.cache.pool, model.config.n_layers, model.config.n_kv_heads)
    ids = [*ids_of(9, seed=i), *request.token_ids[:-1]]
    rows = model.logits(extend(model, ids, cache))[8:]
    cache.clear()
    return rows


def test_an_answer_is_drawn_of_the_models_logits(model):
    requests = requests_of(*model, ASKED)
    for i, (name, request) in enumerate(zip(ASKED, requests, strict=True)):
        rows, params = rows_of(model[0], request, i), ASKED[name]
        expected = literal_answer(rows, dict(params.logit_bias), params.presence_penalty, params.frequency_penalty)
        assert request.token_ids == expected, name
        assert [piece.token_id for piece in request.pieces] == expected
        if params.logprobs is None:
            assert not request.logprobs and all(piece.logprob is None for piece in request.pieces)
            continue
        assert [piece.logprob for piece in request.pieces] == request.logprobs
        for row, token, found in zip(rows, expected, request.logprobs, strict=True):
            known = literal_logprobs(row)
            assert found.token_id == token and abs(found.logprob - known[token]) < 2e-2
            assert len(found.top) == 3 and found.top[0][1] == max(p for _, p in found.top)
            assert all(abs(p - known[other]) < 2e-2 for other, p in found.top)


def test_penalties_change_answers(model):
    """Else the test above could not fail."""
    plain = [request.token_ids for request in requests_of(*model, ["plain"] * 3)]
    changed = [request.token_ids for request in requests_of(*model, ASKED)]
    assert plain[0] == changed[0] and plain[1] != changed[1] and plain[2] != changed[2]


def test_the_first_token_may_not_be_one_that_ends_an_answer(model):
    """min_tokens forbids it on the host, before anything was decoded."""
    free = requests_of(*model, ["plain"])[0].token_ids
    request = requests_with_least(*model, stop_ids=frozenset(free[:1]))
    row = rows_of(model[0], request, 0)[0]
    row[free[0]] = -np.inf
    assert request.token_ids[0] == int(row.argmax()) != free[0]


def requests_with_least(model, pool, stop_ids):
    cache = KVCache(pool, model.config.n_layers, model.config.n_kv_heads)
    request = Request(model, None, cache, ids_of(9, seed=0), SamplingParams(max_tokens=2), stop_ids=stop_ids)
    request.min_tokens = 2
    Engine().run([request])
    assert request.error is None
    return request


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    with LLM.load(tiny_chat.make(tmp_path_factory.mktemp("model") / "tiny"), cache=CacheConfig("full")) as llm:
        yield llm


def test_pieces_of_a_stream_tell_how_likely_they_are(llm):
    params = SamplingParams(max_tokens=10, temperature=0.9, seed=3, logprobs=2, ignore_eos=True)
    pieces = list(llm.stream("hello", params))
    ids = [*llm.encode("hello"), *(piece.token_id for piece in pieces)]
    rows = llm.logits(ids)[len(ids) - 11 : -1]
    for row, piece in zip(rows, pieces, strict=True):
        assert abs(piece.logprob.logprob - literal_logprobs(row)[piece.token_id]) < 1e-4
    assert [p.token_id for p in llm.stream("hello", SamplingParams(10, 0.9, seed=3, ignore_eos=True))] == ids[-10:]


def test_biases_of_tokens_that_there_are_not(llm):
    for wrong in (258, -1):
        with pytest.raises(UsageError, match=rf"^logit_bias: token id {wrong} is not in 0\.\.257"):
            llm.generate("hello", SamplingParams(logit_bias={wrong: 1}))
    assert "x" * 5 == llm.generate("hello", SamplingParams(5, logit_bias={llm.encode("x")[0]: 100}))


def test_an_answer_that_no_token_is_left_for_ends_alone(llm):
    bias = dict.fromkeys(range(258), float("-inf"))
    sessions, wanted = [llm.session(), llm.session()], [SamplingParams(5, logit_bias=bias), SamplingParams(5)]
    for session in sessions:
        session.feed("abc")
    bad, good = (session.request(params) for session, params in zip(sessions, wanted, strict=True))
    llm.engine.run([bad, good])
    assert "no token is left" in str(bad.error) and good.error is None
    assert good.text == llm.generate("abc", SamplingParams(5))
    for session in sessions:
        session.close()


def test_the_token_that_ends_an_answer_is_told_last(llm):
    params = SamplingParams(100, logprobs=0, logit_bias={257: 1.5})
    *pieces, last = llm.stream("hello", params)
    ids = [*llm.encode("hello"), *(piece.token_id for piece in pieces)]
    assert len(pieces) < 100 and last.token_id == -1 and last.logprob.token_id in llm.stop_ids
    expected = literal_logprobs(llm.logits(ids)[-1])[last.logprob.token_id]
    assert abs(last.logprob.logprob - expected) < 1e-4


# how likely a prompt is


def test_logprobs_of_a_prompt(llm):
    """By the logits of the full cache, whatever cache the LLM has, over several blocks of rows."""
    text = "the cat sat on the mat. " * 7
    ids = llm.encode(text)
    rows, before = llm.logits(ids), llm.cache_config
    assert len(ids) > 2 * 64 + 1
    llm.set_cache(CacheConfig("streaming", 32))
    try:
        found = llm.logprobs(text, top=2)
    finally:
        llm.set_cache(before)
    assert len(found) == len(ids) and found[0] is None and llm.logprobs(ids[:1]) == [None]
    for row, token, one in zip(rows, ids[1:], found[1:], strict=False):
        known = literal_logprobs(row)
        assert one.token_id == token and abs(one.logprob - known[token]) < 1e-4
        assert [token for token, _ in one.top] == sorted(range(258), key=lambda i: (-known[i], i))[:2]
    assert [one.top for one in llm.logprobs(ids)[1:]] == [()] * (len(ids) - 1)
    with pytest.raises(UsageError, match=r"^top must be in 0\.\.20, not 21"):
        llm.logprobs(text, top=21)
    assert llm.pool.bytes_in_use == 0
