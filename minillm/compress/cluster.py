"""SemantiCache (arXiv 2603.14303): chunks between delimiters, greedy clusters of similar keys inside them, one core a
cluster.

The paper fixes tau; a budget is reached here by one ladder of settings for all layers of a pass (`ladder`): tau
falls, and where the delimiters and one core a chunk already cost more than the budget, the chunks are coarsened step
by step."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from minillm.compress.options import Option, number, one_of, text
from minillm.compress.plan import Into
from minillm.text.delimiters import DelimiterClass

MAX_CHUNK = 256  # a chunk without a delimiter is split at this many rows
TAUS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)  # the paper's range is [0.5, 0.9]

SENTENCE, CLAUSE, BLANK, SPECIAL = list(DelimiterClass)[1:]


@dataclass(frozen=True)
class Chunking:
    """How the rows of a head are cut into chunks. A chunk ends after a delimiter (or after `width` rows); rows of the
    classes `alone` and protected rows are kept outside the chunks; `joined` neighbouring chunks form one."""

    alone: tuple[int, ...] = (SPECIAL, SENTENCE, CLAUSE, BLANK)
    width: int | None = None
    joined: int = 1

    def segments(self, layer):
        """rows (C,) that belong to a chunk; starts, lengths (M,) of the chunks as stretches of `rows`."""
        rows, number, new_head = layer.once(("chunks", self.alone, self.width), lambda: self._chunks(layer))
        new = (np.diff(number // self.joined, prepend=-1) != 0) | new_head
        upto = np.cumsum(new)
        within = np.arange(len(rows), like=rows) - np.searchsorted(upto, upto)
        limit = MAX_CHUNK * self.joined if self.width is None else len(rows) + 1
        starts = np.flatnonzero(new | (within % limit == 0))
        return rows, starts, np.diff(starts, append=len(rows))

    def _chunks(self, layer):
        """Before chunks are joined: rows (C,) that belong to one; (C,) the number of its chunk within the head, and
        whether it is the head's first row."""
        outside = layer.protected
        for delimiter_class in self.alone:
            outside = outside | (layer.classes == delimiter_class)
        rows = np.flatnonzero(~outside)
        heads = layer.heads[rows]
        if self.width is None:
            ends = layer.protected | (layer.classes > 0)
            chunk = (np.cumsum(ends) - ends)[rows]
        else:
            head_starts = layer.ops.array(np.cumsum(layer.lengths) - layer.lengths)
            chunk = (rows - head_starts[heads]) // self.width
        new_head = np.diff(heads, prepend=-1) != 0
        new_chunk = (np.diff(chunk, prepend=-1) != 0) | new_head
        number = np.cumsum(new_chunk) - 1
        return rows, number - number[np.searchsorted(heads, heads)], new_head


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
    """(Chunking, tau) from fine to coarse. First tau falls through the paper's range with the chunking as asked. Below
    that, weak delimiters join the chunk before them (blanks, then , ; :, then . ? !), ever more neighbouring chunks
    become one, and at last a head is a single core."""
    for tau in TAUS:
        yield chunking, tau
    lowest = TAUS[-1]
    for n_alone in range(len(chunking.alone) - 1, 0, -1):
        yield Chunking(chunking.alone[:n_alone], chunking.width), lowest
    joined = 2
    while joined < n_rows:
        yield Chunking((SPECIAL,), chunking.width, joined), lowest
        joined *= 2
    yield Chunking((), chunking.width, joined), -1.1


def seeds(layer, scores, target, tau, rope, chunking):
    """The clusters of each chunk: with `target`, those of the finest rung of the ladder that makes no more entries, and
    of their members as many set free, the least like their seeds first, as there is room for; without, those at tau."""
    rungs, room = _rungs(layer, rope, parse_chunking(chunking)), 0
    chunks = rungs.chunking
    if target is not None:
        rung = rungs.finest(lambda rung: rungs.count(rung) <= target)
        (chunks, tau), room = rungs[rung], max(target - rungs.count(rung), 0)
    into, similarity = rungs.clusters(chunks).assign(tau)
    del layer.computed[rungs.key]  # the clusters are not needed any more
    rows = np.arange(len(into), like=into)
    least_alike = np.where(into == rows, np.float32(-np.inf), -similarity)
    return Into(np.where(layer.ops.segment_topk(least_alike, [len(into)], [room]), rows, into), tau)


def spread(ledger, layer, scores, tau, rope, chunking):
    """What the finest rung whose forecast for all layers keeps to the ledger makes in this one, and a share of what the
    next finer one would make more, as large as leaves room for the same share in the layers to come."""
    rungs = _rungs(layer, rope, parse_chunking(chunking))
    forecast = cache(lambda rung: ledger.forecast(rung, rungs.count(rung)))
    rungs.at = ledger.rung
    rung = ledger.rung = rungs.finest(lambda rung: forecast(rung) <= ledger.left)
    count, finer_count, finer_forecast = rungs.count(rung), len(layer.pos), sum(ledger.rows[-ledger.to_come :])
    if rung:
        finer_count, finer_forecast = rungs.count(rung - 1), forecast(rung - 1)
    room = (ledger.left - forecast(rung)) / max(finer_forecast - forecast(rung), 1e-9)
    return [*ledger.targets, ledger.bounded(round(count + max(room, 0.0) * (finer_count - count)))]


def _rungs(layer, rope, chunking):
    """The Rungs of a layer, made once."""
    key = "rungs", rope, chunking
    if key not in layer.computed:
        layer.computed[key] = Rungs(layer, rope, chunking, key)
    return layer.computed[key]


class Rungs(list):
    """The ladder of a layer, from fine to coarse, and the rung `at` which the last search of it ended."""

    def __init__(self, layer, rope, chunking, key):
        super().__init__(ladder(chunking, len(layer.pos)))
        self.layer, self.rope, self.chunking, self.key, self.at = layer, rope, chunking, key, 0
        self._counts, self._clusters = {}, {}

    def finest(self, fits):
        """The finest rung that fits, or the last one: from where the last search ended on to coarser ones until one
        fits, and then to finer ones as long as they do."""
        while self.at + 1 < len(self) and not fits(self.at):
            self.at += 1
        while self.at and fits(self.at - 1):
            self.at -= 1
        return self.at

    def count(self, rung):
        """Entries that the layer would have: clusters, and rows outside the chunks."""
        chunks, tau = self[rung]
        if (chunks, tau) not in self._counts:
            outside, clusters = len(self.layer.pos) - len(_segments(self.layer, chunks)[0]), self.clusters(chunks)
            around = self[max(rung - clusters.AROUND, 0) : rung + clusters.AROUND + 1]  # which are asked for next
            near = [near for of, near in around if of == chunks]
            counts = clusters.counts(near)
            self._counts |= {(chunks, tau): outside + count for tau, count in zip(near, counts, strict=True)}
        return self._counts[chunks, tau]

    def clusters(self, chunks):
        """GreedyClusters of the chunks; the two that were made last are kept: a rung that fits and the next finer
        one."""
        if chunks not in self._clusters:
            if len(self._clusters) == 2:
                self._clusters.pop(next(iter(self._clusters)))
            layer = self.layer
            rotation = (layer.pos, layer.cos, layer.sin) if self.rope == "unrotated" else None
            self._clusters[chunks] = layer.ops.greedy_clusters(layer.k, *_segments(layer, chunks), rotation)
        return self._clusters[chunks]


def _segments(layer, chunks):
    """Chunking.segments, computed once."""
    return layer.once(chunks, lambda: chunks.segments(layer))


def _chunking(value):
    parse_chunking(text(value))
    return value


ROPE = Option("unrotated", one_of("unrotated", "cached"), "compare and average keys without or with rotation")
OPTIONS = {
    "tau": Option(None, number(-1, 1), "fixed similarity threshold; the kept share is then the outcome"),
    "rope": ROPE,
    "chunking": Option("delimiter", _chunking, "delimiter, fixed:N or none"),
}
