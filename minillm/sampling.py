"""From logits to a token: what changes the logits, then greedy, or temperature with top-k, top-p and min-p."""

import operator
import reprlib
from collections import Counter
from dataclasses import dataclass, fields

import numpy as np

from minillm.constraint import Constraint
from minillm.errors import MinillmError, UsageError
from minillm.logprobs import MOST_LIKELY, Logprob, ranked

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
    presence_penalty: float = 0.0  # subtracted from the logit of each token that the answer has already
    frequency_penalty: float = 0.0  # subtracted as many times as the answer has it
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit), or a mapping; -inf: never
    logprobs: int | None = None  # each token with its Logprob, and so many of the likeliest there; None: without
    constraint: Constraint | None = None  # what the text of the answer must be

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        rules = {
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repeat_penalty": (0.01 <= self.repeat_penalty <= 100, "from 0.01 to 100 (1: none)"),
            "presence_penalty": (-100 <= self.presence_penalty <= 100, "from -100 to 100 (0: none)"),
            "frequency_penalty": (-100 <= self.frequency_penalty <= 100, "from -100 to 100 (0: none)"),
            "logit_bias": (
                all(-100 <= x <= 100 or x == -np.inf for _, x in self.logit_bias),
                "of values from -100 to 100, or -inf (never)",
            ),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= MOST_LIKELY, f"in 0..{MOST_LIKELY}, or None"),
            "constraint": (self.constraint is None or isinstance(self.constraint, Constraint), "a Constraint, or None"),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
            "stop": (all(self.stop), "texts that are not empty"),
        }
        for name, (right, valid) in rules.items():
            if not right:
                raise UsageError(f"{name} must be {valid}, not {getattr(self, name)!r}")
        if self.constraint and self.ignore_eos:
            raise UsageError("a constraint says where an answer ends, and ignore_eos goes on: leave one of them out")

    @property
    def on_host(self):
        """Whether an answer takes more than kernels/cuda/sample.cu does: the logits themselves, on the host."""
        changed = self.presence_penalty or self.frequency_penalty or self.logit_bias or self.constraint
        return bool(changed) or self.logprobs is not None

    @classmethod
    def names(cls):
        return [field.name for field in fields(cls)]


def _pairs(bias):
    """(token id, value) of a logit bias, by id. Raises UsageError."""
    try:
        pairs = [(operator.index(i), float(x)) for i, x in (bias.items() if hasattr(bias, "items") else bias)]
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"logit_bias must map token ids to numbers, not {reprlib.repr(bias)}") from None
    if len(dict(pairs)) < len(pairs):
        raise UsageError(f"logit_bias must name each token once, and {reprlib.repr(bias)} does not")
    return tuple(sorted(pairs))


@dataclass(frozen=True)
class Draw:
    """What decides the next token of a sequence beside its logits."""

    params: SamplingParams
    recent: np.ndarray  # (m,) int32 ids that the repeat penalty is for, ascending; m <= PENALTY_WINDOW
    uniform: float  # in [0, 1): the first id at which the sum of the weights so far is more than this share is taken
    added: tuple[np.ndarray, np.ndarray] | None = None  # (n,) ids, each once, and float32 that is added to their logits
    allowed: np.ndarray | None = None  # (vocab,) bool: tokens that may come; None: all


GREEDY = Draw(SamplingParams(), np.zeros(0, np.int32), 0.0)


@dataclass(frozen=True)
class Drawn:
    """The token that comes next."""

    token_id: int
    logprob: Logprob | None = None  # where its SamplingParams ask for it


class Sampler:
    """Draws the tokens of one answer; its random numbers depend on the seed alone."""

    def __init__(self, params, matcher=None):
        """matcher: constraint.Matcher of the constraint, where there is one."""
        assert (matcher is None) == (params.constraint is None), "a constraint needs its matcher"
        self.params, self.matcher = params, matcher
        self.rng = np.random.default_rng(params.seed)
        self.bias = dict(params.logit_bias)
        self.counts = Counter()  # of the tokens of the answer
        self.added = dict(self.bias)  # token id -> what is added to its logit

    def draw(self, recent, never=()):
        """The Draw of the next token. recent: token ids so far, of which the last 64 count; never: ids that are not
        drawn."""
        params, ids = self.params, []
        if params.repeat_penalty != 1:
            ids = recent[-PENALTY_WINDOW:]
        uniform = 0.0 if params.temperature == 0 else self.rng.random()
        added = self.added | dict.fromkeys(never, -np.inf)
        arrays = (np.array([*added], np.int64), np.array([*added.values()], np.float32)) if added else None
        allowed = self.matcher.allowed() if self.matcher else None
        return Draw(params, np.unique(np.asarray(ids, np.int32)), uniform, arrays, allowed)

    def take(self, token_id):
        """The next token of the answer is this one."""
        params = self.params
        if params.presence_penalty or params.frequency_penalty:
            self.counts[token_id] += 1
            penalty = params.presence_penalty + self.counts[token_id] * params.frequency_penalty
            self.added[token_id] = self.bias.get(token_id, 0.0) - penalty
        if self.matcher:
            self.matcher.take(token_id)


def drawn(logits, draw):
    """logits (vocab,) float32 -> Drawn."""
    token, most = sample(logits, draw), draw.params.logprobs
    return Drawn(token, None if most is None else Logprob.of(logits, token, most))


def sample(logits, draw):
    """logits (vocab,) float32 -> token id. What kernels/cuda/sample.cu does, but for what is added and allowed. Raises
    MinillmError where no token is left."""
    params, logits = draw.params, changed(logits, draw)
    if params.temperature == 0:
        return int(logits.argmax())
    sums = np.cumsum(weights(logits, params))
    return int(np.searchsorted(sums, draw.uniform * sums[-1], side="right"))


def changed(logits, draw):
    """The logits (vocab,) that a token is drawn from: the repeat penalty first, then what is added (biases, and
    presence and frequency penalties), and at last -inf for tokens that are not allowed."""
    seen = draw.recent
    if len(seen):
        logits = logits.copy()
        factor = np.float32(draw.params.repeat_penalty)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / factor, logits[seen] * factor)
    if draw.added is None and draw.allowed is None:
        return logits
    if draw.added is not None:
        ids, values = draw.added
        logits = logits.copy()
        logits[ids] += values
    if draw.allowed is not None:
        logits = np.where(draw.allowed, logits, np.float32(-np.inf))
    if logits.max() == -np.inf:
        raise MinillmError("no token is left to come next: constraint and logit_bias leave all of them out")
    return logits


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


def only(weight, ids):
    """The weights (vocab,) of `ids`, 0 for the others."""
    out = np.zeros_like(weight)
    out[ids] = weight[ids]
    return out
