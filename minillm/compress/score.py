"""How much each row of a layer matters: (R,) float32, more is kept longer."""

import numpy as np


def recency(layer, rng):
    """StreamingLLM (Xiao et al. 2024): the newest rows."""
    return layer.pos.astype(np.float32)


def chance(layer, rng):
    """Random numbers: the control that every method must beat."""
    return rng.random(len(layer.pos), np.float32)
