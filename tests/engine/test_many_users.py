"""Many users of one LLM: threads, tasks, garbage collection, forks; what each gets is what it would get alone."""

import asyncio
import contextlib
import gc
import os
import random
import sys
import threading
import traceback
from functools import partial

import numpy as np
import pytest
import tiny_chat

from minillm import LLM, CacheConfig, MinillmError, SamplingParams, UsageError
from minillm.compress import reading

CACHES = [
    CacheConfig("full"),
    CacheConfig("snapkv", 0.3),
    CacheConfig("hindsight", 0.4),
    CacheConfig("streaming", 64, recompress=8),
    CacheConfig("h2o", 64, recompress=8),
    CacheConfig("semanticache", 0.4),
    CacheConfig("random", 0.3, dtype="int8"),
    CacheConfig("full", dtype="int8"),
]
PARAMS = SamplingParams(max_tokens=16, ignore_eos=True, temperature=0.7, seed=3)


@pytest.fixture
def llm(tmp_path):
    with LLM.load(tiny_chat.make(tmp_path / "tiny"), cache=CacheConfig("full")) as llm:
        yield llm


@pytest.fixture
def small_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def prompt(i):
    return f"{i} onions and {i * i} potatoes " * 6


def in_threads(works):
    """Run functions at once; -> what they return. What one raises is raised."""
    results, errors = [None] * len(works), []

    def run(i, work):
        try:
            results[i] = work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    return results


def answer_of(session, text):
    return "".join(piece.text for piece in session.ask(text, PARAMS))


def nothing_is_left(llm):
    gc.collect()
    llm.trim()
    assert [pool.bytes_in_use for pool in llm.pools.values()] == [0] * len(llm.pools)
    assert not llm.engine.scheduler.requests


def test_eight_threads_with_methods_and_budgets_of_their_own(llm, tmp_path, small_switches):
    """Answers, second turns, batches, logits, saved sessions, and readings that are left at any layer."""

    def all_of(i, leaves=None):
        if leaves is not None:
            leave(i, leaves)
        with contextlib.closing(session_of(i)) as session:
            first = answer_of(session, prompt(i))
            session.save(tmp_path / f"{i}-{leaves}.kv")
            second = answer_of(session, "and more")
            with contextlib.closing(session_of(i)) as again:
                again.restore(tmp_path / f"{i}-{leaves}.kv")
                assert answer_of(again, "and more") == second
        return first, second

    def session_of(i):
        session = llm.session()
        session.compressor = compressors[i]
        session.cache = llm.new_cache(None, CACHES[i].dtype)
        return session

    def leave(i, layers):
        """Leave a reading after so many layers, or as soon as its thread hears of them."""

        class Left(Exception):
            pass

        def progress(done, n):
            if done > layers:
                raise Left

        with contextlib.closing(session_of(i)) as session, pytest.raises(Left):
            list(session.ask("something else " * 20, PARAMS, progress=progress))

    compressors = [llm.compressor_for(cache) for cache in CACHES]
    alone = [all_of(i) for i in range(8)]
    batch = llm.generate_batch([prompt(8), prompt(9)], PARAMS)
    logits = llm.logits(list(range(40)))
    assert len({first for first, _ in alone}) == 8
    rng = random.Random(0)
    works = [partial(all_of, i, rng.randrange(2)) for i in range(8)]
    works += [lambda: llm.generate_batch([prompt(8), prompt(9)], PARAMS), lambda: llm.logits(list(range(40)))]
    works += [lambda: "".join(piece.text for piece in llm.stream(prompt(9), PARAMS))]
    *together, batched, found, streamed = in_threads(works)
    assert together == alone and batched == batch and streamed == batch[1]
    np.testing.assert_array_equal(found, logits)
    nothing_is_left(llm)


def test_those_that_wait_together_are_decoded_together(llm, monkeypatch):
    """Where the backend decodes batches: here NumPy, said to have a runner."""
    from minillm.engine import scheduler

    sizes, started = [], threading.Barrier(4)

    def together(requests):
        sizes.append(len(requests))
        return [[request] for request in requests]

    monkeypatch.setattr(scheduler, "batches", together)

    def ask(i):
        started.wait()
        return "".join(piece.text for piece in llm.stream(prompt(i), PARAMS))

    in_threads([lambda i=i: ask(i) for i in range(4)])
    assert max(sizes) == 4


def test_tasks(llm):
    alone = [llm.generate(prompt(i), PARAMS) for i in range(12)]

    async def left(i):
        async for _ in llm.astream(prompt(i), PARAMS):
            break

    async def all_at_once():
        ticks, done = 0, False

        async def tick():
            nonlocal ticks
            while not done:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        answers = await asyncio.gather(*(llm.agenerate(prompt(i), PARAMS) for i in range(12)), left(1), left(2))
        gone = asyncio.create_task(llm.agenerate(prompt(3), PARAMS))
        await asyncio.sleep(0.01)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        with pytest.raises(MinillmError, match="the prompt is empty"):
            await llm.agenerate([])
        done = True
        await ticking
        return answers[:12], ticks

    answers, ticks = asyncio.run(all_at_once())
    assert answers == alone and ticks > 5
    nothing_is_left(llm)


def test_one_session_used_by_two_at_once_is_refused(llm):
    session, inside, go_on = llm.session(), threading.Event(), threading.Event()

    def progress(done, n):
        inside.set()
        go_on.wait(30)

    thread = threading.Thread(target=lambda: list(session.ask("abc", PARAMS, progress=progress)))
    thread.start()
    inside.wait(30)
    calls = [lambda: next(session.ask("x", PARAMS)), lambda: session.feed("x"), session.close, session.fork]
    for call in [*calls, lambda: session.save("x.kv")]:
        with pytest.raises(UsageError, match="used by another thread or task: give each one a session or a fork"):
            call()
    go_on.set()
    thread.join()
    assert len(session.answer.token_ids) == 16


def test_an_answer_that_was_left_does_not_go_on_after_the_next(llm):
    session = llm.session()
    first = session.ask("abc", PARAMS)
    next(first)
    assert len(list(session.ask("def", PARAMS))) > 2
    with pytest.raises(UsageError, match="this answer was left"):
        next(first)


def test_one_request_that_fails_fails_alone(llm, monkeypatch):
    """An answer whose numbers go bad in a batch, and one whose recompression raises."""
    llm.set_cache(CacheConfig("streaming", 64, recompress=8))
    prompts = [prompt(i) for i in range(4)]
    alone = [llm.generate(text, PARAMS) for text in prompts]
    decode, recompress = llm.model.decode, reading.recompress
    ids = [llm.encode(text) for text in prompts]

    def bad_decode(token_ids, caches, draws=None):
        if any(cache.token_ids[: len(ids[1])] == ids[1] and cache.seen > len(ids[1]) + 5 for cache in caches):
            raise MinillmError("NaN or infinity in the output of layer 1")
        return decode(token_ids, caches, draws)

    def bad_recompress(model, cache, compressor):
        if cache.token_ids[: len(ids[2])] == ids[2]:
            raise ValueError("this method has a bug")
        recompress(model, cache, compressor)

    monkeypatch.setattr(llm.model, "decode", bad_decode)
    monkeypatch.setattr("minillm.engine.request.recompress", bad_recompress)

    def ask(i):
        try:
            return llm.generate(prompts[i], PARAMS)
        except Exception as error:
            return type(error)

    assert in_threads([lambda i=i: ask(i) for i in range(4)]) == [alone[0], MinillmError, ValueError, alone[3]]
    nothing_is_left(llm)


def test_a_session_goes_on_after_a_failed_step(llm, monkeypatch):
    session = llm.session()
    decode, left = llm.model.decode, [3]

    def sometimes(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise MinillmError("NaN")
        return decode(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(llm.model, "decode", sometimes)
        with pytest.raises(MinillmError, match="NaN"):
            list(session.ask("abc", PARAMS))
    assert len(session.answer.token_ids) == 4
    assert len(session.unread) == 1 and len(list(session.ask("go on", PARAMS))) >= 16


def test_ctrl_c_in_one_thread_ends_that_answer_alone(llm, monkeypatch):
    """KeyboardInterrupt reaches who waits; the others go on."""
    alone, others = llm.generate(prompt(1), PARAMS), []
    thread = threading.Thread(target=lambda: others.append(llm.generate(prompt(1), PARAMS)))
    pieces = llm.stream(prompt(2), SamplingParams(max_tokens=400, ignore_eos=True))
    next(pieces)
    wait, times = llm.engine.turn.wait, [4]

    def interrupted(timeout=None):
        if threading.current_thread() is threading.main_thread():
            times[0] -= 1
            if times[0] == 0:
                raise KeyboardInterrupt
        return wait(timeout)

    monkeypatch.setattr(llm.engine.turn, "wait", interrupted)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        while True:
            next(pieces)
    thread.join(60)
    assert others == [alone]
    monkeypatch.undo()
    nothing_is_left(llm)


def test_set_cache_leaves_sessions_under_way_alone(llm):
    llm.set_cache(CacheConfig("streaming", 64, recompress=8))
    with contextlib.closing(llm.session()) as session:
        whole = answer_of(session, prompt(1)), answer_of(session, "more")
    with contextlib.closing(llm.session()) as session:
        pieces = session.ask(prompt(1), PARAMS)
        text = next(pieces).text
        llm.set_cache(CacheConfig("h2o", 0.5))
        text += "".join(piece.text for piece in pieces)
        assert (text, answer_of(session, "more")) == whole
        assert session.stats["cache"]["method"] == "streaming"


def test_garbage_in_another_thread_touches_no_page(llm):
    session = llm.session()
    session.feed(prompt(1))
    session.read()
    pool, refs = llm.pool, llm.pool.refs.copy()
    cycle = [session]
    cycle.append(cycle)
    del session, cycle
    in_threads([gc.collect])
    np.testing.assert_array_equal(pool.refs, refs)  # nobody has touched them
    assert pool.bytes_in_use == 0  # and they count as free
    llm.generate(prompt(2), PARAMS)
    assert not pool.refs.any()


def test_closing_ends_what_is_on_the_way(tmp_path):
    llm = LLM.load(tiny_chat.make(tmp_path / "tiny"), cache=CacheConfig("full"))
    found, begun = [], threading.Event()

    def ask():
        try:
            for _ in llm.stream("abc", SamplingParams(max_tokens=4000, ignore_eos=True)):
                begun.set()
        except MinillmError as error:
            found.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    begun.wait(30)
    llm.close()
    thread.join(30)
    assert len(found) == 1 and "close" in found[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_child_answers_after_a_fork_in_the_midst_of_answers(llm):
    alone, done = llm.generate(prompt(1), PARAMS), threading.Event()

    def keep_busy():
        while not done.is_set():
            llm.generate(prompt(2), PARAMS)

    threads = [threading.Thread(target=keep_busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            if (child := os.fork()) == 0:
                try:
                    os._exit(0 if llm.generate(prompt(1), PARAMS) == alone else 1)
                except BaseException:
                    traceback.print_exc()
                    os._exit(2)
            assert os.waitpid(child, 0)[1] == 0
            assert llm.generate(prompt(1), PARAMS) == alone
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
    nothing_is_left(llm)
