"""Prompt and generation speed at several context lengths, with the full cache and with a compressed one.

With the compiled kernels, the floor of a generated token stands beside it: the time to read the weights and the cache
once at the bandwidth that the same threads reach.

python tools/speed.py TEXT_FILE --tokens 512 2048 7000 --kv-budget full 0.2
"""

import argparse
import time
from pathlib import Path

import numpy as np

from minillm import LLM, CacheConfig


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="at least as many tokens as the longest prompt")
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 7000])
    parser.add_argument("--kv-budget", nargs="+", default=["full", "0.2"])
    parser.add_argument("-n", type=int, default=12, help="tokens generated")
    args = parser.parse_args()
    llm = LLM.load(args.model, cache=CacheConfig("full"))
    ids = llm.encode(args.text.read_text(encoding="utf-8"))
    if len(ids) < max(args.tokens):
        parser.error(f"{args.text} has {len(ids)} tokens: give a longer text, or smaller --tokens")
    ops, weight_bytes = llm.model.ops, llm.model.nbytes
    columns = ("prompt", "budget", "prompt tok/s", "generated tok/s", "ms", "floor ms", "cache MiB", "kept")
    print("|", " | ".join(columns), "|\n" + "|---" * len(columns) + "|")
    for n in args.tokens:
        for budget in args.kv_budget:
            llm.set_cache(CacheConfig("full") if budget == "full" else CacheConfig(budget=float(budget)))
            session = llm.session()
            session.feed(ids[:n])
            start = time.perf_counter()
            logits = session.read()
            prompt_seconds, seconds = time.perf_counter() - start, []
            for _ in range(args.n):
                session.unread = [int(logits.argmax())]
                start = time.perf_counter()
                logits = session.step()
                seconds.append(time.perf_counter() - start)
            cache, token = session.cache, np.median(seconds)
            floor = (weight_bytes + cache.bytes_in_use) / ops.bandwidth() if hasattr(ops, "bandwidth") else None
            cells = (n, budget, f"{n / prompt_seconds:.0f}", f"{1 / token:.1f}", f"{1000 * token:.1f}")
            cells += (f"{1000 * floor:.1f}" if floor else "-", f"{cache.bytes_in_use / 2**20:.1f}", f"{cache.kept:.3f}")
            print("|", " | ".join(map(str, cells)), "|", flush=True)
            session.close()


if __name__ == "__main__":
    main()
