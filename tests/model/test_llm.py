"""The Python API: what it says to odd prompts, to use after close, and of the last answer."""

import json

import gguf
import numpy as np
import pytest
import tiny_chat
import tokenizers
from safetensors.numpy import save_file

from minillm import LLM, CacheConfig, MinillmError, SamplingParams
from minillm.errors import UsageError
from minillm.ops import cpu_lib
from minillm.programs import run


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


# Tokens that the model has no row for


@pytest.fixture(params=["added", "in the vocabulary", "of another file", "in the template"])
def too_many_tokens(request, tmp_path):
    """A folder whose tokenizer has [CALL] as id 258, of 258 rows."""
    template = tiny_chat.TEMPLATE.replace("<|im_start|>", "[CALL]", 1) if request.param == "in the template" else None
    folder = tiny_chat.make(tmp_path / "tiny", template=template or tiny_chat.TEMPLATE)
    path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    library = tokenizers.Tokenizer.from_file(str(path))
    if request.param == "in the vocabulary":
        content = json.loads(path.read_text())
        content["model"]["vocab"]["[CALL]"] = 258
        path.write_text(json.dumps(content))
        library = tokenizers.Tokenizer.from_file(str(path))
    if request.param == "of another file":
        decoder = {"added_tokens_decoder": {"258": {"content": "[CALL]", "special": True}}}
        config.write_text(json.dumps(json.loads(config.read_text()) | decoder))
    else:
        library.add_tokens(["[CALL]"])
        library.save(str(path))
    return folder


def test_a_token_beyond_the_embedding_is_named(too_many_tokens, capfd):
    text, params = "please [CALL] me", SamplingParams(4)
    chat = [{"role": "user", "content": text}]
    said = r"the token '\[CALL\]', whose id 258 is not in 0\.\.257, what tiny has embeddings for"
    with LLM.load(too_many_tokens) as llm:
        plain, session = llm.generate("please", params), llm.session()
        ways = (
            lambda: llm.generate(text, params),
            lambda: llm.generate(chat, params),
            lambda: list(llm.stream(text, params)),
            lambda: llm.generate_batch(["please", text], params),
            lambda: llm.logits(text),
            lambda: llm.encode(text),
            lambda: session.feed(text),
            lambda: list(session.ask(text, params)),
        )
        for way in ways:
            with pytest.raises(MinillmError, match=said):
                way()
        if "[CALL]" in llm.tokenizer.vocabulary.chat_template:
            with pytest.raises(MinillmError, match=said):
                list(session.ask("please", params))
        assert llm.pool.bytes_in_use == 0 and llm.generate("please", params) == plain
        session.feed("please")
        assert "".join(piece.text for piece in session.stream(params)) == plain
    assert run.main(["-m", str(too_many_tokens), "-q", "-n", "4", text]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("minillm: error: the text has the token '[CALL]'") and err.count("\n") == 1


def test_a_session_goes_on_after_a_token_beyond_the_embedding(tmp_path):
    folder, params = tiny_chat.make(tmp_path / "tiny"), SamplingParams(4)
    with LLM.load(folder) as llm:
        session = llm.session()
        expected = ["".join(piece.text for piece in session.ask(text, params)) for text in ("hello", "again")]
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.add_tokens(["[CALL]"])
    library.save(str(folder / "tokenizer.json"))
    with LLM.load(folder) as llm:
        session, got = llm.session(), []
        for text in ("hello", "please [CALL] me", "again"):
            try:
                got.append("".join(piece.text for piece in session.ask(text, params)))
            except MinillmError as error:
                assert "[CALL]" in str(error)
    assert got == expected


@pytest.mark.parametrize("token", [258, -1, 2**31, 2**32, 2**63, 2**80])
def test_an_id_beyond_the_embedding_is_named(token, tiny):
    params = SamplingParams(4)
    with LLM.load(tiny) as llm:
        session = llm.session()
        for call in (llm.generate, llm.logits, llm.encode, session.feed, lambda ids: llm.generate_batch([[1], ids])):
            with pytest.raises(UsageError, match=rf"token id {token} is not in 0\.\.257"):
                call([1, token])
        assert session.unread == [] and llm.pool.bytes_in_use == 0
        assert llm.generate([1, 257], params) is not None


@pytest.mark.parametrize("path", cpu_lib.available_paths())
def test_c_never_reads_beyond_the_embedding(path, tiny, monkeypatch):
    monkeypatch.setenv("MINILLM_CPU", path)
    with LLM.load(tiny) as llm:
        for token in (258, -1, 2**32):
            with pytest.raises(IndexError, match=r"token ids are not all in 0\.\.257"):
                llm.model.ops.embed(llm.model.embedding, [1, token])


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


def test_stats_of_a_turn_and_of_an_answer_left_early(tiny):
    with LLM.load(tiny) as llm:
        session = llm.session()
        assert session.stats == {}
        for _ in range(2):
            text = "".join(piece.text for piece in session.ask("abc", SamplingParams(5)))
            stats = session.stats
            assert (stats["text"], stats["generated_tokens"]) == (text, 5)
        assert stats["cached_tokens"] > 0
        for _ in zip(range(2), session.ask("abc", SamplingParams(9, ignore_eos=True)), strict=False):
            pass
        assert session.stats["generated_tokens"] in (2, 3) and session.stats["stop_reason"] is None


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
