"""Texts that are uploaded once and named in questions."""

import time

import numpy as np
import pytest
import tiny_chat
from serving import error_of, nothing_is_held, served, user

from minillm import LLM, CacheConfig

DOCUMENT = "the cat sat on the mat, and the dog ran. " * 12
SHORT = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tiny_chat.make(tmp_path_factory.mktemp("model") / "tiny")
    with LLM.load(folder, cache=CacheConfig("snapkv", 0.4), cache_limit=64 << 20) as llm:
        yield llm


@pytest.fixture
def client(llm):
    with served(llm) as (_, client):
        yield client
        assert nothing_is_held(llm)


def upload(client, text, name="report.txt", **fields):
    return client.post("/v1/files", files={"file": (name, text)}, data={"purpose": "user_data"} | fields)


def ready(client, file):
    end = time.monotonic() + 20
    while (found := client.get(f"/v1/files/{file['id']}").json())["minillm"]["state"] != "ready":
        assert time.monotonic() < end and found["minillm"]["state"] in ("queued", "reading"), found
        time.sleep(0.02)
    return found


def ask(client, *parts, **fields):
    body = {"messages": [{"role": "user", "content": list(parts)}]} | SHORT | fields
    return client.post("/v1/chat/completions", json=body)


def test_a_file_is_read_before_the_first_question(client, llm):
    """Also by a method that scores by the newest queries; the answer is that of the text itself, read afresh."""
    file = upload(client, DOCUMENT).json()
    assert file["object"] == "file" and file["id"].startswith("file-") and file["filename"] == "report.txt"
    assert file["bytes"] == len(DOCUMENT) and file["purpose"] == "user_data"
    read = ready(client, file)["minillm"]
    assert read["kept"] < 0.5 and read["bytes"] < read["full_bytes"]
    part, question = {"type": "file", "file": {"file_id": file["id"]}}, {"type": "text", "text": "who"}
    answer = ask(client, part, question).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == read["tokens"] > 400
    text = {"type": "text", "text": DOCUMENT, "cache_control": {"type": "ephemeral"}}
    assert ask(client, text, question, cache_prompt=False).json()["choices"] == answer["choices"]
    listed = client.get("/v1/files").json()
    assert listed["object"] == "list" and [one["id"] for one in listed["data"]] == [file["id"]]
    assert client.get(f"/v1/files/{file['id']}/content").text == DOCUMENT
    prompt = client.post("/apply-template", json={"messages": [{"role": "user", "content": [part]}]}).json()["prompt"]
    assert DOCUMENT.strip() in prompt


def test_what_is_left_of_each_token(client, llm):
    file = upload(client, DOCUMENT).json()
    read = ready(client, file)["minillm"]
    cache = client.get(f"/v1/cache/{file['id']}").json()
    assert len(cache["tokens"]) == len(cache["kept"]) == read["tokens"]
    assert "".join(cache["tokens"]).endswith(DOCUMENT.strip()) and cache["tokens"][0] == "<|im_start|>"
    assert (cache["method"], cache["budget"]) == ("snapkv", 0.4) and cache["bytes"] == read["bytes"]
    assert np.shape(cache["lengths"]) == (2, 2)
    # snapkv drops and merges nothing: an entry is a token
    assert sum(cache["kept"]) * 4 == pytest.approx(np.sum(cache["lengths"])) and max(cache["kept"]) == 1


def test_a_file_that_is_deleted(client):
    file = upload(client, DOCUMENT).json()
    ready(client, file)
    assert client.delete(f"/v1/files/{file['id']}").json() == {"id": file["id"], "object": "file", "deleted": True}
    for path in (f"/v1/files/{file['id']}", f"/v1/files/{file['id']}/content", f"/v1/cache/{file['id']}"):
        error_of(client.get(path), 404, "not_found_error")
    part = {"type": "file", "file": {"file_id": file["id"]}}
    assert "there is no file" in error_of(ask(client, part), 400, "invalid_request_error")
    text = {"type": "text", "text": DOCUMENT, "cache_control": {"type": "ephemeral"}}
    assert ask(client, text, {"type": "text", "text": "who"}).json()["timings"]["cache_n"] == 0


def test_a_short_file(client):
    file = upload(client, "a word").json()
    assert (
        file["minillm"] == ready(client, file)["minillm"] == {"state": "ready"} or file["minillm"]["state"] == "queued"
    )
    assert "wait until it is read" in error_of(client.get(f"/v1/cache/{file['id']}"), 404, "not_found_error")
    assert ask(client, {"type": "file", "file": {"file_id": file["id"]}}).status_code == 200


def test_what_is_no_file(llm):
    with served(llm, max_body=6000) as (_, client):
        assert "no UTF-8 text at byte 1" in error_of(upload(client, b"a\xff"), 400, "invalid_request_error")
        assert "holds no text" in error_of(upload(client, b" \n"), 400, "invalid_request_error")
        assert "purpose" in error_of(upload(client, "x", purpose="fine-tune"), 400, "invalid_request_error")
        assert "exceed" in upload(client, "x" * 5000).json()["error"]["type"]
        error_of(upload(client, "x" * 6000), 413, "request_too_large")
        for settings in ({"data": {"purpose": "user_data"}}, {"content": b"x"}, {"data": {"file": "x"}}):
            error_of(client.post("/v1/files", **settings), 400, "invalid_request_error")
        broken = {"content-type": "multipart/form-data; boundary=x"}
        error_of(client.post("/v1/files", content=b"--y\r\n", headers=broken), 400, "invalid_request_error")
        for file in (None, {}, {"file_id": 1}, {"file_data": "data:text/plain;base64,eA=="}):
            error_of(ask(client, {"type": "file", "file": file}), 400, "invalid_request_error")


def test_a_file_waits_for_its_place(llm):
    """And a server that ends meanwhile loses no page."""
    with served(llm, parallel=1) as (_, client):
        body = {"messages": user("x"), "stream": True, "ignore_eos": True, "temperature": 0}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            beginning = response.iter_raw()
            next(beginning)
            file = upload(client, DOCUMENT).json()
            assert client.get(f"/v1/files/{file['id']}").json()["minillm"]["state"] == "queued"
        ready(client, file)
        upload(client, f"another {DOCUMENT}")
    assert nothing_is_held(llm)
