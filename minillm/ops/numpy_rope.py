"""RoPE, and RoPE undone, in NumPy."""

import numpy as np


def rope(x, cos, sin):
    """Rotate the halves of the last axis: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin). x (..., d); cos, sin
    broadcast to (..., d/2). With -sin it is the inverse rotation."""
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    out = np.empty_like(x)
    np.multiply(x1, cos, out=out[..., :half])
    out[..., :half] -= x2 * sin
    np.multiply(x2, cos, out=out[..., half:])
    out[..., half:] += x1 * sin
    return out


def unrotated(rows, pos, cos, sin, rope=rope):
    """rows (R, d) with RoPE undone: what it was applied to at pos (R,). cos, sin (positions, d/2)."""
    norm = np.float32(cos[0, 0] ** 2)  # yarn scales cos and sin: position 0 shows by how much
    cos, sin = cos / norm, -sin / norm
    return rope(rows, cos.take(pos, axis=0), sin.take(pos, axis=0))
