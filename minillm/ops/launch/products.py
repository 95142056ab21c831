"""Matrices: rows of them, and products with few rows of activations."""

import numpy as np

from minillm.ops.launch.start import blocks, run


def embed(device, weight, ids, out, scale=1.0):
    """out (n, dim) float32 = scale times rows ids (n,) int32 of a CudaWeight (vocab, dim)."""
    _rows_of(device, "embed", weight, len(ids), {"ids": ids, "scale": scale, "x": out})
    assert out.shape == (len(ids), weight.shape[1])


def dequantize(device, weight, first, out):
    """out (rows, n_in) real16 = rows first, first + 1, ... of a CudaWeight."""
    assert first + len(out) <= weight.shape[0] and out.shape[1] == weight.shape[1]
    _rows_of(device, "dequantize", weight, len(out), {"first": first, "out_words": out})


def _rows_of(device, kernel, weight, n, arguments):
    n_in = weight.shape[1]
    grid = n, blocks(n_in // weight.format.chunk, 128)
    arguments |= {"words": weight.words, "scales": weight.scales, "n_in": n_in}
    run(device, "embed", kernel, grid, (128,), arguments, defines={"WEIGHT": weight.format.name})


ROWS = (1, 2, 4, 8)  # that the kernels for few rows are compiled for


def rows_at_once(device, n_in):
    """How many rows of n_in a kernel that normalises them takes at once: they must fit in shared memory."""
    static = 256  # bytes, at most, that the kernels need beside
    return min(max(ROWS), (device.shared_memory - static) // (2 * n_in))


def gemv(device, x, weight, y, add=False):
    """y (rows, n_out) float32 = or += x W^T; x (rows, n_in) real16, rows <= 8."""
    assert x.shape[1] == weight.shape[1] and y.shape == (len(x), weight.shape[0])
    arguments = {"x_words": x, "y": y, "n_out": weight.shape[0], "add": add}
    _gemv(device, "gemv", weight, len(x), weight.shape[0], arguments)


def norm_gemv(device, x, norm, eps, weight, y, column=0):
    """y (rows, width) real16 or, for logits, float32: its n_out columns from `column` on = norm(x) W^T; x (rows, n_in)
    float32, at most rows_at_once."""
    n_out, width = weight.shape[0], y.shape[1]
    assert x.shape[1] == weight.shape[1] and len(y) == len(x) and 0 <= column <= width - n_out
    kernel, name = ("norm_gemv", "y_words") if y.dtype == np.uint16 else ("norm_gemv_logits", "y")
    arguments = {"x": x, "norm": norm, "eps": eps, name: y, "n_out": n_out, "column": column, "width": width}
    _gemv(device, kernel, weight, len(x), n_out, arguments, normalised=True)


def norm_gemv_glu(device, x, norm, eps, weight, bias, activation, y):
    """y (rows, ffn) real16 = act(gate) * up of norm(x); weight (2 ffn, n_in): gate above up; bias (2 ffn,) or None;
    activation: as of `glu`."""
    ffn = weight.shape[0] // 2
    assert x.shape[1] == weight.shape[1] and y.shape == (len(x), ffn)
    arguments = {"x": x, "norm": norm, "eps": eps, "bias": bias, "y_words": y, "ffn": ffn}
    arguments |= dict(zip(("linear", "cubic"), activation, strict=True))
    _gemv(device, "norm_gemv_glu", weight, len(x), 2 * ffn, arguments, normalised=True)


def _gemv(device, kernel, weight, rows, n_out, arguments, normalised=False):
    n_in = weight.shape[1]
    assert n_in % weight.format.chunk == 0 and n_in % 8 == 0
    arguments |= {"words": weight.words, "scales": weight.scales, "n_in": n_in, "rows": rows}
    shared = 2 * rows * n_in if normalised else 0
    resident = 2 if shared > 48 << 10 else 4  # blocks of 256 threads that a processor holds at once, at least
    grid = (min(blocks(n_out, 16), resident * device.processors),)
    defines = {"WEIGHT": weight.format.name, "ROWS": str(min(r for r in ROWS if r >= rows))}
    run(device, "gemv", kernel, grid, (256,), arguments, defines=defines, shared=shared)


def random_words(device, out, seed, bound, real16):
    """out, real16, = uniform in [-bound, bound), by `seed`."""
    grid = (min(blocks(out.size, 256), 32 * device.processors),)
    arguments = {"out": out, "n": out.size, "seed": seed, "bound": bound}
    run(device, "random_words", "random_words", grid, (256,), arguments, defines={"real16": real16})
