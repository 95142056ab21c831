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
    "unsigned short": np.uint16,
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


def kernels(file):
    """Names of the kernels of a file."""
    return {name for name, _ in _SIGNATURE.findall(_text(f"{file}.cu"))}


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


def embed(device, weight, ids, out):
    """out (n, dim) float32 = rows ids (n,) int32 of a CudaWeight (vocab, dim)."""
    _rows_of(device, "embed", weight, len(ids), {"ids": ids, "x": out})
    assert out.shape == (len(ids), weight.shape[1])


def dequantize(device, weight, first, out):
    """out (rows, n_in) real16 = rows first, first + 1, ... of a CudaWeight."""
    assert first + len(out) <= weight.shape[0] and out.shape[1] == weight.shape[1]
    _rows_of(device, "dequantize", weight, len(out), {"first": first, "out_words": out})


def _rows_of(device, kernel, weight, n, arguments):
    n_in = weight.shape[1]
    grid = n, _blocks(n_in // weight.format.chunk, 128)
    arguments |= {"words": weight.words, "scales": weight.scales, "n_in": n_in}
    run(device, "embed", kernel, grid, (128,), arguments, defines={"WEIGHT": weight.format.name})


ROWS = (1, 2, 4, 8)  # that the kernels for few rows are compiled for


def gemv_add(device, x, weight, y):
    """y (rows, n_out) float32 += x W^T; x (rows, n_in) real16, rows <= 8."""
    _gemv(device, "gemv_add", weight, len(x), weight.shape[0], {"x_words": x, "y": y, "n_out": weight.shape[0]})
    assert x.shape[1] == weight.shape[1] and y.shape == (len(x), weight.shape[0])


def norm_gemv(device, x, norm, eps, weight, y):
    """y (rows, n_out) = norm(x) W^T, real16 or, for logits, float32; x (rows, n_in) float32, rows <= 8."""
    assert x.shape[1] == weight.shape[1] and y.shape == (len(x), weight.shape[0])
    kernel, name = ("norm_gemv", "y_words") if y.dtype == np.uint16 else ("norm_gemv_logits", "y")
    arguments = {"x": x, "norm": norm, "eps": eps, name: y, "n_out": weight.shape[0]}
    _gemv(device, kernel, weight, len(x), weight.shape[0], arguments, normalised=True)


def norm_gemv_swiglu(device, x, norm, eps, weight, bias, y):
    """y (rows, ffn) real16 = silu(gate) * up of norm(x); weight (2 ffn, n_in): gate above up; bias (2 ffn,) or None."""
    ffn = weight.shape[0] // 2
    assert x.shape[1] == weight.shape[1] and y.shape == (len(x), ffn)
    arguments = {"x": x, "norm": norm, "eps": eps, "bias": bias, "y_words": y, "ffn": ffn}
    _gemv(device, "norm_gemv_swiglu", weight, len(x), 2 * ffn, arguments, normalised=True)


def _gemv(device, kernel, weight, rows, n_out, arguments, normalised=False):
    n_in = weight.shape[1]
    assert n_in % weight.format.chunk == 0 and n_in % 8 == 0
    arguments |= {"words": weight.words, "scales": weight.scales, "n_in": n_in, "rows": rows}
    shared = 2 * rows * n_in if normalised else 0
    resident = 2 if shared > 48 << 10 else 4  # blocks of 256 threads that a processor holds at once, at least
    grid = (min(_blocks(n_out, 16), resident * device.processors),)
    defines = {"WEIGHT": weight.format.name, "ROWS": str(min(r for r in ROWS if r >= rows))}
    run(device, "gemv", kernel, grid, (256,), arguments, defines=defines, shared=shared)


def random_words(device, out, seed, bound, real16):
    """out, real16, = uniform in [-bound, bound), by `seed`."""
    grid = (min(_blocks(out.size, 256), 32 * device.processors),)
    arguments = {"out": out, "n": out.size, "seed": seed, "bound": bound}
    run(device, "random_words", "random_words", grid, (256,), arguments, defines={"real16": real16})


def swiglu(device, gate_up, bias, out, real16):
    """out (n, ffn) real16 = silu(gate) * up; gate_up (n, 2 ffn) real16; bias (2 ffn,) float32 or None."""
    n, ffn = out.shape
    assert gate_up.shape == (n, 2 * ffn) and ffn % 8 == 0
    arguments = {"gate_up": gate_up, "bias": bias, "out": out, "ffn": ffn}
    run(device, "swiglu", "swiglu", (n, _blocks(ffn, 8 * 256)), (256,), arguments, defines={"real16": real16})


def rope_split(device, qkv, bias, cos, sin, q, k, v, real16):
    """q (Hq, n, d), k and v (H, n, d) from qkv (n, (Hq + 2 H) d) real16; q and k turned by cos, sin (n, d/2)."""
    (n_heads, n, d), n_kv_heads = q.shape, len(k)
    assert qkv.shape == (n, (n_heads + 2 * n_kv_heads) * d) and cos.shape == sin.shape == (n, d // 2)
    assert k.shape == v.shape == (n_kv_heads, n, d)
    arguments = {"qkv": qkv, "bias": bias, "cos": cos, "sin": sin, "q": q, "k": k, "v": v}
    arguments |= {"n_heads": n_heads, "n_kv_heads": n_kv_heads}
    grid = n, _blocks((n_heads + 2 * n_kv_heads) * d // 4, 256)
    run(device, "rope", "rope_split", grid, (256,), arguments, defines=_head(d, real16))


def rope_append(device, qkv, bias, cos, sin, q, past, real16):
    """A decode step: q (B, Hq, d) turned, k turned and v into the last entry of every head of `past` (Paged)."""
    (batch, n_heads, d), n_kv_heads = q.shape, past.lengths.shape[1]
    assert qkv.shape == (batch, (n_heads + 2 * n_kv_heads) * d) and cos.shape == sin.shape == (batch, d // 2)
    arguments = {"qkv": qkv, "bias": bias, "cos": cos, "sin": sin, "q": q, "seen": past.seen}
    arguments |= past.arguments() | {"n_heads": n_heads, "n_kv_heads": n_kv_heads}
    grid = batch, _blocks((n_heads + 2 * n_kv_heads) * d // 4, 256)
    run(device, "rope", "rope_append", grid, (256,), arguments, defines=_head(d, real16))


def unrotate(device, rows, pos, cos, sin, norm, out, real16):
    """out (n, d) = rows (n, d) turned back by their positions pos (n,); cos, sin (positions, d/2) over sqrt(norm)."""
    n, d = rows.shape
    arguments = {"rows": rows, "pos": pos, "cos": cos, "sin": sin, "norm": norm, "out": out, "n": n}
    run(device, "rope", "unrotate", (_blocks(n * d // 4, 256),), (256,), arguments, defines=_head(d, real16))


def write_entries(device, k, v, log_size, pos, past, first, start, real16):
    """The entries of a layer, heads one after another (rows first[h] : first[h + 1]; first (H + 1,) int32), into the
    pages of `past` (Paged, B = 1) from entry start[h] on."""
    _entries(device, "write_entries", k, v, log_size, pos, past, first, start, real16)


def read_entries(device, k, v, log_size, pos, past, first, start, real16):
    """The other way: out of the pages into k, v, log_size, pos."""
    _entries(device, "read_entries", k, v, log_size, pos, past, first, start, real16)


def _entries(device, kernel, k, v, log_size, pos, past, first, start, real16):
    (n, d), n_kv_heads = k.shape, past.lengths.shape[1]
    assert v.shape == k.shape and log_size.shape == pos.shape == (n,) and past.lengths.shape[0] == 1
    assert first.shape == (n_kv_heads + 1,) and start.shape == (n_kv_heads,)
    arguments = {"k": k, "v": v, "log_size": log_size, "pos": pos, "first": first, "start": start}
    arguments |= past.arguments() | {"n_kv_heads": n_kv_heads, "n_rows": n}
    del arguments["lengths"]
    run(device, "entries", kernel, (_blocks(n * d // 8, 256),), (256,), arguments, defines=_head(d, real16))


def take(device, rows, index, out):
    """out (n, d) = rows index (n,) of rows (R, d)."""
    n, d = out.shape
    assert d % 8 == 0 and len(index) == n
    arguments = {"rows": rows, "index": index, "out": out, "d": d, "n": n}
    run(device, "take", "take", (_blocks(n * d // 8, 256),), (256,), arguments)


def merge(device, rows, order, first, weight, out, real16):
    """out (E, d): entry e = sum of weight[r] * rows[r] over r in order[first[e] : first[e + 1]]; first (E + 1,)."""
    (n, d), arguments = out.shape, {"rows": rows, "order": order, "first": first, "weight": weight, "out": out}
    assert len(first) == n + 1 and len(weight) == len(rows)
    arguments["n_entries"] = n
    run(device, "merge", "merge", (_blocks(n * d // 8, 256),), (256,), arguments, defines=_head(d, real16))


def merge_unrotated(device, rows, unrotated, pos, order, first, weight, entry_pos, cos, sin, out, real16):
    """`merge` of keys with the rotation at pos (R,) undone; sums are turned to entry_pos (E,)."""
    n, d = out.shape
    assert len(first) == n + 1 and len(entry_pos) == n and len(weight) == len(pos) == len(rows) == len(unrotated)
    arguments = {"rows": rows, "unrotated": unrotated, "pos": pos, "order": order, "first": first, "weight": weight}
    arguments |= {"entry_pos": entry_pos, "cos": cos, "sin": sin, "out": out, "n_entries": n}
    run(device, "merge", "merge_unrotated", (_blocks(n * d // 8, 256),), (256,), arguments, defines=_head(d, real16))


def not_finite(device, x, layer, bad):
    """bad[0] = min(bad[0], layer) if x, float32, holds a NaN or an infinity."""
    assert x.size % 4 == 0
    grid = (min(_blocks(x.size, 1024), 8 * device.processors),)
    run(device, "not_finite", "not_finite", grid, (256,), {"x": x, "n": x.size, "layer": layer, "bad": bad})


def last_pages(device, pages, lengths, last):
    """pages (L, B, H, capacity): the page of entry lengths - 1 of each head becomes last; both (L, B, H) int32."""
    assert pages.shape[:3] == lengths.shape == last.shape
    arguments = {"pages": pages, "lengths": lengths, "last_pages": last, "capacity": pages.shape[3]}
    arguments["n_heads"] = lengths.size
    run(device, "last_pages", "last_pages", (_blocks(lengths.size, 256),), (256,), arguments)


def add_bias(device, x, bias):
    """x (n, dim) float32 += bias (dim,)."""
    n, dim = x.shape
    run(device, "add_bias", "add_bias", (n, _blocks(dim, 256)), (256,), {"x": x, "bias": bias, "dim": dim})


def _head(d, real16):
    return {"real16": real16, "HEAD_DIM": str(d)}


# clusters


def unit_rows(device, keys, out, real16):
    """out (C, d) float32 = keys (C, d), each over its norm."""
    n, d = out.shape
    arguments = {"keys": keys, "unit": out, "n": n}
    run(device, "clusters", "unit_rows", (_blocks(n, 8),), (256,), arguments, defines=_head(d, real16))


def keep_cosines(device, unit, starts, lengths, place, kept, real16):
    """kept[place[m] + i * L + j] = cosine of rows i < j of segment m, for segments with place >= 0."""
    arguments = {"unit": unit, "starts": starts, "lengths": lengths, "place": place, "kept": kept}
    arguments["n_segments"] = len(starts)
    grid, defines = (_blocks(len(starts), 4),), _head(unit.shape[1], real16)
    run(device, "clusters", "keep_cosines", grid, (128,), arguments, defines=defines)


def clusters(device, unit, kept, starts, lengths, place, taus, counts, seed, similarity, taken, real16):
    """counts (taus,) int32 += clusters for each of taus (taus,); seed, similarity (taus, C) or None. taken (taus, C)
    uint8, zero, where there are long segments; else None."""
    common = {"starts": starts, "lengths": lengths, "place": place, "taus": taus, "counts": counts}
    common |= {"seed": seed, "similarity": similarity, "n_rows": len(unit)}
    defines, n_taus, n_segments = _head(unit.shape[1], real16), len(taus), len(starts)
    arguments = common | {"kept": kept, "n_segments": n_segments}
    run(device, "clusters", "short_clusters", (_blocks(n_segments, 4), n_taus), (128,), arguments, defines=defines)
    if taken is not None:
        arguments = common | {"unit": unit, "taken": taken}
        run(device, "clusters", "long_clusters", (n_segments, n_taus), (256,), arguments, defines=defines)


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


# scores


@dataclass
class Rows:
    """Rows of a layer that queries give attention to: device arrays, KV heads one after another."""

    keys: object  # (R, d) real16
    log_size: object  # (R,) float32
    pos: object  # (R,) int32
    starts: object  # (H + 1,) int32: rows of head h are starts[h] : starts[h + 1]
    longest: int  # rows of the longest head

    def arguments(self, q, q_pos, scale, window):
        _, n, d = q.shape
        n_kv_heads = len(self.starts) - 1
        assert self.keys.shape == (len(self.pos), d) and len(self.log_size) == len(self.pos) and q_pos.shape == (n,)
        arguments = {"q": q, "keys": self.keys, "log_size": self.log_size, "pos": self.pos, "starts": self.starts}
        return arguments | {"q_pos": q_pos, "n": n, "group": len(q) // n_kv_heads, "scale": scale, "window": window}


def score_splits(device, q, rows):
    """Into how many parts score_lse should split the rows of a head to fill the card."""
    n_kv_heads = len(rows.starts) - 1
    blocks = n_kv_heads * _blocks(len(q) // n_kv_heads * q.shape[1], 128)
    return max(1, min(2 * device.processors // max(blocks, 1), rows.longest // 512))


def score_lse(device, q, rows, q_pos, lse, scale, window, real16):
    """lse (splits, Hq, n) float32: the log of each query's sum of exponentials over each part of the rows it sees; q
    (Hq, n, d) at q_pos (n,), ascending."""
    arguments = rows.arguments(q, q_pos, scale, window) | {"lse": lse}
    assert lse.shape[1:] == q.shape[:2]
    grid = _blocks(arguments["group"] * q.shape[1], 128), len(rows.starts) - 1, len(lse)
    _scores(device, "score_lse", grid, q.shape[2], 128, 2 * 64, 2, arguments, real16)


def window_scores(device, q, rows, q_pos, lse, out, scale, window, real16):
    """out (G, n, R) float32: the attention probabilities of q (Hq, n, d) over the rows."""
    total, arguments = len(rows.pos), rows.arguments(q, q_pos, scale, window)
    assert out.shape == (arguments["group"], q.shape[1], total) and lse.shape[1:] == q.shape[:2]
    arguments |= {"lse": lse, "splits": len(lse), "out": out, "total": total}
    grid = _blocks(rows.longest, 64), _blocks(arguments["group"] * q.shape[1], 128), len(rows.starts) - 1
    _scores(device, "window_scores", grid, q.shape[2], 128, 64, 1, arguments, real16)


def column_scores(device, q, rows, q_pos, lse, out, scale, window, largest, min_distance, real16):
    """out (G, R) float32: the sum, or the largest, of the probabilities that q (Hq, n, d) give to each row from
    min_distance positions away or more."""
    total, arguments = len(rows.pos), rows.arguments(q, q_pos, scale, window)
    assert out.shape == (arguments["group"], total) and lse.shape[1:] == q.shape[:2]
    arguments |= {"lse": lse, "splits": len(lse), "out": out, "total": total}
    arguments |= {"largest": largest, "min_distance": min_distance}
    grid = _blocks(rows.longest, 64), len(q)
    _scores(device, "column_scores", grid, q.shape[2], 2 * 128, 64, 1, arguments, real16)


def _scores(device, kernel, grid, head_dim, n_queries, n_keys, n_biases, arguments, real16):
    shared = (n_queries + n_keys) * head_dim * 2 + n_biases * 64 * 8
    run(device, "scores", kernel, grid, (128,), arguments, defines=_head(head_dim, real16), shared=shared)
