"""SemantiCache (arXiv 2603.14303): chunks between delimiters, greedy clusters of similar keys inside them, one core a
cluster.

The paper fixes tau; a budget is reached here by one ladder of settings for all layers of a pass (`ladder`): tau
falls, and where the delimiters and one core a chunk already cost more than the budget, the chunks are coarsened step
by step."""

from dataclasses import dataclass

import numpy as np

from minillm.compress.options import Option, number, one_of, text

MAX_CHUNK = 256  # a chunk without a delimiter is split at this many rows
TAUS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)  # the paper's range is [0.5, 0.9]

SENTENCE, CLAUSE, BLANK, SPECIAL = 1, 2, 3, 4  # delimiter classes, see tokenizer.DelimiterClass


@dataclass(frozen=True)
class Chunking:
    """How the rows of a head are cut into chunks. A chunk ends after a delimiter (or after `width` rows); rows of the
    classes `alone` and protected rows are kept outside the chunks; `joined` neighbouring chunks form one."""

    alone: tuple[int, ...] = (SPECIAL, SENTENCE, CLAUSE, BLANK)
    width: int | None = None
    joined: int = 1

    def segments(self, layer):
        """rows (C,) that belong to a chunk; starts, lengths (M,) of the chunks as stretches of `rows`."""
        rows = np.flatnonzero(~(layer.protected | np.isin(layer.classes, self.alone)))
        heads = layer.heads[rows]
        head_starts = np.cumsum(layer.lengths) - layer.lengths
        if self.width is None:
            ends = layer.protected | (layer.classes > 0)
            chunk = (np.cumsum(ends) - ends)[rows]
        else:
            chunk = (rows - head_starts[heads]) // self.width
        new_head = np.diff(heads, prepend=-1) != 0
        new_chunk = (np.diff(chunk, prepend=-1) != 0) | new_head
        number = np.cumsum(new_chunk) - 1
        number -= np.maximum.accumulate(np.where(new_head, number, 0))  # of the chunk within its head
        new = (np.diff(number // self.joined, prepend=-1) != 0) | new_head
        starts = np.flatnonzero(new)
        within = np.arange(len(rows)) - starts[np.cumsum(new) - 1] if len(rows) else rows
        limit = MAX_CHUNK * self.joined if self.width is None else len(rows) + 1
        starts = np.flatnonzero(new | (within % limit == 0))
        return rows, starts, np.diff(starts, append=len(rows))


def parse_chunking(text):
    """Chunking of "delimiter", "fixed:N" or "none" (the paper's table 4). Raises ValueError."""
    if text == "delimiter":
        return Chunking()
    if text == "none":
        return Chunking((SPECIAL,), width=1 << 40)
    kind, _, width = text.partition(":")
    if kind != "fixed" or not width.isdecimal() or int(width) < 1:
        raise ValueError(f"chunking {text!r} is not one of delimiter, fixed:N, none")
    return Chunking((SPECIAL,), width=int(width))


def ladder(chunking, n_rows):
    """(Chunking, tau) from fine to coarse. First tau falls through the paper's range with the chunking as asked.
    Below that, weak delimiters join the chunk before them (blanks, then , ; :, then . ? !), ever more neighbouring
    chunks become one, and at last a head is a single core."""
    for tau in TAUS:
        yield chunking, tau
    for n_alone in range(len(chunking.alone) - 1, 0, -1):
        yield Chunking(chunking.alone[:n_alone], chunking.width), TAUS[-1]
    joined = 2
    while joined < n_rows:
        yield Chunking((SPECIAL,), chunking.width, joined), TAUS[-1]
        joined *= 2
    yield Chunking((), chunking.width, joined), -1.1


def seeds(layer, scores, target, tau, rope, chunking):
    """The clusters of each chunk, as `into`: with `target`, those of the finest rung of the ladder that makes no more
    entries, and of their members as many set free, the least like their seeds first, as there is room for; without,
    those at tau."""
    n = len(layer.pos)
    if target is None:
        clusters, rows = _clusters(layer, rope, parse_chunking(chunking))
        layer.memo = {"tau": tau}
        return _seeds(n, rows, clusters, tau)[0]
    for chunks, tau in ladder(parse_chunking(chunking), n):
        count = _count(layer, rope, chunks, tau)
        if count <= target:
            break
    clusters, rows = _clusters(layer, rope, chunks)
    layer.memo = {"tau": tau}  # the clusters are not needed any more
    into, similarity = _seeds(n, rows, clusters, tau)
    members = np.flatnonzero(into != np.arange(n))
    free = members[np.argsort(similarity[members], kind="stable")[: max(target - count, 0)]]
    into[free] = free
    return into


def spread(ledger, layer, scores, tau, rope, chunking):
    """What the finest rung whose forecast for all layers keeps to the ledger makes in this one, and a share of what the
    next finer one would make more, as large as leaves room for the same share in the layers to come."""
    n = len(layer.pos)
    finer_count, finer_forecast = n, sum(ledger.rows[-ledger.to_come :])
    for rung, (chunks, threshold) in enumerate(ladder(parse_chunking(chunking), n)):
        count = _count(layer, rope, chunks, threshold)
        forecast = ledger.forecast(rung, count)
        if forecast <= ledger.left:
            break
        finer_count, finer_forecast = count, forecast
    room = (ledger.left - forecast) / max(finer_forecast - forecast, 1e-9)
    return [*ledger.targets, ledger.bounded(round(count + max(room, 0.0) * (finer_count - count)))]


def _clusters(layer, rope, chunking):
    """(GreedyClusters of the chunks, the rows they are about); those asked for last are kept."""
    key = rope, chunking
    if layer.memo.get("clusters", [None])[0] != key:
        layer.memo.pop("clusters", None)
        keys = layer.k_unrotated if rope == "unrotated" else layer.k
        rows, starts, lengths = chunking.segments(layer)
        layer.memo["clusters"] = key, layer.ops.GreedyClusters(layer.ops.take(keys, rows), starts, lengths), rows
    return layer.memo["clusters"][1:]


def _count(layer, rope, chunking, tau):
    """Entries that the layer would have: clusters, and rows outside the chunks."""
    key = rope, chunking, tau
    if key not in layer.memo:
        clusters, rows = _clusters(layer, rope, chunking)
        layer.memo[key] = len(layer.pos) - len(rows) + clusters.count(tau)
    return layer.memo[key]


def _seeds(n_rows, rows, clusters, tau):
    """seed (R,) and similarity (R,) for all rows, from clusters of a part of them."""
    seed, similarity = np.arange(n_rows), np.ones(n_rows, np.float32)
    inner_seed, similarity[rows] = clusters.assign(tau)
    seed[rows] = rows[inner_seed]
    return seed, similarity


def _chunking(value):
    parse_chunking(text(value))
    return value


ROPE = Option("unrotated", one_of("unrotated", "cached"), "compare and average keys without or with rotation")
OPTIONS = {
    "tau": Option(None, number(-1, 1), "fixed similarity threshold; the kept share is then the outcome"),
    "rope": ROPE,
    "chunking": Option("delimiter", _chunking, "delimiter, fixed:N or none"),
}
