"""Weights from safetensors and GGUF: the right numbers, whatever the model is stored as, and no foreign model."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
from blocks import BLOCKS, random_blocks
from model_files import (
    BIASED,
    CONFIG,
    MODEL,
    NORM,
    UP,
    bf16,
    from_bf16,
    gguf_name,
    random_model,
    raw_model,
    stored,
    write_gguf,
    write_raw,
    write_safetensors,
    write_shards,
)

from minillm.errors import MinillmError, UsageError
from minillm.files.formats import FORMATS
from minillm.files.hub import ModelFiles
from minillm.files.stored_model import open_model, tensor_shapes
from minillm.files.weights import Weight, load_weights
from minillm.ops.numpy_ops import NUMPY


def load(path, config=CONFIG, dtype="stored"):
    return load_weights(stored(path, config), dtype=dtype, progress=False)


def assert_same(weights, want, config, path, dtype):
    assert set(weights) == set(want)
    for name, array in want.items():
        weight = weights[name]
        assert weight.shape == array.shape
        assert weight.widened().format.name == "F32"
        if array.ndim == 1 or dtype == "float32":
            assert weight.format.name == "F32" and weight.data.dtype == np.float32
        np.testing.assert_array_equal(weight.widened().data, array, err_msg=name)
        np.testing.assert_array_equal(weight.rows(1, 5), array[1:5], err_msg=name)
        assert weight.rows(1, 5).dtype == np.float32
    held = sum(w.format.held.nbytes(math.prod(w.shape)) for w in weights.values())
    assert stored(path, config).weight_bytes(dtype, NUMPY) == held
    assert all(w.nbytes == w.format.nbytes(math.prod(w.shape)) for w in weights.values())


@pytest.mark.parametrize("dtype", ["float32", "stored"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("config", [CONFIG, BIASED], ids=["plain", "biased"])
def test_safetensors(tmp_path, kind, dtype, config):
    model = random_model(config)
    write_safetensors(tmp_path / "model.safetensors", model, kind)
    round_trip = {
        "F32": np.array,
        "F16": lambda a: a.astype(np.float16).astype(np.float32),
        "BF16": lambda a: from_bf16(bf16(a)),
    }
    want = {name: round_trip[kind](array) for name, array in model.items()}
    weights = load(tmp_path, config, dtype)
    assert_same(weights, want, config, tmp_path, dtype)
    assert weights["model.norm.weight"].format.name == "F32"
    if dtype == "stored":
        assert weights["model.layers.0.mlp.up_proj.weight"].format.name == kind


@pytest.mark.parametrize("dtype", ["float32", "stored"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_gguf(tmp_path, kind, dtype):
    model = random_model(BIASED)
    path = write_gguf(tmp_path / "model.gguf", model, BIASED, kind)
    number = gguf.GGMLQuantizationType[kind]
    want = {n: gguf.dequantize(gguf.quantize(a, number), number) if a.ndim == 2 else a for n, a in model.items()}
    weights = load(path, BIASED, dtype)
    assert_same(weights, want, BIASED, path, dtype)
    if dtype == "stored":
        assert weights["model.layers.1.self_attn.q_proj.weight"].format.name == kind


def write_embedding(path, config, kind, blocks):
    """A .gguf whose embedding is `blocks`, all else float32."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, array in random_model(config).items():
        if name == "model.embed_tokens.weight":
            writer.add_tensor("token_embd.weight", blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


OF_256 = replace(CONFIG, dim=256, n_layers=1, tied_head=True)


@pytest.mark.parametrize("kind", [name for name, format in FORMATS.items() if format.block > 1])
def test_any_format_of_blocks_is_loaded(tmp_path, kind):
    """As it is stored, and with the values of gguf; what no kernel reads becomes Q8_0."""
    blocks = random_blocks(np.random.default_rng(0), kind, OF_256.vocab_size, 256, 1.0)
    path = write_embedding(tmp_path / "k.gguf", OF_256, kind, blocks)
    weights, want = load(path, OF_256), gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    weight = weights["model.embed_tokens.weight"]
    if FORMATS[kind].kind is None:
        assert weight.format is FORMATS["Q8_0"]
        want = gguf.dequantize(gguf.quantize(want, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0)
    else:
        assert weight.format is FORMATS[kind] and not weight.data.flags.writeable
    np.testing.assert_array_equal(weight.widened().data, want)
    held = sum(w.format.held.nbytes(math.prod(w.shape)) for w in weights.values())
    assert stored(path, OF_256).weight_bytes("stored", NUMPY) == held
    floats = load(path, OF_256, "float32")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(floats.data, gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]))


# relative root mean square error of Q8_0 made of what no kernel reads
ROUNDED = {"IQ1_S": 3e-3, "IQ1_M": 6e-3, "IQ2_XXS": 6e-3, "IQ2_XS": 6e-3, "IQ2_S": 6e-3, "IQ3_XXS": 6e-3, "IQ3_S": 6e-3}
ROUNDED |= {"TQ1_0": 4e-4, "TQ2_0": 6e-3, "NVFP4": 8e-3}


@pytest.mark.parametrize("kind, share", ROUNDED.items())
def test_how_far_q8_0_is_from_what_no_kernel_reads(kind, share):
    assert set(ROUNDED) == {name for name, format in FORMATS.items() if format.kind is None}
    blocks = random_blocks(np.random.default_rng(0), kind, 64, 1024, 1.0)
    exact = np.float64(gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]))
    made = Weight(FORMATS[kind], blocks, exact.shape).quantized(FORMATS["Q8_0"])
    error = np.sqrt(((made.rows(0, 64) - exact) ** 2).mean() / (exact**2).mean())
    assert share / 3 < error < share


@pytest.mark.parametrize("kind, n_bytes", [("I8", 256), ("Q8_K", 292), ("Q8_1", 320), ("Q1_0", 36)])
def test_types_that_nobody_can_read_are_refused_before_loading(tmp_path, kind, n_bytes):
    blocks = np.zeros((OF_256.vocab_size, n_bytes), np.int8 if kind == "I8" else np.uint8)
    path = write_embedding(tmp_path / "k.gguf", OF_256, kind, blocks)
    with pytest.raises(MinillmError, match=rf"k.gguf: tensor token_embd.weight is of type {kind}, .* cannot read"):
        stored(path, OF_256)


@pytest.mark.parametrize("kind", BLOCKS)
def test_any_block_is_what_the_library_says(kind):
    """All bytes of the quants, scales of every size, more blocks than go through at a time."""
    rng, format = np.random.default_rng(0), FORMATS[kind]
    n = 4 * (2**18 // format.block // 4 + 100)
    blocks = rng.integers(0, 256, (n, format.block_bytes), dtype=np.uint8)
    scales = rng.standard_normal((n, 2)) * 10.0 ** rng.integers(-6, 4, (n, 2))
    halves = scales[:, : 2 if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else 1].astype(np.float16).view(np.uint8)
    at = format.block_bytes - 2 if kind == "Q6_K" else 0
    blocks[:, at : at + halves.shape[1]] = halves
    data = blocks.reshape(n // 4, 4 * format.block_bytes)
    want = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    weight = Weight(format, data, (n // 4, 4 * format.block))
    np.testing.assert_array_equal(weight.widened().data, want)
    np.testing.assert_array_equal(weight.rows(len(data) - 10, len(data)), want[-10:])
    assert weight.nbytes == data.nbytes


def test_shards(tmp_path):
    model = random_model(CONFIG)
    write_shards(tmp_path, model)
    assert_same(load(tmp_path), model, CONFIG, tmp_path, "stored")


def test_stored_is_a_view_of_the_map(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", random_model(CONFIG), "BF16")
    data = load(tmp_path)["model.embed_tokens.weight"].data
    assert data.dtype == np.uint16 and data.base is not None and not data.flags.writeable
    float32 = load(tmp_path, dtype="float32")["model.embed_tokens.weight"].data
    assert float32.base is None


def test_unaligned_tensors_are_copied(tmp_path):
    """The format does not align: a header of odd length puts every float at an odd address."""
    model = random_model(CONFIG)
    write_raw(tmp_path / "model.safetensors", *raw_model(model), pad=1)
    weights = load(tmp_path)
    assert_same(weights, model, CONFIG, tmp_path, "stored")
    assert all(weight.data.flags.aligned for weight in weights.values())


def test_harmless_extras_are_left_out(tmp_path):
    config = replace(CONFIG, tied_head=True)
    model = random_model(config)
    extra = {"lm_head.weight": np.zeros((40, 64)), "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(16)}
    write_safetensors(tmp_path / "model.safetensors", model | extra)
    assert set(load(tmp_path, config)) == set(model)


# -- refused: a model whose tensors are not those of the config


def without(model, *names):
    return {n: a for n, a in model.items() if n not in names}


FOREIGN = [
    (without(MODEL, UP), "lacks tensor model.layers.1.mlp.up_proj.weight"),
    (without(MODEL, "lm_head.weight"), "lacks tensor lm_head.weight"),
    (without(MODEL, *[n for n in MODEL if ".1." in n]), "lacks tensor .* and 6 more"),
    (MODEL | {UP: np.zeros((95, 64), np.float32)}, rf"{UP} has shape \[95, 64\], but the config asks for \[96, 64\]"),
    (MODEL | {UP: np.zeros((64, 96), np.float32)}, rf"{UP} has shape \[64, 96\]"),
    (MODEL | {NORM: np.zeros((1, 64), np.float32)}, rf"{NORM} has shape \[1, 64\]"),
    (
        MODEL | {"model.layers.0.self_attn.q_proj.bias": np.zeros(128, np.float32)},
        "q_proj.bias has no place.*qkv_bias",
    ),
    (MODEL | {n.replace(".1.", ".2."): a for n, a in MODEL.items() if ".1." in n}, r"model.layers.2.* has no place"),
    (MODEL | {"model.layers.0.self_attn.q_norm.weight": np.zeros(32, np.float32)}, "q_norm.weight has no place"),
]


@pytest.mark.parametrize(("model", "said"), FOREIGN)
def test_foreign_safetensors(tmp_path, model, said):
    write_safetensors(tmp_path / "model.safetensors", model)
    with pytest.raises(MinillmError, match=said) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(MinillmError, match=said):
        stored(tmp_path, CONFIG).weight_bytes("float32", NUMPY)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({UP: None}, "lacks tensor model.layers.1.mlp.up_proj.weight"),
        ({UP: np.zeros((95, 64), np.float32)}, r"blk.1.ffn_up.weight has shape \[95, 64\]"),
        ({"blk.0.attn_q_norm.weight": np.zeros(32, np.float32)}, "blk.0.attn_q_norm.weight has no place"),
        ({"blk.0.attn_q.bias": np.zeros(128, np.float32)}, "blk.0.attn_q.bias has no place"),
        ({"blk.0.ffn_gate.0.weight": np.zeros(32, np.float32)}, "blk.0.ffn_gate.0.weight has no place"),
        ({"blk.2.attn_norm.weight": np.zeros(64, np.float32)}, "blk.2.attn_norm.weight has no place"),
    ],
)
def test_foreign_gguf(tmp_path, change, said):
    model = {n: change.get(n, a) for n, a in MODEL.items()}
    extra = {n: a for n, a in change.items() if n.startswith("blk")}
    path = write_gguf(tmp_path / "m.gguf", {n: a for n, a in model.items() if a is not None}, CONFIG, extra=extra)
    with pytest.raises(MinillmError, match=said) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_gguf_head_that_the_config_does_not_expect(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", MODEL, CONFIG)
    with pytest.raises(MinillmError, match="tensor output.weight has no place"):
        load(path, replace(CONFIG, tied_head=True))


def test_gguf_types_that_cannot_be_read(tmp_path):
    model = without(MODEL, UP, NORM)
    path = write_gguf(
        tmp_path / "m.gguf",
        model,
        CONFIG,
        extra={gguf_name(NORM): MODEL[NORM], gguf_name(UP): np.zeros((96, 64), np.int8)},
    )
    with pytest.raises(MinillmError, match="tensor blk.1.ffn_up.weight is of type I8"):
        load(path)


def test_unknown_dtype(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", MODEL)
    for call in (load, lambda path, dtype: stored(path, CONFIG).weight_bytes(dtype, NUMPY)):
        with pytest.raises(UsageError, match="'int8'; use float32, stored, q8_0 or q4_0"):
            call(tmp_path, dtype="int8")


# -- blocks made at load


def q8_0_of(block):
    """One block as quantize_row_q8_0_ref of ggml-quants.c makes it, number by number in float32."""
    f = np.float32
    scale = f(max(abs(f(x)) for x in block) / f(127))
    inverse = f(1) / scale if scale else f(0)
    rounded = [math.copysign(math.floor(abs(float(f(x) * inverse)) + 0.5), x) for x in block]  # roundf
    return np.float16(scale).tobytes() + np.array(rounded).astype(np.int8).tobytes()


def q4_0_of(block):
    """quantize_row_q4_0_ref: the number of the largest magnitude becomes -8."""
    f = np.float32
    largest = f(0)
    for x in block:
        if abs(x) > abs(largest):
            largest = f(x)
    scale = f(largest / f(-8))
    inverse = f(1) / scale if scale else f(0)
    quants = [min(15, int(f(f(x) * inverse) + f(8.5))) for x in block]
    return np.float16(scale).tobytes() + bytes(quants[i] | quants[i + 16] << 4 for i in range(16))


def test_blocks_are_rounded_as_by_ggml():
    """Scales of every size, ties, a block of zeros, a largest number of either sign and twice."""
    rng = np.random.default_rng(3)
    rows = (rng.standard_normal((40, 96)) * 10.0 ** rng.integers(-6, 4, (40, 1))).astype(np.float32)
    rows[0] = 0
    rows[1:3] = rng.integers(-16, 16, (2, 96)) / 2  # of the scale 1: halves
    rows[1, ::32], rows[2, ::32] = -8, 127
    rows[3, :2], rows[4, :2] = (5000, -5000), (-5000, 5000)
    for kind, reference in (("Q8_0", q8_0_of), ("Q4_0", q4_0_of)):
        made = Weight.floats(rows).quantized(FORMATS[kind])
        assert (made.format.name, made.shape, made.data.dtype) == (kind, rows.shape, np.uint8)
        for row, blocks in zip(rows, made.data, strict=True):
            assert blocks.tobytes() == b"".join(reference(block) for block in row.reshape(-1, 32))


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("config", [CONFIG, BIASED], ids=["untied", "tied"])
@pytest.mark.parametrize("file", ["safetensors", "gguf"])
def test_blocks_at_load(tmp_path, file, kind, dtype, config):
    model = random_model(config)
    path = tmp_path if file == "safetensors" else tmp_path / "model.gguf"
    if file == "gguf":
        write_gguf(path, model, config, kind)
    else:
        write_safetensors(path / "model.safetensors", model, kind)
    floats, weights = load(path, config, "float32"), load(path, config, dtype)
    head = "model.embed_tokens.weight" if config.tied_head else "lm_head.weight"
    for name, array in model.items():
        if array.ndim == 1:
            np.testing.assert_array_equal(weights[name].data, floats[name].data)
            continue
        expected = "Q8_0" if name == head else dtype.upper()
        assert weights[name].format.name == expected and weights[name].shape == array.shape
        blocks = gguf.quantize(floats[name].data, gguf.GGMLQuantizationType[expected])
        np.testing.assert_array_equal(weights[name].data, blocks)
    assert stored(path, config).weight_bytes(dtype, NUMPY) == sum(w.nbytes for w in weights.values())


def test_blocks_of_blocks_and_of_odd_rows_are_refused(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_model(CONFIG), CONFIG, "Q5_0")
    with pytest.raises(MinillmError, match=r"model.gguf: tensor .* is quantised already \(Q5_0\)"):
        load(path, CONFIG, "q8_0")
    odd = replace(CONFIG, ffn_dim=100)
    write_safetensors(tmp_path / "model.safetensors", random_model(odd))
    with pytest.raises(MinillmError, match=r"down_proj.weight has rows of 100, which are no blocks of 32"):
        stored(tmp_path, odd).weight_bytes("q4_0", NUMPY)


# -- what loading costs


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak resident memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "q4_0"])
def test_peak_memory_is_the_weights_and_one_tensor(tmp_path, dtype):
    """300 MB of bfloat16: the mapped pages of tensors that were widened or made blocks of must not stay resident."""
    config = replace(CONFIG, n_layers=12, dim=1024, ffn_dim=4096, vocab_size=1000, tied_head=True)
    header, size = {}, 0
    for name, shape in tensor_shapes(config).items():
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, size + nbytes]}
        size += nbytes
    assert size > 300e6
    write_raw(tmp_path / "model.safetensors", header, b"")
    with open(tmp_path / "model.safetensors", "ab") as file:
        block = bf16(np.linspace(-1, 1, 2**20)).tobytes()
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
    program = f"""
import re, sys
from pathlib import Path
from minillm.files.config import ModelConfig, RopeConfig
from minillm.files.stored_model import StoredModel, folder_tensors
from minillm.files.weights import load_weights
from minillm.ops.numpy_ops import NUMPY
def resident(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
config, folder = {config!r}, Path(sys.argv[1])
stored = StoredModel(folder, config, folder_tensors(folder, config), None)
from gguf import quantize  # a package's own memory is not what is measured
before = resident("VmHWM")
weights = load_weights(stored, dtype={dtype!r}, progress=False)
print(resident("VmHWM") - before, sum(w.nbytes for w in weights.values()), stored.weight_bytes({dtype!r}, NUMPY))
"""
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, loaded, foretold = map(int, run.stdout.split())
    assert loaded == foretold
    assert loaded == 2 * size if dtype == "float32" else 0.28 < loaded / size < 0.29
    largest = 2 * 1024 * 4096
    assert grown < loaded + largest + 16 * 2**20, f"{(grown - loaded) / 2**20:.1f} MiB beyond the weights"


def test_progress_is_silent_off_a_terminal(tmp_path, capfd):
    write_safetensors(tmp_path / "model.safetensors", MODEL)
    load_weights(stored(tmp_path, CONFIG), dtype="float32", progress=True)
    assert capfd.readouterr() == ("", "")


def test_importing_takes_no_gguf_package():
    program = "import sys, minillm.files.weights; print('gguf' in sys.modules, 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


def test_default_model(default_model_path):
    model = open_model(ModelFiles("gguf", default_model_path, "default"))
    config, weights = model.config, load_weights(model, dtype="stored")
    assert (config.n_layers, config.n_heads, config.n_kv_heads, config.vocab_size) == (30, 9, 3, 49152)
    assert sum(int(np.prod(w.shape)) for w in weights.values()) == 134_515_008
    assert weights["model.embed_tokens.weight"].format.name == "Q8_0"
    q = weights["model.layers.0.self_attn.q_proj.weight"]
    assert (q.format.name, q.shape, q.data.shape) == ("Q4_1", (576, 576), (576, 360))
    assert 0.01 < q.rows(0, 64).std() < 1
