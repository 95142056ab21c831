"""The contract of `minillm.ops` on kernels/cpu: compiled C, one thread pool, pages of bf16 or 8 bits, weights used as
they are stored.

Results differ from numpy_ops by rounding: weights in blocks meet activations of 16 bits when few rows are computed, on
avx2 and avx512 always; on avx512 and amx both operands of other large products are bf16. Sums are float32 everywhere.
"""

import functools
import mmap
from ctypes import addressof, byref

import numpy as np

from minillm.ops import cpu_lib, numpy_ops
from minillm.ops.cpu_clusters import GreedyClusters as GreedyClusters
from minillm.ops.cpu_lib import KINDS, Matrix, Product, floats, pointer
from minillm.ops.cpu_pages import CACHE_DTYPE, paged, slab_table, stored_rows  # noqa: F401
from minillm.ops.cpu_planning import compact, fold, neighbours, nonzero, segment_count, segment_topk  # noqa: F401
from minillm.ops.cpu_runner import Runner
from minillm.ops.numpy_ops import (  # noqa: F401
    DEVICE,
    array,
    available_memory,
    concatenate,
    host,
    pooled,
    random_words,
    read_labels,
    segment_ids,
    segment_sum,
)
from minillm.ops.pages import StoredRows
from minillm.ops.pages import new_slab as new_slab

_lib = cpu_lib.library()


class CpuWeight:
    """A Weight as the kernels read it. kind, shape as in Weight; data: what `matrix` points into."""

    def __init__(self, kind, shape, data):
        self.kind, self.shape, self.data = kind, shape, data
        self.matrix = Matrix(KINDS[kind], shape[0], shape[1], 0, pointer(data))

    @property
    def nbytes(self):
        return self.data.nbytes

    def rows(self, lo, hi):
        """(hi - lo, in) float32."""
        return embed(self, np.arange(lo, hi))


def prepare(weight):
    """The Weight (out, in) as a CpuWeight. Floats stay where they are, in the mapped file; blocks are laid out anew,
    and the mapped pages they were read from are given back."""
    if isinstance(weight, CpuWeight):
        return weight
    if weight.kind in ("F32", "F16", "BF16"):
        return CpuWeight(weight.kind, weight.shape, np.ascontiguousarray(weight.data))
    (n_out, n_in), stored = weight.shape, np.ascontiguousarray(weight.data)
    panel = -(-n_in // 32 * {"Q8_0": 544, "Q4_0": 288, "Q4_1": 320}[weight.kind] // 64) * 64
    panels = cpu_lib.huge_pages(-(-n_out // 16) * panel)
    _lib.repack(KINDS[weight.kind], n_out, n_in, pointer(stored), pointer(panels))
    _release_mapped(weight.data)
    return CpuWeight(weight.kind, weight.shape, panels)


def _release_mapped(data):
    """If `data` is a view of a mapped file, take its pages out of the process's resident memory."""
    base = data
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    if isinstance(base, mmap.mmap) and not data.flags.writeable and hasattr(base, "madvise"):
        start = data.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
        aligned = start - start % mmap.PAGESIZE
        base.madvise(mmap.MADV_DONTNEED, aligned, start + data.nbytes - aligned)


def embed(table, ids):
    """Rows `ids` (n,) of the embedding table, a Weight (vocab, dim) -> (n, dim)."""
    table, ids = prepare(table), np.ascontiguousarray(ids, np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < table.shape[0]:
        raise IndexError(f"token ids are not all in 0..{table.shape[0] - 1}")
    out = np.empty((len(ids), table.shape[1]), np.float32)
    _lib.rows(byref(table.matrix), pointer(ids), len(ids), pointer(out))
    return out


def linear(x, weight, bias=None):
    """x (n, in) times the transpose of a Weight (out, in), plus bias (out,) -> (n, out)."""
    x, weight, bias = floats(x), prepare(weight), None if bias is None else floats(bias)
    y = np.empty((len(x), weight.shape[0]), np.float32)
    assert x.shape[1] == weight.shape[1]
    if y.size:
        _lib.linear(byref(Product(weight.matrix, pointer(bias), pointer(y), 0, 0)), 1, pointer(x), len(x))
    return y


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. x (n, dim), weight (dim,)."""
    x, weight = floats(x), floats(weight)
    y = np.empty_like(x)
    _lib.rms_norm(pointer(x), pointer(weight), eps, pointer(y), *x.shape)
    return y


def rope(x, cos, sin):
    """Rotate the halves of the last axis: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin). x (..., d); cos, sin
    broadcast to (..., d/2)."""
    x = floats(x)
    n, half = x.shape[-2] if x.ndim > 1 else 1, x.shape[-1] // 2
    if cos.shape[-2:] != (n, half) or cos.size != n * half:
        cos, sin = (np.broadcast_to(table, (*x.shape[:-1], half)) for table in (cos, sin))
        n = x.size // x.shape[-1]
    cos, sin, y = floats(cos), floats(sin), np.empty_like(x)
    if x.size:
        heads = x.size // (n * x.shape[-1])
        _lib.rope(pointer(x), pointer(cos), pointer(sin), pointer(y), heads, n, x.shape[-1])
    return y


def swiglu(gate, up):
    """silu(gate) * up, elementwise; overwrites and returns `gate`."""
    assert gate.dtype == np.float32 and gate.shape == up.shape
    up = floats(up)
    _lib.swiglu(pointer(gate), pointer(up), gate.size)
    return gate


def prefill_attention(q, k, v, past, scale, window=None, q_pos=None):
    """Causal attention of n queries over stored entries and m new tokens.

    q (Hq, n, d), k and v (H, m, d), rotated; past: PagedLayer; q_pos (n,), or None: the queries are the new tokens'. ->
    (n, Hq * d); lse (Hq, n). See numpy_ops."""
    q, k, v, slabs = floats(q), floats(k), floats(v), slab_table(past.pool)
    q_pos = None if q_pos is None else np.ascontiguousarray(q_pos, np.int32)
    (n_heads, n, d), (n_kv_heads, m, _) = q.shape, k.shape
    assert k.shape == v.shape and (n == m if q_pos is None else len(q_pos) == n)
    out, lse = np.empty((n, n_heads * d), np.float32), np.empty((n_heads, n), np.float32)
    pointers, table = (pointer(a) for a in (q, k, v, out, lse, q_pos)), paged(past, slabs)
    shape = n, m, n_heads, n_kv_heads, d, window or 0
    _lib.prefill_attention(byref(cpu_lib.PrefillAttention(*pointers, table, *shape, scale)))
    return out, lse


def decode_attention(q, past, scale, window=None):
    """Attention of one token of each of B sequences over its stored entries (its own entry among them).

    q (B, Hq, d) rotated; past: B PagedLayers of one model layer and one pool -> (B, Hq * d)."""
    q, slabs = floats(q), slab_table(past[0].pool)
    batch, n_heads, d = q.shape
    out = np.empty((batch, n_heads * d), np.float32)
    tables = (cpu_lib.Paged * batch)(*(paged(layer, slabs) for layer in past))
    n_kv_heads = len(past[0].lengths)
    shape = (batch, n_heads, n_kv_heads, d, window or 0, 0)
    _lib.decode_attention(byref(cpu_lib.DecodeAttention(pointer(q), pointer(out), addressof(tables), *shape, scale)))
    return out


def window_scores(q, keys, lengths, log_size, pos, q_pos, scale, window=None):
    """Attention probabilities of a few queries over the rows of a layer. q (Hq, w, d) -> (G, w, R). See numpy_ops."""
    shape = (len(q) // len(lengths), q.shape[1], len(keys))
    out = np.zeros(shape, np.float32)
    return _scores(out, 0, q, keys, lengths, log_size, pos, q_pos, scale, window, 0, None)


def column_scores(
    q, keys, lengths, log_size, pos, q_pos, scale, window=None, *, reduce="sum", min_distance=0, lse=None
):
    """The sum or the largest of what many queries give to each row. q (Hq, n, d) -> (G, R). See numpy_ops."""
    out = np.empty((len(q) // len(lengths), len(keys)), np.float32)
    number = {"sum": 1, "max": 2}[reduce]
    return _scores(out, number, q, keys, lengths, log_size, pos, q_pos, scale, window, min_distance, lse)


def _scores(out, reduce, q, keys, lengths, log_size, pos, q_pos, scale, window, min_distance, lse):
    n_heads, n, d = q.shape
    n_rows, n_kv_heads = len(keys), len(lengths)
    lengths = np.ascontiguousarray(lengths, np.int64)
    pos, q_pos = np.ascontiguousarray(pos, np.int32), np.ascontiguousarray(q_pos, np.int32)
    q, keys, log_size = floats(q), floats(keys), floats(log_size)
    lse = None if lse is None else floats(lse)
    assert lengths.sum() == n_rows == len(pos) == len(log_size) and n == len(q_pos) and min_distance >= 0
    assert keys.shape[1] == d and (lse is None or lse.shape == (n_heads, n))
    pointers = (pointer(a) for a in (q, keys, log_size, lengths, pos, q_pos, lse, out))
    shape = (n, n_rows, n_heads, n_kv_heads, d)
    _lib.scores(byref(cpu_lib.Scores(*pointers, *shape, window or 0, min_distance, reduce, scale)))
    return out


def gather(rows):
    """(R, d) float32: StoredRows as an array of their own; an array is itself."""
    if not isinstance(rows, StoredRows):
        return rows
    n = rows.shape[0]
    return merge(rows, np.arange(n), np.ones(n, np.float32), n)


def merge(rows, dest, weight, n_entries):
    """entry[dest[r]] += weight[r] * rows[r], for dest >= 0. rows (R, d) or StoredRows, dest, weight (R,) -> (n_entries,
    d) float32."""
    return _merge(rows, dest, weight, n_entries, None, None, None, None)


def merge_unrotated(rows, pos, dest, weight, entry_pos, cos, sin):
    """`merge` of keys, rotated at pos (R,), summed with RoPE undone and turned to entry_pos (E,). cos, sin (positions,
    d/2). See numpy_ops."""
    pos, entry_pos = np.ascontiguousarray(pos, np.int32), np.ascontiguousarray(entry_pos, np.int32)
    assert len(pos) == rows.shape[0] and max(pos.max(initial=0), entry_pos.max(initial=0)) < len(cos) == len(sin)
    return _merge(rows, dest, weight, len(entry_pos), pos, entry_pos, floats(cos), floats(sin))


def _merge(rows, dest, weight, n_entries, pos, entry_pos, cos, sin):
    (n, d), dest, weight = rows.shape, np.ascontiguousarray(dest, np.int64), floats(weight)
    out = np.empty((n_entries, d), np.float32)
    assert n == len(dest) == len(weight) and dest.max(initial=-1) < n_entries
    if isinstance(rows, StoredRows):
        past, start, slabs = rows.past, np.ascontiguousarray(rows.start, np.int64), slab_table(rows.past.pool)
        new = np.empty((len(start), 0, d), np.float32) if rows.new is None else floats(rows.new)
        where = paged(past, slabs), pointer(start), pointer(new), *new.shape[:2], d, rows.field == "v"
    else:
        rows = floats(rows)
        where = cpu_lib.Paged(), None, pointer(rows), 1, n, d, 0
    pointers = (pointer(a) for a in (dest, weight, out, pos, entry_pos, cos, sin))
    _lib.merge(byref(cpu_lib.Merge(cpu_lib.StoredRows(*where), *pointers, n, n_entries)))
    return out


def write_entries(layer, start, entries):
    """Entries into the pages of a PagedLayer, after the first `start` (H,) of each head."""
    k, v, log_size = (floats(a) for a in (entries.k, entries.v, entries.log_size))
    pos, slabs = np.ascontiguousarray(entries.pos, np.int32), slab_table(layer.pool)
    start, lengths = (np.ascontiguousarray(a, np.int64) for a in (start, entries.lengths))
    assert lengths.sum() == len(k) == len(v) == len(log_size) == len(pos) and (start + lengths == layer.lengths).all()
    pointers = (pointer(a) for a in (k, v, log_size, pos, start, lengths))
    shape = len(lengths), layer.pool.head_dim
    _lib.write_entries(byref(cpu_lib.Entries(paged(layer, slabs), *pointers, *shape)))


def rewrite(layer, start, dest, weights, entries):
    """The entries of a PagedLayer after the first `start` (H,) of each head become sums of themselves where they lie.
    See numpy_ops."""
    start, lengths, dest = (np.ascontiguousarray(a, np.int64) for a in (start, entries.lengths, dest))
    floating = [floats(a) for a in (*weights, entries.log_size)]
    pos, slabs, n = np.ascontiguousarray(entries.pos, np.int32), slab_table(layer.pool), (layer.lengths - start).sum()
    assert n == len(dest) == len(floating[0]) == len(floating[1]) and (start + lengths <= layer.lengths).all()
    assert lengths.sum() == len(pos) == len(floating[2]) > dest.max(initial=-1)
    pointers = (pointer(a) for a in (start, lengths, dest, *floating, pos))
    _lib.rewrite(byref(cpu_lib.Rewrite(paged(layer, slabs), *pointers, len(start), layer.pool.head_dim)))


def nearest(keys, rows, others, first, last):
    """For each of some rows the one most like it of a segment of others. See numpy_ops."""
    keys = floats(keys)
    unit, found, cosine = np.empty_like(keys), np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
    _lib.unit_rows(pointer(keys), *keys.shape, pointer(unit))
    segments = (np.ascontiguousarray(a, np.int64) for a in (first, last))
    arrays = unit.take(rows, axis=0), unit.take(others, axis=0), *segments
    assert len(first) == len(last) == len(rows)
    _lib.nearest(byref(cpu_lib.Nearest(*map(pointer, (*arrays, found, cosine)), len(rows), len(others), keys.shape[1])))
    return np.append(others, -1)[found], cosine


unrotated = functools.partial(numpy_ops.unrotated, rope=rope)


def trim():
    """The scratch memory of the kernels goes back."""
    _lib.trim()


def set_threads(n):
    """Threads of the pool. The linear algebra library under NumPy, which has little left to do, gets one: two pools
    whose threads spin side by side cost about a factor of two."""
    _lib.set_threads(n)
    numpy_ops.set_threads(1)


def bandwidth(n_bytes=256 << 20, repeats=5):
    """Bytes a second that the pool's threads read from memory: the best of some repeats."""
    import time

    words = np.ones(n_bytes // 4, np.float32)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        _lib.stream(pointer(words), len(words))
        seconds.append(time.perf_counter() - start)
    return n_bytes / min(seconds)


READS_STORED = True


def runner(model):
    """The Runner of a Model whose weights were prepared."""
    return Runner(model)
