"""Needles in prose: how much of what a prompt says survives in a compressed cache.

    python tools/needle.py HAYSTACK_FOLDER --kv-budget full 0.5 0.35 0.2 --set rope=unrotated --set rope=cached

A sentence with a number is hidden in about 1,000 tokens of prose (or four sentences with four keys), the whole prompt
is compressed, and the answer is read off teacher-forced: the share of answer tokens that are the most likely ones, and
their mean negative log likelihood in nats.
"""

import argparse
import random
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minillm import LLM, CacheConfig

CITIES = "Lisbon Oslo Quito Nairobi Hanoi Lima Dublin Cairo Prague Accra Havana Riga Kyoto Turin Bergen Cusco".split()
NEEDLE = "One of the special magic numbers for {} is: {}."
QUESTION = "What is the special magic number for {} mentioned in the provided text?"
ANSWER = "The special magic number for {} mentioned in the provided text is"


def sample(llm, sentences, seed, n_tokens, n_keys):
    """-> token ids of the prompt up to the answer, and of the answer."""
    rng = random.Random(seed)
    keys = rng.sample(CITIES, n_keys)
    values = [str(rng.randrange(1_000_000, 10_000_000)) for _ in keys]
    start, prose, length = rng.randrange(len(sentences) // 2), [], 0
    while length < n_tokens:
        prose.append(sentences[start + len(prose)])
        length += len(llm.encode(prose[-1] + " ", bos=False))
    for key, value in zip(keys, values, strict=True):
        prose.insert(rng.randrange(len(prose) + 1), NEEDLE.format(key, value))
    wanted = rng.randrange(n_keys)
    user = " ".join(prose) + "\n\n" + QUESTION.format(keys[wanted])
    text = llm.tokenizer.render_chat([{"role": "user", "content": user}]) + ANSWER.format(keys[wanted])
    return llm.encode(text), llm.encode(" " + values[wanted] + ".", bos=False)


def score(llm, cache, first, answer):
    """-> (accuracy, NLL in nats a token, kept share) of the answer after the prompt that `cache` holds, compressed;
    first (vocab,): the logits after the prompt, which no compression has touched yet."""
    kept = cache.kept
    hidden = llm.model.extend(answer[:-1], cache)
    cache.clear()
    logits = np.vstack([first, llm.model.logits(hidden)]).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    chosen = log_p[np.arange(len(answer)), answer]
    return (log_p.argmax(axis=1) == answer).mean(), -chosen.mean(), kept


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("haystack", type=Path, help="a folder of .txt files, or one")
    parser.add_argument("--model")
    parser.add_argument("--kv-method", nargs="+", default=["semanticache"])
    parser.add_argument("--kv-budget", nargs="+", default=["full", "0.5", "0.35", "0.2"])
    parser.add_argument("--set", nargs="+", action="append", help="OPTION=VALUE ...: one configuration each")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--keys", type=int, nargs="+", default=[1, 4])
    parser.add_argument("-n", type=int, default=12, help="samples")
    args = parser.parse_args()
    files = sorted(args.haystack.rglob("*.txt")) if args.haystack.is_dir() else [args.haystack]
    text = " ".join(" ".join(file.read_text(encoding="utf-8").split()) for file in files[-8:])
    sentences = [s.strip() + "." for s in text.split(".") if len(s.split()) > 3]
    llm = LLM.load(args.model, cache=CacheConfig("full"), progress=True)
    budgets = [budget for budget in args.kv_budget if budget != "full"]
    configurations = [("full", [], "full")] if "full" in args.kv_budget else []
    configurations += [(m, options, b) for m in args.kv_method for options in args.set or [[]] for b in budgets]
    print("| keys | method | options | budget | kept | accuracy | NLL |\n|---|---|---|---|---|---|---|")
    for n_keys in args.keys:
        rows = [[] for _ in configurations]
        for seed in tqdm(range(args.n), f"{n_keys} keys", disable=None):
            prompt, answer = sample(llm, sentences, seed, args.tokens, n_keys)
            caches = [llm.new_cache() for _ in configurations]
            compressors = []
            for configuration in configurations:
                llm.set_cache(cache_config(*configuration))
                compressors.append(llm.compressor)
            first = llm.model.logits(llm.model.extend_each(prompt, caches, compressors)[-1:])
            for row, cache in zip(rows, caches, strict=True):
                row.append(score(llm, cache, first, answer))
        for row, (method, options, budget) in zip(rows, configurations, strict=True):
            accuracy, nll, kept = np.mean(row, axis=0)
            cells = (n_keys, method, " ".join(options), budget, f"{kept:.3f}", f"{accuracy:.3f}", f"{nll:.3f}")
            print("|", " | ".join(map(str, cells)), "|", flush=True)


def cache_config(method, options, budget):
    if method == "full":
        return CacheConfig("full")
    named = dict(option.split("=", 1) for option in options)
    return CacheConfig(
        method, float(budget), **{k: v == "true" if v in ("true", "false") else v for k, v in named.items()}
    )


if __name__ == "__main__":
    main()
