"""Rotary position embedding: inverse frequencies of every kind, and the cos and sin tables of some positions.

Half-split, as in Hugging Face weights: element i is rotated with element i + head_dim // 2. Arithmetic is float32 in
the order of transformers.modeling_rope_utils, so that long positions round as they do there.
"""

import math

import numpy as np

from minillm.files.config import RopeConfig


class Rope:
    """One rotation of a model: position p turns pair i by p * inv_freq[i]; cos and sin carry `attention_factor`.

    head_dim: elements of a head. rotated: how many of them are in pairs that turn, the others stay as they are."""

    def __init__(self, rope: RopeConfig, head_dim: int, rotated: int | None = None):
        self.rope, self.rotated = rope, head_dim if rotated is None else rotated
        self.n_still = (head_dim - self.rotated) // 2  # pairs
        self.attention_factor = _attention_factor(rope)
        self._inv_freq = _inverse_frequencies(rope, self.rotated)
        self._long = None
        if rope.kind == "longrope":
            self._long = 1 / _wavelengths(rope.theta, rope.long_factors, self.rotated)

    def inverse_frequencies(self, length: int) -> np.ndarray:
        """(rotated // 2) float32 for a sequence of `length` tokens, on which "dynamic" and "longrope" depend."""
        rope = self.rope
        if length <= rope.original_context or rope.kind not in ("dynamic", "longrope"):
            return self._inv_freq
        if rope.kind == "longrope":
            return self._long
        stretch = rope.factor * length / rope.original_context - (rope.factor - 1)
        theta = rope.theta * stretch ** (self.rotated / (self.rotated - 2))
        return 1 / _wavelengths(theta, rope.freq_factors, self.rotated)

    def tables(self, positions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """positions (n,) int -> cos (n, head_dim // 2), sin (n, head_dim // 2) float32.
        `length` = tokens in the sequence after this forward."""
        angles = np.asarray(positions, np.float32)[:, None] * self.inverse_frequencies(length)
        factor, still = np.float32(self.attention_factor), (len(angles), self.n_still)
        cos, sin = np.cos(angles) * factor, np.sin(angles) * factor
        if self.n_still:
            cos, sin = (np.hstack([x, np.full(still, at, np.float32)]) for x, at in ((cos, 1), (sin, 0)))
        return cos, sin


def _wavelengths(theta: float, factors: tuple[float, ...] | None, n: int) -> np.ndarray:
    """theta ** (2i / n), (n // 2) float32: wavelength / 2 pi of each pair, times its factor."""
    exponents = np.arange(0, n, 2, dtype=np.float32) / np.float32(n)
    # the power in float64: NumPy's float32 power is an ulp off torch's, which at position 100,000 turns by 0.01
    wavelengths = (theta ** exponents.astype(np.float64)).astype(np.float32)
    return wavelengths if factors is None else wavelengths * np.asarray(factors, np.float32)


def _inverse_frequencies(rope: RopeConfig, n: int) -> np.ndarray:
    if rope.kind == "none":
        return np.zeros(n // 2, np.float32)
    wavelengths = _wavelengths(rope.theta, rope.freq_factors, n)
    inv_freq = 1 / wavelengths
    if rope.kind == "linear":
        return inv_freq / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(inv_freq, rope)
    if rope.kind == "yarn":
        kept = _yarn_extrapolated(rope, n)
        return 1 / (np.float32(rope.factor) * wavelengths) * (1 - kept) + inv_freq * kept
    return inv_freq


def _llama3(inv_freq: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, those between are blended."""
    turns = np.float32(rope.original_context / (2 * math.pi)) * inv_freq  # rotations within the original context
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    return (1 - kept) * inv_freq / np.float32(rope.factor) + kept * inv_freq


def _yarn_extrapolated(rope: RopeConfig, n: int) -> np.ndarray:
    """YaRN (arXiv 2309.00071, section 3.2): the share of each pair's frequency that is kept, (n // 2) float32.
    Pairs that turn more than beta_fast times within the original context are kept, fewer than beta_slow interpolated.
    """

    def pair_with(rotations: float) -> float:
        return n * math.log(rope.original_context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(n // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return 1 - np.clip(ramp, 0, 1)


def _attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind not in ("yarn", "longrope") or rope.factor <= 1:
        return 1.0
    if rope.kind == "longrope":
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_context))
    log_factor = 0.1 * math.log(rope.factor)
    if rope.mscale and rope.mscale_all_dim:
        return (rope.mscale * log_factor + 1.0) / (rope.mscale_all_dim * log_factor + 1.0)
    return log_factor + 1.0
