"""From kernels/cuda/*.cu to a launch: where sources are found and compiled, arguments checked, and grid, block, shared
memory and argument order computed. A device (cuda_device.py, or the emulator of the tests) compiles and starts what it
is given here, and knows nothing of any kernel.

A kernel is called with keyword arguments that carry the names of its parameters in the .cu file: their order and their
C types are read there, and an array of another dtype, one that is not contiguous or lies elsewhere, or a missing
argument is an error before anything runs. CUDA itself would check nothing of it.
"""

import functools
import itertools
import math
import re
from dataclasses import dataclass

import numpy as np

from minillm.ops.kernels import folder

WARP = 32
PAGE_SIZE = 32  # entries a page, as in pages.cuh
_TYPES = {
    "float": np.float32,
    "int": np.int32,
    "unsigned": np.uint32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "unsigned char": np.uint8,
    "half": np.uint16,  # 16-bit floats are words on the host
    "bf16": np.uint16,
}
_INCLUDE = re.compile(r'^#include "([\w.]+)"$', re.MULTILINE)
_SIGNATURE = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(([^)]*)\)')


# sources


@functools.cache
def _text(name):
    """The text of a file of kernels/cuda with the project's own includes put in their place, each once: it compiles by
    itself, and a cache that goes by the text cannot miss a change of a header."""
    seen = {name}

    def inline(file):
        text = (folder() / "cuda" / file).read_text()

        def replaced(match):
            if match[1] in seen:
                return ""
            seen.add(match[1])
            line = text.count("\n", 0, match.start()) + 2
            return f'#line 1 "{match[1]}"\n{inline(match[1])}\n#line {line} "{file}"'

        return _INCLUDE.sub(replaced, text)

    return f'#line 1 "{name}"\n{inline(name)}'


def files():
    """Names of the kernel files, without .cu."""
    return sorted(path.stem for path in (folder() / "cuda").glob("*.cu"))


@functools.cache
def variants(file):
    """What a file may be compiled with, as its line `// Defines: NAME = a, b; OTHER = c, d` says: a list of dicts, one
    for each combination."""
    match = re.search(r"^// Defines: (.*)$", _text(f"{file}.cu"), re.MULTILINE)
    names = [part.split(" = ") for part in match[1].split("; ")] if match else []
    choices = [[(name, value) for value in values.split(", ")] for name, values in names]
    return [dict(choice) for choice in itertools.product(*choices)]


def source(file, defines):
    """The text that is compiled for one of the variants of a file."""
    assert defines in variants(file), f"{file}.cu is not made for {defines}"
    return "".join(f"#define {name} {value}\n" for name, value in defines.items()) + _text(f"{file}.cu")


@functools.cache
def parameters(file, kernel):
    """{name: (C type, whether it is a pointer)} of a kernel, in order."""
    lists = dict(_SIGNATURE.findall(_text(f"{file}.cu")))
    out = {}
    for parameter in lists[kernel].split(","):
        c_type, pointer, name = re.fullmatch(
            r"\s*(?:const )?([\w ]+?)\s*(\*?)\s*(?:__restrict__ )?(\w+)\s*", parameter
        ).groups()
        out[name] = c_type, bool(pointer)
    return out


# launching


@dataclass
class Paged:
    """The stored entries of one layer of B sequences, as kernels/cuda/pages.cuh reads them: device arrays."""

    slabs: object  # (slabs,) uint64 addresses
    slab_pages: int  # pages a slab
    pages: object  # (B, H, capacity) int32 page ids; a row holds the pages of a head, the first of them are meant
    lengths: object  # (B, H) int32 entries of each head
    seen: object  # (B,) int32 tokens seen before the new ones: the position of the first of them

    def arguments(self):
        return {
            "slabs": self.slabs,
            "slab_pages": self.slab_pages,
            "pages": self.pages,
            "capacity": self.pages.shape[2],
            "lengths": self.lengths,
        }


def run(device, file, kernel, grid, block, arguments, *, defines=None, shared=0):
    """Start a kernel of `file`.cu: grid, block as tuples; shared: bytes of dynamic shared memory; arguments: values by
    the names of the parameters, device arrays for pointers (None: a null pointer)."""
    defines = defines or {}
    if 0 in grid:
        return
    key = file, kernel, *defines.items()
    if key not in device.kernels:
        device.kernels[key] = _compiled(device, file, kernel, defines)
    function, declared = device.kernels[key]
    assert arguments.keys() == declared.keys(), f"{kernel}: {arguments.keys() ^ declared.keys()} missing or unknown"
    values = [_checked(device, kernel, name, arguments[name], *declared[name]) for name in declared]
    if shared > function.max_dynamic_shared_size_bytes:
        function.max_dynamic_shared_size_bytes = shared
    function(grid, block, tuple(values), shared_mem=shared)


def _compiled(device, file, kernel, defines):
    """(the function, {parameter: (dtype, whether it is a pointer)})"""
    key = file, *defines.items()
    if key not in device.kernels:
        device.kernels[key] = device.module(source(file, defines))
    types = {
        name: (_TYPES[defines.get(c_type, c_type)], pointer)
        for name, (c_type, pointer) in parameters(file, kernel).items()
    }
    return device.kernels[key].get_function(kernel), types


def _checked(device, kernel, name, value, dtype, pointer):
    if not pointer:
        return dtype(value)
    if value is None:
        return np.uint64(0)
    assert device.owns(value), f"{kernel}: {name} is not an array of {device.name}"
    assert value.dtype == dtype, f"{kernel}: {name} is {value.dtype}, not {np.dtype(dtype)}"
    assert value.flags.c_contiguous, f"{kernel}: {name} is not contiguous"
    return value


def _blocks(n, size):
    return math.ceil(n / size)


# kernels, one function each


def rms_norm(device, x, weight, eps, out, real16):
    """out (n, dim) real16 = x / rms(x) * weight; x (n, dim) float32, weight (dim,) float32."""
    n, dim = x.shape
    assert weight.shape == (dim,) and out.shape == x.shape and dim % 4 == 0
    arguments = {"x": x, "weight": weight, "eps": eps, "out": out, "dim": dim}
    run(device, "rms_norm", "rms_norm", (n,), (256,), arguments, defines={"real16": real16})


def _head(d, real16):
    return {"real16": real16, "HEAD_DIM": str(d)}


# attention


@dataclass
class DecodeSpace:
    """Where the partial results of decode_attention lie, and its grid, which fills the card at any lengths."""

    blocks: int
    warps: int  # a block
    out: object  # (blocks * warps + items, G, d) float32
    lse: object  # (blocks * warps + items, G) float32


def decode_space(device, items, group, head_dim):
    """A DecodeSpace for up to `items` pairs of a sequence and a KV head."""
    warps = min(8, device.shared_memory // _decode_warp_bytes(head_dim))
    rows = device.processors * warps + items
    out = device.empty((rows, group, head_dim), np.float32)
    return DecodeSpace(device.processors, warps, out, device.empty((rows, group), np.float32))


def _decode_warp_bytes(head_dim):
    return (16 + 2 * 2 * PAGE_SIZE) * head_dim * 2  # q, and two pages of K and of V


def decode_plan(device, lengths, starts):
    """starts (L, B * H + 1) int32: pages of all heads before, layer by layer; lengths (L, B, H) int32. Once a step."""
    n_layers, batch, n_kv_heads = lengths.shape
    assert starts.shape == (n_layers, batch * n_kv_heads + 1)
    arguments = {"lengths": lengths, "starts": starts, "n_items": batch * n_kv_heads}
    run(device, "decode_attention", "decode_plan", (n_layers,), (WARP,), arguments, defines=_head(64, "half"))


def decode_attention(device, q, past, starts, space, out, scale, window, real16):
    """out (B, Hq, d) = attention of one token of each sequence, q (B, Hq, d), over its stored entries, its own among
    them. past: Paged; starts (B * H + 1,): this layer's row of decode_plan; window: 0 for none."""
    (batch, n_heads, head_dim), n_kv_heads = q.shape, past.lengths.shape[1]
    items, group, n_warps = batch * n_kv_heads, n_heads // n_kv_heads, space.blocks * space.warps
    assert out.shape == q.shape and past.lengths.shape[0] == len(past.seen) == batch and starts.shape == (items + 1,)
    assert space.out.shape[0] >= n_warps + items and space.out.shape[1:] == (group, head_dim)
    partial = {"partial_out": space.out, "partial_lse": space.lse, "starts": starts, "n_items": items}
    arguments = {"q": q, "seen": past.seen, "scale": scale, "window": window, "n_kv_heads": n_kv_heads, "group": group}
    arguments |= past.arguments() | partial
    grid, block, defines = (space.blocks, _blocks(group, 16)), (space.warps * WARP,), _head(head_dim, real16)
    shared = space.warps * _decode_warp_bytes(head_dim)
    run(device, "decode_attention", "decode_attention", grid, block, arguments, defines=defines, shared=shared)
    arguments = partial | {"out": out, "n_warps": n_warps}
    run(device, "decode_attention", "decode_combine", (items, group), (8 * WARP,), arguments, defines=defines)


def prefill_attention(device, q, k, v, past, out, lse, scale, window, real16):
    """out (n, Hq, d), lse (Hq, n) float32 = causal attention of n new tokens of one sequence, q (Hq, n, d), over its
    stored entries and one another, k and v (H, n, d). past: Paged; window: 0 for none."""
    (n_heads, n, head_dim), n_kv_heads = q.shape, len(k)
    assert k.shape == v.shape == (n_kv_heads, n, head_dim) and past.lengths.shape == (1, n_kv_heads)
    assert out.shape == (n, n_heads, head_dim) and lse.shape == (n_heads, n)
    arguments = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "n": n, "group": n_heads // n_kv_heads}
    arguments |= past.arguments() | {"seen": past.seen, "scale": scale, "window": window}
    shared = (128 + 2 * 64) * head_dim * 2 + 2 * 64 * 8
    grid, defines = (n_heads, _blocks(n, 128)), _head(head_dim, real16)
    run(device, "prefill_attention", "prefill_attention", grid, (128,), arguments, defines=defines, shared=shared)
