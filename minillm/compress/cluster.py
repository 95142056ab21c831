"""SemantiCache (arXiv 2603.14303): chunks between delimiters, greedy clusters of similar keys inside them, one core a
cluster.

The paper fixes tau; a budget is reached here by one ladder of settings for all layers of a pass (`ladder`): tau
falls, and where the delimiters and one core a chunk already cost more than the budget, the chunks are coarsened step
by step."""

from dataclasses import dataclass

import numpy as np

from minillm.compress.plan import Plan

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


def cores(layer, ledger, *, tau, rope, chunking, log_size):
    """The Plan that replaces each cluster by the mean of its keys and of its values, of size = tokens in it (eqs. 2-4).

    ledger: how many entries may be made, or None: tau decides. rope "unrotated": keys are compared and averaged with
    RoPE undone and the core is rotated to the mean position of its tokens; "cached": as they are stored."""
    keys = layer.k_unrotated if rope == "unrotated" else layer.k
    chunks = parse_chunking(chunking)
    if ledger is None:
        clusters, rows = _clusters(layer, keys, chunks)
        seed, _ = _seeds(len(keys), rows, clusters, tau)
    else:
        seed = _seeds_for_budget(layer, keys, chunks, ledger)
    return _mean_of_clusters(layer, seed, unrotate=rope == "unrotated", log_size=log_size)


def _clusters(layer, keys, chunking):
    rows, starts, lengths = chunking.segments(layer)
    return layer.ops.GreedyClusters(keys[rows], starts, lengths), rows


def _seeds(n_rows, rows, clusters, tau):
    """seed (R,) and similarity (R,) for all rows, from clusters of a part of them."""
    seed, similarity = np.arange(n_rows), np.ones(n_rows, np.float32)
    inner_seed, similarity[rows] = clusters.assign(tau)
    seed[rows] = rows[inner_seed]
    return seed, similarity


def _seeds_for_budget(layer, keys, chunking, ledger):
    """seed (R,): the clusters of the finest rung whose forecast keeps to the ledger, and of their members as many set
    free, the least like their seeds first, as the next finer rung's forecast leaves room for."""
    n, level = len(keys), None
    finer_count, finer_forecast = n, sum(ledger.rows)
    for rung, (chunks, tau) in enumerate(ladder(chunking, n)):
        if chunks != level:
            (clusters, rows), level = _clusters(layer, keys, chunks), chunks
        count = n - len(rows) + clusters.count(tau)
        forecast = ledger.forecast(rung, count)
        if forecast <= ledger.left:
            break
        finer_count, finer_forecast = count, forecast
    seed, similarity = _seeds(n, rows, clusters, tau)
    members = np.flatnonzero(seed != np.arange(n))
    room = (ledger.left - forecast) / max(finer_forecast - forecast, 1e-9)
    spare = ledger.bounded(round(count + max(room, 0.0) * (finer_count - count))) - count
    free = members[np.argsort(similarity[members], kind="stable")[: max(spare, 0)]]
    seed[free] = free
    return seed


def _mean_of_clusters(layer, seed, unrotate, log_size):
    seeds, dest = np.unique(seed, return_inverse=True)
    size = np.bincount(dest, layer.size).astype(np.float32)
    weight = layer.size / size[dest]
    pos = np.rint(np.bincount(dest, weight * layer.pos)).astype(np.int32)
    lengths = np.bincount(layer.heads[seeds], minlength=len(layer.lengths))
    return Plan(dest, weight, size if log_size else np.ones_like(size), pos, lengths, unrotate)
