"""The page without a browser: what is served, and to whom; and the data that it draws, of a text that is being read."""

import re
import time

import numpy as np
import pytest
import tiny_chat
from paths import ROOT
from serving import nothing_is_held, served

from minillm import LLM, CacheConfig

WEB = ROOT / "minillm" / "server" / "web"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tiny_chat.make(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=4096)
    with LLM.load(folder, cache=CacheConfig("hindsight", 0.2), cache_limit=64 << 20) as llm:
        yield llm


def test_three_files_that_ask_nobody_else(llm):
    with served(llm, api_keys=("secret",)) as (_, client):
        page = client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        sent = {"/": page.text}
        for path in re.findall(r'(?:href|src)="(/[^"]*)"', page.text):
            response = client.get(path)
            assert response.status_code == 200 and response.headers["x-content-type-options"] == "nosniff"
            policy = response.headers["content-security-policy"].split("; ")
            assert "default-src 'self'" in policy and "unsafe" not in response.headers["content-security-policy"]
            sent[path] = response.text
        assert client.get("/props").status_code == 401
    assert len(sent) == 3 and set(sent.values()) == {file.read_text(encoding="utf-8") for file in WEB.iterdir()}
    assert sum(map(len, sent.values())) < 60_000
    for text in sent.values():
        assert not re.search(
            r"https?://|innerHTML|insertAdjacent|document\.write|\beval\b|<style| style=|<script>| on\w+=\"", text
        )


def test_no_page(llm):
    with served(llm, webui=False) as (_, client):
        assert client.get("/").status_code == client.get("/web/page.js").status_code == 404


def test_a_text_fills_the_cache_and_the_cache_shrinks(llm):
    """What is looked at while it is read: a layer after the other fills up and is cut; at last what stays."""
    text = "".join(f"line {i}: the cät sat on mat {i * 7 % 90} €. " for i in range(60))
    with served(llm) as (_, client):
        with llm.engine.alone():  # the reading waits until it is looked at
            file = client.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("a.txt", text)}).json()["id"]
            assert client.get(f"/v1/files/{file}").json()["minillm"]["state"] == "queued"
        looks, end = [], time.monotonic() + 30
        while not looks or looks[-1]["state"] != "ready":
            assert time.monotonic() < end
            if client.get(f"/v1/files/{file}").json()["minillm"]["state"] == "queued":
                continue
            response = client.get(f"/v1/cache/{file}")
            if response.status_code == 200:
                looks.append(response.json())
        last = looks[-1]
        lengths = np.array(last["lengths"])
        config = llm.config
        assert lengths.shape == (config.n_layers, config.n_kv_heads)
        assert len(last["tokens"]) == len(last["kept"]) == last["n_tokens"] and "".join(last["tokens"]).endswith(
            text.strip()
        )
        assert lengths.sum() == pytest.approx(0.2 * lengths.size * last["n_tokens"], rel=0.02)
        assert sum(last["kept"]) == pytest.approx(lengths.sum() / lengths.size, rel=0.01)
        assert 0 < last["bytes"] < 0.5 * last["full_bytes"] and last["share"] == 1
        for look in looks[:-1]:
            assert look["state"] == "reading" and 0 <= look["share"] <= 1 and look["n_tokens"] == last["n_tokens"]
            assert np.shape(look["lengths"]) == lengths.shape and look["bytes"] >= 0
        assert client.delete(f"/v1/files/{file}").status_code == 200
    assert nothing_is_held(llm)


def test_what_is_held_while_a_text_is_read(llm):
    """Between two blocks of the engine's: layers that were read are full or cut, the others empty."""
    text = "so it goes on and on, and on it goes. " * 40
    with served(llm) as (listener, client):
        file = client.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("b.txt", text)}).json()["id"]
        kept = listener.server.files.files[file]
        found = []
        while kept.state != "ready":
            with llm.engine.alone():
                if kept.state == "reading":
                    found.append(kept.under_way())
        for look in found:
            lengths = np.array(look["lengths"])
            assert lengths.max() <= look["n_tokens"]
            if 0 < look["share"] < 0.9:
                assert look["bytes"] > 0 or not lengths.any()
    assert nothing_is_held(llm)
