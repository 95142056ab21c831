"""More requests than places, answers that take too long, the end of a server, and what one request's failure is to
others."""

import asyncio
import concurrent.futures
import contextlib
import re
import signal
import socket
import threading
import time

import httpx
import pytest
import tiny_chat
from serving import error_of, events, nothing_is_held, program, served, user

from minillm import LLM, CacheConfig, MinillmError, SamplingParams

ENDLESS = {"messages": user("a long tale"), "ignore_eos": True, "temperature": 0, "stream": True}
SHORT = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.make(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def llm(folder):
    with LLM.load(folder, cache=CacheConfig("full"), cache_limit=64 << 20) as llm:
        yield llm


def ask(client, text, **fields):
    return client.post("/v1/chat/completions", json={"messages": user(text)} | SHORT | fields)


class Hanging:
    """A stream that has begun, and goes on until it is left."""

    def __init__(self, client, **fields):
        self.context = client.stream("POST", "/v1/chat/completions", json=ENDLESS | fields)

    def __enter__(self):
        self.blocks = self.context.__enter__().iter_raw()
        self.first = next(self.blocks)
        return self

    def __exit__(self, *exception):
        self.context.__exit__(*exception)


def test_more_requests_than_places_are_all_answered(llm):
    with served(llm, parallel=2) as (listener, client), concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = [str(i) * 5 for i in range(8)]
        found = [response.json() for response in pool.map(lambda text: ask(client, text), texts)]
        assert [one["choices"][0]["message"]["content"] for one in found] == [
            llm.generate(user(text), PARAMS) for text in texts
        ]
        places = listener.server.places
        assert (places.taken, len(places.waiting)) == (0, 0)
    assert nothing_is_held(llm)


def test_a_full_queue_is_refused(llm):
    with served(llm, parallel=1, max_queue=1, ping_interval=0.05) as (_, client):
        with Hanging(client), Hanging(client) as queued:
            assert queued.first.startswith(b": keepalive")
            for stream in (False, True):
                response = ask(client, "x", stream=stream)
                message = error_of(response, 503, "overloaded_error")
                assert message == "1 requests are being answered and 1 wait: ask again later"
                assert 1 <= int(response.headers["retry-after"]) <= 60
        assert nothing_is_held(llm)
        assert ask(client, "x").status_code == 200


def test_an_answer_that_takes_too_long(llm):
    with served(llm, timeout=0.4) as (_, client):
        response = client.post("/v1/chat/completions", json=ENDLESS | {"stream": False})
        assert "after 0.4 seconds" in error_of(response, 504, "timeout_error")
        *chunks, last = events(client.post("/v1/chat/completions", json=ENDLESS))
        assert last["error"]["code"] == 504 and chunks
        assert nothing_is_held(llm)
    with served(llm, timeout=0.4, parallel=1) as (listener, client):

        async def take():
            return listener.server.places.ask()

        place = asyncio.run_coroutine_threadsafe(take(), listener.loop).result()
        error_of(ask(client, "waits for a place"), 504, "timeout_error")
        listener.loop.call_soon_threadsafe(listener.server.places.leave, place)
        assert ask(client, "has one").status_code == 200


def test_the_program_ends_when_its_answers_have(folder, llm):
    """Its start line says where it is. After SIGTERM it takes nothing more, who waits is told so, and what is being
    answered goes on; then it ends with status 0."""
    flags = ["--cache-limit", "64", "-np", "1", "--sse-ping-interval", "0.05", "--host", "0.0.0.0"]
    with program(folder, *flags) as (process, lines, client):
        assert "warning: whoever reaches this address may ask" in process.stderr.readline()
        assert re.search(r"; 64.00 MiB for caches: \d+ documents of 4,096 tokens", lines[-1])
        assert client.get("/v1/models").json()["data"][0]["id"] == "named"
        with Hanging(client, max_tokens=600) as running, Hanging(client) as queued:
            process.send_signal(signal.SIGTERM)
            rest = b"".join(queued.blocks)
            assert b'"unavailable_error","code":503' in rest and b"[DONE]" not in rest
            assert "shutting down" in error_of(client.get("/health"), 503, "unavailable_error")
            error_of(ask(client, "x"), 503, "unavailable_error")
            assert b"".join(running.blocks).endswith(b"data: [DONE]\n\n")
        assert process.wait(30) == 0


def test_an_answer_that_outlasts_the_end(llm):
    with served(llm, drain_timeout=0.2) as (listener, client), Hanging(client) as running:
        listener.handle_exit(signal.SIGTERM, None)
        rest = b"".join(running.blocks)
        assert b"this server has shut down" in rest and b"[DONE]" not in rest
    assert nothing_is_held(llm)


def test_a_second_signal_ends_it_at_once(llm, tmp_path):
    """Nothing is waited for and nothing is written; every page is back all the same."""
    long = user("the cat sat on the mat, and the dog ran. " * 12)
    with served(llm, drain_timeout=60, cache_disk=str(tmp_path)) as (listener, client):
        with Hanging(client, messages=long) as running:
            assert listener.server.snapshots.caches
            for _ in range(2):
                listener.handle_exit(signal.SIGTERM, None)
            with contextlib.suppress(httpx.RemoteProtocolError):
                assert b"[DONE]" not in b"".join(running.blocks)
    assert nothing_is_held(llm) and not list(tmp_path.iterdir())


def test_a_request_that_fails_fails_alone(llm, monkeypatch):
    """Numbers that go bad, and a bug, in one of three requests that are answered at a time."""
    decode, bad = llm.model.decode, {}

    def sometimes(ids, caches, draws=None):
        for prompt, error in bad.items():
            if any(cache.token_ids[: len(prompt)] == list(prompt) and cache.seen > len(prompt) + 3 for cache in caches):
                raise error
        return decode(ids, caches, draws)

    texts = ["fine", "not a number", "a bug"]
    expected = llm.generate(user("fine"), PARAMS)
    bad[tuple(llm.encode(user(texts[1])))] = MinillmError("NaN in layer 1")
    bad[tuple(llm.encode(user(texts[2])))] = ValueError("this has\na bug")
    monkeypatch.setattr(llm.model, "decode", sometimes)
    with served(llm) as (_, client), concurrent.futures.ThreadPoolExecutor(6) as pool:
        for stream in (False, True):
            fine, nan, bug = pool.map(lambda text, stream=stream: ask(client, text, stream=stream), texts)
            if stream:
                chunks = [events(one)[-1] for one in (fine, nan, bug)]
                assert chunks[0] == "[DONE]"
                errors = [chunk["error"] for chunk in chunks[1:]]
            else:
                assert fine.json()["choices"][0]["message"]["content"] == expected
                errors = [one.json()["error"] for one in (nan, bug)]
                assert [one.status_code for one in (nan, bug)] == [500, 500]
            assert [error["type"] for error in errors] == ["server_error"] * 2
            assert errors[0]["message"] == "NaN in layer 1"
            assert errors[1]["message"].endswith("please report it: ValueError: this has a bug")
    assert nothing_is_held(llm)


def test_clients_that_are_broken_touch_nobody(llm):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n\r\n"
    sent = [b"\x00\xff\x16\x03 what is this\r\n\r\n", head, head + b'{"messages"', b"GET / HTTP/9.9\r\n\r\n", b""]
    expected = llm.generate(user("fine"), PARAMS)
    with served(llm) as (_, client):
        address = client.base_url.host, client.base_url.port
        left = [socket.create_connection(address) for _ in sent]
        for one, data in zip(left, sent, strict=True):
            one.sendall(data)
        assert ask(client, "fine").json()["choices"][0]["message"]["content"] == expected
        for one in left:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # a reset, and no farewell
            one.close()
        assert ask(client, "fine").json()["choices"][0]["message"]["content"] == expected
    assert nothing_is_held(llm)


def test_cancels_at_random_moments(llm):
    """Clients that hang up while they wait, are read for, or are answered: no place and no page is lost."""
    with served(llm, parallel=3, max_queue=100) as (listener, client):

        def come_and_go(i):
            fields = {"messages": user("some words " * (i % 7) * 20), "n": 1 + i % 2, "stream": i % 3 > 0}
            patience = 0.02 + 0.013 * (i % 11)  # also of a stream that goes on
            asked = client.stream("POST", "/v1/chat/completions", json=ENDLESS | fields, timeout=patience)
            leaves = time.monotonic() + patience
            with contextlib.suppress(httpx.TimeoutException), asked as response:
                for _ in response.iter_raw():
                    if time.monotonic() > leaves:
                        break

        threads = [threading.Thread(target=come_and_go, args=(i,)) for i in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        end = time.monotonic() + 5
        places = listener.server.places
        while (places.taken or places.waiting) and time.monotonic() < end:
            time.sleep(0.01)
        assert (places.taken, places.free, len(places.waiting)) == (0, 3, 0)
        assert nothing_is_held(llm)
        assert ask(client, "x").status_code == 200
