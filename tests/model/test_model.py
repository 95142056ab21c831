"""The forward pass against what transformers computed: tiny random models of every kind, and the default model's greedy
text."""

import goldens
import numpy as np
import pytest

from minillm import LLM, CacheConfig, SamplingParams


def load(path, **options):
    return LLM.load(str(path), cache=CacheConfig("full"), offline=True, **options)


@pytest.mark.parametrize("dtype", ["float32", "stored"])
def test_logits_are_those_of_transformers(tiny_model, dtype):
    with np.load(tiny_model / "golden.npz") as golden, load(tiny_model, dtype=dtype) as llm:
        logits = llm.logits(golden["ids"].tolist())
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)


def test_decoding_token_by_token_gives_the_same_logits(tiny_model):
    """Decode and extend share no attention code: both must give the reference, from every position of the prompt on."""
    with load(tiny_model) as llm:
        ids, expected = goldens.tiny_golden(llm, tiny_model)
        for first in (1, len(ids) // 2):
            np.testing.assert_allclose(goldens.decoded(llm, ids, first), expected[first - 1 :], rtol=0, atol=1e-4)


def test_extending_in_parts_gives_the_same_logits(tiny_model):
    with load(tiny_model) as llm:
        ids, expected = goldens.tiny_golden(llm, tiny_model)
        logits, places = goldens.extended(llm, ids, 7)
        np.testing.assert_allclose(logits, expected[places], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def default_model(default_model_path):
    with load(default_model_path) as llm:
        yield llm


SHORT = [golden for golden in goldens.DEFAULT["prompts"] if golden["name"] != "document"]  # for the compiled kernels


@pytest.mark.parametrize("golden", SHORT, ids=lambda golden: golden["name"])
def test_greedy_text_is_that_of_transformers(default_model, golden):
    """Prompt ids, logits within 2e-3, and every one of the (up to) 48 greedy tokens, after those before it, which are
    read at once. No top two logits on any of these paths are nearer to each other than 4e-3."""
    llm, greedy = default_model, golden["greedy"]
    prompt = golden["messages"] or golden["text"]
    assert llm.encode(prompt) == golden["ids"]
    logits = llm.logits(golden["ids"] + greedy["ids"][:-1])[len(golden["ids"]) - 1 :]
    np.testing.assert_allclose(logits[0][golden["logits"]["ids"]], golden["logits"]["values"], rtol=0, atol=2e-3)
    assert greedy["smallest_margin"] > 4e-3
    assert logits.argmax(axis=1).tolist() == greedy["ids"]


def test_answers_are_those_of_transformers(default_model):
    """Token by token, and as text, to the token that ends it: a talk of several turns."""
    (golden,) = (golden for golden in goldens.DEFAULT["prompts"] if golden["name"] == "turns")
    session = default_model.session()
    session.feed(golden["messages"])
    pieces = list(session.stream(SamplingParams(max_tokens=48)))
    session.close()
    assert [piece.token_id for piece in pieces if piece.token_id >= 0] == golden["greedy"]["ids"][:-1]
    assert golden["greedy"]["ids"][-1] == goldens.DEFAULT["stop_id"]
    assert "".join(piece.text for piece in pieces) == golden["greedy"]["text"]
