"""The forward pass on the compiled kernels, every path, against what transformers computed.

Logits of the tiny models are some units large. Pages hold K and V in bf16 (2^-9 of each), and on avx512 and amx the
operands of large products are bf16 as well."""

import numpy as np
import pytest

from minillm import LLM, CacheConfig, SamplingParams
from minillm.ops import cpu_lib

PATHS = cpu_lib.available_paths()
FLOAT, BF16 = 1e-5, 3e-2  # small random models make much of a rounding; the default model's logits move by 1e-2
if not PATHS:
    pytest.skip("the CPU kernels were not built: no C compiler", allow_module_level=True)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setenv("MINILLM_CPU", request.param)
    return request.param


def load(path, **options):
    return LLM.load(str(path), cache=CacheConfig("full"), offline=True, **options)


def close(actual, expected, share):
    """The root mean square of the difference is at most `share` of that of `expected`."""
    assert np.sqrt(((actual - expected) ** 2).mean()) <= share * np.sqrt((expected**2).mean())


@pytest.mark.parametrize("dtype", ["float32", "stored"])
def test_logits_are_those_of_transformers(tiny_model, path, dtype):
    with np.load(tiny_model / "golden.npz") as golden, load(tiny_model, dtype=dtype) as llm:
        assert llm.model.ops.__name__.endswith("cpu_ops")
        close(llm.logits(golden["ids"].tolist()), golden["logits"], FLOAT if path in ("portable", "avx2") else BF16)


def test_decoding_and_extending_give_the_same_logits(tiny_model, path):
    with np.load(tiny_model / "golden.npz") as golden, load(tiny_model) as llm:
        ids, expected = golden["ids"].tolist(), golden["logits"]
        if llm.config.rope.kind == "dynamic":  # its frequencies change with the length of the whole sequence
            ids = ids[: llm.config.rope.original_context]
            expected = llm.logits(ids)
        for first in (1, len(ids) // 2):
            session = llm.session()
            session.feed(ids[:first])
            rows = [session.read()]
            for token in ids[first : first + 40]:
                session.unread = [token]
                rows.append(session.step())
            close(np.array(rows), expected[first - 1 : first - 1 + len(rows)], BF16)
        session = llm.session()
        for lo in range(0, len(ids), 7):
            session.feed(ids[lo : lo + 7])
            close(session.read(), expected[min(lo + 7, len(ids)) - 1], 2 * BF16)  # one row: less of an average


def test_a_batch_of_forks_decodes_like_its_sequences(tiny_models, path):
    with load(tiny_models["tied-head"]) as llm:
        session = llm.session()
        session.feed(list(range(5, 45)))
        session.read()
        caches = [session.cache, session.cache.fork()]
        together = [llm.model.decode([7, 9], caches), llm.model.decode([3, 4], caches)]
        for column, tokens in enumerate([(7, 3), (9, 4)]):
            alone = llm.session()
            alone.feed(list(range(5, 45)))
            alone.read()
            for logits, token in zip(together, tokens, strict=True):
                np.testing.assert_allclose(logits[column], llm.model.decode([token], [alone.cache])[0], atol=1e-4)


def test_what_is_not_finite_is_found_and_nothing_is_lost(tiny_models, path):
    from minillm.errors import MinillmError

    with load(tiny_models["tied-head"]) as llm:
        session = llm.session()
        session.feed([5, 6, 7])
        session.read()
        before = session.cache.lengths.copy()
        llm.model.blocks[1].mlp_norm[0] = np.nan
        with pytest.raises(MinillmError, match="layer 1"):
            llm.model.decode([8], [session.cache])
        np.testing.assert_array_equal(session.cache.lengths, before)
        with pytest.raises(MinillmError, match="layer 1"):
            llm.logits([5, 6, 7])


def test_the_default_model_answers_alike(default_model_path, path):
    if path == "portable":
        return  # ten times slower, and the same code as avx2 with narrower vectors
    with load(default_model_path) as llm:
        text = llm.generate(
            [{"role": "user", "content": "What is the capital of France?"}],
            SamplingParams(temperature=0, max_tokens=12),
        )
        assert text.strip() == "The capital of France is Paris."
