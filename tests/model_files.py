"""A tiny Llama-like model of random weights, and writers of it in every format that minillm reads."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import safetensors.numpy

from minillm.files.config import ModelConfig, RopeConfig
from minillm.files.gguf_file import read_gguf
from minillm.files.stored_model import StoredModel, folder_tensors, gguf_tensors, tensor_shapes

CONFIG = ModelConfig(
    name="tiny",
    architecture="LlamaForCausalLM",
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,  # not dim / n_heads
    dim=64,
    ffn_dim=96,
    vocab_size=40,
    context=128,
    rms_eps=1e-5,
    rope=RopeConfig(),
)
BIASED = replace(CONFIG, qkv_bias=True, o_bias=True, mlp_bias=True, tied_head=True)
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def stored(path, config):
    """The StoredModel of files that hold no config, or another one."""
    path = Path(path)
    if path.is_dir():
        return StoredModel(path, config, folder_tensors(path, config), None)
    gguf_file = read_gguf(path)
    return StoredModel(path, config, gguf_tensors(path, gguf_file, config), gguf_file.metadata)


def bf16(array):
    """float32 -> uint16 words of the nearest-below bfloat16."""
    return (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(words):
    return (words.astype(np.uint32) << 16).view(np.float32)


def random_model(config, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in tensor_shapes(config).items()}


def write_safetensors(path, tensors, dtype="F32"):
    if dtype == "BF16":  # which safetensors.numpy can neither read nor write
        write_raw(path, *raw_model(tensors, dtype, bf16))
    else:
        safetensors.numpy.save_file({n: a.astype(f"float{dtype[1:]}") for n, a in tensors.items()}, path)


def raw_model(tensors, dtype="F32", convert=np.float32):
    """(header dict, data bytes), to be damaged by the tests."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in tensors.items():
        own = convert(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(own)]}
        data += own
    return header, data


def write_raw(path, header, data, pad=0):
    """`pad`: length of the header modulo 8."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * ((pad - len(text)) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_shards(folder, tensors, dtype="F32"):
    names = list(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, own in shards.items():
        write_safetensors(folder / shard, {n: tensors[n] for n in own}, dtype)
    weight_map = {n: shard for shard, own in shards.items() for n in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def gguf_name(name):
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, stem = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[stem]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def write_gguf(path, tensors, config, kind="F32", extra=None, describe=lambda writer: None):
    """As llama.cpp's converter does: Q and K rows in adjacent pairs, matrices quantised, the rest float32. describe:
    adds metadata, of which there are none otherwise."""
    number = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    describe(writer)
    for name, array in tensors.items():
        for part, heads in (("q_proj", config.n_heads), ("k_proj", config.n_kv_heads)):
            if part in name:
                halves = array.reshape(heads, 2, config.head_dim // 2, *array.shape[1:])
                array = halves.swapaxes(1, 2).reshape(array.shape)
        quantised = kind != "F32" and array.ndim == 2
        data = gguf.quantize(array, number) if quantised else array
        writer.add_tensor(gguf_name(name), data, raw_dtype=number if quantised else None)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


MODEL = random_model(CONFIG)
NORM, UP = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"
