"""How much each row of a layer matters: a Score(layer, **options) -> (R,) float32, more is kept longer.

`layer.queries` are those of the tokens read since the last compression, where the Score reads them."""

from dataclasses import dataclass

import numpy as np

from minillm.compress.options import Option, Part, number, one_of


@dataclass(frozen=True)
class Score(Part):
    """reads: what it looks at beside keys and values: queries of the "new" tokens, or of a second reading of them
    ("again"), scores "predicted" by a profile, or nothing (None).
    adds_up: what it gives is kept for the next compression, which finds it in layer.history.
    ranks_only: it says which row is better and not by how much."""

    reads: str | None = None
    adds_up: bool = False
    ranks_only: bool = False


def recency(layer):
    """StreamingLLM (Xiao et al. 2024): the newest rows."""
    return layer.pos.astype(np.float32)


def chance(layer):
    """Random numbers: the control that every method must beat."""
    return layer.ops.array(np.random.default_rng(layer.index).random(len(layer.pos), np.float32))


def window(layer, queries, pool, pooling, group):
    """SnapKV (Li et al. 2024): what the newest queries attend to, averaged over them and over the group (or the most
    that a query head of it does, as Ada-KV's code can), and pooled over neighbours."""
    attention = layer.window_means(queries)
    return pooled(layer, attention.max(axis=0) if group == "max" else attention.mean(axis=0), pool, pooling)


def columns(layer, per_query):
    """H2O (Zhang et al. 2023): the attention of all queries since a row was read, summed, averaged over the group;
    per_query: and over the queries, so that old rows have no advantage."""
    sums, history = layer.column_scores("sum").mean(axis=0), layer.history
    if not per_query:
        return sums if history is None else history + sums
    n_new = sum(queries.q.shape[1] for queries in layer.queries)
    since = layer.queries[-1].pos[-1] + 1 - layer.pos  # queries that have seen each row
    new = np.minimum(since, n_new).astype(np.float32)
    return sums / new if history is None else (history * (since - new) + sums) / since.astype(np.float32)


def reread(layer, group, worth, asked):
    """KVzip (Kim et al. 2025): the most that any query of a second reading of the text gives to a row, the largest of
    the group's query heads; hindsight: their mean, plus the same of questions about the text, times what an entry of
    the head is worth where that is known."""
    largest = layer.column_scores("max")
    if asked and layer.is_asked:
        largest = largest + layer.column_scores("max", asks=True)
    scores = largest.max(axis=0) if group == "max" else largest.mean(axis=0)
    return largest_so_far(layer, worth_of_heads(layer, scores) if worth else scores)


def worth_of_heads(layer, scores):
    """scores (R,), times what an entry of the head is worth where that is known."""
    return scores if layer.worth is None else scores * layer.ops.array(np.repeat(layer.worth, layer.lengths))


def largest_so_far(layer, scores):
    """(R,) the scores (R,), or what an earlier compression left a row where that is more."""
    return scores if layer.history is None else np.maximum(layer.history, scores)


def predicted(layer, asked):
    """foresight: what `reread` would give, predicted from the hidden state of each token when that was read. asked: to
    what was read last comes ASKED_COUNTS times the most that any query of questions about the text gives to it."""
    if not (asked and layer.is_asked):
        return layer.predicted
    given = np.float32(ASKED_COUNTS) * worth_of_heads(layer, layer.column_scores("max", asks=True).mean(axis=0))
    return layer.predicted + (given if layer.history is None else np.where(layer.history > 0, np.float32(0), given))


def mean_variance(layer, queries, gamma, pool):
    """CAKE (Qin et al. 2025): what the newest queries attend to and how much that varies among them, averaged over the
    group and over neighbours."""
    attention = layer.window_scores(queries)
    variance = attention.var(axis=1, ddof=min(1, attention.shape[1] - 1))
    return pooled(layer, (attention.mean(axis=1) + np.float32(gamma) * variance).mean(axis=0), pool, "avg")


def value_scaled(layer, queries, pool):
    """LAVa (Shen et al. 2025): what the newest queries attend to, the largest of the group and of neighbours, times
    the largest L1 norm of a value in the head."""
    scores = pooled(layer, layer.window_means(queries).max(axis=0), pool, "max")
    norms = np.where(layer.protected, np.float32(0), np.abs(layer.values).sum(axis=1))
    none = np.zeros((), np.float32, like=norms)
    return scores * np.stack([part.max() if len(part) else none for part in layer.of_heads(norms)])[layer.heads]


def column_row(layer, queries, pool, pooling, gqa, norm):
    """LaProx (Mai and Kim 2026): a layer's output is the product of attention (a column a row of the cache) and
    v W_O^h (a row), and what a pair adds to it is bounded by |column| |row|. `norm`: as a share of the layer's."""
    attention = layer.window_scores(queries)  # (G, m, R)
    if gqa == "frobenius":
        products = np.einsum("gmr,hmr->ghr", attention, attention)
        products *= layer.output.inner(layer.values, layer.lengths)
        scores = np.sqrt(np.maximum(products.sum(axis=(0, 1)), 0))
    else:
        if gqa == "mean_attn":
            attention = attention.mean(axis=0, keepdims=True)
        columns = np.sqrt(np.square(attention).sum(axis=1))
        scores = (columns * layer.output_norms("l2")).mean(axis=0)
    scores = pooled(layer, scores, pool, pooling)
    return scores / np.maximum(scores[layer.free].sum(), np.finfo(np.float32).tiny) if norm else scores


def composite(layer, queries_agree, heads_agree, v_norm):
    """KVCompose (2025): the largest (or mean) attention that each query head of a second reading gives to a row,
    averaged over the group, and the mean over the heads of the layer added."""
    if queries_agree == "max":
        scores = layer.column_scores("max").mean(axis=0)
    else:
        n_queries = sum(queries.q.shape[1] for queries in layer.queries)
        scores = layer.column_scores("sum").mean(axis=0) / np.float32(n_queries)
    if v_norm:
        scores = scores * np.linalg.norm(layer.values, axis=1)
    if heads_agree:
        scores = scores + over_heads(layer, scores) / np.float32(len(layer.lengths))
    return largest_so_far(layer, scores)


def contribution(layer, queries, pool, pooling):
    """LongFlow (2026): the newest generated query's attention to a row, summed over all query heads, each times the
    1-norm of the row's value; for a prompt SnapKV's attention of the newest `queries`, pooled, summed over all heads.
    Rows of one token score alike in every head: one index set a layer."""
    if layer.generated:
        attention = layer.window_scores(1).sum(axis=(0, 1))
        return over_heads(layer, attention * np.abs(layer.values).sum(axis=1))
    return over_heads(layer, pooled(layer, layer.window_means(queries).sum(axis=0), pool, pooling))


def over_heads(layer, scores):
    """(R,) for each row the sum of the scores (R,) of the rows that the heads have of its token."""
    return layer.ops.segment_sum(layer.pos, scores, len(layer.cos))[layer.pos].astype(np.float32)


def pooled(layer, scores, width, kind):
    """Of the scores (R,), the maximum ("max") or mean ("avg": zeros beyond the ends count) of `width` neighbours, for
    the rows of each head that are not protected, and among these."""
    out = scores.copy()
    out[layer.free] = layer.ops.pooled(scores[layer.free], layer.n_free, width, kind)
    return out


ASKED_COUNTS = 0.2  # beside what is predicted, the mean of logs: less than a largest attention that was seen

QUERIES = Option(32, number(1, 1 << 20, int), "how many of the newest queries are looked at")
POOL = Option(7, number(1, 1 << 10, int), "neighbours whose scores are pooled")
POOLING = Option("max", one_of("max", "avg"), "max or avg")
WINDOW = {"queries": QUERIES, "pool": POOL, "pooling": POOLING}
GROUP = Option("mean", one_of("mean", "max"), "of the query heads of a KV head: mean or max")
WORTH = Option(False, one_of(True, False), "times what an entry of the head is worth, where a profile says that")
ASKED = Option(False, one_of(True, False), "general questions are read after the text, too: what answers need of it")
PER_QUERY = Option(False, one_of(True, False), "divided by the number of queries that have seen the row")
QUERIES_AGREE = Option("max", one_of("max", "mean"), "of the second reading's queries: max or mean")
HEADS_AGREE = Option(True, one_of(True, False), "add the mean over the heads of the layer")
V_NORM = Option(False, one_of(True, False), "times the 2-norm of the value")

SCORES = {
    "recency": Score(recency, "the newest", ranks_only=True),
    "random": Score(chance, "by lot", ranks_only=True),
    "window": Score(window, "attention of the newest queries", WINDOW | {"group": GROUP}, "new"),
    "columns": Score(columns, "attention of all queries, summed", {"per_query": PER_QUERY}, "new", True),
    "reread": Score(
        reread,
        "the largest attention when the text is read a second time",
        {"group": GROUP, "worth": WORTH, "asked": ASKED},
        "again",
        True,
    ),
    "predicted": Score(
        predicted,
        "the same, as a profile of the model predicts it",
        {"asked": ASKED},
        "predicted",
    ),
    "composite": Score(
        composite,
        "attention when the text is read a second time, with the mean of the layer's heads added",
        {"queries_agree": QUERIES_AGREE, "heads_agree": HEADS_AGREE, "v_norm": V_NORM},
        "again",
        True,
    ),
    "contribution": Score(
        contribution,
        "what rows add to the newest query's output, of all heads together",
        WINDOW,
        "new",
    ),
    "mean_variance": Score(
        mean_variance,
        "attention of the newest queries and its variance",
        {
            "queries": QUERIES,
            "gamma": Option(200.0, number(0, 1e9), "weight of the variance"),
            "pool": POOL,
        },
        "new",
    ),
    "value_scaled": Score(
        value_scaled,
        "attention of the newest queries times the head's largest value",
        {"queries": QUERIES, "pool": POOL},
        "new",
    ),
    "column_row": Score(
        column_row,
        "attention of the newest queries times what the value adds through W_O",
        {
            "queries": QUERIES,
            "pool": POOL,
            "pooling": POOLING,
            "gqa": Option(
                "product_mean",
                one_of("product_mean", "mean_attn", "frobenius"),
                "of a group: the mean of products, mean attention first, or the exact norm of the sum",
            ),
            "norm": Option(True, one_of(True, False), "as a share of the layer's"),
        },
        "new",
    ),
}
