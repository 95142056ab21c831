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
    model, errors = llm.model, np.empty((len(caches), llm.config.n_layers))
    for step in model.layers([(model.embed(token_ids), full.position)], full.layer):
        for row, cache in zip(errors, caches, strict=True):
            found = model.attention(step.index, step.x, *step.rotation, cache.layer(step.index))[-1]
            row[step.index] = np.linalg.norm(found - step.mixed) / np.linalg.norm(step.mixed)
    return errors
