"""From logits to a token: greedy, or temperature with top-k, top-p and min-p, and a penalty on repetition."""

from dataclasses import dataclass, fields

import numpy as np

from minillm.errors import UsageError

PENALTY_WINDOW = 64  # tokens that the repeat penalty looks back on, as in llama.cpp


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is drawn, and when it ends. Values out of range raise UsageError."""

    max_tokens: int | None = None  # None: until a stop id or the end of the context
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # the k most likely tokens; 0: all
    top_p: float = 1.0  # the fewest tokens whose probabilities reach p
    min_p: float = 0.0  # tokens at least min_p times as likely as the most likely one
    repeat_penalty: float = 1.0  # logits of the last 64 tokens: positive ones divided by it, negative multiplied
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        rules = {
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repeat_penalty": (0.01 <= self.repeat_penalty <= 100, "from 0.01 to 100 (1: none)"),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
            "stop": (all(self.stop), "texts that are not empty"),
        }
        for name, (right, valid) in rules.items():
            if not right:
                raise UsageError(f"{name} must be {valid}, not {getattr(self, name)!r}")

    @classmethod
    def names(cls):
        return [field.name for field in fields(cls)]


@dataclass(frozen=True)
class Draw:
    """What decides the next token of a sequence beside its logits."""

    params: SamplingParams
    recent: np.ndarray  # (m,) int32 ids that the repeat penalty is for, ascending; m <= PENALTY_WINDOW
    uniform: float  # in [0, 1): the first id at which the sum of the weights so far is more than this share is taken
    forbidden: tuple[int, ...] = ()  # ids that are not drawn


GREEDY = Draw(SamplingParams(), np.zeros(0, np.int32), 0.0)


class Sampler:
    """Draws tokens of one answer; its random numbers depend on the seed alone."""

    def __init__(self, params):
        self.params = params
        self.rng = np.random.default_rng(params.seed)

    def draw(self, recent):
        """The Draw of the next token. recent: token ids so far, of which the last 64 count."""
        params, ids = self.params, []
        if params.repeat_penalty != 1:
            ids = recent[-PENALTY_WINDOW:]
        uniform = 0.0 if params.temperature == 0 else self.rng.random()
        return Draw(params, np.unique(np.asarray(ids, np.int32)), uniform)


def sample(logits, draw):
    """logits (vocab,) float32 -> token id. What kernels/cuda/sample.cu does, but for `forbidden`."""
    params, seen = draw.params, draw.recent
    if draw.forbidden:
        logits = logits.copy()
        logits[list(draw.forbidden)] = -np.inf
    if len(seen):
        logits = logits.copy()
        factor = np.float32(params.repeat_penalty)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / factor, logits[seen] * factor)
    if params.temperature == 0:
        return int(logits.argmax())
    sums = np.cumsum(weights(logits, params))
    return int(np.searchsorted(sums, draw.uniform * sums[-1], side="right"))


def sample_each(logits, draws):
    """logits (B, vocab) -> the next tokens, B ids, by B Draws; the logits themselves where there are none."""
    return logits if draws is None else [sample(row, draw) for row, draw in zip(logits, draws, strict=True)]


def weights(logits, params):
    """(vocab,) float64: the probability of each token over that of the most likely one; 0 for what temperature, then
    top-k, top-p and min-p, each on what the one before left, leave out."""
    weight = np.exp((logits.astype(np.float64) - logits.max()) / params.temperature)
    if params.top_k:
        weight = only(weight, ranked(logits, params.top_k))
    if params.top_p < 1:
        goal = params.top_p * weight.sum()
        for n in (64, 4096, len(logits)):  # mostly few tokens reach it, and the others need no order
            order = ranked(logits, n)
            sums = np.cumsum(weight[order])
            if sums[-1] >= goal:
                break
        weight = only(weight, order[: int(np.searchsorted(sums, goal)) + 1])
    weight[weight < params.min_p] = 0
    return weight


def ranked(logits, n):
    """The first n token ids by logit, of equal ones the lower first."""
    ids = np.arange(len(logits))
    if n < len(logits):
        ids = np.flatnonzero(logits >= np.partition(logits, -n)[-n])
    return ids[np.argsort(-logits[ids], kind="stable")][:n]


def only(weight, ids):
    """The weights (vocab,) of `ids`, 0 for the others."""
    out = np.zeros_like(weight)
    out[ids] = weight[ids]
    return out


def log_softmax(logits):
    """(n, vocab) float64."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
