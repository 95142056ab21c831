"""The retrieval heads of a model (RazorAttention, arXiv 2407.15891, section 3.2), for --kv-method razor.

    python tools/razor_heads.py smollm2.json
    python -m minillm.run --kv-method razor --kv-set retrieval_heads=smollm2.json ...

Random tokens are read four times over. A head echoes as much as its queries attend to the same token in the readings
before, and induces as much as they attend to the token after that; a KV head as much as the best of its query heads.
The file names the share of KV heads that echo most, and of the others the share that induce most.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from minillm import LLM, CacheConfig
from minillm.compress.reading import extend
from minillm.session import Session

READINGS = 4


class Watch:
    """Stands where a compressor does, and as its own compression: looks at the attention of each layer."""

    reads = "new"
    block_tokens, asked = None, ()

    def __init__(self, llm, n_tokens):
        self.llm, self.n, self.found = llm, n_tokens, []

    def begin(self, cache, new_ids, coming):
        return self

    def store(self, index, k, v, queries, wo):
        """Appends (echo (H,), induction (H,)): the mean attention to earlier readings of the token and of the next."""
        ops, n_heads, n = self.llm.model.ops, len(k), k.shape[1]
        q, group = queries[0].q, len(queries[0].q) // n_heads
        pos, echo, induction = np.arange(n), np.zeros((group, n_heads)), np.zeros((group, n_heads))
        keys, zeros = k.reshape(-1, k.shape[2]), np.zeros(n_heads * n, np.float32)
        for lo in range(self.n, n, 128):  # a few queries at a time
            at = pos[lo : lo + 128]
            arguments = q[:, at], keys, np.full(n_heads, n), zeros, np.tile(pos, n_heads), at, self.llm.model.scale
            p = ops.host(ops.window_scores(*arguments, self.llm.config.sliding_window))
            p = p.reshape(group, len(at), n_heads, n)
            back = at[:, None] - pos
            same = (back > 0) & (back % self.n == 0)
            after = (back > 0) & ((back + 1) % self.n == 0) & (back > 1)
            echo += np.einsum("gihj,ij->gh", p, same)
            induction += np.einsum("gihj,ij->gh", p, after)
        self.found.append((echo.max(axis=0) / (n - self.n), induction.max(axis=0) / (n - self.n)))

    def finish(self):
        pass


def best(scores, n):
    """The (layer, head) of the n largest of scores (L, H)."""
    flat = np.argsort(-scores, axis=None, kind="stable")[:n]
    return [list(map(int, np.unravel_index(at, scores.shape))) for at in flat]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the file to write (.json)")
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=256, help=f"that are read {READINGS} times")
    parser.add_argument("--echo", type=float, default=0.01, help="share of the KV heads that echo most")
    parser.add_argument("--share", type=float, default=0.14, help="share that induce most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    with LLM.load(args.model, cache=CacheConfig("full"), progress=True) as llm:
        ids = np.random.default_rng(args.seed).integers(0, llm.config.vocab_size, args.tokens).tolist()
        session, watch = Session(llm), Watch(llm, args.tokens)
        extend(llm.model, ids * READINGS, session.cache, watch)
        echo, induction = (np.array(scores) for scores in zip(*watch.found, strict=True))
        heads = best(echo, round(args.echo * echo.size))
        for layer, head in heads:
            induction[layer, head] = -1
        heads += best(induction, max(1, round(args.share * echo.size)))
        text = json.dumps({"model": llm.config.name, "retrieval_heads": sorted(heads)})
    args.out.write_text(text + "\n", encoding="utf-8")
    print(f"{len(heads)} of {echo.size} KV heads in {args.out}")


if __name__ == "__main__":
    main()
