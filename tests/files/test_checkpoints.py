"""Packed checkpoints: what is held is what their quantisers meant, by packers that share nothing with minillm."""

import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import packers
import pytest
from packed_cases import ASYMMETRIC, AWQ, CASES, FP8, GPTQ, compressed, inside, load, mlx, stored
from packers import PHI3, QWEN2

from minillm import LLM
from minillm.errors import MinillmError
from minillm.files.formats import F32, FORMATS
from minillm.ops.numpy_ops import NUMPY
from minillm.programs import run


def widened(weights, like):
    """Their numbers in float64, with matrices above one another where `like` has them so."""
    arrays = {name: np.float64(weight.widened().data) for name, weight in weights.items()}
    return packers.fused(arrays) if any("qkv_proj" in name for name in like) else arrays


def off(got, want):
    return np.sqrt(((got - want) ** 2).mean() / (want**2).mean())


@pytest.mark.parametrize("family", [{}, PHI3], ids=["plain", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_held_is_what_was_meant(tmp_path, case, family):
    packer, packing, held, error = CASES[case]
    _, means = packers.make(tmp_path, packer, packing, everything="mlx" in case, **family)
    model, weights = stored(tmp_path), load(tmp_path)
    matrices = [name for name in means if "proj" in name or "mlx" in case and means[name].ndim == 2]
    assert len(matrices) >= 8 and {w.format.name for n, w in weights.items() if "proj" in n} == {held}
    exact, got = widened(load(tmp_path, "float32"), means), widened(weights, means)
    assert exact.keys() == means.keys()
    for name, want in means.items():
        np.testing.assert_array_equal(exact[name], np.float32(want), err_msg=name)
        if name not in matrices or not error:
            np.testing.assert_array_equal(got[name], want, err_msg=name)
    if error:
        assert error / 3 < max(off(got[name], means[name]) for name in matrices) < error
    assert model.weight_bytes("stored", NUMPY) == sum(weight.nbytes for weight in weights.values())
    rows = weights["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(rows.rows(3, 9), rows.widened().data[3:9])


@pytest.mark.parametrize("case", CASES)
def test_rows_of_rows_that_lie_on_no_word_and_no_block(tmp_path, case):
    packer, packing, held, _ = CASES[case]
    _, means = packers.make(tmp_path, packer, packing)
    name = "model.layers.1.mlp.gate_proj.weight"
    whole = stored(tmp_path).tensors[name]
    part = whole.rows(3, 61).rows(18, 50)
    assert part.shape == (32, 32) and part.nbytes == whole.nbytes // 2
    np.testing.assert_array_equal(part.read(5, 18, F32), np.float32(means[name][26:39]))
    in_blocks = whole.read(0, 64, FORMATS[held])
    np.testing.assert_array_equal(part.read(5, 18, FORMATS[held]), in_blocks[26:39])


PARTIAL = PHI3 | {"partial_rotary_factor": 0.75, "head_dim": 8}
MODELS = [("awq", PARTIAL), ("gptq", PHI3), ("gptq, asymmetric", QWEN2), ("fp8, blocks", QWEN2), ("mlx", PHI3)]
MODELS += [("compressed, words, asymmetric", PHI3), ("gptq, act-order", PARTIAL), ("fp8, matrices", PARTIAL)]


@pytest.mark.parametrize("case, family", MODELS)
def test_logits_are_those_of_the_same_weights_in_float32(tmp_path, case, family):
    packer, packing, _, error = CASES[case]
    _, means = packers.make(tmp_path / "packed", packer, packing, everything=case == "mlx", **family)
    plain = packers.make_plain(tmp_path / "plain", means, **family)
    ids = np.random.default_rng(0).integers(0, 256, 40).tolist()

    def logits(folder, dtype):
        with LLM.load(folder, dtype=dtype, device="cpu") as llm:
            return np.float64(llm.logits(ids))

    want = logits(plain, "float32")
    np.testing.assert_array_equal(logits(tmp_path / "packed", "float32"), want)
    assert off(logits(tmp_path / "packed", "stored"), want) < 0.01 + 3 * error


def test_quantize_of_floats_of_8_bits(tmp_path):
    """They are floats like others; what has fewer bits is refused."""
    _, means = packers.make(tmp_path / "a", packers.fp8, FP8)
    plain = packers.make_plain(tmp_path / "plain", {name: np.float32(array) for name, array in means.items()})
    packed = load(tmp_path / "a", "q8_0")
    for name, weight in load(plain, "q8_0").items():
        np.testing.assert_array_equal(packed[name].data, weight.data, err_msg=name)
    packers.make(tmp_path / "b", packers.awq, AWQ)
    with pytest.raises(
        MinillmError, match=r"_proj.weight is quantised already \(Q4_1\): quantize is for 16- and 32-bit"
    ):
        load(tmp_path / "b", "q8_0")


def test_modules_of_mlx_have_their_own_bits(tmp_path):
    down, up, head = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj", "lm_head"
    own = {down: partial(packers.mlx, bits=8), up: None, head: partial(packers.mlx, bits=6, group=16)}
    sizes = {down: {"group_size": 32, "bits": 8}, up: False, head: {"group_size": 16, "bits": 6}, "other": True}
    packing = mlx(4, **sizes)
    packing |= {"quantization_config": packing["quantization"]}  # new folders say it twice
    with pytest.raises(
        MinillmError, match="lm_head.weight has rows of 32 weights in groups of 16, which are no blocks"
    ):
        packers.make(tmp_path, packers.mlx, packing, everything=True, own=own)
        load(tmp_path)
    own[head], sizes[head] = partial(packers.mlx, bits=6), {"group_size": 32, "bits": 6}
    packing = {key: {"group_size": 32, "bits": 4, **sizes} for key in packing}
    _, means = packers.make(tmp_path, packers.mlx, packing, everything=True, own=own)
    weights = load(tmp_path)
    formats = {name: weights[f"{name}.weight"].format.name for name in (down, up, head, "model.embed_tokens")}
    assert formats == {down: "Q8_0", up: "F16", head: "Q8_0", "model.embed_tokens": "Q4_1"}
    for name, want in means.items():
        assert off(np.float64(weights[name].widened().data), want) < 6e-3


def test_the_text_model_of_one_that_also_sees(tmp_path):
    """config.json says of the whole model how it is packed, with the names of the file."""
    down = "language_model.model.layers.0.mlp.down_proj"
    own = {down.removeprefix("language_model."): partial(packers.mlx, bits=8)}
    tensors, means = packers.make(tmp_path, packers.mlx, {}, own=own)
    packers.write(tmp_path / "model.safetensors", {f"language_model.{name}": array for name, array in tensors.items()})
    text = json.loads((tmp_path / "config.json").read_text())
    values = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "text_config": text}
    values |= mlx(4, **{down: {"group_size": 32, "bits": 8}})
    (tmp_path / "config.json").write_text(json.dumps(values))
    weights = load(tmp_path, "float32")
    for name, want in means.items():
        np.testing.assert_array_equal(weights[name].data, np.float32(want), err_msg=name)


def test_zeros_of_old_quantisers_are_left_out_and_other_biases_are_not(tmp_path):
    """A Llama has no biases, but old quantisers gave one of zeros to every matrix."""
    tensors, means = packers.make(tmp_path, packers.gptq, GPTQ)
    bias = "model.layers.0.mlp.up_proj.bias"
    packers.write(tmp_path / "model.safetensors", tensors | {bias: packers.half(np.zeros(64))})
    assert bias not in load(tmp_path) and len(load(tmp_path)) == len(means)
    packers.write(tmp_path / "model.safetensors", tensors | {bias: packers.half(np.eye(64)[3])})
    with pytest.raises(MinillmError, match=rf"{bias} has no place in this model"):
        stored(tmp_path)


def test_zero_points_of_symmetric_bytes_must_be_zero(tmp_path):
    packing = compressed("naive-quantized", num_bits=8, type="int", strategy="channel", symmetric=True)
    tensors, means = packers.make(tmp_path, packers.bytes_of_integers, packing)
    zeros, name = np.zeros((64, 1), np.int8), "model.layers.1.mlp.up_proj.weight_zero_point"
    packers.write(tmp_path / "model.safetensors", tensors | {name: ("I8", zeros)})
    assert load(tmp_path).keys() == means.keys()
    packers.write(tmp_path / "model.safetensors", tensors | {name: ("I8", zeros + 1)})
    with pytest.raises(MinillmError, match=rf"{name} has no place in this model"):
        load(tmp_path)


def test_what_sees_is_left_out_however_it_is_packed(tmp_path):
    tensors, means = packers.make(tmp_path, packers.mlx, mlx(4))
    tower = {
        "vision_tower.fc.weight": ("U32", np.zeros((3, 5), np.uint32)),
        "vision_tower.fc.scales": packers.half([1]),
    }
    packers.write(tmp_path / "model.safetensors", tensors | tower)
    assert load(tmp_path).keys() == means.keys()


def test_the_digest_is_of_all_parts(tmp_path):
    tensors, _ = packers.make(tmp_path, packers.gptq, ASYMMETRIC, **PHI3)
    packers.make(tmp_path, partial(packers.gptq, symmetric=False), ASYMMETRIC, **PHI3)
    seen = {stored(tmp_path).digest}
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        name = f"model.layers.1.self_attn.qkv_proj.{part}"
        dtype, array = tensors[name]
        changed = array.copy()
        changed.flat[-1] += 1
        packers.write(tmp_path / "model.safetensors", tensors | {name: (dtype, changed)})
        seen.add(stored(tmp_path).digest)
    assert len(seen) == 5 and all(digest.startswith("safetensors F16 Q4_1 ") for digest in seen)


# A program answers


def test_the_command_line_answers_from_a_packed_folder(tmp_path, capfd):
    packer, packing, *_ = CASES["awq"]
    _, means = packers.make(tmp_path / "packed", packer, packing, **QWEN2)
    plain = packers.make_plain(tmp_path / "plain", means, **QWEN2)
    answers, flags = [], ("-n", "12", "-p", "tell me all of it", "--temp", "0", "-q", "--dtype", "float32")
    for folder in (tmp_path / "packed", plain):
        assert run.main(["-m", str(folder), *flags]) == 0
        answers.append(capfd.readouterr().out)
    assert answers[0] == answers[1] and len(answers[0]) > 4


# What loading costs


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak resident memory is read from /proc")
def test_peak_memory_is_the_weights_and_one_matrix(tmp_path):
    """100 MB of AWQ, 4 layers of Llama: pages of matrices that became blocks do not stay resident."""
    values = {"architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "num_attention_heads": 16, "vocab_size": 256}
    values |= {
        "intermediate_size": 8192,
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
        **inside(AWQ, group_size=64),
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    shapes = {"self_attn.q_proj": (2048, 2048), "mlp.gate_proj": (8192, 2048), "mlp.down_proj": (2048, 8192)}
    shapes |= {f"self_attn.{name}_proj": (2048, 2048) for name in "kvo"} | {"mlp.up_proj": (8192, 2048)}
    tensors = {"model.embed_tokens.weight": packers.half(np.ones((256, 2048)))}
    tensors["model.norm.weight"] = packers.half(np.ones(2048))
    for layer in range(3):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = packers.half(np.ones(2048))
        for name, (n_out, n_in) in shapes.items():
            at = f"model.layers.{layer}.{name}."
            tensors[at + "qweight"] = packers.integers(np.full((n_in, n_out // 8), 0x12345678))
            tensors[at + "qzeros"] = packers.integers(np.full((n_in // 64, n_out // 8), 0x88888888))
            tensors[at + "scales"] = packers.half(np.full((n_in // 64, n_out), 0.01))
    packers.write(tmp_path / "model.safetensors", tensors)
    program = """
import re, sys
from pathlib import Path
from minillm.files import hub
from minillm.files.stored_model import open_model
from minillm.files.weights import load_weights
from minillm.ops.numpy_ops import NUMPY
def resident(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
stored = open_model(hub.resolve(sys.argv[1]))
before = resident("VmHWM")
weights = load_weights(stored, dtype="stored", progress=False)
print(resident("VmHWM") - before, sum(w.nbytes for w in weights.values()), stored.weight_bytes("stored", NUMPY))
"""
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, loaded, foretold = map(int, run.stdout.split())
    assert loaded == foretold > 100e6
    largest = 2 * 2048 * 8192 // 2
    assert grown < loaded + largest + 32 * 2**20, f"{(grown - loaded) / 2**20:.1f} MiB beyond the weights"
