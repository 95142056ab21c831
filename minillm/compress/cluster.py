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
    """(Chunking, taus) from fine to coarse; a rung is one of them and one of its taus. First tau falls through the
    paper's range with the chunking as asked. Below that, weak delimiters join the chunk before them (blanks, then
    , ; :, then . ? !), ever more neighbouring chunks become one, and at last a head is a single core."""
    yield chunking, TAUS
    lowest = TAUS[-1:]
    for n_alone in range(len(chunking.alone) - 1, 0, -1):
        yield Chunking(chunking.alone[:n_alone], chunking.width), lowest
    joined = 2
    while joined < n_rows:
        yield Chunking((SPECIAL,), chunking.width, joined), lowest
        joined *= 2
    yield Chunking((), chunking.width, joined), (-1.1,)


def seeds(layer, scores, target, tau, rope, chunking):
    """The clusters of each chunk, as `into`: with `target`, those of the finest rung of the ladder that makes no more
    entries, and of their members as many set free, the least like their seeds first, as there is room for; without,
    those at tau."""
    chunks, room = parse_chunking(chunking), 0
    if target is not None:
        for chunks, tau, count in _rungs(layer, rope, chunking):
            if count <= target:
                room = target - count
                break
    into, similarity = _clusters(layer, rope, chunks).assign(tau)
    layer.memo = {"tau": tau}  # the clusters are not needed any more
    members = np.flatnonzero(into != np.arange(len(into)))
    free = members[_least(similarity[members], room)]
    into[free] = free
    return into


def spread(ledger, layer, scores, tau, rope, chunking):
    """What the finest rung whose forecast for all layers keeps to the ledger makes in this one, and a share of what the
    next finer one would make more, as large as leaves room for the same share in the layers to come."""
    finer_count, finer_forecast = len(layer.pos), sum(ledger.rows[-ledger.to_come :])
    for rung, (_, _, count) in enumerate(_rungs(layer, rope, chunking)):
        forecast = ledger.forecast(rung, count)
        if forecast <= ledger.left:
            break
        finer_count, finer_forecast = count, forecast
    room = (ledger.left - forecast) / max(finer_forecast - forecast, 1e-9)
    return [*ledger.targets, ledger.bounded(round(count + max(room, 0.0) * (finer_count - count)))]


def _rungs(layer, rope, chunking):
    """Of each rung of the ladder its Chunking, its tau and the entries that the layer would have: clusters, and rows
    outside the chunks."""
    n = len(layer.pos)
    for chunks, taus in ladder(parse_chunking(chunking), n):
        key = "counts", rope, chunks
        if key not in layer.memo:
            outside = n - len(_segments(layer, chunks)[0])
            layer.memo[key] = [outside + count for count in _clusters(layer, rope, chunks).counts(taus)]
        for tau, count in zip(taus, layer.memo[key], strict=True):
            yield chunks, tau, count


def _clusters(layer, rope, chunks):
    """GreedyClusters of the chunks; those asked for last are kept."""
    last, clusters = layer.memo.get("clusters", (None, None))
    if last != (rope, chunks):
        layer.memo.pop("clusters", None)
        rotation = (layer.pos, layer.cos, layer.sin) if rope == "unrotated" else None
        clusters = layer.ops.GreedyClusters(layer.k, *_segments(layer, chunks), rotation)
        layer.memo["clusters"] = (rope, chunks), clusters
    return clusters


def _segments(layer, chunks):
    """Chunking.segments, computed once."""
    if chunks not in layer.shared:
        layer.shared[chunks] = chunks.segments(layer)
    return layer.shared[chunks]


def _least(values, n):
    """The numbers of the n least of values (m,), of equal ones the first."""
    if not 0 < n < len(values):
        return np.arange(len(values) if n else 0)
    bound = np.partition(values, n - 1)[n - 1]
    less, equal = np.flatnonzero(values < bound), np.flatnonzero(values == bound)
    return np.append(less, equal[: n - len(less)])


def _chunking(value):
    parse_chunking(text(value))
    return value


ROPE = Option("unrotated", one_of("unrotated", "cached"), "compare and average keys without or with rotation")
OPTIONS = {
    "tau": Option(None, number(-1, 1), "fixed similarity threshold; the kept share is then the outcome"),
    "rope": ROPE,
    "chunking": Option("delimiter", _chunking, "delimiter, fixed:N or none"),
}
