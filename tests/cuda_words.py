"""16-bit floats as words on the host, in plain NumPy."""

import numpy as np

REAL16 = {"half": 2**-11 * 1.01, "bf16": 2**-8 * 1.01}  # the type -> largest relative error of rounding to it


def to_words(values, real16):
    """float array -> uint16 words, rounded to nearest (even)."""
    values = np.ascontiguousarray(values, np.float32)
    if real16 == "half":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_words(words, real16):
    """uint16 words -> float32."""
    if real16 == "half":
        return words.view(np.float16).astype(np.float32)
    return (words.astype(np.uint32) << 16).view(np.float32)
