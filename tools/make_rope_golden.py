"""Writes tests/data/rope_golden.json: inverse frequencies, attention factors and a few cos and sin of transformers.

python tools/make_rope_golden.py        (needs torch and transformers; minillm itself needs neither)
"""

import json
from pathlib import Path

import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

SIZES = {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 8}
LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}

# name -> (keys of config.json beyond SIZES, lengths at which the frequencies are read)
CASES = {
    "default": ({"max_position_embeddings": 4096}, [10]),
    "default, top-level theta": ({"rope_theta": 500000.0, "head_dim": 64}, [10]),
    "default, rope_parameters": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}, [10]),
    "theta inside goes first": (
        {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}},
        [10],
    ),
    "linear, type": ({"rope_scaling": {"type": "linear", "factor": 2.5}}, [10]),
    "dynamic": (
        {"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
        [10, 64, 65, 256, 300],
    ),
    "llama3": (
        {"max_position_embeddings": 131072, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
        [10],
    ),
    "llama3, head_dim 128": (
        {"head_dim": 128, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3 | {"factor": 8.0}},
        [10],
    ),
    "llama3, original beside": (
        {"original_max_position_embeddings": 1024, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
        [10],
    ),
    "yarn": ({"max_position_embeddings": 8192, "rope_scaling": YARN}, [10]),
    "yarn, original from max_position": (
        {"max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": 16.0, "finetuned": True}},
        [10],
    ),
    "yarn, factor from the ratio": ({"max_position_embeddings": 16384, "rope_scaling": YARN | {"factor": None}}, [10]),
    "yarn, mscale": ({"rope_scaling": YARN | {"mscale": 1.2, "mscale_all_dim": 0.7}}, [10]),
    "yarn, attention_factor": ({"rope_scaling": YARN | {"attention_factor": 0.8}}, [10]),
    "yarn, betas, not truncated": (
        {"rope_scaling": YARN | {"beta_fast": 20.0, "beta_slow": 2.0, "truncate": False}},
        [10],
    ),
}
POSITIONS = [0, 1, 7, 4095]


def golden(keys: dict, length: int) -> dict:
    config = transformers.LlamaConfig.from_dict(SIZES | keys)
    rotary = LlamaRotaryEmbedding(config)
    rotary(torch.zeros(1), torch.arange(length)[None])  # lets dynamic scaling see the length
    inv_freq = rotary.inv_freq
    angles = torch.tensor(POSITIONS).float()[:, None] * inv_freq
    return {
        "length": length,
        "inv_freq": inv_freq.tolist(),
        "attention_factor": float(rotary.attention_scaling),
        "cos": (angles.cos() * rotary.attention_scaling)[:, :4].tolist(),
        "sin": (angles.sin() * rotary.attention_scaling)[:, :4].tolist(),
    }


if __name__ == "__main__":
    cases = [
        {
            "name": name,
            "config": SIZES | keys,
            "at": [golden(json.loads(json.dumps(keys)), length) for length in lengths],
        }
        for name, (keys, lengths) in CASES.items()
    ]
    lines = ",\n".join(json.dumps(case) for case in cases)
    head = f'"transformers": "{transformers.__version__}", "positions": {POSITIONS}'
    path = Path(__file__).parent.parent / "tests" / "data" / "rope_golden.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'{{{head}, "cases": [\n{lines}\n]}}\n', encoding="utf-8")
