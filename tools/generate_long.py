"""What a long generation costs with each method that compresses while it generates: pages held and time a token.

    python tools/razor_heads.py smollm2.json
    python tools/generate_long.py --entries 256 --tokens 4000 -t 1 --kv-set retrieval_heads=smollm2.json
    python tools/generate_long.py --entries 256 --tokens 9000 -t 1 --methods streaming --kv-set positions=cache

Generates from a short prompt, without an end, with the full cache and with each method, and prints a row for every
quarter of the tokens. Times are the processor's, of all threads: other programs on the machine hardly change them. An
option of --kv-set goes to the methods that have it.
"""

import argparse
import time
from itertools import pairwise

import numpy as np
from tqdm import tqdm

from minillm import LLM, CacheConfig, SamplingParams, UsageError
from minillm.compress.methods import METHODS
from minillm.programs import flags

PROMPT = "Once upon a time, in a village by the sea, there lived an old woman who told stories. " * 10
QUARTERS = 4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model")
    generating = [name for name, method in METHODS.items() if method.generates]
    parser.add_argument("--methods", nargs="+", default=["full", *generating])
    parser.add_argument("--entries", type=int, default=512, help="the budget, entries a head")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("-t", "--threads", type=int)
    flags.cache_flags(parser.add_argument)
    args = parser.parse_args()
    try:
        configs = {method: config_of(method, args) for method in args.methods}
    except UsageError as error:
        parser.error(str(error))
    print("| method | tokens | entries a head | MiB of pages | CPU ms a token | slowest |\n|---|---|---|---|---|---|")
    with LLM.load(args.model, cache=CacheConfig("full"), threads=args.threads, progress=True) as llm:
        for method, config in configs.items():
            llm.set_cache(config)
            session = llm.session()
            session.feed(PROMPT)
            pieces = session.stream(SamplingParams(max_tokens=args.tokens, ignore_eos=True))
            next(pieces)
            ends, entries, held = [time.process_time()], [], []
            for _ in tqdm(pieces, method, args.tokens - 1, disable=None):
                ends.append(time.process_time())
                entries.append(session.cache.entries / session.cache.lengths.size)
                held.append(session.cache.bytes_in_use / 2**20)
            session.close()
            ms = 1e3 * np.diff(ends)
            for lo, hi in pairwise(np.linspace(0, len(ms), QUARTERS + 1).astype(int).tolist()):
                most, pages = max(entries[lo:hi]), max(held[lo:hi])
                print(
                    f"| {method} | {lo}-{hi} | {most:.0f} | {pages:.1f} | {ms[lo:hi].mean():.1f} "
                    f"| {ms[lo:hi].max():.0f} |",
                    flush=True,
                )


def config_of(method, args):
    """The CacheConfig of a method with the flags that it has."""
    if method == "full":
        return CacheConfig("full")
    options = CacheConfig.option_table(method)
    settings = [text for text in args.kv_set if text.partition("=")[0] in options]
    named = {
        "kv_method": method,
        "kv_budget": args.entries,
        "kv_set": settings,
        "tau": None,
        "quality": None,
        "kv_memory": None,
    }
    return flags.cache_config(argparse.Namespace(**vars(args) | named))


if __name__ == "__main__":
    main()
