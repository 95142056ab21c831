"""A forward pass of Llama and its kind in NumPy float64, as literal as it gets: what minillm is compared with.

It shares no code with minillm. A model is its config.json as a dict and its weights as a dict of float arrays under
their Hugging Face names; nothing is cached, batched or fused. n: tokens, m: keys, the rest as in config.json.
"""

import json
from pathlib import Path

import numpy as np


def forward(config, weights, ids, inv_freq=None, attention_factor=1.0):
    """Logits (n, vocab) float64 of the token ids (n,).

    `inv_freq` (rotated // 2,) and `attention_factor` are what the model's RoPE scaling makes of them; without them the
    plain theta ** (-2i / rotated) is used, and a config that wants a scaling is refused.
    """
    w = split({name: np.asarray(array, np.float64) for name, array in weights.items()}, config)
    if config["model_type"] == "gemma3_text":
        w = {name: array + 1 if name.endswith("norm.weight") else array for name, array in w.items()}
    n, n_heads = len(ids), config["num_attention_heads"]
    n_kv_heads = config.get("num_key_value_heads") or n_heads
    head_dim = config.get("head_dim") or config["hidden_size"] // n_heads
    eps = config["rms_norm_eps"]
    turned = int(head_dim * config.get("partial_rotary_factor", 1))
    if inv_freq is None:
        inv_freq = plain_inv_freq(config, turned)
    gemma = config["model_type"] == "gemma3_text"
    local_inv_freq = config.get("rope_local_base_freq", 1) ** (-np.arange(0, turned, 2) / turned)

    position = np.arange(n)
    causal = position[None, :] <= position[:, None]  # (n queries, n keys)
    near = position[None, :] > position[:, None] - (config.get("sliding_window") or n)
    residual = config.get("residual_multiplier", 1)
    scale = config.get("attention_multiplier", config.get("query_pre_attn_scalar", head_dim) ** -0.5)
    wide = config["hidden_size"] ** 0.5 if gemma else 1

    x = w["model.embed_tokens.weight"][ids] * config.get("embedding_multiplier", wide)  # (n, dim)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."

        def linear(name, x, prefix=prefix):
            return x @ w[f"{prefix}{name}.weight"].T + w.get(f"{prefix}{name}.bias", 0)

        def heads(kind, x, count, prefix=prefix):
            y = linear(f"self_attn.{kind}_proj", x).reshape(n, count, head_dim)
            if f"{prefix}self_attn.{kind}_norm.weight" in w:
                y = rms_norm(y, w[f"{prefix}self_attn.{kind}_norm.weight"], eps)
            return y.transpose(1, 0, 2)

        h = rms_norm(x, w[prefix + "input_layernorm.weight"], eps)
        q, k, v = heads("q", h, n_heads), heads("k", h, n_kv_heads), heads("v", h, n_kv_heads)
        slides = layer % 6 != 5 if gemma else layer >= config.get("max_window_layers", 0)
        angle = position[:, None] * np.asarray(local_inv_freq if gemma and slides else inv_freq, np.float64)
        cos, sin = np.cos(angle) * attention_factor, np.sin(angle) * attention_factor  # (n, turned // 2)
        if config["model_type"] != "smollm3" or layer % 4 != 3:
            q[..., :turned], k[..., :turned] = rotate(q[..., :turned], cos, sin), rotate(k[..., :turned], cos, sin)
        beta = config.get("rope_parameters", {}).get("llama_4_scaling_beta")
        if beta:
            context = config["rope_parameters"]["original_max_position_embeddings"]
            q = q * (1 + beta * np.log(1 + np.floor(position / context)))[:, None]
        out = attention(q * scale * head_dim**0.5, k, v, causal & near if slides else causal)
        out = linear("self_attn.o_proj", out.transpose(1, 0, 2).reshape(n, n_heads * head_dim))
        if gemma:
            out = rms_norm(out, w[prefix + "post_attention_layernorm.weight"], eps)
        x = x + residual * out

        h = rms_norm(x, w[prefix + ("pre_feedforward" if gemma else "post_attention") + "_layernorm.weight"], eps)
        gate = linear("mlp.gate_proj", h)
        if gemma:
            gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate / (1 + np.exp(-gate))
        out = linear("mlp.down_proj", gate * linear("mlp.up_proj", h))
        if gemma:
            out = rms_norm(out, w[prefix + "post_feedforward_layernorm.weight"], eps)
        x = x + residual * out

    head = w["model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"]
    return rms_norm(x, w["model.norm.weight"], eps) @ head.T / config.get("logits_scaling", 1)


def split(weights, config):
    """`weights` with the matrices of Phi-3, which lie above one another in one, by their names in a Llama."""
    out = {}
    for name, array in weights.items():
        if "qkv_proj" in name:
            d = config["hidden_size"] // config["num_attention_heads"]
            q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
            parts = np.split(array, [q, q + kv])
            out |= {name.replace("qkv", kind): part for kind, part in zip("qkv", parts, strict=True)}
        elif "gate_up_proj" in name:
            parts = np.split(array, 2)
            out |= {name.replace("gate_up", kind): part for kind, part in zip(("gate", "up"), parts, strict=True)}
        else:
            out[name] = array
    return out


def attention(q, k, v, mask=None, log_size=None):
    """softmax(q k^T / sqrt(head_dim) + log_size) v, head by head and query by query.

    q (n_heads, n, head_dim); k, v (n_kv_heads, m, head_dim); mask (n, m) bool, True where a query sees a key;
    log_size (n_kv_heads, m), the log of how many tokens a key stands for. Returns (n_heads, n, head_dim) float64.
    """
    n_heads, n, head_dim = q.shape
    group = n_heads // len(k)
    out = np.zeros((n_heads, n, v.shape[-1]))
    for head in range(n_heads):
        kv_head = head // group
        for i in range(n):
            logits = k[kv_head].astype(np.float64) @ q[head, i].astype(np.float64) / np.sqrt(head_dim)  # (m,)
            if log_size is not None:
                logits = logits + log_size[kv_head]
            if mask is not None:
                logits = np.where(mask[i], logits, -np.inf)
            p = np.exp(logits - logits.max())
            out[head, i] = (p / p.sum()) @ v[kv_head].astype(np.float64)
    return out


def rotate(x, cos, sin):
    """Half-split RoPE of x (heads, n, head_dim): element i is paired with element i + head_dim // 2."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def plain_inv_freq(config, head_dim):
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError("this config scales its RoPE: pass inv_freq")
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    return theta ** (-np.arange(0, head_dim, 2) / head_dim)


def read_folder(folder):
    """config.json as a dict and every tensor of every *.safetensors as float32, by name."""
    weights = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                weights[name] = floats(data[start + begin : start + end], entry["dtype"]).reshape(entry["shape"])
    return json.loads((Path(folder) / "config.json").read_text()), weights


def floats(data, dtype):
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)
