"""Packed checkpoints: what is held is what their quantisers meant, by packers that share nothing with minillm; what is
damaged or unknown is refused by name."""

import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import packers
import pytest
from packers import PHI3, QWEN2

from minillm import LLM
from minillm.errors import MinillmError
from minillm.files import hub
from minillm.files.config_json import config_from_json
from minillm.files.formats import F32, FORMATS
from minillm.files.stored_model import open_model
from minillm.files.weights import load_weights
from minillm.programs import run


def said(method, **settings):
    return {"quantization_config": {"quant_method": method, **settings}}


def compressed(format, **weights):
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8}}}
    return said("compressed-tensors", format=format, config_groups=groups, ignore=["lm_head"], kv_cache_scheme=None)


AWQ = said("awq", bits=4, group_size=32, zero_point=True, version="gemm", modules_to_not_convert=None)
GPTQ = said("gptq", bits=4, group_size=32, sym=True, desc_act=False, checkpoint_format="gptq", damp_percent=0.1)
ASYMMETRIC = said("gptq", bits=4, group_size=32, sym=False, desc_act=False)
FP8 = said("fp8", activation_scheme="dynamic", fmt="e4m3", weight_block_size=[24, 20])
WORDS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, "actorder": None}
CHANNELS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "block_structure": None}


def mlx(bits, **more):
    return {"quantization": {"group_size": 32, "bits": bits, **more}}


# name -> (packer, what config.json says, the format that matrices are held in, their error: relative, root mean square)
CASES = {
    "awq": (packers.awq, AWQ, "Q4_1", 5e-4),
    "awq, rows": (partial(packers.awq, group=-1), said("awq", bits=4, group_size=-1, zero_point=True), "Q4_1", 5e-4),
    "gptq": (packers.gptq, GPTQ, "Q4_0", 0),
    "gptq, rows": (partial(packers.gptq, group=-1), said("gptq", bits=4, group_size=-1, sym=True), "Q4_0", 0),
    "gptq, asymmetric": (partial(packers.gptq, symmetric=False), ASYMMETRIC, "Q4_1", 5e-4),
    "gptq, v2": (
        partial(packers.gptq, symmetric=False, stored_less=0),
        said("gptq", bits=4, group_size=32, sym=False, checkpoint_format="gptq_v2"),
        *("Q4_1", 5e-4),
    ),
    "gptq, 8 bits": (partial(packers.gptq, bits=8), said("gptq", bits=8, group_size=32, sym=True), "Q8_0", 0),
    "gptq, 8 bits, asymmetric": (
        partial(packers.gptq, bits=8, symmetric=False),
        said("gptq", bits=8, group_size=32, sym=False),
        *("Q8_0", 6e-3),
    ),
    "gptq, act-order": (
        partial(packers.gptq, scattered=True),
        said("gptq", bits=4, group_size=32, sym=True, desc_act=True),
        *("Q8_0", 6e-3),
    ),
    "fp8, blocks": (packers.fp8, FP8, "F16", 4e-4),
    "fp8, matrices": (
        partial(packers.fp8, block="tensor"),
        said("fp8", activation_scheme="static", weight_block_size=None, modules_to_not_convert=["lm_head"]),
        *("F16", 4e-4),
    ),
    "compressed, fp8 in rows": (
        partial(packers.fp8, block="channel", name="weight_scale"),
        compressed("float-quantized", **CHANNELS),
        *("F16", 3e-4),
    ),
    "compressed, fp8 in blocks": (
        partial(packers.fp8, name="weight_scale"),
        compressed("float-quantized", **CHANNELS | {"strategy": "block", "block_structure": [24, 20]}),
        *("F16", 4e-4),
    ),
    "compressed, words": (packers.words_of_integers, compressed("pack-quantized", **WORDS), "Q4_0", 0),
    "compressed, words, asymmetric": (
        partial(packers.words_of_integers, symmetric=False),
        compressed("pack-quantized", **WORDS | {"symmetric": False}),
        *("Q4_1", 5e-4),
    ),
    "compressed, words of 8 bits": (
        partial(packers.words_of_integers, bits=8, group=-1),
        compressed("pack-quantized", **WORDS | {"num_bits": 8, "strategy": "channel", "group_size": None}),
        *("Q8_0", 0),
    ),
    "compressed, words of 8 bits, asymmetric": (
        partial(packers.words_of_integers, bits=8, symmetric=False),
        compressed("pack-quantized", **WORDS | {"num_bits": 8, "symmetric": False}),
        *("Q8_0", 6e-3),
    ),
    "compressed, bytes": (
        packers.bytes_of_integers,
        compressed("int-quantized", **WORDS | {"num_bits": 8, "strategy": "channel", "group_size": None}),
        *("Q8_0", 0),
    ),
    "mlx, 2 bits": (partial(packers.mlx, bits=2), mlx(2), "Q4_1", 0),
    "mlx, 3 bits": (partial(packers.mlx, bits=3), mlx(3), "Q4_1", 0),
    "mlx": (packers.mlx, mlx(4, mode="affine"), "Q4_1", 0),
    "mlx, float16": (partial(packers.mlx, rounded=packers.f16), mlx(4), "Q4_1", 0),
    "mlx, 5 bits": (partial(packers.mlx, bits=5), mlx(5), "Q5_1", 0),
    "mlx, 6 bits": (partial(packers.mlx, bits=6), mlx(6), "Q8_0", 6e-3),
    "mlx, 8 bits": (partial(packers.mlx, bits=8), mlx(8), "Q8_0", 6e-3),
}


def stored(folder):
    return open_model(hub.resolve(str(folder)))


def load(folder, dtype="stored"):
    return load_weights(stored(folder), dtype=dtype)


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
    assert model.weight_bytes("stored") == sum(weight.nbytes for weight in weights.values())
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


# Damage


O_PROJ = "model.layers.1.self_attn.o_proj"


def changed(part, change):
    """A damage: the part of one matrix, (dtype, array), becomes change(dtype, array), or is away: None."""

    def damage(tensors):
        tensors = dict(tensors)
        dtype, array = tensors.pop(f"{O_PROJ}.{part}")
        return tensors if change is None else tensors | {f"{O_PROJ}.{part}": change(dtype, array)}

    return damage


def cut(dtype, array):
    return dtype, array[:-1]


def written(value):
    """The last number of the array becomes `value`."""

    def change(dtype, array):
        array = np.array(array)
        array.flat[-1] = value
        return dtype, array

    return change


DAMAGES = [
    ("awq", changed("scales", None), "o_proj.qweight has no scales beside it"),
    ("awq", changed("qweight", None), "o_proj.qzeros has no qweight beside it"),
    (
        "awq",
        changed("scales", cut),
        r"o_proj.scales has shape \[0, 32\], but .*o_proj.qweight and .* ask for \[1, 32\]",
    ),
    ("awq", changed("qzeros", lambda d, a: ("F32", np.float32(a))), "o_proj.qzeros is of type F32; .* I32, U32 here"),
    ("awq", changed("scales", lambda d, a: ("I16", np.int16(a))), "o_proj.scales is of type I16; .* F32, F16, BF16"),
    (
        "awq",
        changed("qweight", lambda d, a: ("F32", np.float32(a))),
        r"qweight is F32 \[32, 4\]; it must be a matrix of",
    ),
    ("awq", changed("qweight", lambda d, a: (d, a.ravel())), r"qweight is I32 \[128\]; it must be a matrix of I32"),
    ("awq", changed("scales", written(np.inf)), "o_proj.weight has numbers that no float16 holds"),
    ("gptq", changed("g_idx", None), "o_proj.qweight has no g_idx beside it"),
    ("gptq", changed("g_idx", written(7)), "o_proj.g_idx has a group beyond the 1 there are"),
    ("gptq, act-order", changed("g_idx", cut), r"o_proj.g_idx has shape \[31\]"),
    ("gptq", changed("qzeros", written(0x77777770)), "o_proj.weight has zero points other than 8, .* symmetric"),
    ("gptq, asymmetric", changed("qzeros", written(0x0F111111)), r"o_proj.qzeros has a zero point of 15 \+ 1"),
    ("fp8, blocks", changed("weight_scale_inv", None), "o_proj.weight has no weight_scale beside it"),
    ("fp8, blocks", changed("weight_scale_inv", cut), r"o_proj.weight_scale_inv has shape \[1, 2\], .* \[2, 2\]"),
    ("fp8, blocks", changed("weight", lambda d, a: ("F8_E5M2", a)), "o_proj.weight is F8_E5M2 .* matrix of F8_E4M3"),
    ("fp8, blocks", changed("weight", written(127)), "o_proj.weight has numbers that no float16 holds"),
    ("fp8, blocks", changed("weight_scale_inv", written(1e9)), "o_proj.weight has numbers that no float16 holds"),
    (
        "compressed, fp8 in rows",
        changed("weight_scale", cut),
        r"weight_scale has shape \[31, 1\], .* or \[1\] or \[32, 1\]",
    ),
    ("compressed, words", changed("weight_scale", None), "o_proj.weight_packed has no weight_scale beside it"),
    ("compressed, words, asymmetric", changed("weight_zero_point", None), "weight_packed has no weight_zero_point"),
    ("compressed, bytes", changed("weight_scale", None), "o_proj.weight has no weight_scale beside it"),
    ("mlx", changed("biases", None), "o_proj.weight has no biases beside it"),
    ("mlx", changed("scales", lambda d, a: (d, a[:, :0])), r"o_proj.scales has shape \[32, 0\], .* ask for \[32, 1\]"),
    ("mlx", changed("weight", lambda d, a: (d, a[:, :2])), r"o_proj.weight has rows of 16 weights in groups of 32"),
    (
        "mlx",
        changed("weight", lambda d, a: (d, np.repeat(a, 2, 1))),
        r"o_proj.scales has shape \[32, 1\], .* \[32, 2\]",
    ),
]


@pytest.mark.parametrize("case, damage, words", DAMAGES)
def test_damage_is_named(tmp_path, case, damage, words):
    packer, packing, *_ = CASES[case]
    tensors, _ = packers.make(tmp_path, packer, packing)
    packers.write(tmp_path / "model.safetensors", damage(tensors))
    with pytest.raises(MinillmError, match=words) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/model.safetensors: tensor {O_PROJ}")
    assert "\n" not in str(caught.value)


def test_groups_that_do_not_lie_together_and_nothing_says_so(tmp_path):
    """With rows of two groups, as down_proj has here."""
    packers.make(tmp_path, partial(packers.gptq, scattered=True), GPTQ)
    with pytest.raises(MinillmError, match="down_proj.weight has groups that do not lie together.*desc_act"):
        load(tmp_path)


@pytest.mark.parametrize("case", ["awq", "gptq", "fp8, blocks", "compressed, words", "mlx"])
def test_a_packed_folder_whose_config_does_not_say_so(tmp_path, case):
    packers.make(tmp_path, CASES[case][0], {})
    with pytest.raises(MinillmError, match="is a part of a packed matrix, but config.json has no quantization_config"):
        stored(tmp_path)


# Refused by key, value and the way out


def inside(base, **change):
    (key, value), *_ = base.items()
    return {key: value | change}


def weights_of(base, **change):
    values = json.loads(json.dumps(base))
    values["quantization_config"]["config_groups"]["group_0"]["weights"] |= change
    return values


INTS, FLOATS8 = compressed("pack-quantized", **WORDS), compressed("float-quantized", **CHANNELS)
REFUSED = [
    (
        said("bitsandbytes", load_in_4bit=True),
        r"quantization_config: quant_method = 'bitsandbytes' .* reads awq, gptq, fp8",
    ),
    ({"quantization_config": {"load_in_8bit": True}}, "quantization_config: quant_method = None"),
    ({"quantization_config": "awq"}, "quantization_config = 'awq' .* must be an object"),
    *((said(method, bits=4), f"quant_method = '{method}'") for method in ("exl2", "hqq", "aqlm", "mxfp4", "modelopt")),
    (said(["awq"]), r"quant_method = \['awq'\]"),
    (inside(AWQ, version="gemv"), r"quantization_config \(awq\): version = 'gemv' .* reads gemm or GEMM"),
    (inside(AWQ, bits=3), r"\(awq\): bits = 3 .* reads 4"),
    (inside(AWQ, zero_point=False), r"\(awq\): zero_point = False"),
    (inside(AWQ, group_size=0), r"\(awq\): group_size = 0"),
    (inside(AWQ, group_size=None), r"\(awq\): group_size is missing"),
    (inside(GPTQ, bits=3), r"\(gptq\): bits = 3 .* reads 4 or 8"),
    (inside(GPTQ, bits=2), r"\(gptq\): bits = 2"),
    (inside(GPTQ, checkpoint_format="marlin"), "checkpoint_format = 'marlin' .* reads gptq or gptq_v2"),
    (inside(GPTQ, is_marlin_format=True), "is_marlin_format = True"),
    (inside(GPTQ, sym="yes"), "sym = 'yes'"),
    (inside(FP8, fmt="e5m2"), "fmt = 'e5m2' .* reads e4m3"),
    (inside(FP8, weight_block_size=[128]), r"weight_block_size = \[128\] .* must be \[rows, columns\]"),
    (inside(INTS, format="nvfp4-pack-quantized"), r"\(compressed-tensors\): format = 'nvfp4-pack-quantized'"),
    (
        inside(INTS, format="mxfp4-pack-quantized"),
        "format = 'mxfp4-pack-quantized' .* naive-quantized or pack-quantized",
    ),
    (inside(INTS, format="marlin-24"), "format = 'marlin-24'"),
    (inside(INTS, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config = .*sparse-24-bitmask"),
    (inside(INTS, transform_config={"config_groups": {"u": {}}}), "transform_config = "),
    (inside(INTS, config_groups={}), "config_groups = {} .* one kind of weights"),
    (inside(INTS, config_groups={"a": {"weights": WORDS}, "b": {"weights": CHANNELS}}), "config_groups = .* one kind"),
    (weights_of(INTS, num_bits=3), "weights: num_bits = 3 .* reads 4 or 8"),
    (weights_of(INTS, type="float"), "weights: type = 'float' .* reads int"),
    (weights_of(INTS, actorder="group"), "weights: actorder = 'group'"),
    (weights_of(INTS, strategy="tensor_group"), "weights: strategy = 'tensor_group'"),
    (weights_of(FLOATS8, strategy="group"), "weights: strategy = 'group' .* reads tensor or channel or block"),
    (weights_of(FLOATS8, num_bits=4), "weights: num_bits = 4 .* reads 8"),
    (mlx(4, mode="mxfp4"), r"quantization \(mlx\): mode = 'mxfp4' .* reads affine"),
    (mlx(7), r"quantization \(mlx\): bits = 7 .* reads 2 or 3 or 4 or 5 or 6 or 8"),
    (mlx(4, rounding="up"), r"quantization \(mlx\): rounding = 'up'"),
    (mlx(4, lm_head={"group_size": 64, "bits": 9}), r"quantization \(mlx\): lm_head: bits = 9"),
    (
        mlx(4) | {"quantization_config": {"group_size": 64, "bits": 4}},
        "quantization = .* contradicts quantization_config",
    ),
]


@pytest.mark.parametrize("packing, words", REFUSED)
def test_refused_by_key_value_and_way_out(packing, words):
    values = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 40}
    values |= {"intermediate_size": 96, "num_hidden_layers": 2}
    config_from_json(values | AWQ, "m")  # what is wrong is the packing
    with pytest.raises(MinillmError, match=words) as caught:
        config_from_json(values | packing, "m")
    text = str(caught.value)
    assert text.startswith("m: ") and "\n" not in text
    assert "must be" in text or "missing" in text or "take the 16-bit repository of the model, or a GGUF of it" in text


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
def resident(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
stored = open_model(hub.resolve(sys.argv[1]))
before = resident("VmHWM")
weights = load_weights(stored, dtype="stored", progress=False)
print(resident("VmHWM") - before, sum(w.nbytes for w in weights.values()), stored.weight_bytes("stored"))
"""
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, loaded, foretold = map(int, run.stdout.split())
    assert loaded == foretold > 100e6
    largest = 2 * 2048 * 8192 // 2
    assert grown < loaded + largest + 32 * 2**20, f"{(grown - loaded) / 2**20:.1f} MiB beyond the weights"
