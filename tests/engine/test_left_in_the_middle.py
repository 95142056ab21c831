"""What is left in the middle: answers, tasks, caches that nobody has any more, turns that are refused."""

import asyncio
import gc
import threading

import pytest
import tiny_chat

from minillm import LLM, CacheConfig, MinillmError, SamplingParams

LONG = SamplingParams(max_tokens=200, ignore_eos=True)
SHORT = SamplingParams(max_tokens=3, ignore_eos=True)
STRICT = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
)


@pytest.fixture
def llm(tmp_path):
    with LLM.load(tiny_chat.make(tmp_path / "tiny"), cache=CacheConfig("full")) as llm:
        yield llm


def test_what_is_fed_while_an_answer_is_open_is_kept(llm):
    session = llm.session()
    session.feed("hello world")
    answer = session.stream(LONG)
    next(answer)
    session.feed(" important")
    soon = session.seen_soon
    assert list(answer) == [] and session.seen_soon == soon


def test_a_task_that_is_cancelled_twice_leaves_nothing(llm):
    async def one(n):
        async for _ in llm.astream("abc" * (n + 1), LONG):
            pass

    async def run():
        tasks = [asyncio.create_task(one(n)) for n in range(6)]
        await asyncio.sleep(0.3)
        for _ in range(3):  # as a scope does that cancels until it is left
            for task in tasks:
                task.cancel()
            await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        for _ in range(100):
            if not llm.engine.scheduler.requests and not llm.pool.bytes_in_use:
                return
            await asyncio.sleep(0.05)

    asyncio.run(run())
    assert llm.engine.scheduler.requests == [] and llm.pool.bytes_in_use == 0


def test_a_session_that_closes_when_it_is_collected_gives_its_pages_back_once(llm):
    class Owner:
        def __init__(self):
            self.session, self.me = llm.session(), self
            self.session.feed("hello world")
            list(self.session.stream(SHORT))

        def __del__(self):
            self.session.close()

    Owner()
    gc.collect()
    assert llm.generate("hello", SHORT) and llm.pool.bytes_in_use == 0


def test_threads_may_ask_one_document_at_once(llm):
    document, said = llm.read("a long text " * 60), []

    def ask(n):
        said.append("".join(piece.text for piece in document.ask(f"question {n}", SHORT)))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    reader = threading.Thread(target=lambda: llm.generate("another text " * 200, SHORT))
    for thread in (reader, *threads):
        thread.start()
    for thread in (reader, *threads):
        thread.join()
    assert len(said) == 8
    document.close()


def test_a_turn_that_the_template_refuses_is_no_turn(tmp_path):
    with LLM.load(tiny_chat.make(tmp_path / "strict", template=STRICT), cache=CacheConfig("full")) as llm:
        session = llm.session()
        with pytest.raises(MinillmError, match="no system"):
            list(session.ask("hello", SHORT, system="be brief"))
        assert session.messages == []
        assert list(session.ask("hello", SHORT))


def test_a_first_turn_that_is_too_long_sets_no_system_prompt(llm):
    session = llm.session()
    with pytest.raises(MinillmError, match="context"):
        list(session.ask("x" * 5000, SHORT, system="first"))
    list(session.ask("hello", SHORT, system="second"))
    assert session.messages[0]["content"] == "second"


def test_an_answer_whose_session_was_taken_up_anew_ends_and_changes_nothing(llm, tmp_path):
    session = llm.session()
    list(session.ask("hello", SHORT))
    session.save(tmp_path / "s.kv")
    answer = session.ask("more", LONG)
    next(answer)
    session.restore(tmp_path / "s.kv")
    messages, seen = list(session.messages), session.seen_soon
    try:
        list(answer)
    except MinillmError:
        pass
    assert session.messages == messages and session.seen_soon == seen
