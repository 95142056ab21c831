"""Packed checkpoints that are damaged or of a kind that minillm does not read: one sentence that names what."""

import json
from functools import partial

import numpy as np
import packers
import pytest
from packed_cases import AWQ, CASES, CHANNELS, FP8, GPTQ, WORDS, compressed, inside, load, mlx, said, stored

from minillm.errors import MinillmError
from minillm.files.config_json import config_from_json

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
    ("gptq", changed("scales", written(np.nan)), "o_proj.weight has numbers that no float16 holds"),
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
