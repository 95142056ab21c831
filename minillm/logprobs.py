"""How likely tokens are, by the model's own distribution: the softmax of its logits as they are, before temperature,
penalties, biases and constraints, as OpenAI's API and llama.cpp's server have it."""

from dataclasses import dataclass

import numpy as np

MOST_LIKELY = 20  # tokens beside the one that came, as in OpenAI's API


@dataclass(frozen=True)
class Logprob:
    """The log-probability (natural logarithm) of a token, and those of the likeliest ones at its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), the likeliest first, of equal ones the lower id

    @classmethod
    def of(cls, logits, token_id, most):
        """logits (vocab,): of the place. most: how many of the likeliest."""
        found = log_softmax(logits[None])[0]
        top = ranked(logits, most) if most else ()
        return cls(int(token_id), float(found[token_id]), tuple((int(i), float(found[i])) for i in top))


def ranked(logits, n):
    """The first n >= 1 token ids by logit, of equal ones the lower first."""
    ids = np.arange(len(logits))
    if n < len(logits):
        ids = np.flatnonzero(logits >= np.partition(logits, -n)[-n])
    return ids[np.argsort(-logits[ids], kind="stable")][:n]


def log_softmax(logits):
    """(n, vocab) float64."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
