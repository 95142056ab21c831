"""The Python API: what it says to odd prompts, to use after close, and of the last answer."""

import gguf
import numpy as np
import pytest
import tiny_chat
from safetensors.numpy import save_file

from minillm import LLM, CacheConfig, MinillmError, SamplingParams
from minillm.errors import UsageError
from minillm.ops import cpu_lib


@pytest.fixture
def tiny(tmp_path):
    return tiny_chat.make(tmp_path / "tiny")


@pytest.mark.parametrize(
    "prompt", [None, 5, [1.5], [1, "a"], ["a", "b"], [{"role": "user"}, 3], {"role": "user"}, [[1]]]
)
def test_prompt_that_is_none(prompt, tiny):
    with LLM.load(tiny) as llm:
        for call in (llm.generate, llm.logits, lambda p: llm.generate_batch([p]), llm.session().feed):
            with pytest.raises(UsageError, match="is no prompt: give a text, a list of token ids"):
                call(prompt)
        assert llm.pool.bytes_in_use == 0


def test_batch_of_one_text_that_is_no_list(tiny):
    with LLM.load(tiny) as llm, pytest.raises(UsageError, match="list of prompts"):
        llm.generate_batch("Hi")


def test_token_ids_may_be_an_array(tiny):
    with LLM.load(tiny) as llm:
        ids = np.array([3, 4, 5])
        np.testing.assert_array_equal(llm.logits(ids), llm.logits([3, 4, 5]))
        assert llm.generate(ids, SamplingParams(3)) == llm.generate([3, 4, 5], SamplingParams(3))


def test_logits_of_nothing_of_too_much_and_without_memory(tiny, monkeypatch):
    with LLM.load(tiny, context=64) as llm:
        with pytest.raises(MinillmError, match="the prompt is empty"):
            llm.logits([])
        with pytest.raises(MinillmError, match="65 tokens and the context 64"):
            llm.logits([1] * 65)
        monkeypatch.setattr("minillm.ops.numpy_ops.available_memory", lambda: 64 * 258 * 4)
        with pytest.raises(MinillmError, match="cache .* at 64 tokens, workspace"):
            llm.logits([1] * 64)


def test_use_after_close(tiny):
    llm = LLM.load(tiny)
    session = llm.session()
    llm.close()
    for call in (lambda: llm.generate("x"), lambda: llm.logits([1]), lambda: list(session.ask("x", SamplingParams()))):
        with pytest.raises(MinillmError, match="is closed"):
            call()


def test_stats_of_a_turn_of_an_answer_left_early_and_of_a_batch(tiny):
    with LLM.load(tiny) as llm:
        assert llm.stats() == {}
        session = llm.session()
        for _ in range(2):
            text = "".join(piece.text for piece in session.ask("abc", SamplingParams(5)))
            stats = llm.stats()
            assert (stats["text"], stats["generated_tokens"]) == (text, 5)
        assert stats["cached_tokens"] > 0
        for _ in zip(range(2), llm.stream("abc", SamplingParams(9, ignore_eos=True)), strict=False):
            pass
        assert llm.stats()["generated_tokens"] in (2, 3) and llm.stats()["stop_reason"] is None
        llm.generate_batch(["abc"], SamplingParams(2))
        assert llm.stats() == {}


@pytest.mark.parametrize("path", ["numpy", *cpu_lib.available_paths()])
@pytest.mark.parametrize("quantize", ["q8_0", "q4_0"])
def test_quantize_computes_with_the_rounded_weights(quantize, path, tmp_path, monkeypatch):
    """The model whose weights are the blocks made of it, written out as floats, has the same logits."""
    monkeypatch.setenv("MINILLM_CPU", path)
    rounded = tiny_chat.weights(tiny_chat.CONFIG, 7)
    for name, weight in rounded.items():
        if weight.ndim == 2:
            kind = gguf.GGMLQuantizationType["Q8_0" if name == "lm_head.weight" else quantize.upper()]
            rounded[name] = gguf.dequantize(gguf.quantize(weight, kind), kind)
    tiny, floats = tiny_chat.make(tmp_path / "tiny"), tiny_chat.make(tmp_path / "floats")
    save_file(rounded, floats / "model.safetensors")
    with LLM.load(str(tiny), quantize=quantize) as llm, LLM.load(str(floats)) as reference:
        assert llm.dtype == quantize
        got, expected = (model.logits(list(range(40))) for model in (llm, reference))
        # avx2: activations of 16 bits meet the blocks; avx512, amx: bf16 operands
        share = {"numpy": 1e-6, "portable": 1e-5, "avx2": 3e-4}.get(path, 2e-2)
        assert np.sqrt(((got - expected) ** 2).mean()) <= share * np.sqrt((expected**2).mean())


def test_a_model_with_a_sliding_window_holds_no_more_than_it_sees(tiny_models):
    """Of a full cache; what was promised before is no less."""
    with LLM.load(tiny_models["sliding-window"], cache=CacheConfig("full")) as llm:
        assert llm.config.sliding_window == 8
        session = llm.session()
        session.feed([1 + i % 50 for i in range(100)])
        list(session.stream(SamplingParams(max_tokens=9, ignore_eos=True)))
        assert session.cache.seen == 108 and (session.cache.lengths < 8 + 32).all()
        assert session.cache.bytes_in_use <= llm.cache_bytes(108) < session.cache.full_bytes
