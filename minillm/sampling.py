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
            "repeat_penalty": (self.repeat_penalty > 0, "more than 0 (1: none)"),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
            "stop": (all(self.stop), "texts that are not empty"),
        }
        for name, (right, valid) in rules.items():
            if not right:
                raise UsageError(f"{name} must be {valid}, not {getattr(self, name)!r}")

    @classmethod
    def names(cls):
        return [field.name for field in fields(cls)]


class Sampler:
    """Draws tokens of one answer; its random numbers depend on the seed alone."""

    def __init__(self, params):
        self.params = params
        self.rng = np.random.default_rng(params.seed)

    def __call__(self, logits, recent):
        """logits (vocab,) float32, recent: token ids so far (the last 64 count) -> token id."""
        params = self.params
        if params.repeat_penalty != 1 and len(recent):
            logits = logits.copy()
            seen = np.unique(recent[-PENALTY_WINDOW:])
            factor = np.float32(params.repeat_penalty)
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / factor, logits[seen] * factor)
        if params.temperature == 0:
            return int(logits.argmax())
        return int(self.rng.choice(len(logits), p=self.probabilities(logits)))

    def probabilities(self, logits):
        """(vocab,) float64: temperature, then top-k, top-p and min-p, each on what the one before left."""
        params = self.params
        order = np.argsort(-logits, kind="stable")
        if params.top_k:
            order = order[: params.top_k]
        scaled = logits[order].astype(np.float64) / params.temperature
        p = np.exp(scaled - scaled[0])
        p /= p.sum()
        if params.top_p < 1:
            n = int(np.searchsorted(np.cumsum(p), params.top_p)) + 1
            order, p = order[:n], p[:n]
        n = int(np.count_nonzero(p >= params.min_p * p[0]))  # p falls
        order, p = order[:n], p[:n]
        full = np.zeros(len(logits))
        full[order] = p / p.sum()
        return full
