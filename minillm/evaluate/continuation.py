"""Held-out text: a stretch is read and compressed, and what follows it is the answer. `perplexity` scores that
teacher-forced; `fidelity` also measures, layer by layer, how far the attention output moves."""

import random

import numpy as np

from minillm.errors import UsageError
from minillm.evaluate.prompt import Prompt

FIDELITY_TOKENS = 64  # read after the context


def samples(lengths, following, seeds, text):
    """length, following: tokens that are compressed, and that are scored."""
    return [
        {"kind": "text", "length": length, "following": following, "seed": seed, "text": text.digest}
        for length in lengths
        for seed in seeds
    ]


def prompt(llm, sample, text, fidelity=False):
    """A stretch of the text that begins anywhere. Stretches of several seeds may overlap."""
    ids = llm.encode(text.text, bos=False)
    needed = sample["length"] + sample["following"]
    if needed > len(ids):
        raise UsageError(f"the held-out text has {len(ids)} tokens and {needed} are asked for: give --text, or less")
    start = random.Random(f"text/{sample['seed']}").randrange(len(ids) - needed + 1)
    stretch = ids[start : start + needed]
    begin = llm.encode("")  # BOS, for models that want it
    context = begin + stretch[: sample["length"] - len(begin)]
    answer = stretch[len(context) - len(begin) :][: sample["following"]]
    return Prompt(context, [], answer, fidelity=fidelity)


def local_errors(llm, full, caches, token_ids):
    """|o - o_full| / |o_full| of the attention output o of each layer (before its output projection), for `token_ids`
    read after each of `caches` in place of `full`, a cache of the same tokens that keeps everything; -> (caches,
    layers). Local: every layer is given what it is given with the full cache."""
    model = llm.model
    pos = np.arange(full.seen, full.seen + len(token_ids))
    cos, sin = model.rope.tables(pos, full.seen + len(pos))
    x = model.ops.embed(model.embedding, token_ids)
    errors = np.empty((len(caches), len(model.blocks)))
    for index in range(len(model.blocks)):
        wanted, *found = (model.attention(index, x, cos, sin, cache.layer(index))[-1] for cache in (full, *caches))
        errors[:, index] = [np.linalg.norm(mixed - wanted) / np.linalg.norm(wanted) for mixed in found]
        model.output(index, x, wanted)
    return errors
