"""Documents: read and compressed once, asked many times; what a fork takes, and what a file holds."""

import gc

import numpy as np
import pytest
import tiny_chat

from minillm import LLM, CacheConfig, SamplingParams, UsageError
from minillm.cache import state as cache_state

TEXT = "the cat sat on the mat, and the dog ran. " * 12
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
SETTLING = [CacheConfig("full"), CacheConfig("snapkv", 0.3), CacheConfig("hindsight", 0.3), CacheConfig("h2o", 0.4)]


@pytest.fixture
def llm(tmp_path):
    with LLM.load(tiny_chat.make(tmp_path / "tiny"), cache=CacheConfig("full")) as llm:
        yield llm


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("cache", SETTLING)
def test_questions_know_nothing_of_one_another(cache, llm):
    """Answers are the same in any order, and those of a document that is read for each; every page comes back."""
    with llm.read(TEXT, cache) as document:
        before = cache_state.state(document.session.cache)
        first, second, again = (text_of(document.ask(question, PARAMS)) for question in ("who", "where", "who"))
        assert first == again != second
        for name, array in cache_state.state(document.session.cache).items():
            np.testing.assert_array_equal(array, before[name])
        with llm.read(TEXT, cache) as fresh:
            assert text_of(fresh.ask("where", PARAMS)) == second
    gc.collect()
    assert not any(pool.bytes_in_use for pool in llm.pools.values())


def test_a_question_reads_what_the_chat_template_puts_after_the_document(llm):
    """With the full cache the answer is that of the whole prompt, and a follow-up goes on as a session does."""
    session = llm.session()
    expected = [text_of(session.ask(f"{TEXT.strip()}\n\nwho", PARAMS)), text_of(session.ask("and why", PARAMS))]
    with llm.read(TEXT.strip()) as document:
        chat = document.fork()
        assert [text_of(chat.ask(question, PARAMS)) for question in ("who", "and why")] == expected
        assert chat.cache.token_ids == session.cache.token_ids and chat.messages == session.messages
    system = [{"role": "system", "content": "be brief"}, {"role": "user", "content": TEXT.strip()}]
    whole = [system[0], {"role": "user", "content": f"{TEXT.strip()}\n\nwho"}]
    assert text_of(llm.read(system).ask("who", PARAMS)) == llm.generate(whole, PARAMS)
    ids = llm.encode("ab " * 100)
    expected = text_of(llm.stream(ids + llm.encode("cd"), PARAMS))
    assert text_of(llm.read(ids).ask("cd", PARAMS)) == expected


@pytest.mark.parametrize("cache", SETTLING)
@pytest.mark.parametrize("n", [1, 28, 40, 100])
def test_what_a_question_takes(cache, n, llm):
    """Of n tokens on a fork exactly the pages that they open, and the copy of each head's open one."""
    document = llm.read(llm.encode(TEXT), cache)
    fork, pool = document.fork(), document.session.cache.pool
    lengths, before = fork.cache.lengths.copy(), pool.pages_in_use
    fork.feed(llm.encode("x" * n, bos=False))
    fork.read()
    assert pool.pages_in_use - before == (-(-(lengths % 32 + n) // 32)).sum()
    assert pool.pages_in_use - before <= lengths.size * (-(-n // 32) + 1)
    assert (fork.cache.lengths == lengths + n).all()


def test_a_longer_follow_up_is_compressed_without_the_document(llm):
    document = llm.read(llm.encode(TEXT), CacheConfig("h2o", 0.5))
    settled = [document.session.cache.read(layer) for layer in range(2)]
    lengths, fork = document.session.cache.lengths.copy(), document.fork()
    fork.feed(llm.encode("some other words " * 20))
    fork.read()
    assert (fork.cache.lengths < lengths + 340).all() and (fork.cache.settled == lengths).all()
    for layer, entries in enumerate(settled):
        for head in range(2):
            start = entries.lengths[:head].sum()
            np.testing.assert_array_equal(
                fork.cache.layer(layer).read(head)[0][: lengths[layer, head]],
                entries.k[start : start + lengths[layer, head]],
            )


def test_a_short_text_is_not_settled(llm):
    document = llm.read(llm.encode("x" * 255))
    assert document.session.cache.settled_tokens == 0
    assert llm.read(llm.encode("x" * 256)).session.cache.settled_tokens == 256


def test_entries_that_move_are_refused(llm):
    with pytest.raises(UsageError, match="positions=cache moves entries"):
        llm.read(TEXT, CacheConfig("streaming", 64, positions="cache"))


@pytest.mark.parametrize("cache", SETTLING)
def test_a_document_in_a_file(cache, llm, tmp_path):
    with llm.read(TEXT, cache) as document:
        answer = text_of(document.ask("who", PARAMS))
        settled = document.session.cache.settled.copy()
        document.save(tmp_path / "a.kv")
    with llm.document(tmp_path / "a.kv", cache) as document:
        np.testing.assert_array_equal(document.session.cache.settled, settled)
        assert text_of(document.ask("who", PARAMS)) == answer


@pytest.mark.parametrize("cache", SETTLING)
def test_a_prompt_whose_parts_settle(cache, llm):
    """Read by one request, it has the cache of parts that are read and settled one after another; and so has one that
    takes up what another has read."""
    llm.set_cache(cache)
    ids = llm.encode(TEXT + TEXT)
    session, parts = llm.session(), llm.session()
    session.feed(ids)
    kept = []
    request = session.request(PARAMS, settles=(400, 700))
    request.settled = lambda cache: kept.append(cache.fork())
    session.run(request)
    for lo, hi in ((0, 400), (400, 700)):
        parts.feed(ids[lo:hi])
        parts.settle()
    parts.feed(ids[700:])
    other = parts.request(PARAMS)
    parts.run(other)
    assert other.text == request.text
    same(parts.cache, session.cache)
    for n, fork in zip((400, 700), kept, strict=True):
        late = llm.session()
        late.feed(ids)
        request = late.request(PARAMS, settles=(400, 700))
        request.look = lambda request, fork=fork: request.take_up(fork) if not request.cache.seen else None
        late.run(request)
        assert request.text == other.text
        assert (request.timings.cached_tokens, request.timings.prompt_tokens) == (n, len(ids) - n)
        same(late.cache, session.cache)


def same(one, other):
    here, there = cache_state.state(one), cache_state.state(other)
    assert here.keys() == there.keys()
    for name in here:
        np.testing.assert_array_equal(here[name], there[name])
