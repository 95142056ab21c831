"""Prefixes that requests share: where they end, what is taken from whom, and that a hit and a miss are the same."""

import concurrent.futures

import numpy as np
import pytest
import tiny_chat
from serving import error_of, nothing_is_held, served, user

from minillm import LLM, CacheConfig, SamplingParams
from minillm.cache import state as cache_state
from minillm.server import messages
from minillm.server.work import Work

DOCUMENT = "the cat sat on the mat, and the dog ran. " * 12  # 492 tokens
OTHER = "a bird sang in the tree, and nobody heard it. " * 12
SHORT = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
CACHES = [CacheConfig("full"), CacheConfig("hindsight", 0.4), CacheConfig("streaming", 0.4, dtype="int8")]
EXPLICIT = [{"cache_control": {"type": "ephemeral"}}, {"prompt_cache_breakpoint": {"mode": "explicit"}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.make(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def llm(folder):
    with LLM.load(folder, cache=CacheConfig("streaming", 0.4), cache_limit=64 << 20) as llm:
        yield llm


@pytest.fixture
def server(llm):
    """With nothing in its memory."""
    with served(llm) as (listener, client):
        yield listener.server, client
        assert nothing_is_held(llm)


def asked(client, messages, **fields):
    response = client.post("/v1/chat/completions", json={"messages": messages} | SHORT | fields)
    assert response.status_code == 200, response.text
    return response.json()


def cached(answer):
    details, timings = answer["usage"]["prompt_tokens_details"], answer["timings"]
    assert timings["cache_n"] == details["cached_tokens"]
    assert timings["prompt_n"] + timings["cache_n"] == answer["usage"]["prompt_tokens"]
    return details["cached_tokens"]


def parts(*texts, **more):
    """A user's message of texts, the first of them with more fields."""
    found = [{"type": "text", "text": text} for text in texts]
    return [{"role": "user", "content": [found[0] | more, *found[1:]]}]


def test_the_second_question_about_a_document(server):
    """The document is cached up to its last word; the answer is the same without."""
    _, client = server
    first, second = (asked(client, parts(DOCUMENT, question)) for question in ("who sat", "who ran"))
    assert cached(first) == 0
    assert cached(second) == len("<user\n") - 1 + len(DOCUMENT.rstrip()) + 1
    assert second["choices"] == asked(client, parts(DOCUMENT, "who ran"), cache_prompt=False)["choices"]
    assert cached(asked(client, parts(DOCUMENT, "who ran"), n=2)) == cached(second)


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.method)
def test_a_hit_and_a_miss_have_the_same_cache(cache, folder, monkeypatch):
    states, leave = [], Work._leave

    def noted(work):
        with work.engine.alone():
            states.append(cache_state.state(work.choices[0].session.cache))
        leave(work)

    monkeypatch.setattr(Work, "_leave", noted)
    talk = [{"role": "system", "content": OTHER}, *parts(DOCUMENT, OTHER), {"role": "assistant", "content": "well"}]
    talk += user("who ran")
    with LLM.load(folder, cache=cache) as llm:
        found = []
        for warm in (False, True):
            with served(llm) as (_, client):
                if warm:
                    asked(client, talk[:-2])
                states.clear()
                found.append(asked(client, talk))
                assert bool(cached(found[-1])) == warm
                found[-1]["state"] = states[0]
        cold, warm = found
        assert cold["choices"] == warm["choices"] and cold["state"].keys() == warm["state"].keys()
        for name, array in cold["state"].items():
            np.testing.assert_array_equal(array, warm["state"][name])
        assert cold["state"]["settled_tokens"] > 1400  # system, document and what follows it


def test_the_next_turn_of_a_chat(server, llm):
    """What was read in an earlier turn is not read again, down to the answer."""
    _, client = server
    talk = user(DOCUMENT)
    answer = asked(client, talk)["choices"][0]["message"]
    turn = [*talk, answer, *user("and then")]
    n = len(llm.encode(llm.render_chat(talk).rpartition("<|im_end|>")[0].rstrip()))
    assert cached(asked(client, turn)) == n
    assert cached(asked(client, user(OTHER))) == 0
    assert cached(asked(client, turn)) == n


def test_short_parts_are_no_prefix(server):
    server, client = server
    for _ in range(2):
        assert cached(asked(client, parts("x" * 100, "y" * 100, "z"))) == 0
    assert not server.snapshots.caches
    asked(client, parts("x" * 100, "y" * 300, "z"))
    assert [cache.seen for cache in server.snapshots.caches.values()] == [5 + 1 + 100 + 1 + 300]


def test_who_shares_with_whom(server):
    """Not with another salt, nor with another cache; and not what is read afresh."""
    server, client = server
    ask = parts(DOCUMENT, "who")
    assert cached(asked(client, ask, cache_prompt=False)) == 0 and not server.snapshots.caches
    for fields in ({}, {"cache_salt": "a"}, {"prompt_cache_key": "b"}, {"kv": {"budget": 0.3}}):
        assert cached(asked(client, ask, **fields)) == 0
        assert cached(asked(client, ask, **fields)) > 400


@pytest.mark.parametrize("mark", EXPLICIT, ids=lambda mark: next(iter(mark)))
def test_where_the_client_says_so(server, mark):
    """Methods that look at the newest queries settle there alone, and so does mode explicit."""
    server, client = server
    for fields in ({"kv": {"method": "snapkv"}}, {"prompt_cache_options": {"mode": "explicit"}}):
        for _ in range(2):
            assert cached(asked(client, parts(DOCUMENT, OTHER, "who"), **fields)) == 0
        asked(client, parts(DOCUMENT, OTHER, "who", **mark), **fields)
        assert 400 < cached(asked(client, parts(DOCUMENT, OTHER, "what", **mark), **fields)) < 500
    response = client.post("/chat/completions", json={"messages": user("x"), "prompt_cache_options": {"mode": "much"}})
    error_of(response, 400, "invalid_request_error")


def test_a_line_that_changes_each_time(server):
    """Claude Code's: it is no part of the prompt."""
    _, client = server
    for form in (lambda line: [{"type": "text", "text": line}], lambda line: f"{line}\nbe brief"):
        found = []
        for number in (1, 2):
            system = {"role": "system", "content": form(f"x-anthropic-billing-header: cc_version=2; cch={number};")}
            found.append(asked(client, [system, *parts(DOCUMENT, "who")]))
        assert cached(found[0]) == 0 and cached(found[1]) > 400
        assert found[0]["choices"] == found[1]["choices"]
    said = [messages.checked({"messages": user(f"x-anthropic-billing-header: {i}")})[0].parts[0].text for i in (1, 2)]
    assert said == ["x-anthropic-billing-header: 1", "x-anthropic-billing-header: 2"]  # where a user says it, it stays


def test_many_at_once_read_a_document_once(llm):
    """Whoever comes while it is read waits for that."""
    with served(llm) as (_, client), concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda i: asked(client, parts(DOCUMENT, f"question {i}")), range(6)))
    assert sorted(bool(cached(one)) for one in found) == [False] + [True] * 5


def test_the_last_four_are_kept(server):
    server, client = server
    asked(client, parts(*[f"{i} {DOCUMENT[:300]}" for i in range(6)], "who"))
    assert len(server.snapshots.caches) == 4


def test_memory_is_bounded(llm):
    """The one that was not used for longest goes, and whoever needs its memory gets it."""
    documents = [f"{i} {DOCUMENT}" for i in range(3)]
    with served(llm) as (listener, client):
        asked(client, parts(documents[0], "who"))
        each = listener.server.snapshots.bytes_in_use
    with served(llm, cache_ram=int(2.5 * each)) as (listener, client):
        for i in (0, 1, 0, 2):
            asked(client, parts(documents[i], "who"))
        snapshots = listener.server.snapshots
        assert snapshots.bytes_in_use <= 2.5 * each and snapshots.events["evict"] == 1
        assert [bool(cached(asked(client, parts(documents[i], "what")))) for i in (0, 2, 1)] == [True, True, False]
    with served(llm, cache_ram=0) as (listener, client):
        assert [cached(asked(client, parts(DOCUMENT, "who"))) for _ in range(2)] == [0, 0]


def test_an_answer_takes_the_memory_of_snapshots(llm, monkeypatch):
    with served(llm, cache_ram=1 << 30) as (listener, client):
        snapshots = listener.server.snapshots
        for i in range(3):
            asked(client, parts(f"{i} {DOCUMENT}", "who"))
        assert 60 < snapshots.bytes_in_use // llm.pool.page_bytes
        monkeypatch.setattr(llm.pool, "limit_pages", 250)  # 232 of them are what is promised
        whole = asked(client, user(OTHER), max_tokens=200)
        assert whole["usage"]["completion_tokens"] == 200 and snapshots.events["evict"]
        monkeypatch.undo()
        alone = llm.generate(user("x"), SamplingParams(max_tokens=8, ignore_eos=True))
        assert asked(client, user("x"))["choices"][0]["message"]["content"] == alone
