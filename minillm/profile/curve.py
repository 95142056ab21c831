"""What a profile is worth: how much of a held-out text a model can still repeat, threshold after threshold."""

import numpy as np

from minillm.compress.config import CacheConfig
from minillm.compress.reading import extend, finish, read

CUE, REPEATED, STRETCHES = 16, 64, 4  # tokens that are given, tokens that are to follow, and how often in a text


def repeat(llm, token_ids, thresholds):
    """Read a text, and then stretches of it once more. -> (kept (m,), right (m + 1,)): the share of the entries kept at
    each of m thresholds, and the number of tokens of the stretches foretold there and, last, with the full cache."""
    configs = [CacheConfig("foresight", threshold=float(threshold)) for threshold in thresholds]
    compressors = [*map(llm.compressor_for, configs), None]
    caches = [llm.new_cache() for _ in compressors]
    try:
        finish(read(llm.model, token_ids, caches, compressors))
        kept = np.array([cache.kept for cache in caches[:-1]])
        right = np.zeros(len(caches), int)
        starts = np.linspace(0, len(token_ids) - CUE - REPEATED - 1, STRETCHES + 2).astype(int)[1:-1]
        for start in starts:
            stretch = token_ids[start : start + CUE + REPEATED]
            right += [_foretold(llm, cache, stretch) for cache in caches]
        return kept, right
    finally:
        for cache in caches:
            cache.clear()


def _foretold(llm, cache, stretch):
    """How many of the last REPEATED tokens of a stretch are the most likely ones after those before them."""
    fork = cache.fork()
    try:
        hidden = extend(llm.model, stretch[:-1], fork)
        likeliest = llm.model.logits(hidden[-REPEATED:]).argmax(axis=1)
        return int((likeliest == stretch[-REPEATED:]).sum())
    finally:
        fork.clear()
