"""A server of ours in a thread of this process, on a port that is free, and a client for it."""

import contextlib
import threading
import time

import httpx

from minillm.server.app import Server
from minillm.server.listener import Listener
from minillm.server.serve import bound
from minillm.server.settings import Settings


@contextlib.contextmanager
def served(llm, **settings):
    """-> (Server, httpx.Client) of an LLM that is served with these Settings."""
    server, listening = Server(llm, Settings(**settings)), bound("127.0.0.1", 0)
    listener = Listener(server)
    thread = threading.Thread(target=listener.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not listener.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = listening.getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield server, client
    finally:
        listener.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
