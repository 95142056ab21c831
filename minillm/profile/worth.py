"""What an entry is worth in each head.

One cut through all heads takes attention for worth. But where several heads copy the same token each of them can be
spared, and where one alone finds it, none of its entries can. So the heads are tried: a text is compressed to a small
budget, one head after another gets some entries more and some fewer, and what that does to passages that the model
foretells afterwards says what an entry of the head is worth. The log of it is added to the head's scores."""

import numpy as np

from minillm.compress.config import CacheConfig, Recipe
from minillm.logprobs import log_softmax
from minillm.profile.fit import layer_of

BUDGET = 0.1
TOKENS = 1024  # of a text, at most
SHIFT = 0.5  # of log scores, up and down, that makes entries more and fewer
REPEATED = 16, 48  # tokens of a passage that are given, and that follow: repeated at length
LOOKED_UP = 6, 24  # found from a few words
STEP = 0.6  # of the way: what an entry is worth changes with how many there are
MOST = 3.3  # times the mean, and 1 over it the least


class Trial:
    """A text that was read and compressed to the budget, and passages to be foretold.

    token_ids (n,): at most TOKENS are compressed, and what follows them is a passage too; asks: tokens between the text
    and a passage of it."""

    def __init__(self, llm, token_ids, asks=()):
        self.model, self.cache, ids = llm.model, llm.new_cache(), np.asarray(token_ids[:TOKENS])
        budgeted = CacheConfig("foresight", BUDGET)
        (sinks, window), pos = budgeted.protect(len(ids), budgeted.budget), np.arange(len(ids))
        protected = (pos < sinks) | (pos >= len(ids) - window)
        self.rows, scores = zip(*_rows(llm, ids, protected), strict=True)
        self.scores = np.stack(scores)  # (L, H n)
        scores = self.scores.reshape(-1, len(ids))
        room = round(BUDGET * scores.size) - len(scores) * np.count_nonzero(protected)
        threshold = float(np.sort(scores[:, ~protected], axis=None)[-room])
        config = CacheConfig("foresight", threshold=threshold)
        self.recipe = Recipe(config, config.options)
        self.lengths = np.stack([self._store(*row) for row in zip(self.rows, self.scores, strict=True)])  # (L, H)
        self.cache.advance(ids, 0)
        self.passages = list(_passages(ids, list(asks)))
        if len(token_ids) > len(ids):
            self.passages.append((token_ids[len(ids) : len(ids) + REPEATED[1]], None))
        self.hidden = [self._begin(passage) for passage, _ in self.passages]
        self.base = self.loss(0)

    def tried(self, index, head):
        """(nats a token that fewer entries of the head lose, or more save; how many entries that is)"""
        layer, lost, entries = self.rows[index], 0.0, 0
        n = layer.lengths[head]
        for sign in (1, -1):
            scores = self.scores[index].copy()
            scores[head * n : (head + 1) * n] *= np.float32(np.exp(sign * SHIFT))
            more = int(self._store(layer, scores)[head] - self.lengths[index, head])
            if more:
                lost -= sign * (self.loss(index) - self.base)
                entries += sign * more
        self._store(layer, self.scores[index])
        return lost, entries

    def loss(self, first):
        """Nats a token that the passages cost, the mean over them; what is cached for layers before `first` is as it
        was when the trial began."""
        return float(np.mean([self._cost(number, first) for number in range(len(self.passages))]))

    def clear(self):
        self.cache.clear()

    def _store(self, layer, scores):
        """Compress a layer's rows by their scores. -> (H,) entries"""
        plan = self.recipe.plan(layer, layer.ops.array(scores), None)
        self.cache.write(layer.index, plan.apply(layer), np.zeros(len(layer.lengths), np.int64))
        return plan.lengths

    def _begin(self, passage):
        """The hidden states of a passage before each layer."""
        return [step.x.copy() for step in self._layers(self.model.embed(np.asarray(passage[:-1])), 0)]

    def _cost(self, number, first):
        (passage, scored), x = self.passages[number], self.hidden[number][first].copy()
        for _ in self._layers(x, first):
            pass
        following = np.asarray(passage[1:])[-(scored or len(passage)) :]
        log_p = log_softmax(self.model.logits(x[-len(following) :]))
        return -log_p[np.arange(len(following)), following].mean()

    def _layers(self, x, first):
        """Have the layers from `first` on read a passage, x (n, dim) its hidden states: yields a Step of each."""
        return self.model.layers([(x, self.cache.seen)], self.cache.layer, first=first)


def _rows(llm, token_ids, protected):
    """Yields the Layers of a text that is read, and what the profile predicts of each one's rows (H n,), in NumPy."""
    model, empty = llm.model, llm.new_cache()
    for step in model.layers([(model.embed(token_ids), 0)], empty.layer, {"scores"}):
        yield layer_of(model, step, protected), np.exp(model.ops.host(step.scores)).ravel()


def _passages(token_ids, asks):
    """(tokens, how many of the last are scored): passages from all over the text, of both kinds."""
    for (given, following), n in ((REPEATED, 2), (LOOKED_UP, 3)):
        room = max(len(token_ids) - given - following, 0)
        for start in np.linspace(0, room, n + 2).astype(int)[1:-1]:
            passage = token_ids[start : start + given + following]
            yield [*asks, *passage], min(following, len(passage) - 1)


def try_heads(llm, readings, done=lambda: None):
    """lost, entries (T, L, H): what a Trial of each of the readings, (token ids, asks), says of every head. done() is
    called after each."""
    config, found = llm.config, []
    for ids, asks in readings:
        trial = Trial(llm, ids, asks)
        for index in range(config.n_layers):
            found += [trial.tried(index, head) for head in range(config.n_kv_heads)]
        trial.clear()
        done()
    return np.array(found).reshape(len(readings), config.n_layers, config.n_kv_heads, 2).transpose(3, 0, 1, 2)


def log_worth(lost, entries):
    """(L, H) float32 from lost and entries (T, L, H) of T trials: the log of what an entry is worth, over the mean of
    all heads, as far as it is known: heads whose entries the trials hardly moved are taken for the mean."""
    n_trials, shape = len(lost), lost.shape[1:]
    lost, entries = (a.reshape(n_trials, -1) for a in (lost, entries))
    if not lost.sum() > 0:
        return np.zeros(shape, np.float32)
    lost, total = lost * (entries.sum() / lost.sum()), np.maximum(entries.sum(axis=0), 1)
    each = lost.sum(axis=0) / total
    spread = np.square(lost - each * entries).mean(axis=0)
    known = 1 / (1 + n_trials * np.maximum(spread, np.median(spread)) / total**2)
    return (STEP * np.log(np.clip(1 + known * (each - 1), 1 / MOST, MOST))).astype(np.float32).reshape(shape)
