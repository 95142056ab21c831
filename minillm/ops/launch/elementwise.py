"""Hidden states: norm, activation, bias, a look for what is not finite."""

from minillm.ops.launch.start import blocks, run


def rms_norm(device, x, weight, eps, out, real16):
    """out (n, dim) real16 = x / rms(x) * weight; x (n, dim) float32, weight (dim,) float32."""
    n, dim = x.shape
    assert weight.shape == (dim,) and out.shape == x.shape and dim % 4 == 0
    arguments = {"x": x, "weight": weight, "eps": eps, "out": out, "dim": dim}
    run(device, "rms_norm", "rms_norm", (n,), (256,), arguments, defines={"real16": real16})


def add_rms_norm(device, y, weight, eps, x):
    """x (n, dim) float32 += y / rms(y) * weight; y (n, dim) float32, weight (dim,) float32."""
    n, dim = x.shape
    assert weight.shape == (dim,) and y.shape == x.shape and dim % 4 == 0
    arguments = {"y": y, "weight": weight, "eps": eps, "x": x, "dim": dim}
    run(device, "rms_norm", "add_rms_norm", (n,), (256,), arguments, defines={"real16": "half"})


def glu(device, gate_up, bias, activation, out, real16):
    """out (n, ffn) real16 = act(gate) * up; gate_up (n, 2 ffn) real16; bias (2 ffn,) float32 or None; activation: its
    linear and its cubic coefficient (files.config.ACTIVATIONS)."""
    n, ffn = out.shape
    assert gate_up.shape == (n, 2 * ffn) and ffn % 8 == 0
    arguments = {"gate_up": gate_up, "bias": bias, "out": out, "ffn": ffn}
    arguments |= dict(zip(("linear", "cubic"), activation, strict=True))
    run(device, "glu", "glu", (n, blocks(ffn, 8 * 256)), (256,), arguments, defines={"real16": real16})


def add_bias(device, x, bias):
    """x (n, dim) float32 += bias (dim,)."""
    n, dim = x.shape
    run(device, "add_bias", "add_bias", (n, blocks(dim, 256)), (256,), {"x": x, "bias": bias, "dim": dim})


def not_finite(device, x, layer, bad):
    """bad[0] = min(bad[0], layer) if x, float32, holds a NaN or an infinity."""
    grid = (min(blocks(x.size, 1024), 8 * device.processors),)
    run(device, "not_finite", "not_finite", grid, (256,), {"x": x, "n": x.size, "layer": layer, "bad": bad})
