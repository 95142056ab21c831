"""What a server says about itself, and about texts."""

import time

import pytest
import tiny_chat
from prometheus_client.parser import text_string_to_metric_families
from serving import error_of, served, user

from minillm import LLM, CacheConfig
from minillm.server import cli

DOCUMENT = "the cat sat on the mat, and the dog ran. " * 12
SHORT = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tiny_chat.make(tmp_path_factory.mktemp("model") / "tiny")
    with LLM.load(folder, cache=CacheConfig("full"), cache_limit=64 << 20) as llm:
        yield llm


@pytest.fixture
def client(llm):
    with served(llm, parallel=3) as (_, client):
        yield client


def metrics(client):
    """(name, labels) -> value"""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(one.name, *sorted(one.labels.values())): one.value for family in families for one in family.samples}


def test_metrics_add_up(client, llm):
    ask = {"messages": user(DOCUMENT)} | SHORT
    n = client.post("/v1/chat/completions", json=ask).json()["usage"]["prompt_tokens"]
    again = client.post("/chat/completions", json=ask | {"n": 2}).json()
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    client.post("/chat/completions", json=[])
    client.get("/v1/somewhere/else")
    found = metrics(client)
    assert found["minillm:prompt_tokens_total",] == 2 * n - cached
    assert found["minillm:prompt_tokens_cache_total",] == cached > 400
    assert found["minillm:tokens_predicted_total",] == 24
    assert found["minillm:prompt_seconds_total",] > 0 < found["minillm:tokens_predicted_seconds_total",]
    assert found["minillm:requests_total", "/chat/completions", "200"] == 2
    assert found["minillm:requests_total", "/chat/completions", "400"] == 1
    assert found["minillm:requests_total", "404", "other"] == 1
    assert (found["minillm:snapshots_total", "hit"], found["minillm:snapshots_total", "miss"]) == (1, 1)
    for name, count in {"time_to_first_token": 2, "queue": 2, "e2e_request_latency": 2}.items():
        assert found[f"minillm:{name}_seconds_count",] == count
    assert found["minillm:inter_token_latency_seconds_count",] == 7 + 2 * 7
    assert found["minillm:requests_processing",] == found["minillm:requests_deferred",] == 0
    assert found["minillm:kv_bytes", "running"] == 0 < found["minillm:kv_bytes", "idle"]
    assert found["minillm:kv_bytes", "idle"] == llm.pool.bytes_in_use <= found["minillm:kv_bytes_full",]
    assert found["minillm:kv_entries",] == found["minillm:kv_tokens_seen",] * 4  # 2 layers x 2 heads, all of it kept
    assert found["minillm:kv_bytes_limit",] == 64 << 20


def test_what_goes_on_now(client):
    assert client.get("/slots").json() == []
    ask = {"messages": user("x" * 50), "stream": True, "temperature": 0, "ignore_eos": True}
    with client.stream("POST", "/v1/chat/completions", json=ask) as response:
        beginning = response.iter_raw()
        next(beginning)
        (slot,) = client.get("/v1/slots").json()
        assert slot["state"] == "generating" and slot["is_processing"] and slot["read"] == 1
        assert slot["n_prompt_tokens"] > 50 and slot["n_decoded"] >= 1 and slot["kv_bytes"] > 0
        found = metrics(client)
        assert found["minillm:requests_processing",] == found["minillm:batch_size",] == 1
        assert found["minillm:kv_bytes", "running"] > 0 < found["minillm:kv_bytes_promised",]
    end = time.monotonic() + 5
    while not (gone := metrics(client)["minillm:cancelled_total",]) and time.monotonic() < end:
        time.sleep(0.02)
    assert gone == 1


def test_what_is_off(llm):
    args = cli.parse([], {"MINILLM_ARG_SLOTS": "0", "MINILLM_ARG_NO_METRICS": "1"})
    assert not args.settings.slots and not args.settings.metrics and cli.parse([], {}).settings.slots
    with served(llm, slots=False, metrics=False) as (_, client):
        assert "--no-slots" in error_of(client.get("/slots"), 501, "not_supported_error")
        assert "--no-metrics" in error_of(client.get("/metrics"), 501, "not_supported_error")


def test_props(client):
    props = client.get("/props").json()
    assert props["total_slots"] == 3 and props["chat_template"] == tiny_chat.TEMPLATE
    settings = props["default_generation_settings"]
    assert settings["n_ctx"] == 4096 and settings["params"]["temperature"] == 0.8
    assert props["kv"]["method"] == "full"


def test_tokens_of_a_text_and_back(client, llm):
    text = "caf\u00e9 <|im_end|> \u2603"
    ids = client.post("/tokenize", json={"content": text}).json()["tokens"]
    assert ids == llm.encode(text) and 257 in ids
    plain = client.post("/v1/tokenize", json={"content": text, "parse_special": False}).json()["tokens"]
    assert len(plain) == len(text.encode()) and 257 not in plain
    for one in (ids, plain):
        assert client.post("/detokenize", json={"tokens": one}).json() == {"content": text}
    pieces = client.post("/tokenize", json={"content": "a\u00e9", "with_pieces": True}).json()["tokens"]
    assert [one["piece"] for one in pieces] == ["a", [0xC3], [0xA9]]
    assert [one["id"] for one in pieces] == llm.encode("a\u00e9")
    for path, body in (("/tokenize", {}), ("/tokenize", {"content": 1}), ("/detokenize", {"tokens": [258 + 5]})):
        error_of(client.post(path, json=body), 400, "invalid_request_error")
    error_of(client.post("/detokenize", json={"tokens": [True]}), 400, "invalid_request_error")


def test_the_template(client, llm):
    talk = [{"role": "developer", "content": "be brief"}, *user("hi")]
    plain = [{"role": "system", "content": "be brief"}, *user("hi")]

    def applied(messages, **more):
        return client.post("/apply-template", json={"messages": messages} | more).json()["prompt"]

    assert applied(talk) == llm.render_chat(plain)
    assert applied(talk, add_generation_prompt=False) == llm.render_chat(plain).removesuffix("<|im_start|>assistant\n")
    assert applied([*talk, {"role": "assistant", "content": "well,"}]) == llm.render_chat(plain) + "well,"


def test_a_model_without_a_chat_template(tmp_path):
    with LLM.load(tiny_chat.make(tmp_path / "plain", template=None), cache=CacheConfig("full")) as llm:
        with served(llm) as (_, client):
            response = client.post("/v1/chat/completions", json={"messages": user("x")})
            assert "has no chat template" in error_of(response, 400, "invalid_request_error")
            assert client.post("/v1/completions", json={"prompt": "x"} | SHORT).status_code == 200
            assert client.get("/props").json()["chat_template"] == ""


def test_an_engine_that_is_stuck(client, llm, monkeypatch):
    """It makes no step while there is work: a prober is told, and not when there is nothing to do."""
    monkeypatch.setattr("minillm.server.about.STUCK", 0.1)
    assert client.get("/livez").status_code == 200
    ask = {"messages": user("x"), "stream": True, "temperature": 0, "ignore_eos": True}
    with client.stream("POST", "/v1/chat/completions", json=ask) as response:
        beginning = response.iter_raw()
        next(beginning)
        with llm.engine.alone():
            time.sleep(0.2)
            assert "has made no step" in error_of(client.get("/livez"), 503, "unavailable_error")
        time.sleep(0.02)
        assert client.get("/livez").status_code == 200
    assert client.get("/livez").status_code == 200
