"""16-bit floats as words on the host, and rows of 8 bits, in plain NumPy."""

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


def to_int8(rows):
    """rows (n, d) -> (n, d) int8 and scales (n,) in words of bf16, by the letter of what pages hold."""
    rows = np.ascontiguousarray(rows, np.float32)
    numbers, words = np.zeros(rows.shape, np.int8), np.zeros(len(rows), np.uint16)
    for i, row in enumerate(rows):
        words[i : i + 1] = to_words(np.float32(max(abs(x) for x in row)) / np.float32(127), "bf16")
        scale = from_words(words[i : i + 1], "bf16")[0]
        if scale > 0:
            numbers[i] = [max(-127, min(127, round(float(x / scale)))) for x in row]  # round: ties to even
    return numbers, words


def from_int8(numbers, words):
    """The other way, float32."""
    return numbers * from_words(words, "bf16")[..., None]


def packed(words, format, real16):
    """Rows (n, d) of 16-bit words -> what a RowFormat of pages stores of them, a list of arrays, and what is read,
    float32."""
    rows = from_words(words, real16)
    if format.exact:
        return [words], rows
    if not format.turned:
        return list(to_int8(rows)), from_int8(*to_int8(rows))
    parts = list(format.pack(rows))
    return parts, format.unpack(parts, rows.shape[1])
