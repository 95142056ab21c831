"""The next tokens from logits."""

from dataclasses import dataclass

import numpy as np

from minillm.ops.launch.start import blocks, run
from minillm.sampling import PENALTY_WINDOW

THREADS = 512  # of sample_draw, as in sample.cu


@dataclass
class SampleSpace:
    """What lies between the kernels."""

    best: object  # (B, parts) uint64
    weights: object  # (B, vocab) float64


def sample_space(device, batch, vocab):
    """A SampleSpace for logits (batch, vocab)."""
    parts = min(64, blocks(vocab, 1024))
    return SampleSpace(device.empty((batch, parts), np.uint64), device.empty((batch, vocab), np.float64))


def draw_tables(draws):
    """What sample.cu reads of B Draws: reals (B, 5) float64, ints (B, 2 + PENALTY_WINDOW) int32, on the host."""
    reals, ints = np.zeros((len(draws), 5)), np.zeros((len(draws), 2 + PENALTY_WINDOW), np.int32)
    for b, draw in enumerate(draws):
        params, m = draw.params, len(draw.recent)
        reals[b] = params.temperature, params.top_p, params.min_p, draw.uniform, params.repeat_penalty
        ints[b, :2], ints[b, 2 : 2 + m] = (min(params.top_k, np.iinfo(np.int32).max), m), draw.recent
    return reals, ints


def sample(device, logits, reals, ints, space, tokens):
    """tokens (B,) int32: the next of each of B sequences by draw_tables (B, ...); logits (B, vocab) float32, which the
    repeat penalty changes."""
    batch, vocab = logits.shape
    assert reals.shape == (batch, 5) and ints.shape == (batch, 2 + PENALTY_WINDOW) and tokens.shape == (batch,)
    assert space.weights.shape == logits.shape and len(space.best) == batch
    parts, common = space.best.shape[1], {"logits": logits, "reals": reals, "best": space.best, "vocab": vocab}
    run(device, "sample", "sample_best", (parts, batch), (256,), common | {"ints": ints})
    run(device, "sample", "sample_weights", (parts, batch), (256,), common | {"weights": space.weights})
    arguments = common | {"weights": space.weights, "ints": ints, "tokens": tokens, "parts": parts}
    run(device, "sample", "sample_draw", (batch,), (THREADS,), arguments, shared=16 * THREADS * 8)
