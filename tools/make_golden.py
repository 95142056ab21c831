"""Writes tests/data/golden_default.json: what transformers makes of the default model, token by token.

    python tools/make_golden.py SmolLM2-135M-Instruct.Q4_1.gguf        (needs torch, transformers, gguf)

The weights are those of the .gguf, dequantised by gguf.quants and put into a LlamaForCausalLM in float32; the tokenizer
is built here from the .gguf's vocabulary and merges. Nothing of minillm takes part. For each prompt the file holds

    name, messages (chat) or None, text (what is encoded), ids
    logits: after the last prompt token, {"ids": [...], "values": [...]} for the 64 largest and 200 random ids
    greedy: {"ids", "text", "stop", "margins", "runners_up"}: up to 48 tokens with a full cache. `ids` ends with the
        stop token if one was met; margins[i] is the gap between the largest and second logit where ids[i] was chosen,
        and runners_up[i] the second. `smallest_margin`: below rounding error a different greedy path is no mistake.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DATA = Path(__file__).parent.parent / "tests" / "data"
N_TOKENS = 48

CHAT = {
    "chat": [{"role": "user", "content": "What is gravity? Explain it to a child in a few sentences."}],
    "unicode": [
        {
            "role": "user",
            "content": "Repeat this message: Grüße aus Köln! 👩\u200d🚀🎉 naïve café, Ωμέγα, 日本語, 12345 €.",
        }
    ],
    "turns": [
        {"role": "system", "content": "You are a pirate and answer briefly."},
        {"role": "user", "content": "Name three fruits."},
        {"role": "assistant", "content": "Arr! Apples, bananas and coconuts, matey."},
        {"role": "user", "content": "Which of them grows on a palm tree, and what does it look like?"},
    ],
    "document": [
        {
            "role": "user",
            "content": (DATA / "alice.txt").read_text(encoding="utf-8").strip()
            + "\n\nWhat did the Rabbit take out of its waistcoat-pocket, and where did it go?",
        }
    ],
}
RAW = {
    "code": 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n    if n < 2:\n\treturn n\n',
    "completion": "The history of the printing press began in the year 1440, when",
    "short": "The",
}


def tokenizer_of(fields):
    """Byte-level BPE with the splits of the `smollm` vocabulary: each digit alone, then GPT-2's pattern."""
    value = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges", "pre")}
    assert value["pre"] == "smollm"
    vocabulary = {token: i for i, token in enumerate(value["tokens"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in value["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        t for t, kind in zip(value["tokens"], value["token_type"], strict=True) if kind == gguf.TokenType.CONTROL
    ]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    template = fields["tokenizer.chat_template"].contents()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)


def model_of(reader):
    field = {name: f.contents() for name, f in reader.fields.items() if name.startswith("llama.")}
    config = LlamaConfig(
        hidden_size=field["llama.embedding_length"],
        intermediate_size=field["llama.feed_forward_length"],
        num_hidden_layers=field["llama.block_count"],
        num_attention_heads=field["llama.attention.head_count"],
        num_key_value_heads=field["llama.attention.head_count_kv"],
        max_position_embeddings=field["llama.context_length"],
        vocab_size=field["llama.vocab_size"],
        rms_norm_eps=field["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=field["llama.rope.freq_base"],
        tie_word_embeddings=True,
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stem, suffix = name.rsplit(".", 1)
            tensor = tensors.pop(f"{names.get_name(stem)}.{suffix}")
            weight = np.array(dequantize(tensor.data, tensor.tensor_type))
            if "q_proj" in name or "k_proj" in name:
                weight = unpermuted(weight, parameter.shape[0] // config.head_dim)
            parameter.copy_(torch.from_numpy(weight.reshape(parameter.shape)))
    assert not tensors, tensors.keys()
    return model


def unpermuted(weight, n_heads):
    """RoPE pairs element 2i with 2i + 1 in a GGUF, element i with i + head_dim / 2 in Hugging Face: rows move back."""
    out, dim = weight.shape
    return weight.reshape(n_heads, out // n_heads // 2, 2, dim).swapaxes(1, 2).reshape(out, dim)


@torch.no_grad()
def record(model, tokenizer, stop_id, name, text, messages, rng):
    ids = tokenizer.encode(text, add_special_tokens=False)
    output = model(torch.tensor([ids]), use_cache=True)
    first = output.logits[0, -1].numpy()
    shown = np.concatenate([np.argsort(-first)[:64], rng.choice(len(first), 200, replace=False)])
    tokens, margins, runners_up = [], [], []
    while True:
        logits = output.logits[0, -1]
        (best, second), (token, runner_up) = (x.tolist() for x in logits.topk(2))
        tokens.append(token)
        margins.append(round(best - second, 4))
        runners_up.append(runner_up)
        if token == stop_id or len(tokens) == N_TOKENS:
            break
        output = model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
    stopped = tokens[-1] == stop_id
    return {
        "name": name,
        "messages": messages,
        "text": text,
        "ids": ids,
        "logits": {"ids": shown.tolist(), "values": [round(float(v), 4) for v in first[shown]]},
        "greedy": {
            "ids": tokens,
            "text": tokenizer.decode(tokens[:-1] if stopped else tokens, clean_up_tokenization_spaces=False),
            "stop": stopped,
            "margins": margins,
            "smallest_margin": min(margins),
            "runners_up": runners_up,
        },
    }


def main(path):
    reader = gguf.GGUFReader(path)
    tokenizer, model = tokenizer_of(reader.fields), model_of(reader)
    stop_id = reader.fields["tokenizer.ggml.eos_token_id"].contents()
    rng = np.random.default_rng(0)
    prompts = [
        (name, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), messages)
        for name, messages in CHAT.items()
    ] + [(name, text, None) for name, text in RAW.items()]
    records = [record(model, tokenizer, stop_id, *prompt, rng) for prompt in prompts]
    for r in records:
        greedy = r["greedy"]
        print(f"{r['name']}: {len(r['ids'])} tokens, margin {greedy['smallest_margin']}\n    {greedy['text']!r}")
    golden = {"model": Path(path).name, "stop_id": stop_id, "prompts": records}
    lines = json.dumps(golden, ensure_ascii=False, separators=(",", ":")).replace('{"name"', '\n{"name"')
    (DATA / "golden_default.json").write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
