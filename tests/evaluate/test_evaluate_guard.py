"""The default model on a real prompt: nothing a method does may drift unnoticed, and what every sample shows stays so.

python tests/evaluate/test_evaluate_guard.py       writes the golden errors anew, after a change that is meant
"""

import json
import os

import pytest
from paths import DATA

os.environ.setdefault("MINILLM_CPU", "numpy")

from minillm import LLM, CacheConfig  # noqa: E402
from minillm.evaluate import continuation, needles  # noqa: E402
from minillm.evaluate.evaluator import ready_methods  # noqa: E402
from minillm.evaluate.scoring import score  # noqa: E402
from minillm.evaluate.text import read_text  # noqa: E402

GOLDEN = DATA / "fidelity_golden.json"
LAYERS = (2, 14, 27)
TOKENS, BUDGET = 160, 0.35
CONFIGS = {name: CacheConfig(name, BUDGET) for name in ready_methods("a profile") if name != "full"}


@pytest.fixture(scope="module")
def llm(default_model_path):
    with LLM.load(default_model_path, cache=CacheConfig("full")) as llm:
        yield llm


def local_errors(llm):
    """{method: relative errors of the attention output of three layers}"""
    text = read_text(None, "heldout.txt")
    sample = continuation.samples([TOKENS], 32, [0], text)[0]
    prompt = continuation.prompt(llm, sample, text, fidelity=True)
    results = score(llm, prompt, list(CONFIGS.values()), "agnostic")
    return {
        name: [round(float(result["layers"][layer]), 4) for layer in LAYERS]
        for name, result in zip(CONFIGS, results, strict=True)
    }


def test_no_method_drifts(llm):
    golden = json.loads(GOLDEN.read_text())
    assert golden.keys() == CONFIGS.keys(), f"write {GOLDEN.name} anew: python tests/evaluate/test_evaluate_guard.py"
    for name, errors in local_errors(llm).items():
        assert errors == pytest.approx(golden[name], rel=0.02), name


def test_what_compression_costs_in_order(llm):
    """A number hidden in the first half of a prompt of 600 tokens, which is compressed whole; nats a token."""
    configs = {
        "full": CacheConfig("full"),
        "half": CacheConfig("semanticache", 0.5),
        "fifth": CacheConfig("semanticache", 0.2),
        "no log s": CacheConfig("semanticache", 0.5, log_size=False),
        "snapkv": CacheConfig("snapkv", 0.2),
        "streaming": CacheConfig("streaming", 0.2),
    }
    hay = read_text()
    for sample in needles.samples(["prose"], [600], [0.3], [0], hay):
        results = score(llm, needles.prompt(llm, sample, hay), list(configs.values()), "aware")
        nll = {name: result["scores"]["nll"] for name, result in zip(configs, results, strict=True)}
        assert results[0]["scores"]["em"] == 1.0
        assert nll["full"] < nll["half"] < nll["fifth"], nll
        assert nll["half"] < nll["no log s"], nll
        assert nll["snapkv"] < nll["streaming"], nll


if __name__ == "__main__":
    with LLM.load(None, cache=CacheConfig("full")) as model:
        lines = (f'"{name}": {errors}' for name, errors in local_errors(model).items())
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
