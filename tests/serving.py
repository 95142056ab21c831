"""A server of ours in a thread of this process, on a port that is free, and a client for it."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time

import httpx

from minillm.server.app import Server
from minillm.server.listener import Listener
from minillm.server.serve import bound
from minillm.server.settings import Settings


@contextlib.contextmanager
def served(llm, **settings):
    """-> (Listener, httpx.Client) of an LLM that is served with these Settings."""
    listener, listening = Listener(Server(llm, Settings(**settings))), bound("127.0.0.1", 0)
    thread = threading.Thread(target=listener.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not listener.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = listening.getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield listener, client
    finally:
        listener.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextlib.contextmanager
def program(folder, *flags):
    """-> (process, its lines on stderr so far, httpx.Client) of `python -m minillm.server` with a model's folder."""
    command = [sys.executable, "-m", "minillm.server", "-m", str(folder), "--port", "0", *flags]
    environ = os.environ | {"MINILLM_ARG_ALIAS": "named"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)
    try:
        lines = []
        while not lines or " serves " not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        with httpx.Client(base_url=lines[-1].split("/v1 ")[0], timeout=60) as client:
            yield process, lines, client
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def user(text):
    """The messages of one question."""
    return [{"role": "user", "content": text}]


def events(response):
    """The values of the data lines of a stream that is complete; its last one is "[DONE]"."""
    found = []
    for block in response.text.split("\n\n"):
        assert block == "" or block.startswith(("data: ", ": keepalive")), block
        if block.startswith("data: "):
            data = block.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


def nothing_is_held(llm, seconds=1.0):
    """Wait for so long that requests are gone, and all pages but those of a server's snapshots; -> whether they are."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with llm.engine.alone():
            idle = llm.engine.scheduler.idle.bytes_in_use if llm.engine.scheduler.idle else 0
            if not llm.engine.scheduler.requests and sum(pool.bytes_in_use for pool in llm.pools.values()) == idle:
                return True
        time.sleep(0.01)
    return False


def error_of(response, status, type):
    """The message of an error object."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["type"]) == (status, type) and {"message", "param"} <= set(error)
    return error["message"]
