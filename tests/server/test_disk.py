"""Prefixes in files: taken up again after a restart, bounded, and never believed when they are damaged."""

import os
import signal
import time

import numpy as np
import pytest
import tiny_chat
from serving import nothing_is_held, program, served, user

from minillm import LLM, CacheConfig, UsageError
from minillm.cache import state as cache_state
from minillm.server.disk import ABANDONED, Disk
from minillm.server.work import Work

DOCUMENT = "the cat sat on the mat, and the dog ran. " * 12
SHORT = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
CACHES = [CacheConfig("full"), CacheConfig("h2o", 0.4), CacheConfig("hindsight", 0.4, dtype="int8")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.make(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def llm(folder):
    with LLM.load(folder, cache=CacheConfig("streaming", 0.4), cache_limit=64 << 20) as llm:
        yield llm


def ask(client, document, question="who"):
    """-> (text, cached tokens)"""
    parts = [{"type": "text", "text": text} | {"cache_control": {"type": "ephemeral"}} for text in (document, question)]
    response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]} | SHORT)
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.method)
def test_a_restart(cache, folder, tmp_path, monkeypatch):
    """What was read before it is taken up, and the cache is the same, byte by byte."""
    states, leave = [], Work._leave

    def noted(work):
        with work.engine.alone():
            states.append(cache_state.state(work.choices[0].session.cache))
        leave(work)

    monkeypatch.setattr(Work, "_leave", noted)
    found = []
    for _ in range(2):
        with LLM.load(folder, cache=cache) as llm:
            with served(llm, cache_disk=str(tmp_path)) as (listener, client):
                found.append(ask(client, DOCUMENT))
                events = listener.server.snapshots.events
            assert nothing_is_held(llm)
    (cold, none), (warm, cached) = found
    assert cold == warm and none == 0 and cached > 400
    assert events["restore"] == events["hit"] == 1 and events["corrupt"] == 0
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name])


def test_what_has_no_room_in_memory(llm, tmp_path):
    with served(llm, cache_disk=str(tmp_path), cache_ram=0) as (listener, client):
        first, cached = ask(client, DOCUMENT)
        assert cached == 0 and listener.server.snapshots.events["spill"] == 1
        listener.server.snapshots.disk.wait()
        again, cached = ask(client, DOCUMENT)
        assert again == first and cached > 400
        text = client.get("/metrics").text
        size = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert f"minillm:disk_bytes {float(size)}" in text and 'minillm:snapshots_total{event="restore"} 1.0' in text


@pytest.mark.parametrize("damage", ["cut", "longer", "changed", "empty", "renamed"])
def test_a_damaged_file_is_deleted_and_the_prompt_read(llm, tmp_path, damage):
    with served(llm, cache_disk=str(tmp_path)) as (_, client):
        expected = ask(client, DOCUMENT)[0]
        ask(client, f"other {DOCUMENT}")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    for path, other in zip(files, [path.read_bytes() for path in reversed(files)], strict=True):
        data = path.read_bytes()
        changed = data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]
        made = {"cut": data[:-1], "longer": data + b"x", "changed": changed, "empty": b"", "renamed": other}
        path.write_bytes(made[damage])
    with served(llm, cache_disk=str(tmp_path)) as (listener, client):
        assert ask(client, DOCUMENT) == (expected, 0)
        assert listener.server.snapshots.events["corrupt"] == 1 and len(list(tmp_path.iterdir())) == 1


def test_files_are_bounded(llm, tmp_path):
    """Those go that were not used for longest; what another program left behind, and old rests, are no prefixes."""
    documents = [f"{i} {DOCUMENT}" for i in range(3)]
    (tmp_path / "mine.txt").write_text("x")
    old, new = tmp_path / "a.kv.1.tmp", tmp_path / "b.kv.2.tmp"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 2 * ABANDONED,) * 2)
    with served(llm, cache_disk=str(tmp_path), cache_ram=0) as (listener, client):
        assert not old.exists() and new.exists()
        disk = listener.server.snapshots.disk
        ask(client, documents[0])
        disk.wait()
        disk.limit = int(2.5 * disk.bytes_in_use)
        for i in (1, 0, 2):
            ask(client, documents[i])
            disk.wait()
            time.sleep(0.02)  # the times of files are coarse
        assert disk.bytes_in_use <= disk.limit and (tmp_path / "mine.txt").exists()
        assert [bool(ask(client, documents[i])[1]) for i in (0, 2, 1)] == [True, True, False]


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="--cache-disk .*file cannot be made"):
        Disk(tmp_path / "file", 1)


def test_sigterm_writes_what_was_read(folder, tmp_path):
    for cached in (False, True):
        with program(folder, "--kv-budget", "full", "--cache-disk", str(tmp_path)) as (process, _, client):
            assert bool(ask(client, DOCUMENT)[1]) == cached
            assert client.post("/v1/chat/completions", json={"messages": user("x")} | SHORT).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        assert [path.suffix for path in tmp_path.iterdir()] == [".kv"]
