"""How many entries each layer and each head may keep: an Allocation.

heads(layer, scores, target, **options) -> Into: which rows of a layer become entries, `target` of them.

layers(ledger, layer, scores, **options) -> the targets of the layers seen so far, this one the last. None: `heads` is
one cut through all layers; it gets their Rows, not a Layer."""

import math
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from minillm.compress import cluster, retrieval
from minillm.compress.options import Option, Part, number, one_of
from minillm.compress.plan import Into, others, split
from minillm.compress.score import QUERIES, over_heads


@dataclass(frozen=True)
class Allocation:
    """scored: it ranks rows by a score. joins: it says of rows that do not stay which row they join. reads: whose
    queries it looks at, as of a Score."""

    summary: str
    heads: Part
    layers: Part | None
    reads: str | None = None
    scored: bool = True
    joins: bool = False

    @property
    def options(self):
        return self.heads.options | (self.layers.options if self.layers else {})


def stay(kept):
    """The Into of rows that stay (R,) bool; the others have no place."""
    return Into(np.where(kept, np.arange(len(kept), like=kept), -1))


# heads


def per_head(layer, scores, target):
    """The same number of rows in every head (the first heads take one more where it does not divide; what a head does
    not have goes to the others): the protected ones and, of the others, those with the best scores; of equal ones the
    earlier."""
    protected = layer.n_protected
    counts = leveled(protected, layer.n_free, max(target - int(protected.sum()), 0))
    return stay(best(layer, scores, counts, layer.protected))


def leveled(held, most, room):
    """(H,) how many more each head takes, none above `most` (H,): `room` in all, or as many as there are, so that with
    what it has, `held` (H,), each has as many as another; the first take one more where it does not divide."""
    taken = lambda level: np.clip(level - held, 0, most)  # noqa: E731
    levels = range(int((held + most).max(initial=0)) + 1)
    level = bisect_right(levels, room, key=lambda level: taken(level).sum()) - 1
    counts = taken(level)
    counts[np.flatnonzero(taken(level + 1) > counts)[: room - counts.sum()]] += 1
    return counts


def across_heads(layer, scores, target):
    """The best rows of all heads together, beside the protected ones; of equal ones the earlier."""
    return stay(layer.protected | best_of_all(layer, scores, target - int(layer.n_protected.sum())))


def above(layer, scores, target, threshold):
    """As `across_heads`, or, where a threshold stands in place of a budget, the rows with no less than that."""
    if target is None:
        return stay(layer.protected | (scores >= threshold))
    return across_heads(layer, scores, target)


def shared(layer, scores, target):
    """The same tokens in every head (but for one where the number does not divide): those with the best sums of the
    scores of all heads; of equal ones the earlier."""
    return per_head(layer, over_heads(layer, scores), target)


def adaptive(layer, scores, target, alpha, normalize):
    """Ada-KV (Feng et al. 2024): the best rows of each head, in number a mixture of what it has among the best of all
    heads and, `alpha` of it, of the same for all."""
    return stay(best(layer, scores, adaptive_counts(layer, scores, target, alpha, normalize), layer.protected))


def critical(layer, scores, target, alpha, normalize, first_stage, value_norm):
    """CriticalKV (Feng et al. 2025): of what each head may keep (as in `adaptive`), the share `first_stage` by score,
    the rest by score times what the value adds through W_O, averaged over the group."""
    counts = adaptive_counts(layer, scores, target, alpha, normalize)
    by_score = np.floor(first_stage * counts).astype(np.int64)
    kept = best(layer, scores, by_score, layer.protected)
    weighed = (scores + np.float32(1e-4)) * layer.output_norms(value_norm).mean(axis=0)
    return stay(best(layer, weighed, counts - by_score, kept))


def adaptive_counts(layer, scores, target, alpha, normalize):
    """(H,) rows that each head may keep beside the protected ones, their sum exact by the largest remainder.
    normalize: the scores of a head count by the share of them that its best rows have, as many as every head would
    keep if all kept the same (the authors' code)."""
    room, n_heads = max(target - int(layer.n_protected.sum()), 0), len(layer.lengths)
    if normalize:
        top = best(layer, scores, np.full(n_heads, math.ceil(room / n_heads)), layer.protected) & ~layer.protected
        held, all_of_it = (
            np.stack([part.sum(dtype=np.float64) for part in layer.of_heads(np.where(rows, scores, np.float32(0)))])
            for rows in (top, ~layer.protected)
        )
        scores = scores * (held / np.maximum(all_of_it, np.finfo(np.float32).tiny))[layer.heads]
    hits = layer.count(best_of_all(layer, scores, room) & ~layer.protected)
    return split(room, (1 - alpha) * hits + alpha * room / n_heads, layer.n_free)


def best(layer, scores, counts, kept):
    """(R,) bool: `kept` and, of each head's other rows, the `counts` (H,) with the best scores; of equal ones the
    earlier."""
    return kept | layer.ops.segment_topk(others(scores, kept), layer.lengths, counts)


def best_of_all(layer, scores, count):
    """(R,) bool: of the rows of all heads that are not protected the `count` with the best scores; of equal ones the
    earlier. (And others, where there are not so many.)"""
    return layer.ops.segment_topk(others(scores, layer.protected), [len(scores)], [count])


def ranked(layer, scores, kept):
    """The rows that are not `kept`, best first in each head, heads one after another; and the rank of each in its
    head, from 0."""
    n = layer.count(~kept)
    rows = layer.ops.nonzero(~kept, int(n.sum()))
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    rows = rows[np.argsort(layer.heads[rows], kind="stable")]
    first = layer.ops.array(np.cumsum(n) - n)[layer.ops.segment_ids(n)]
    return rows, np.arange(len(rows), like=rows) - first


# layers


def even(ledger, layer, scores):
    """The same for every layer."""
    return ledger.fixed(np.ones(len(ledger.rows)))


def composites(ledger, layer, scores, least):
    """KVCompose's structured form: the best rows of each head form the layer's first composite, the next ones its
    second, and so on; a composite scores the mean of its rows. One cut through the composites of all layers, so that
    the heads of a layer keep as many rows each; the first `least` of each layer come before all others."""
    rows, rank = ranked(layer, scores, layer.protected)
    n_ranks = int(layer.n_free.max())
    sums, heads = (layer.ops.segment_sum(rank, x, n_ranks) for x in (scores[rows], np.ones_like(rank)))
    composite, of_rank = np.zeros(len(scores), np.float32, like=scores), sums / np.maximum(heads, 1)
    composite[rows] = np.where(rank < least, np.inf, of_rank[rank]).astype(np.float32)
    ledger.pool.append(others(composite, layer.protected))
    pool, lengths = np.concatenate(ledger.pool), [len(known) for known in ledger.pool]
    kept = layer.ops.segment_topk(pool, [len(pool)], [ledger.room]) & (pool > -np.inf)
    counts = layer.ops.segment_count(kept, lengths)
    ends = np.cumsum(counts).tolist()
    ledger.pool = np.split(pool[layer.ops.nonzero(kept, ends[-1])], ends[:-1])
    return (ledger.protected + counts).tolist()


def unlike(ledger, layer, scores):
    """D2O: the more, the less the scores of its rows vary: in proportion to exp(-F), F the mean over the heads of the
    variance of their rows' scores, which the least and the greatest of the heads bring to 0 and 1."""
    variance = np.stack([part.astype(np.float64).var() for part in layer.of_heads(scores) if len(part)]).tolist()
    spread = max(np.ptp(variance), np.finfo(np.float64).tiny)
    ledger.weights.append(np.exp(-np.mean((variance - np.min(variance)) / spread)))
    return ledger.shared(ledger.weights)


def pyramid(ledger, layer, scores, beta):
    """PyramidKV (Cai et al. 2024): fewer from layer to layer, in a line down to 1 / beta of the mean, or less steep
    where the first layer has not so many; the same for all where there is little to drop."""
    n_layers, mean = len(ledger.rows), ledger.room / len(ledger.rows)
    first = min(2 * mean - mean / beta, ledger.rows[0] - ledger.protected)
    if ledger.rows[0] < 2 * mean:
        first = mean
    return ledger.fixed(np.linspace(first, 2 * mean - first, n_layers))


def preference(ledger, layer, scores, queries, tau1, tau2):
    """CAKE (Qin et al. 2025): in proportion to H^(1/tau1) V^(1/tau2): H the entropy of what the newest queries attend
    to, V its variance among them, summed over heads and rows."""
    attention = layer.window_scores(queries)[:, :, layer.free]
    entropy = float(-(attention * np.log(attention + np.float32(1e-10))).sum(dtype=np.float64))
    variance = float(attention.var(axis=1, ddof=min(1, attention.shape[1] - 1)).sum(dtype=np.float64))
    ledger.weights.append(max(entropy, 0) ** (1 / tau1) * variance ** (1 / tau2))
    return ledger.shared(ledger.weights)


def entropy(ledger, layer, scores):
    """LAVa (Shen et al. 2025): in proportion to the entropy of the scores of all heads together, as a share of the
    largest that so many could have."""
    p = scores[layer.free].astype(np.float64)
    p = p[p > 0] / p.sum()
    ledger.weights.append(float(-(p * np.log(p)).sum()) / np.log(max(len(layer.free), 2)))
    return ledger.shared(ledger.weights)


PER_HEAD = Part(per_head, "the same number in every head")
ACROSS_HEADS = Part(across_heads, "the best of a layer, whichever head")
MIXTURE = {
    "alpha": Option(0.2, number(0, 1), "share that is the same for all heads"),
    "normalize": Option(False, one_of(True, False), "a head's scores count by how much of them its best rows have"),
}
ADAPTIVE = Part(adaptive, "more where a head has more of the best", MIXTURE)
THRESHOLD = Option(None, number(0, 1e9), "score from which rows stay, in place of a budget")
EVEN = Part(even, "the same number in every layer")

ALLOCATIONS = {
    "even": Allocation("the same number in every head of every layer", PER_HEAD, EVEN),
    "layer": Allocation("the best of each layer, whichever head", ACROSS_HEADS, EVEN),
    "global": Allocation(
        "the best of the whole model: one cut through all layers and heads",
        Part(above, "the best of all layers, whichever head", {"threshold": THRESHOLD}),
        None,
    ),
    "shared": Allocation(
        "the same tokens in every head of a layer", Part(shared, "the same tokens in every head"), EVEN
    ),
    "adaptive": Allocation("more where the heads of a layer have more of its best", ADAPTIVE, EVEN),
    "critical": Allocation(
        "half by score, half by score times what the value adds",
        Part(
            critical,
            "half by score, half by score times what the value adds",
            MIXTURE
            | {
                "first_stage": Option(0.5, number(0, 1), "share that the score alone decides"),
                "value_norm": Option("l1", one_of("l1", "l2"), "norm of what a value adds: l1 or l2"),
            },
        ),
        EVEN,
    ),
    "pyramid": Allocation(
        "fewer from layer to layer",
        PER_HEAD,
        Part(
            pyramid,
            "fewer from layer to layer",
            {"beta": Option(20.0, number(1, 1e9), "a layer's mean, as a multiple of the last one's")},
        ),
    ),
    "preference": Allocation(
        "more in layers whose attention is spread and changes",
        PER_HEAD,
        Part(
            preference,
            "more where attention is spread and changes",
            {
                "queries": QUERIES,
                "tau1": Option(1.0, number(1e-3, 1e3), "1 / the power of the entropy"),
                "tau2": Option(1.0, number(1e-3, 1e3), "1 / the power of the variance"),
            },
        ),
        reads="new",
    ),
    "entropy": Allocation(
        "more in layers whose scores are spread, and in heads that have more of the best",
        ADAPTIVE,
        Part(entropy, "more where scores are spread"),
    ),
    "clusters": Allocation(
        "clusters of similar keys between delimiters, as many as fit at one threshold for all layers",
        Part(cluster.seeds, "one entry a cluster", cluster.OPTIONS),
        Part(cluster.spread, "what one threshold gives each", cluster.OPTIONS),
        scored=False,
        joins=True,
    ),
    "composites": Allocation(
        "the same number in every head of a layer: one cut through the ranks of all layers",
        PER_HEAD,
        Part(
            composites,
            "the best ranks of all layers",
            {"least": Option(0, number(0, 1 << 30, int), "ranks that every layer keeps, if the budget has room")},
        ),
    ),
    "unlike": Allocation(
        "the same number in every head; more for layers whose scores vary less",
        PER_HEAD,
        Part(unlike, "more for layers whose scores vary less"),
    ),
    "retrieval": Allocation(
        "everything in the retrieval heads, one entry for all that the others do not keep",
        Part(retrieval.heads, "all, or the best and one entry for the rest", retrieval.OPTIONS),
        Part(retrieval.layers, "what their retrieval heads hold, and a share", retrieval.OPTIONS),
        joins=True,
    ),
}
