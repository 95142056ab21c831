"""How much each row of a layer matters: score(layer, **options) -> (R,) float32, more is kept longer.

`layer.queries` are those of the tokens read since the last compression; a score of the table `READS` looks at them."""

import numpy as np

from minillm.compress.options import Option, Part, number, one_of


def recency(layer):
    """StreamingLLM (Xiao et al. 2024): the newest rows."""
    return layer.pos.astype(np.float32)


def chance(layer):
    """Random numbers: the control that every method must beat."""
    return np.random.default_rng(layer.index).random(len(layer.pos), np.float32)


def window(layer, queries, pool, pooling):
    """SnapKV (Li et al. 2024): what the newest queries attend to, averaged over them and over the group, and pooled
    over neighbours."""
    return pooled(layer, layer.window_scores(queries).mean(axis=(0, 1)), pool, pooling)


def columns(layer):
    """H2O (Zhang et al. 2023): the attention of all queries since a row was read, summed, averaged over the group."""
    return layer.column_scores("sum").mean(axis=0)


def reread(layer):
    """KVzip (Kim et al. 2025): the most that any query of a second reading of the text gives to a row."""
    return layer.column_scores("max").max(axis=0)


def pooled(layer, scores, width, kind):
    """Of the scores (R,) of each head, the maximum ("max") or mean ("avg": zeros beyond the ends count) of `width`
    neighbours, for every row."""
    if width == 1:
        return scores
    out = np.empty_like(scores)
    for end, n in zip(np.cumsum(layer.lengths), layer.lengths, strict=True):
        padding = -np.inf if kind == "max" else 0
        padded = np.pad(scores[end - n : end], (width // 2, width - 1 - width // 2), constant_values=padding)
        around = np.lib.stride_tricks.sliding_window_view(padded, width)
        out[end - n : end] = around.max(axis=1) if kind == "max" else around.mean(axis=1)
    return out


QUERIES = Option(32, number(1, 1 << 20, int), "how many of the newest queries are looked at")
POOL = Option(7, number(1, 1 << 10, int), "neighbours whose scores are pooled")
POOLING = Option("max", one_of("max", "avg"), "max or avg")

SCORES = {
    "recency": Part(recency, "the newest"),
    "random": Part(chance, "by lot"),
    "window": Part(window, "attention of the newest queries", {"queries": QUERIES, "pool": POOL, "pooling": POOLING}),
    "columns": Part(columns, "attention of all queries, summed"),
    "reread": Part(reread, "the largest attention when the text is read a second time"),
}
READS = {"window": "new", "columns": "new", "reread": "again"}  # whose queries: the new tokens', or a second reading's
ADDS_UP = {"columns": np.add, "reread": np.maximum}  # how an earlier compression's score and the new one make one
