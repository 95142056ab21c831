"""The contract of `minillm.ops` on kernels/cpu: compiled C, one thread pool, pages of bf16 or 8 bits, weights used as
they are stored.

Results differ from NumpyOps by rounding: weights in blocks meet activations of 16 bits when few rows are computed, on
avx2 and avx512 always; on avx512 and amx both operands of other large products are bf16. Sums are float32 everywhere.
"""

import math
import mmap
from ctypes import addressof, byref

import numpy as np

from minillm.ops import cpu_lib
from minillm.ops.cpu_clusters import GreedyClusters
from minillm.ops.cpu_lib import Kernels, Matrix, Product, floats, paged, pointer, pointing, slab_table, whole
from minillm.ops.cpu_runner import Runner
from minillm.ops.numpy_ops import NumpyOps, set_blas_threads
from minillm.ops.pages import BFLOAT16, StoredRows


class CpuOps(NumpyOps):
    """On one path of cpu_lib, with `threads` of the pool; None: as many as there are processors."""

    page_format = BFLOAT16
    READS_STORED = True

    def __init__(self, path, threads=None):
        self.lib = Kernels(path, threads)
        if threads is not None:  # two pools whose threads spin side by side cost about a factor of two
            set_blas_threads(1)

    @property
    def name(self):
        return self.lib.path

    # the forward pass

    def held_bytes(self, format, shape):
        return format.nbytes(math.prod(shape)) if format.is_float else self.lib.panels_bytes(format.kind, *shape)

    def prepare(self, weight):
        """Floats stay where they are, in the mapped file; blocks are laid out anew, in the format that they are held
        as, and the mapped pages they were read from are given back."""
        if isinstance(weight, CpuWeight):
            return weight
        format, stored = weight.format, np.ascontiguousarray(weight.data)
        if format.is_float:
            return CpuWeight(self.lib, format, weight.shape, stored)
        panels = cpu_lib.huge_pages(self.lib.panels_bytes(format.kind, *weight.shape))
        self.lib.repack(format.kind, *weight.shape, pointer(stored), pointer(panels))
        _release_mapped(weight.data)
        return CpuWeight(self.lib, format.held, weight.shape, panels)

    def runner(self, model):
        return Runner(model)

    def embed(self, table, ids):
        table, ids = self.prepare(table), whole(ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < table.shape[0]:
            raise IndexError(f"token ids are not all in 0..{table.shape[0] - 1}")
        return table.take(ids)

    def linear(self, x, weight, bias=None):
        x, weight, bias = floats(x), self.prepare(weight), None if bias is None else floats(bias)
        y = np.empty((len(x), weight.shape[0]), np.float32)
        assert x.shape[1] == weight.shape[1]
        if y.size:
            product = Product(w=weight.matrix, bias=pointer(bias), y=pointer(y))
            self.lib.linear(byref(product), 1, pointer(x), len(x))
        return y

    def rms_norm(self, x, weight, eps):
        x, weight = floats(x), floats(weight)
        y = np.empty_like(x)
        self.lib.rms_norm(pointer(x), pointer(weight), eps, pointer(y), *x.shape)
        return y

    def rope(self, x, cos, sin):
        x = floats(x)
        n, half = x.shape[-2] if x.ndim > 1 else 1, x.shape[-1] // 2
        if cos.shape[-2:] != (n, half) or cos.size != n * half:
            cos, sin = (np.broadcast_to(table, (*x.shape[:-1], half)) for table in (cos, sin))
            n = x.size // x.shape[-1]
        cos, sin, y = floats(cos), floats(sin), np.empty_like(x)
        if x.size:
            heads = x.size // (n * x.shape[-1])
            self.lib.rope(pointer(x), pointer(cos), pointer(sin), pointer(y), heads, n, x.shape[-1])
        return y

    def glu(self, gate, up, linear, cubic):
        assert gate.dtype == np.float32 and gate.shape == up.shape
        up = floats(up)
        self.lib.glu(pointer(gate), pointer(up), gate.size, linear, cubic)
        return gate

    def prefill_attention(self, q, k, v, past, scale, window=None, q_pos=None):
        q, k, v, slabs = floats(q), floats(k), floats(v), slab_table(past.pool)
        q_pos = None if q_pos is None else np.ascontiguousarray(q_pos, np.int32)
        (n_heads, n, d), (n_kv_heads, m, _) = q.shape, k.shape
        assert k.shape == v.shape and (n == m if q_pos is None else len(q_pos) == n)
        out, lse = np.empty((n, n_heads * d), np.float32), np.empty((n_heads, n), np.float32)
        pointers = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "q_pos": q_pos}
        shape = {"n": n, "m": m, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": d, "window": window or 0}
        call = cpu_lib.PrefillAttention(**pointing(pointers), past=paged(past, slabs), **shape, scale=scale)
        self.lib.prefill_attention(byref(call))
        return out, lse

    def decode_attention(self, q, past, scale, window=None):
        q, slabs = floats(q), slab_table(past[0].pool)
        batch, n_heads, d = q.shape
        out = np.empty((batch, n_heads * d), np.float32)
        tables = (cpu_lib.Paged * batch)(*(paged(layer, slabs) for layer in past))
        shape = {"batch": batch, "n_heads": n_heads, "n_kv_heads": len(past[0].lengths), "head_dim": d}
        pointers = {"q": pointer(q), "out": pointer(out), "past": addressof(tables)}
        call = cpu_lib.DecodeAttention(**pointers, **shape, window=window or 0, scale=scale)
        self.lib.decode_attention(byref(call))
        return out

    # pages

    def holds(self, format):
        return format.k.kind is not None and format.v.kind is not None

    def write_entries(self, layer, start, entries):
        k, v, log_size = (floats(a) for a in (entries.k, entries.v, entries.log_size))
        pos, slabs = np.ascontiguousarray(entries.pos, np.int32), slab_table(layer.pool)
        start, lengths = whole(start), whole(entries.lengths)
        assert lengths.sum() == len(k) == len(v) == len(log_size) == len(pos)
        assert (start + lengths == layer.lengths).all()
        pointers = {"k": k, "v": v, "log_size": log_size, "pos": pos, "start": start, "lengths": lengths}
        shape = {"n_heads": len(lengths), "d": layer.pool.head_dim}
        self.lib.write_entries(byref(cpu_lib.Entries(to=paged(layer, slabs), **pointing(pointers), **shape)))

    def gather(self, rows):
        if not isinstance(rows, StoredRows):
            return rows
        n = rows.shape[0]
        return self.merge(rows, np.arange(n), np.ones(n, np.float32), n)

    def rewrite(self, layer, start, dest, weights, entries):
        start, lengths, dest = whole(start), whole(entries.lengths), whole(dest)
        key_weight, value_weight, log_size = (floats(a) for a in (*weights, entries.log_size))
        pos, slabs = np.ascontiguousarray(entries.pos, np.int32), slab_table(layer.pool)
        n = (layer.lengths - start).sum()
        assert n == len(dest) == len(key_weight) == len(value_weight) and (start + lengths <= layer.lengths).all()
        assert lengths.sum() == len(pos) == len(log_size) > dest.max(initial=-1)
        pointers = {"start": start, "lengths": lengths, "dest": dest, "log_size": log_size, "pos": pos}
        pointers |= {"key_weight": key_weight, "value_weight": value_weight}
        shape = {"n_heads": len(start), "d": layer.pool.head_dim}
        self.lib.rewrite(byref(cpu_lib.Rewrite(within=paged(layer, slabs), **pointing(pointers), **shape)))

    # compression

    def window_scores(self, q, keys, lengths, log_size, pos, q_pos, scale, window=None):
        out = np.zeros((len(q) // len(lengths), q.shape[1], len(keys)), np.float32)
        return self._scores(out, 0, q, keys, lengths, log_size, pos, q_pos, scale, window, 0, None)

    def column_scores(
        self, q, keys, lengths, log_size, pos, q_pos, scale, window=None, *, reduce="sum", min_distance=0, lse=None
    ):
        out, number = np.empty((len(q) // len(lengths), len(keys)), np.float32), {"sum": 1, "max": 2}[reduce]
        return self._scores(out, number, q, keys, lengths, log_size, pos, q_pos, scale, window, min_distance, lse)

    def _scores(self, out, reduce, q, keys, lengths, log_size, pos, q_pos, scale, window, min_distance, lse):
        (n_heads, n, d), n_rows, lengths = q.shape, len(keys), whole(lengths)
        pos, q_pos = np.ascontiguousarray(pos, np.int32), np.ascontiguousarray(q_pos, np.int32)
        q, keys, log_size, lse = floats(q), floats(keys), floats(log_size), None if lse is None else floats(lse)
        assert lengths.sum() == n_rows == len(pos) == len(log_size) and n == len(q_pos) and min_distance >= 0
        assert keys.shape[1] == d and (lse is None or lse.shape == (n_heads, n))
        pointers = {"q": q, "keys": keys, "log_size": log_size, "lengths": lengths, "pos": pos, "q_pos": q_pos}
        pointers |= {"lse": lse, "out": out}
        shape = {"n": n, "n_rows": n_rows, "n_heads": n_heads, "n_kv_heads": len(lengths), "head_dim": d}
        how = {"window": window or 0, "min_distance": min_distance, "reduce": reduce, "scale": scale}
        self.lib.scores(byref(cpu_lib.Scores(**pointing(pointers), **shape, **how)))
        return out

    def merge(self, rows, dest, weight, n_entries):
        return self._merge(rows, dest, weight, n_entries, {})

    def merge_unrotated(self, rows, pos, dest, weight, entry_pos, cos, sin):
        pos, entry_pos = np.ascontiguousarray(pos, np.int32), np.ascontiguousarray(entry_pos, np.int32)
        assert len(pos) == rows.shape[0] and max(pos.max(initial=0), entry_pos.max(initial=0)) < len(cos) == len(sin)
        rotation = {"pos": pos, "entry_pos": entry_pos, "cos": floats(cos), "sin": floats(sin)}
        return self._merge(rows, dest, weight, len(entry_pos), rotation)

    def _merge(self, rows, dest, weight, n_entries, rotation):
        (n, d), dest, weight = rows.shape, whole(dest), floats(weight)
        out = np.empty((n_entries, d), np.float32)
        assert n == len(dest) == len(weight) and dest.max(initial=-1) < n_entries
        if isinstance(rows, StoredRows):
            past, start, slabs = rows.past, whole(rows.start), slab_table(rows.past.pool)
            new = np.empty((len(start), 0, d), np.float32) if rows.new is None else floats(rows.new)
            where = {"past": paged(past, slabs), "start": pointer(start), "values": rows.field == "v"}
            where |= {"n_heads": len(start), "n": new.shape[1]}
        else:
            new, where = floats(rows), {"n_heads": 1, "n": n}
        stored = cpu_lib.StoredRows(**where, fresh=pointer(new), d=d)
        pointers = {"dest": dest, "weight": weight, "out": out} | rotation
        self.lib.merge(byref(cpu_lib.Merge(rows=stored, **pointing(pointers), n_rows=n, n_entries=n_entries)))
        return out

    def nearest(self, keys, rows, others, first, last):
        keys, first, last = floats(keys), whole(first), whole(last)
        unit, found, cosine = np.empty_like(keys), np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
        self.lib.unit_rows(pointer(keys), *keys.shape, pointer(unit))
        assert len(first) == len(last) == len(rows)
        pointers = {"rows": unit.take(rows, axis=0), "others": unit.take(others, axis=0), "first": first, "last": last}
        pointers |= {"found": found, "product": cosine}
        shape = {"n": len(rows), "m": len(others), "d": keys.shape[1]}
        self.lib.nearest(byref(cpu_lib.Nearest(**pointing(pointers), **shape)))
        return np.append(others, -1)[found], cosine

    def greedy_clusters(self, keys, rows, starts, lengths, rotation=None):
        return GreedyClusters(self.lib, keys, rows, starts, lengths, rotation)

    # the device

    def trim(self):
        """The scratch memory of the kernels goes back."""
        self.lib.trim()

    def reading(self, n_bytes):
        words = np.ones(n_bytes // 4, np.float32)
        return lambda: self.lib.stream(pointer(words), len(words))

    # planning

    def segment_count(self, mask, lengths):
        mask, lengths = np.ascontiguousarray(mask, bool), whole(lengths)
        assert lengths.sum() == len(mask)
        out = np.empty(len(lengths), np.int64)
        self.lib.segment_count(pointer(mask), pointer(lengths), len(lengths), pointer(out))
        return out

    def segment_topk(self, scores, lengths, counts):
        scores, lengths, counts = floats(scores), whole(lengths), whole(counts)
        assert lengths.sum() == len(scores) and len(counts) == len(lengths)
        taken = np.empty(len(scores), bool)
        self.lib.segment_topk(pointer(scores), pointer(lengths), pointer(counts), len(lengths), pointer(taken))
        return taken

    def nonzero(self, mask, n):
        return self.compact(mask, n)[0]

    def compact(self, mask, n):
        mask = np.ascontiguousarray(mask, bool)
        assert np.count_nonzero(mask) == n
        rows, number = np.empty(n, np.int64), np.empty(len(mask), np.int64)
        self.lib.compact(pointer(mask), len(mask), pointer(rows), pointer(number))
        return rows, number

    def neighbours(self, stays, pos, lengths, reach):
        stays, pos = np.ascontiguousarray(stays, bool), np.ascontiguousarray(pos, np.int32)
        lengths, near = whole(lengths), np.empty(len(pos), np.int64)
        assert lengths.sum() == len(pos) == len(stays)
        self.lib.neighbours(pointer(stays), pointer(pos), pointer(lengths), len(lengths), reach, pointer(near))
        return near

    def fold(self, scores, size, pos, kept, protected, lengths, reach, counts):
        n, n_rows = int(np.count_nonzero(kept)), len(pos)
        given = {"scores": floats(scores), "size": floats(size), "pos": np.ascontiguousarray(pos, np.int32)}
        given |= {"kept": np.ascontiguousarray(kept, bool), "protected": np.ascontiguousarray(protected, bool)}
        assert all(len(array) == n_rows for array in given.values())
        given["lengths"] = whole(lengths)
        assert given["lengths"].sum() == n_rows
        made = {"dest": np.empty(n_rows, np.int64), "weight": np.empty(n_rows, np.float32)}
        made |= {"sizes": np.empty(n, np.float32), "rows": np.empty(n, np.int64)}
        shape = {"n_segments": len(lengths), "reach": reach, "counts": counts}
        self.lib.fold(byref(cpu_lib.Fold(**pointing(given | made), **shape)))
        return tuple(made.values())


class CpuWeight:
    """A Weight as the kernels read it. format, shape as in Weight; data: what `matrix` points into."""

    def __init__(self, lib, format, shape, data):
        self.lib, self.format, self.shape, self.data = lib, format, shape, data
        self.matrix = Matrix(kind=format.kind, n_out=shape[0], n_in=shape[1], data=pointer(data))

    @property
    def nbytes(self):
        return self.data.nbytes

    def rows(self, lo, hi):
        """(hi - lo, in) float32."""
        return self.take(np.arange(lo, hi))

    def take(self, ids):
        """Rows `ids` (n,) int64 -> (n, in) float32."""
        out = np.empty((len(ids), self.shape[1]), np.float32)
        self.lib.rows(byref(self.matrix), pointer(ids), len(ids), pointer(out))
        return out


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
