"""Every way in which a checkpoint may be packed that minillm reads: its packer, its config, what it becomes."""

from functools import partial

import packers

from minillm.files import hub
from minillm.files.stored_model import open_model
from minillm.files.weights import load_weights


def said(method, **settings):
    return {"quantization_config": {"quant_method": method, **settings}}


def compressed(format, **weights):
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8}}}
    return said("compressed-tensors", format=format, config_groups=groups, ignore=["lm_head"], kv_cache_scheme=None)


def inside(base, **change):
    (key, value), *_ = base.items()
    return {key: value | change}


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
