"""Rope against frequencies that transformers computed (tools/make_rope_golden.py), and against the papers' formulas."""

import json
import math

import numpy as np
import pytest
from paths import DATA

from minillm.files.config import RopeConfig
from minillm.files.config_json import config_from_json
from minillm.rope import Rope

GOLDEN = json.loads((DATA / "rope_golden.json").read_text(encoding="utf-8"))


def rope_of(rope: RopeConfig, head_dim: int = 16) -> Rope:
    return Rope(rope, head_dim)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_transformers(case):
    config = config_from_json(case["config"] | {"architectures": ["LlamaForCausalLM"]})
    rope = Rope(config.rope, config.head_dim)
    for at in case["at"]:
        want = np.array(at["inv_freq"], np.float32)
        got = rope.inverse_frequencies(at["length"])
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=2.5e-7)
        assert rope.attention_factor == pytest.approx(at["attention_factor"], rel=1e-12)
        cos, sin = rope.tables(np.array(GOLDEN["positions"]), at["length"])
        assert cos.dtype == sin.dtype == np.float32
        assert cos.shape == sin.shape == (len(GOLDEN["positions"]), len(want))
        # an ulp of the frequency is 2e-4 at position 4095 times frequency 1; the first pair is exactly 1
        np.testing.assert_allclose(cos[:, :4], at["cos"], atol=3e-4)
        np.testing.assert_allclose(sin[:, :4], at["sin"], atol=3e-4)
        np.testing.assert_allclose(cos[:, 0], np.array(at["cos"])[:, 0], atol=2e-7)


def test_default_is_the_formula():
    rope = rope_of(RopeConfig(theta=10000.0), head_dim=8)
    cos, sin = rope.tables(np.array([3, 50]), 51)
    for row, position in enumerate((3, 50)):
        for i in range(4):
            angle = position / 10000.0 ** (2 * i / 8)
            assert cos[row, i] == pytest.approx(math.cos(angle), abs=1e-5)
            assert sin[row, i] == pytest.approx(math.sin(angle), abs=1e-5)


def test_linear_is_slower_positions():
    positions = np.array([0, 4, 40])
    slow = rope_of(RopeConfig("linear", factor=4.0)).tables(positions, 41)
    default = rope_of(RopeConfig()).tables(positions // 4, 11)
    np.testing.assert_allclose(slow, default, atol=1e-6)


def test_dynamic_depends_on_the_length_only_past_the_original_context():
    dynamic, default = rope_of(RopeConfig("dynamic", factor=2.0, original_context=100)), rope_of(RopeConfig())
    positions = np.arange(5)
    np.testing.assert_array_equal(dynamic.tables(positions, 100), default.tables(positions, 100))
    theta = 10000.0 * (2.0 * 150 / 100 - 1.0) ** (16 / 14)
    want = [theta ** (-2 * i / 16) for i in range(8)]
    np.testing.assert_allclose(dynamic.inverse_frequencies(150), want, rtol=1e-6)
    np.testing.assert_array_equal(dynamic.tables(positions, 100), default.tables(positions, 100))


def test_freq_factors_carry_llama3():
    """The tensor rope_freqs.weight of a GGUF file holds, for every pair, by how much llama3 scaling divides."""
    factors = []
    for i in range(32):
        wavelength = 2 * math.pi * 500000.0 ** (2 * i / 64)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    assert min(factors) == 1.0 and max(factors) == 8.0
    with_tensor = rope_of(RopeConfig(theta=500000.0, freq_factors=tuple(factors)), head_dim=64)
    llama3 = rope_of(RopeConfig("llama3", 500000.0, 8.0, 8192, 1.0, 4.0), head_dim=64)
    np.testing.assert_allclose(with_tensor.inverse_frequencies(9), llama3.inverse_frequencies(9), rtol=1e-6)


def test_attention_factor_multiplies_cos_and_sin():
    rope = rope_of(RopeConfig("yarn", factor=4.0, original_context=64))
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4.0) + 1)
    cos, sin = rope.tables(np.arange(9), 9)
    np.testing.assert_allclose(cos**2 + sin**2, rope.attention_factor**2, rtol=1e-6)
    assert rope_of(RopeConfig("yarn", factor=1.0, original_context=64)).attention_factor == 1.0
