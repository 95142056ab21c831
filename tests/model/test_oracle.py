"""The oracle in float64 against what transformers computed in float32: each proves the other."""

import numpy as np
import pytest
from oracle import attention, forward, read_folder


def test_oracle_agrees_with_transformers(tiny_model):
    config, weights = read_folder(tiny_model)
    with np.load(tiny_model / "golden.npz") as golden:
        golden = dict(golden)
    ids, expected = golden.pop("ids"), golden.pop("logits")
    logits = forward(config, weights, ids, **golden)
    assert logits.dtype == np.float64 and logits.shape == (len(ids), config["vocab_size"])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)

    if {"rope_scaling", "rope_parameters"} & config.keys():  # the scaling cannot be left out by accident
        with pytest.raises(ValueError, match="inv_freq"):
            forward(config, weights, ids)
    else:
        np.testing.assert_allclose(forward(config, weights, ids), expected, rtol=0, atol=2e-5)


def test_log_size_stands_for_repeated_keys():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(4, 3, 8)), rng.normal(size=(2, 5, 8)), rng.normal(size=(2, 5, 8))
    sizes = np.array([[1, 3, 2, 1, 1], [2, 1, 1, 1, 4]])
    merged = attention(q, k, v, log_size=np.log(sizes))
    for kv_head in range(2):
        repeats = [np.repeat(x[kv_head : kv_head + 1], sizes[kv_head], axis=1) for x in (k, v)]
        heads = slice(2 * kv_head, 2 * kv_head + 2)
        np.testing.assert_allclose(merged[heads], attention(q[heads], *repeats), atol=1e-12)


def test_attention_on_one_visible_key_is_its_value():
    rng = np.random.default_rng(1)
    q, k, v = rng.normal(size=(2, 3, 4)), rng.normal(size=(1, 3, 4)), rng.normal(size=(1, 3, 4))
    mask = np.eye(3, dtype=bool)
    np.testing.assert_allclose(attention(q, k, v, mask), np.broadcast_to(v, (2, 3, 4)), atol=1e-15)
