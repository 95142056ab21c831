"""A tiny random Llama that can chat, in small letters and spaces: a tokenizer of bytes, a chat template, 4096 tokens of
context."""

import json

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from minillm.files.config_json import config_from_json
from minillm.files.stored_model import tensor_shapes

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "vocab_size": 258,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 257,
}
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # GPT-2's spelling of the 256 bytes: token ids 0..255
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def weights(config, seed):
    rng = np.random.default_rng(seed)
    shapes = tensor_shapes(config_from_json(config))
    made = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    made = {name: w + 1 if w.ndim == 1 else w for name, w in made.items()}
    said = [*(ALPHABET.index(letter) for letter in "abcdefghijklmnopqrstuvwxyz\u0120"), config["eos_token_id"]]
    silent = np.setdiff1d(np.arange(config["vocab_size"]), said)
    made["lm_head.weight"][silent] = 0  # a logit of 0 is never the largest of so many
    return made


def make(folder, *, template=TEMPLATE, seed=7, **config):
    """Write the model to `folder`; -> folder. template None: no chat template. config: changes to config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(weights(CONFIG, seed), folder / "model.safetensors")
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(ALPHABET)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>"} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
