"""Writes the tiny random models of tests/data/tiny and what transformers computes with them.

    python tools/make_tiny_models.py [NAME ...]      (needs torch and transformers, which minillm itself does without)

Each is a folder as on the Hub, without a tokenizer: config.json, *.safetensors, and beside them golden.npz with
`ids` (n,) int64, `logits` (n, vocab) float32 of one forward pass in float32, and the `inv_freq` (head_dim // 2,) and
`attention_factor` of its RoPE. The weights are scaled so that attention is neither uniform nor stuck on one key, and
what is asserted below refuses a model whose logits would not tell a wrong mask or rotation from a right one.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

TINY = Path(__file__).parent.parent / "tests" / "data" / "tiny"

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}

QWEN = LLAMA | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
PHI3 = LLAMA | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 0}

# Heads are 16 wide in the RoPE models, so that they have eight frequencies: some that a scaling leaves alone, some that
# it blends, some that it stretches. Old (rope_scaling) and new (rope_parameters) spellings both occur.
WIDE = {"num_attention_heads": 2, "num_key_value_heads": 1}

# name: (prompt tokens, files, config)
MODELS = {
    "gqa-bf16-shards": (40, 3, LLAMA | {"num_hidden_layers": 3, "num_attention_heads": 6, "hidden_size": 48}),
    "rope-linear-f32": (
        32,
        1,
        LLAMA | WIDE | {"rope_scaling": {"type": "linear", "factor": 2.5}, "torch_dtype": "float32"},
    ),
    "rope-dynamic": (
        40,
        1,
        LLAMA | WIDE | {"rope_scaling": {"type": "dynamic", "factor": 2.5}, "max_position_embeddings": 16},
    ),
    "rope-llama3": (
        40,
        1,
        LLAMA
        | WIDE
        | {
            "rope_theta": 1000.0,
            "max_position_embeddings": 256,
            "eos_token_id": [2, 5],
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "rope-yarn": (
        40,
        2,
        {key: value for key, value in (LLAMA | WIDE).items() if key != "rope_theta"}
        | {
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "beta_fast": 4.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "biases": (24, 1, LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "sliding-window": (40, 1, MISTRAL | {"sliding_window": 8}),
    "head-dim": (24, 1, MISTRAL | {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 24}),
    "mqa-f16": (24, 1, LLAMA | {"num_key_value_heads": 1, "torch_dtype": "float16"}),
    "tied-head": (24, 1, LLAMA | {"tie_word_embeddings": True}),
    "qwen2": (40, 1, QWEN | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}),
    "qwen3": (
        24,
        1,
        LLAMA
        | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    ),
    "smollm3": (
        24,
        1,
        LLAMA
        | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "num_hidden_layers": 4, "pad_token_id": 0},
    ),
    "granite": (
        24,
        1,
        LLAMA
        | {
            "architectures": ["GraniteForCausalLM"],
            "model_type": "granite",
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.25,
            "residual_multiplier": 0.22,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": (40, 1, PHI3 | {"sliding_window": 8}),
    "phi4-mini": (
        40,
        1,
        PHI3
        | WIDE
        | {
            "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True,
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 32,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.5, 1.7, 2.0],
                "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 8.0],
            },
        },
    ),
    "gemma3": (
        40,
        1,
        LLAMA
        | WIDE
        | {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "head_dim": 16,
            "num_hidden_layers": 6,
            "sliding_window": 8,
            "rope_theta": 1000.0,
            "rope_local_base_freq": 100.0,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
        },
    ),
    "ministral3": (
        40,
        1,
        {key: value for key, value in (LLAMA | WIDE).items() if key != "rope_theta"}
        | {
            "architectures": ["Ministral3ForCausalLM"],
            "model_type": "ministral3",
            "head_dim": 16,
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "beta_fast": 4.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 16,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
}


def random_weights(model, generator):
    """Matrices keep the size of what they multiply; queries and keys are larger, so that attention has favourites."""
    weights = {}
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            values = 0.3 * values + (0 if model.config.model_type == "gemma3_text" else 1)
        elif name.endswith("bias"):
            values *= 0.5
        elif "embed" in name:
            values *= 0.2
        else:
            values *= (
                2.0 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj")) else 1.0
            ) / parameter.shape[1] ** 0.5
        weights[name] = values
    return weights  # without lm_head.weight where it is the embedding


def write(folder, config, weights, n_files):
    """One model.safetensors, or `n_files` with an index; tensors are dealt out in turn, so that every file matters."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    names = sorted(weights)
    files = [f"model-{i + 1:05}-of-{n_files:05}.safetensors" for i in range(n_files)]
    files = files if n_files > 1 else ["model.safetensors"]
    weight_map = {name: files[i % n_files] for i, name in enumerate(names)}
    for file in files:
        part = {name: weights[name].contiguous() for name in names if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    if n_files > 1:
        size = sum(tensor.nbytes for tensor in weights.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def logits_of(model, ids):
    return model(torch.tensor(ids)[None], use_cache=False).logits[0].numpy()


def make(name, n, n_files, config, seed):
    folder = TINY / name
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)), generator)
    dtype = getattr(torch, config["torch_dtype"])
    write(folder, config, {key: tensor.to(dtype) for key, tensor in weights.items()}, n_files)

    model = load(folder)
    ids = torch.randint(3, config["vocab_size"], (n,), generator=generator).numpy()
    logits = logits_of(model, ids)
    rope = model.model.rotary_emb
    check(name, model, ids, logits, config)
    rope = (
        {} if name == "gemma3" else {"inv_freq": rope.inv_freq, "attention_factor": np.float64(rope.attention_scaling)}
    )
    np.savez_compressed(folder / "golden.npz", ids=ids, logits=logits, **rope)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{name:18} {size / 1e3:6.1f} kB  logits {logits.std():.2f} +- {np.abs(logits).max():.1f}", file=sys.stderr)


def check(name, model, ids, logits, config):
    other = ids.copy()
    other[0] = 3 + (ids[0] - 2) % (config["vocab_size"] - 3)
    change = np.abs(logits_of(model, other) - logits).max(axis=1)  # (n,)
    reach = len(ids)
    if config.get("sliding_window") and not config.get("max_window_layers") and name != "gemma3":
        reach = (config["sliding_window"] - 1) * config["num_hidden_layers"] + 1
        assert change[reach:].max() == 0, name
    assert change[:reach].min() > 1e-3, (name, change)

    if "rope" in name or name in ("phi4-mini", "ministral3"):  # the scaling must show: more than rounding could explain
        rope = model.model.rotary_emb
        scaled, factor = rope.inv_freq.clone(), rope.attention_scaling
        rope.rope_type = "default"
        rope.inv_freq, rope.attention_scaling = rope.compute_default_rope_parameters(model.config)
        assert np.abs(logits_of(model, ids) - logits)[-1].max() > 0.05, name
        rope.inv_freq, rope.attention_scaling = scaled, factor


if __name__ == "__main__":
    disable_progress_bar()
    for seed, (name, (n, n_files, config)) in enumerate(MODELS.items()):
        if len(sys.argv) == 1 or name in sys.argv[1:]:
            shutil.rmtree(TINY / name, ignore_errors=True)
            make(name, n, n_files, config, seed)
