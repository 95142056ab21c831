"""Log-probabilities, penalties, biases, echo and constraints over a socket; and what a client that grades answers makes
of them."""

import json
import math
import re
import sys

import pytest
import tiny_chat
from serving import error_of, events, nothing_is_held, served, user

from minillm import LLM, CacheConfig, Constraint, SamplingParams

TEXT = "the cat sat on the mat, and the dog ran. " * 8
ASK = {"temperature": 0, "max_tokens": 12}
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """Its cache is a small one, which no log-probability of a prompt may come from."""
    folder = tiny_chat.make(tmp_path_factory.mktemp("model") / "tiny")
    with LLM.load(folder, cache=CacheConfig("streaming", 40), cache_limit=64 << 20) as llm:
        yield llm


@pytest.fixture(scope="module")
def client(llm):
    with served(llm, cache_ram=0) as (_, client):
        yield client


@pytest.fixture(autouse=True)
def nothing_is_left(llm, client):
    yield
    assert nothing_is_held(llm)


def chat(client, **fields):
    return client.post("/v1/chat/completions", json={"messages": user("hello")} | ASK | fields)


def complete(client, prompt="hello", **fields):
    return client.post("/v1/completions", json={"prompt": prompt} | ASK | fields)


def choice_of(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def literal(logits):
    """Natural logarithms of the softmax, in float64."""
    values = [float(x) for x in logits]
    total = math.fsum(math.exp(x) for x in values)
    return [x - math.log(total) for x in values]


def test_logprobs_of_a_chat(client, llm):
    """By the logits of the model itself, whatever changes the draw."""
    choice = choice_of(chat(client, logprobs=True, top_logprobs=3, logit_bias={"75": 4}, frequency_penalty=1))
    content, text = choice["logprobs"]["content"], choice["message"]["content"]
    assert "".join(one["token"] for one in content) == text and len(content) == 12
    assert bytes(byte for one in content for byte in one["bytes"]).decode() == text
    ids = llm.encode(user("hello"))
    for one in content[:5]:  # the cache is full so far
        known = literal(llm.logits(ids)[-1])
        first = sorted(range(258), key=lambda token: (-known[token], token))[:3]
        token = llm.encode(one["token"])[0]
        assert one["logprob"] == pytest.approx(known[token], abs=1e-4)
        assert [other["logprob"] for other in one["top_logprobs"]] == pytest.approx([known[i] for i in first], abs=1e-4)
        words = [llm.tokenizer.token_bytes(i) for i in first]
        assert [bytes(other["bytes"]) for other in one["top_logprobs"]] == words
        assert [other["token"] for other in one["top_logprobs"]] == [w.decode(errors="replace") for w in words]
        ids.append(token)
    assert choice_of(chat(client))["logprobs"] is None
    assert all("top_logprobs" in one for one in choice_of(chat(client, logprobs=True))["logprobs"]["content"])


@pytest.mark.parametrize("n", [1, 2])
def test_streamed_logprobs_are_those_of_the_whole(client, n):
    for ask, fields in ((chat, {"logprobs": True, "top_logprobs": 2}), (complete, {"logprobs": 2, "echo": True})):
        fields |= {"n": n, "seed": 3, "temperature": 0.9}
        whole = ask(client, **fields).json()["choices"]
        found = [{} for _ in range(n)]
        for chunk in events(ask(client, stream=True, **fields))[:-1]:
            for choice in chunk["choices"]:
                for name, part in (choice["logprobs"] or {}).items():
                    found[choice["index"]][name] = found[choice["index"]].get(name, []) + (part or [])
        for choice, parts in zip(whole, found, strict=True):
            assert parts == {name: part or [] for name, part in choice["logprobs"].items()}


def test_logprobs_of_a_completion(client, llm):
    choice = choice_of(complete(client, logprobs=2))
    told = choice["logprobs"]
    assert "".join(told["tokens"]) == choice["text"] and told["text_offset"] == list(range(12))
    known = literal(llm.logits("hello")[-1])
    first = sorted(range(258), key=lambda token: -known[token])[:2]
    assert told["token_logprobs"][0] == pytest.approx(known[first[0]], abs=1e-4)
    assert list(told["top_logprobs"][0].values()) == pytest.approx([known[i] for i in first], abs=1e-4)
    drawn = choice_of(complete(client, logprobs=1, temperature=2.0, seed=1))["logprobs"]
    pairs = zip(drawn["tokens"], drawn["token_logprobs"], drawn["top_logprobs"], strict=True)
    assert all(top[token] == logprob for token, logprob, top in pairs)  # also where it is none of the likeliest


# echo


def graded(choice, n_context):
    """(log-likelihood, whether it is what greedy decoding says) of what follows the first tokens of a prompt, as
    lm-eval takes them from an answer to {"echo": true, "max_tokens": 1, "logprobs": 1}."""
    told = choice["logprobs"]
    tokens, tops = told["token_logprobs"][n_context:-1], told["top_logprobs"][n_context:-1]
    return sum(tokens), all(token == max(top.values()) for token, top in zip(tokens, tops, strict=True))


def test_log_likelihoods_are_those_of_the_logits(client, llm):
    """Of a full cache, though the server's is none; several prompts at once; also where the answer ends at once."""
    context = llm.encode(TEXT)
    rows = llm.logits(context)
    greedy = int(rows[-1].argmax())
    prompts = [[*context, greedy], [*context, *llm.encode("he ran")], llm.encode("hi")]
    for fields in ({}, {"logit_bias": {"257": 100}}):  # which ends an answer
        response = complete(client, prompts, echo=True, max_tokens=1, logprobs=1, **fields).json()
        for prompt, choice in zip(prompts, response["choices"], strict=True):
            n = len(context) if len(prompt) > 9 else 1
            logits = llm.logits(prompt)
            expected = math.fsum(literal(logits[i - 1])[prompt[i]] for i in range(n, len(prompt)))
            found, likeliest = graded(choice, n)
            assert found == pytest.approx(expected, abs=1e-3)
            assert likeliest == all(int(logits[i - 1].argmax()) == prompt[i] for i in range(n, len(prompt)))
            assert len(choice["logprobs"]["tokens"]) == len(prompt) + 1
        assert graded(response["choices"][0], len(context))[1]
        assert (choice["finish_reason"] == "stop") == bool(fields)


def test_an_echo_is_the_prompt_and_the_answer(client, llm):
    plain = choice_of(complete(client, TEXT, kv={"budget": "full"}))["text"]
    choice = choice_of(complete(client, TEXT, echo=True, logprobs=0))
    assert choice["text"] == TEXT + plain == "".join(choice["logprobs"]["tokens"])
    assert choice["logprobs"]["token_logprobs"][0] is choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["text_offset"] == list(range(len(choice["text"])))
    small = choice_of(complete(client, TEXT))["text"]
    assert (
        choice_of(complete(client, TEXT, echo=True))["text"] == TEXT + small
    )  # the server's cache, where none is told
    assert choice_of(complete(client, llm.encode("a<|im_end|>"), echo=True))["text"].startswith("a<|im_end|>")


def test_tokens_that_are_never_shown(client, llm):
    """A control token of the prompt is a part of the text, one of the answer is not; a chat does not tell of it."""
    end = {"logit_bias": {"257": 100}, "max_tokens": 3, "ignore_eos": True}
    choice = choice_of(complete(client, "a<|im_end|>b", echo=True, logprobs=0, **end))
    assert choice["text"] == "a<|im_end|>b"
    assert choice["logprobs"]["tokens"] == ["a", "<|im_end|>", "b", *["<|im_end|>"] * 3]
    assert choice["logprobs"]["text_offset"] == [0, 1, 11, 12, 12, 12]
    choice = choice_of(chat(client, logprobs=True, **end))
    assert choice["message"]["content"] == "" and choice["logprobs"] is None
    choice = choice_of(complete(client, logprobs=1, logit_bias={"257": 100}))
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]["tokens"]) == ("", "stop", ["<|im_end|>"])


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_of_the_prompt_alone(client, llm, stream):
    for fields in ({}, {"logprobs": 1}):
        response = complete(client, "h\u00e9llo", echo=True, max_tokens=0, stream=stream, **fields)
        if stream:
            first, *_, last = (chunk["choices"][0] for chunk in events(response)[:-1])
            assert (first["text"], last["text"], last["finish_reason"]) == ("h\u00e9llo", "", "length")
        else:
            assert response.json()["usage"] | {"completion_tokens": 0, "prompt_tokens": 6} == response.json()["usage"]
            first = choice_of(response)
            assert (first["text"], first["finish_reason"]) == ("h\u00e9llo", "length")
        if fields:
            told = first["logprobs"]
            assert told["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa9", "l", "l", "o"]
            assert told["text_offset"] == [0, 1, 1, 2, 3, 4]
            expected = [one and one.logprob for one in llm.logprobs("h\u00e9llo")]
            assert told["token_logprobs"][0] is None
            assert told["token_logprobs"][1:] == pytest.approx(expected[1:], abs=1e-6)


def test_an_echo_with_a_cache_of_its_own(client, llm):
    """kv says how the prompt is read."""
    full = choice_of(complete(client, TEXT, echo=True, logprobs=0, max_tokens=8))
    small = choice_of(
        complete(client, TEXT, echo=True, logprobs=0, max_tokens=8, kv={"method": "streaming", "budget": 40})
    )
    n = len(llm.encode(TEXT))
    assert full["logprobs"]["token_logprobs"][:n] == pytest.approx(small["logprobs"]["token_logprobs"][:n], abs=1e-3)
    assert full["text"] != small["text"]


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"max_tokens": 0, "echo": True, "n": 2},
        {"logprobs": 6},
        {"logprobs": -1},
        {"logprobs": True},
        {"echo": 1},
    ],
    ids=str,
)
def test_what_a_completion_refuses(client, fields):
    error_of(complete(client, **fields), 400, "invalid_request_error")
    error_of(complete(client, stream=True, **fields), 400, "invalid_request_error")


# penalties and biases


def test_penalties_and_biases_arrive(client, llm):
    plain = choice_of(complete(client))["text"]
    params = {"presence_penalty": 2.0, "frequency_penalty": 1.5, "logit_bias": {75: 3.0, 220: float("-inf")}}
    expected = llm.generate("hello", SamplingParams(12, **params))
    assert expected != plain and " " not in expected
    for bias in ({"75": 3, "220": -100}, [[75, 3.0], [220, False]], [["75", 3], [220, -100.0]]):
        found = complete(client, presence_penalty=2, frequency_penalty=1.5, logit_bias=bias)
        assert choice_of(found)["text"] == expected
    with served(llm, cache_ram=0, params=SamplingParams(presence_penalty=2.0)) as (_, other):
        assert choice_of(complete(other))["text"] == llm.generate("hello", SamplingParams(12, presence_penalty=2.0))


# constraints


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"json_schema": SCHEMA},
    ],
    ids=["OpenAI's", "llama.cpp's", "json_schema"],
)
def test_answers_by_a_schema(client, fields, n):
    found = chat(client, n=n, max_tokens=60, temperature=1.0, seed=4, **fields).json()["choices"]
    assert len(found) == n
    for choice in found:
        value = json.loads(choice["message"]["content"])
        assert choice["finish_reason"] == "stop" and set(value) == {"kind", "age"}
        assert value["kind"] in ("cat", "dog") and 0 <= value["age"] <= 99
    *chunks, _ = events(chat(client, n=n, max_tokens=60, temperature=1.0, seed=4, stream=True, **fields))
    texts = [""] * n
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [choice["message"]["content"] for choice in found]


def test_answers_by_a_grammar_and_a_json_object(client, llm):
    grammar = 'root ::= ("yes" | "no") ", " [a-c]{2}'
    text = choice_of(complete(client, grammar=grammar))["text"]
    assert re.fullmatch("(yes|no), [a-c]{2}", text)
    assert text == llm.generate("hello", SamplingParams(12, constraint=Constraint.gbnf(grammar)))
    assert choice_of(chat(client, grammar="", response_format={"type": "text"}, json_schema=None))
    text = choice_of(chat(client, response_format={"type": "json_object"}, logit_bias={"92": 50}))["message"]["content"]
    assert json.loads(text) == {}  # 92: }


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_a_constraint_that_makes_no_sense(client, stream, n):
    """Is refused before a stream begins, with the library's words."""
    for fields, said in (
        ({"json_schema": {"type": "hiccup"}}, "Invalid type: hiccup"),
        ({"grammar": "root ::= foo"}, "Rule 'foo' not found"),
        ({"grammar": 'root ::= "a"', "json_schema": {}}, "give one of them"),
        ({"grammar": 'root ::= "a"', "ignore_eos": True}, "ignore_eos"),
    ):
        assert said in error_of(chat(client, stream=stream, n=n, **fields), 400, "invalid_request_error")


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with LLM.load(tiny_chat.make(tmp_path / "tiny"), cache_limit=64 << 20) as llm, served(llm) as (_, client):
        message = error_of(chat(client, json_schema={}), 400, "invalid_request_error")
        assert "pip install 'minillm-engine[grammar]'" in message and choice_of(chat(client))
