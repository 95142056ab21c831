"""Writers of packed checkpoints, number by number in float64, and what they hold. Nothing here is minillm's."""

import itertools
import json

import numpy as np
import tiny_chat
from model_files import bf16, from_bf16, write_raw

QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
PHI3 = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
F8 = [  # what each byte means: (-1)^s 2^(e - 7) (1 + m / 8), without the 1 and with e = 1 where e is 0
    (-1) ** (byte >> 7) * 2.0 ** (max(byte >> 3 & 15, 1) - 7) * ((byte >> 3 & 15 > 0) + (byte & 7) / 8)
    for byte in range(256)
]


def words(codes, bits):
    """Codes one after another from the lowest bit on, as 32-bit words."""
    stream = sum(int(code) << bits * i for i, code in enumerate(codes))
    return np.frombuffer(stream.to_bytes(-(-len(codes) * bits // 32) * 4, "little"), np.uint32)


def rows_of_words(codes, bits):
    return np.array([words(row, bits) for row in codes])


def awq_words(codes):
    """(rows, columns / 8) of 8 columns a word in AWQ's order."""
    packed = np.zeros((len(codes), len(codes[0]) // 8), np.uint32)
    for row, column in np.ndindex(packed.shape):
        packed[row, column] = sum(int(codes[row, 8 * column + c]) << 4 * p for p, c in enumerate(AWQ_ORDER))
    return packed


def f16(x):
    return np.float64(np.float16(x))


def bf(x):
    return np.float64(from_bf16(bf16(x))).item()


def quantised(w, bits, columns, symmetric=False, least=0):
    """Each group of columns with its own scale and zero point: q (out, in), scale and zero (out, groups), and what they
    mean, (out, in) float64. columns: (in,) the group of each."""
    most, shape = 2**bits - 1, (len(w), max(columns) + 1)
    q, scale, zero, means = np.zeros(w.shape, int), np.zeros(shape), np.zeros(shape, int), np.zeros(w.shape)
    for row, group in np.ndindex(shape):
        own = w[row, np.array(columns) == group]
        low, high = min(0, own.min()), max(0, own.max())
        low = -max(-low, high) if symmetric else low
        scale[row, group] = f16(-low / 2 ** (bits - 1) if symmetric else (high - low) / most)
        middle = 2 ** (bits - 1) if symmetric else round(-low / scale[row, group])
        zero[row, group] = min(max(middle, least), most)
    for row, column in np.ndindex(w.shape):
        at = row, columns[column]
        q[row, column] = min(max(round(w[row, column] / scale[at]) + zero[at], 0), most)
        means[row, column] = (q[row, column] - zero[at]) * scale[at]
    return q, scale, zero, means


def in_groups(w, size):
    return [column // (size if size > 0 else w.shape[1]) for column in range(w.shape[1])]


def half(x):
    return "F16", np.float16(x)


def integers(x):
    return "I32", np.uint32(x).view(np.int32)


# each: matrix (out, in) float64 -> (its parts, name -> (dtype, array), and what they mean in float64)


def awq(w, group=32):
    q, scale, zero, means = quantised(w, 4, in_groups(w, group))
    parts = {"qweight": integers(awq_words(q.T)), "qzeros": integers(awq_words(zero.T)), "scales": half(scale.T)}
    return parts, means


def gptq(w, bits=4, group=32, symmetric=True, stored_less=1, scattered=False):
    columns = in_groups(w, group)
    if scattered:
        columns = np.random.default_rng(4).permutation(columns).tolist()
    q, scale, zero, means = quantised(w, bits, columns, symmetric, least=stored_less)
    parts = {
        "qweight": integers(rows_of_words(q, bits).T),
        "qzeros": integers(rows_of_words(zero.T - stored_less, bits)),
    }
    return parts | {"scales": half(scale.T), "g_idx": integers(columns)}, means


def in_f8(w, scale):
    """The nearest of all numbers that a byte may mean, and what that means."""
    finite = [byte for byte in range(256) if byte & 127 != 127]
    table = np.array([F8[byte] for byte in finite])
    codes = np.array([finite[np.abs(table - x).argmin()] for x in (w / scale).ravel()], np.uint8).reshape(w.shape)
    return codes, np.array([F8[code] for code in codes.ravel()]).reshape(w.shape) * scale


def fp8(w, block=(24, 20), name="weight_scale_inv"):
    """block: (rows, columns), or "channel" or "tensor"."""
    rows, columns = {"channel": (1, w.shape[1]), "tensor": w.shape}.get(block, block)
    scale = np.zeros((-(-w.shape[0] // rows), -(-w.shape[1] // columns)), np.float32)
    spread = np.zeros(w.shape)
    for i, j in np.ndindex(scale.shape):
        own = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        scale[i, j] = spread[own] = bf(np.abs(w[own]).max() / 448)
    codes, means = in_f8(w, spread)
    stored = scale[0, 0] if block == "tensor" else scale
    parts = {"weight": ("F8_E4M3", codes), name: ("F32", stored), "activation_scale": ("F32", np.float32(1))}
    return parts, means


def words_of_integers(w, bits=4, group=32, symmetric=True):
    q, scale, zero, means = quantised(w, bits, in_groups(w, group), symmetric)
    parts = {"weight_packed": integers(rows_of_words(q, bits)), "weight_scale": half(scale)}
    if not symmetric:
        parts["weight_zero_point"] = integers(rows_of_words(zero.T, bits).T)
    return parts | {"weight_shape": ("I64", np.int64(w.shape))}, means


def bytes_of_integers(w):
    q, scale, _, means = quantised(w, 8, in_groups(w, -1), symmetric=True)
    return {"weight": ("I8", np.int8(q - 128)), "weight_scale": half(scale)}, means


def mlx(w, bits=4, group=32, rounded=bf):
    columns = in_groups(w, group)
    shape = len(w), columns[-1] + 1
    q, scale, bias, means = np.zeros(w.shape, int), np.zeros(shape), np.zeros(shape), np.zeros(w.shape)
    for row, g in np.ndindex(shape):
        own = w[row, np.array(columns) == g]
        scale[row, g] = rounded((own.max() - own.min()) / (2**bits - 1)) or 1  # a row of zeros
        bias[row, g] = rounded(own.min())
    for row, column in np.ndindex(w.shape):
        at = row, columns[column]
        q[row, column] = min(max(round((w[row, column] - bias[at]) / scale[at]), 0), 2**bits - 1)
        means[row, column] = q[row, column] * scale[at] + bias[at]
    parts = {"weight": ("U32", rows_of_words(q, bits))}
    for name, values in (("scales", scale), ("biases", bias)):
        parts[name] = ("BF16", bf16(values)) if rounded is bf else half(values)
    return parts, means


# models


def fused(tensors):
    """Matrices of Phi-3 above one another."""
    out = dict(tensors)
    for layer in itertools.count():
        at = f"model.layers.{layer}."
        if f"{at}self_attn.q_proj.weight" not in out:
            return out
        for name, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            names = [f"{at}{name.split('.')[0]}.{part}_proj.weight" for part in parts]
            out[f"{at}{name}.weight"] = np.concatenate([out.pop(part) for part in names])


def write(path, tensors):
    """tensors: name -> (dtype, array)."""
    header, data = {}, b""
    for name, (dtype, array) in tensors.items():
        own = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(np.shape(array)),
            "data_offsets": [len(data), len(data) + len(own)],
        }
        data += own
    write_raw(path, header, data)


def make(folder, packer, said, *, everything=False, own=None, **config):
    """A tiny model that can chat, packed. -> (the tensors of its file, name -> (dtype, array); what they mean, name ->
    float64, as one float32 file would hold it). said: what config.json says of the packing. everything: embedding and
    head are packed too. own: module -> another packer, or None for plain floats."""
    tiny_chat.make(folder)
    config = tiny_chat.CONFIG | config
    (folder / "config.json").write_text(json.dumps(config | said))
    plain = tiny_chat.weights(config, seed=7)
    plain = fused(plain) if config["model_type"] == "phi3" else plain
    stored, means = {}, {}
    for name, array in plain.items():
        module = name.removesuffix(".weight")
        pack = (own or {}).get(module, packer) if array.ndim == 2 else None
        if pack and (everything or "proj" in name):
            parts, means[name] = pack(np.float64(array))
            stored |= {f"{module}.{part}": value for part, value in parts.items()}
        else:
            means[name] = np.float64(array.astype(np.float16))
            stored[name] = half(array)
    write(folder / "model.safetensors", stored)
    return stored, means


def make_plain(folder, means, **config):
    """The same model in float32."""
    tiny_chat.make(folder, **config)
    write(folder / "model.safetensors", {name: ("F32", np.float32(array)) for name, array in means.items()})
    return folder
