"""What a long generation costs with each method that compresses while it generates: pages held and time a token.

    python tools/generate_long.py --methods streaming h2o --entries 512 --tokens 4000

Generates greedily from a short prompt, without an end, and prints a row for every quarter of the tokens.
"""

import argparse
import time

import numpy as np
from tqdm import tqdm

from minillm import LLM, CacheConfig, SamplingParams
from minillm.compress.methods import METHODS

PROMPT = "Once upon a time, in a village by the sea, there lived an old woman who told stories. " * 10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--methods", nargs="+", default=[name for name, method in METHODS.items() if method.generates])
    parser.add_argument("--entries", type=int, default=512, help="the budget, entries a head")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--retrieval-heads", help="for razor: a file of tools/razor_heads.py")
    args = parser.parse_args()
    print("| method | tokens | entries a head | MiB of pages | ms a token | slowest |\n|---|---|---|---|---|---|")
    with LLM.load(args.model, cache=CacheConfig("full"), progress=True) as llm:
        for method in args.methods:
            options = {"retrieval_heads": args.retrieval_heads} if method == "razor" else {}
            llm.set_cache(CacheConfig(method, "full" if method == "full" else args.entries, **options))
            session = llm.session()
            session.feed(PROMPT)
            pieces = session.stream(SamplingParams(max_tokens=args.tokens, ignore_eos=True))
            next(pieces)
            seconds, entries, held = [], [], []
            for _ in tqdm(range(args.tokens - 1), method, disable=None):
                start = time.perf_counter()
                if next(pieces, None) is None:
                    break
                seconds.append(time.perf_counter() - start)
                entries.append(session.cache.entries / session.cache.lengths.size)
                held.append(session.cache.bytes_in_use / 2**20)
            session.close()
            for rows in np.array_split(np.arange(len(seconds)), 4):
                part = slice(rows[0], rows[-1] + 1)
                mean, worst = 1e3 * np.mean(seconds[part]), 1e3 * max(seconds[part])
                cells = f"{rows[0]}-{rows[-1]}", f"{max(entries[part]):.0f}", f"{max(held[part]):.1f}"
                print(f"| {method} | {' | '.join(cells)} | {mean:.1f} | {worst:.0f} |", flush=True)


if __name__ == "__main__":
    main()
