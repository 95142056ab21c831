"""Reading a text into a cache: the model goes from block to block, and each block's keys and values are compressed and
stored before the next begins."""

from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace

import numpy as np

from minillm.cache.kv_cache import KVCache
from minillm.compress.plan import Queries


def extend(model, token_ids, cache, compressor=None, progress=None):
    """Read n new tokens of one sequence. -> hidden states (n, dim) before the last norm.

    compressor: None stores all of it. progress(layers done, layers) is called for every block of the model. If anything
    is raised on the way the cache holds what it held before."""
    return finish(read(model, token_ids, [cache], [compressor]), progress and _layers_of(model, progress))


def _layers_of(model, progress):
    n = len(model.blocks)
    return lambda step: progress(step.share * n, n)


def finish(reading, see=None):
    """What a generator returns, driven to its end. see(what it yields) is called each time."""
    while True:
        try:
            step = next(reading)
        except StopIteration as end:
            return end.value
        if see:
            see(step)


def read(model, token_ids, caches, compressors, wants=()):
    """Read n tokens into several caches that hold the same, each stored as its own Compressor has it (None: whole).

    A generator: it yields the Step of every (part of the text, block of the model) once that is stored, and returns
    hidden states (n, dim) before the last norm. One that is left at any yield, or raises, leaves the caches as they
    were. Only one block's keys and values exist in full; where the compressor can tell at once what to keep, only those
    of a part. wants: what a Step is to have beside what compression asks for, see Model.layers; where questions are
    asked, their rows come after those of the text."""
    if len(caches) > 1 and any(cache.seen for cache in caches):
        raise ValueError("caches that are read into together must be empty: what they attend to must be the same")
    model.check_ids(token_ids)
    n, hidden = len(token_ids), []
    size = compressors[0].block_tokens if len(caches) == 1 and compressors[0] else None
    with ExitStack() as undo:
        for cache in caches:
            undo.enter_context(cache.undone_on_error())
        for lo in range(0, max(n, 1), size or max(n, 1)):
            ids = token_ids[lo : lo + size] if size else token_ids
            share = len(ids) / max(n, 1)
            part = _Part(model, ids, caches, compressors, n - lo - len(ids))
            for step in part.steps(wants):
                step.share = lo / max(n, 1) + share * (step.index + 1) / len(model.blocks)
                yield step
            hidden.append(part.x)
    return hidden[0] if len(hidden) == 1 else model.ops.concatenate(hidden)


class _Part:
    """Tokens that are read and stored together. coming: how many of the same text follow them."""

    def __init__(self, model, token_ids, caches, compressors, coming):
        self.model, self.token_ids, self.caches = model, token_ids, caches
        self.compressions = [
            compressor.begin(cache, token_ids, coming) if compressor else None
            for cache, compressor in zip(caches, compressors, strict=True)
        ]
        self.noting = [cache for cache in caches if cache.left.predicted is not None]
        compressing = [one for one, what in zip(compressors, self.compressions, strict=True) if what]
        self.asked = next((one.asked for one in compressing if one.asked), [])
        self.rows = model.embed([*token_ids, *self.asked])  # questions after the text, which nothing is stored of

    @property
    def x(self):
        """(n, dim) the tokens' hidden states."""
        return self.rows[: len(self.token_ids)]

    def steps(self, wants):
        """Read and store the tokens. Yields each Step when it is stored."""
        model, first = self.model, self.caches[0]
        reads = {compression.reads for compression in self.compressions if compression}
        asked = {"new": "queries", "hidden": "hidden"}
        wants = {*wants, *(asked[name] for name in reads & asked.keys()), *(["scores"] if self.noting else [])}
        wants |= {"queries"} if self.asked else set()
        with closing(Rereading(model, self.token_ids, first)) if "again" in reads else nullcontext() as again:
            for step in model.layers([(self.rows, first.position)], first.layer, wants, beyond=len(self.asked)):
                self._store(step, again)
                yield step
        for cache, compression in zip(self.caches, self.compressions, strict=True):
            compression.finish() if compression else cache.advance(self.token_ids)

    def _store(self, step, again):
        asking = []
        if self.asked:
            n = len(self.token_ids)
            asking = [Queries(step.q[:, n:], step.pos[n:], step.lse[:, n:], asks=True)]
            step = step.first(n)
        for cache in self.noting:
            cache.left.predicted[step.index].append(step.scores)
        queries = {"new": [Queries(step.q, step.pos, step.lse)], "predicted": asking}
        queries["again"] = again and again.layer(step) + asking
        for cache, compression in zip(self.caches, self.compressions, strict=True):
            if compression:
                compression.store(step.index, step.k, step.v, queries.get(compression.reads) or (), step.hidden)
            else:
                cache.append(step.index, step.k, step.v, step.pos)
                cache.forget()


def recompress(model, cache, compressor):
    """Compress what was generated since the last time. If anything is raised on the way the cache holds what it held
    before."""
    with cache.undone_on_error():
        compression = compressor.begin(cache, [], generated=True)
        if compression:
            for index in range(len(model.blocks)):
                compression.store(index)
            compression.finish()


class Rereading:
    """A second reading of the new tokens, carried through the blocks of the model beside the first: in parts, each of
    which sees the text and itself. What it attends to says what the text needs (KVzip, KVCompose, hindsight).

    Beside what the first reading takes, it takes a hidden state a token and one layer's keys and values once more."""

    PART = 2048  # tokens

    def __init__(self, model, token_ids, cache):
        self.cache, n = cache, len(token_ids)
        self.position = cache.position + n  # of the second reading's first token
        self.text = KVCache(cache.pool, 1, model.config.n_kv_heads)  # one layer of it, whole
        x, parts = model.embed(token_ids), [slice(lo, min(lo + self.PART, n)) for lo in range(0, n, self.PART)]
        self.n_parts = len(parts)
        self.steps = model.layers([(x[rows], self.position) for rows in parts], self._past, {"queries"})

    def close(self):
        """Give the pages of the text back."""
        self.steps.close()
        self.text.clear()

    def _past(self, index):
        return replace(self.text.layer(0), seen=self.position)

    def layer(self, step):
        """Read on through the block of a Step of the first reading. -> a list of Queries."""
        text = self.text
        text.cut(np.zeros_like(text.lengths))
        if self.cache.seen:
            text.write(0, self.cache.read(step.index))
        text.append(0, step.k, step.v, step.pos)
        again = (next(self.steps) for _ in range(self.n_parts))
        return [Queries(part.q, part.pos, part.lse) for part in again]
