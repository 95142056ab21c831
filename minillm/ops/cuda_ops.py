"""The contract of `minillm.ops` on kernels/cuda and cuBLAS.

Rows of K and V, hidden states and logits stay on the device, as its arrays, and so does what a Plan says about them
(scores, indices, weights, sizes, positions): NumPy's functions, called with CuPy's arrays, run on the device
(__array_ufunc__, __array_function__), and planning is written with those that do. The host knows what is small: how
many rows and entries each head has, budgets, thresholds. Activations, K and V are 16-bit floats of one type, bf16 where
the model's matrices are bf16 and half otherwise; the residual stream and every sum is float32. Pages may be of int8:
what goes in is rounded to 16 bits and then to 8, what comes out is of 16 bits, and back in it is the same words.
"""

from dataclasses import dataclass

import numpy as np

from minillm.errors import MinillmError
from minillm.ops import cuda_device, launch, numpy_ops, numpy_planning
from minillm.ops.cuda_clusters import GreedyClusters, segments
from minillm.ops.cuda_runner import Runner, product
from minillm.ops.cuda_weights import STORED, CudaWeight
from minillm.ops.numpy_planning import joined
from minillm.ops.pages import PAGE_SIZE, Slab, StoredRows, from_int8, from_words, page_bytes, slab_in, to_words

HEAD_DIMS = (64, 128)  # that the kernels are made for
SLABS = 32768  # of 8 MiB, at most: more than any one device has


def open_ops(index):
    """CudaOps on GPU `index`. Raises MinillmError."""
    return CudaOps(cuda_device.open_device(index))


@dataclass
class CudaSlab(Slab):
    """A Slab of device memory, which begins at `address`."""

    address: int = 0


class CudaOps:
    """One model's operations on one device. The first matrix that is prepared decides the 16-bit type."""

    READS_STORED = True

    def __init__(self, device):
        self.device, self.real16 = device, None
        self._made = {}  # id -> (array, what was made of it), the newest of them
        self._slabs = None  # (addresses, the same on the device)

    @property
    def CACHE_DTYPE(self):
        return STORED[self.real16 or "half"]

    @property
    def DEVICE(self):
        return self.device.name

    def available_memory(self):
        """Bytes of device memory that are free."""
        return self.device.memory()[0]

    def trim(self):
        """Tables of the last pass, and memory of arrays that are gone, which CuPy keeps, go back to the device."""
        self._made.clear()
        self.device.trim()

    def set_threads(self, n):
        """Nothing to do: the work is on the device."""

    # weights and the forward pass

    def prepare(self, weight):
        """The Weight (out, in) in device memory."""
        if self.real16 is None:
            self.real16 = "bf16" if weight.kind == "BF16" else "half"
        return CudaWeight.of(self.device, weight, self.real16)

    def random_words(self, shape, seed):
        """A random matrix (out, in) in bf16 words, made on the device."""
        words = self.device.empty(shape, np.uint16)
        launch.random_words(self.device, words, seed, (3 / shape[1]) ** 0.5, "bf16")
        return words

    def runner(self, model):
        d = model.config.head_dim
        if d not in HEAD_DIMS:
            raise MinillmError(
                f"{model.config.name} has heads of {d} elements, and on a GPU minillm has kernels for "
                f"{' and '.join(map(str, HEAD_DIMS))}: use --device cpu"
            )
        return Runner(model)

    def linear(self, x, weight):
        """x (n, in) float32 times the transpose of a CudaWeight (out, in) -> (n, out) float32; both on the host, x
        rounded to 16 bits."""
        y = self.device.empty((len(x), weight.shape[0]), np.float32)
        product(self.device, self._rows(x), weight, y, self.real16)
        return y.get()

    def embed(self, table, ids):
        """Rows `ids` (n,) of the embedding table -> (n, dim) float32 on the device."""
        ids = np.ascontiguousarray(ids, np.int32)
        if ids.size and not 0 <= ids.min() <= ids.max() < table.shape[0]:
            raise IndexError(f"token ids are not all in 0..{table.shape[0] - 1}")
        out = self.device.empty((len(ids), table.shape[1]), np.float32)
        launch.embed(self.device, table, self.device.upload(ids), out)
        return out

    def prefill_attention(self, q, k, v, past, scale, window=None, q_pos=None):
        """Causal attention of n queries over stored entries and m new tokens.

        q (Hq, n, d), k and v (H, m, d), rotated; past: PagedLayer; q_pos (n,) on the host, or None: the queries are
        the new tokens'. -> (n, Hq * d) words; lse (Hq, n) float32. See numpy_ops."""
        (n_heads, n, d), device, real16 = q.shape, self.device, self.real16
        out, lse = device.empty((n, n_heads, d), np.uint16), device.empty((n_heads, n), np.float32)
        q_pos = None if q_pos is None else device.upload(np.asarray(q_pos, np.int32))
        past = self.paged_floats(past)
        launch.prefill_attention(device, q, k, v, past, out, lse, scale, window or 0, real16, q_pos)
        return out.reshape(n, -1), lse

    # pages

    def new_slab(self, n_pages, page_size, head_dim, dtype):
        """A Slab of device memory that is given back with the last reference to it."""
        assert page_size == PAGE_SIZE
        memory = self.device.new_slab_memory((n_pages * page_bytes(page_size, head_dim, dtype),), np.uint8)
        return slab_in(memory, n_pages, page_size, head_dim, dtype, CudaSlab, address=memory.data.ptr)

    def slab_table(self, pool):
        """(SLABS,) uint64 on the device: where each slab begins. The array stays the same when slabs come and go."""
        addresses = [slab.address for slab in pool.slabs]
        if self._slabs is None or self._slabs[0] != addresses:
            table = self.device.empty((SLABS,), np.uint64) if self._slabs is None else self._slabs[1]
            table.set(np.array(addresses + [0] * (SLABS - len(addresses)), np.uint64))
            self._slabs = addresses, table
        return self._slabs[1]

    def paged(self, layer):
        """A PagedLayer as launch.Paged, a batch of one."""
        held = layer.pages[:, : max(1, -(-int(layer.lengths.max()) // PAGE_SIZE))]
        tables = np.concatenate([held.ravel(), layer.lengths, [layer.seen]], dtype=np.int32)  # in one copy
        tables, n_heads = self.device.upload(tables), len(held)
        return launch.Paged(
            layer.pool.dtype,
            self.slab_table(layer.pool),
            layer.pool.slab_pages,
            tables[: held.size].reshape(1, *held.shape),
            tables[held.size : -1].reshape(1, n_heads),
            tables[-1:],
        )

    def paged_floats(self, layer):
        """The same in 16-bit floats, as the attention of a prompt needs them. Of 8 bits a copy, which lives as long as
        what is returned: of one layer, 1.9 times its bytes, written once and then read in place of them."""
        past = self.paged(layer)
        if past.dtype != "int8":
            return past
        d, held = layer.pool.head_dim, -(-layer.lengths // PAGE_SIZE)
        n = int(held.sum())
        memory = self.device.empty((n * page_bytes(PAGE_SIZE, d, self.CACHE_DTYPE),), np.uint8)
        rows = slab_in(memory, n, PAGE_SIZE, d, self.CACHE_DTYPE).entries(slice(None), slice(None)).fields()
        first, start = self._offsets(held * PAGE_SIZE, np.zeros_like(held))  # whole pages, in their order
        launch.read_entries(self.device, past, first, start, d, self.real16, **rows)
        pages = (np.cumsum(held) - held)[:, None] + np.arange(past.pages.shape[2])
        return launch.Paged(
            self.CACHE_DTYPE,
            self.device.upload(np.array([memory.data.ptr], np.uint64)),
            max(n, 1),
            self.device.upload(pages[None].astype(np.int32)),
            past.lengths,
            past.seen,
            memory,
        )

    def write_entries(self, layer, start, entries):
        """Entries into the pages of a PagedLayer, after the first `start` (H,) of each head. k and v: rows of the
        device, or float32 on the host."""
        if len(entries.pos):
            k, v = (self._rows(rows) for rows in (entries.k, entries.v))
            log_size, pos = self.array(entries.log_size), self._indices(entries.pos)
            first, start = self._offsets(entries.lengths, start)
            launch.write_entries(self.device, k, v, log_size, pos, self.paged(layer), first, start, self.real16)

    def gather(self, rows):
        """(R, d) on the device: StoredRows as an array of their own; an array is itself."""
        if not isinstance(rows, StoredRows):
            return rows
        lengths = rows.past.lengths - rows.start
        stored = self.device.empty((int(lengths.sum()), rows.shape[1]), np.uint16)
        self._read(rows.past, rows.start, **{rows.field: stored})
        return stored if rows.new is None else joined(lengths, stored, rows.new)

    rewrite = staticmethod(numpy_ops.rewrite)

    def read_labels(self, layer, start):
        """log_size, pos (E,) of the entries of a PagedLayer after the first `start` (H,) of each head."""
        n = int((layer.lengths - start).sum())
        log_size, pos = self.device.empty((n,), np.float32), self.device.empty((n,), np.int32)
        self._read(layer, start, log_size=log_size, pos=pos)
        return log_size, pos

    def _read(self, layer, start, **out):
        """Fields of entries out of pages, into the arrays `out`."""
        first, start = self._offsets(layer.lengths - start, start)
        launch.read_entries(self.device, self.paged(layer), first, start, layer.pool.head_dim, self.real16, **out)

    def array(self, values):
        """Values of the host on the device; what is there already is itself."""
        return values if self.device.owns(values) else self.device.upload(np.asarray(values))

    def host(self, values):
        """An array of the device, or of the host, in NumPy."""
        if self.device.owns(values):
            values = values.get()
            self.device.use()  # get() of what is not contiguous leaves CuPy on another stream
        return values

    def _offsets(self, lengths, others):
        """(S + 1,) int32: where each of S segments of `lengths` begins; and others (n,) int32."""
        tables = self.device.upload(np.concatenate([[0], np.cumsum(lengths), others]).astype(np.int32))
        return tables[: len(lengths) + 1], tables[len(lengths) + 1 :]

    def _first(self, lengths):
        """The first of _offsets, of lengths that come again."""
        return self._once(lengths, lambda: self._offsets(lengths, [])[0])

    def _rows(self, rows):
        if not self.device.owns(rows):
            return self.device.upload(to_words(rows, self.CACHE_DTYPE))
        if rows.dtype == np.float32:
            return to_words(rows, self.CACHE_DTYPE)
        if rows.flags.c_contiguous:
            return rows
        together = self.device.empty(rows.shape, rows.dtype)
        together[:] = rows
        return together

    def stored_rows(self, rows, scale=None):
        """Rows of the device, with their scales (n,) where they are int8 -> float32 (n, d), there."""
        return from_words(rows, self.CACHE_DTYPE) if scale is None else from_int8(rows, scale)

    def concatenate(self, parts):
        """Rows of several arrays of one dtype, one after another."""
        return np.concatenate(parts)

    # compression

    def unrotated(self, rows, pos, cos, sin):
        """rows (R, d) turned back from their positions; cos, sin (positions, d/2), with yarn's factor."""
        out = self.device.empty(rows.shape, np.uint16)
        tables = self._upload_once(cos), self._upload_once(sin)
        norm = float(cos[0, 0]) ** 2  # of the factor that yarn puts on cos and sin: position 0 shows it
        launch.unrotate(self.device, rows, self._indices(pos), *tables, norm, out, self.real16)
        return out

    def segment_ids(self, lengths):
        """lengths (S,) on the host -> (R,) of each row the number of its segment. See numpy_ops."""
        ends = self.device.upload(np.cumsum(lengths))
        return np.searchsorted(ends, np.arange(int(np.sum(lengths)), like=ends), side="right")

    def nonzero(self, mask, n):
        """(n,) where the n that are true of mask (R,) are: the host knows how many, and nobody waits to be told."""
        return self.places(mask, n)[0]

    def compact(self, mask, n):
        """rows (n,), and the number in them of each row of mask (R,), or -1. See numpy_ops."""
        rows, number = self.device.empty((n,), np.int32), self.device.empty(mask.shape, np.int32)
        space = launch.compact_space(self.device, len(mask))
        launch.compact(self.device, mask.view(np.uint8), space, rows, number)
        return rows, number

    def segment_count(self, mask, lengths):
        """(S,) on the host: how many are true of each segment. See numpy_ops."""
        counts = self.device.empty((len(lengths),), np.int32)
        launch.segment_count(self.device, mask.view(np.uint8), self._first(lengths), counts)
        return counts.get().astype(np.int64)

    def segment_topk(self, scores, lengths, counts):
        """(R,) bool: which are the counts[s] largest of each segment. See numpy_ops."""
        counts = np.clip(counts, 0, lengths)
        taken = self.device.empty(scores.shape, np.uint8)
        tables, longest = self._offsets(lengths, counts), int(np.max(lengths, initial=0))
        space = launch.select_space(self.device, len(counts), longest)
        launch.segment_topk(self.device, self._floats(scores), *tables, longest, space, taken)
        return taken.view(bool)

    def segment_sum(self, groups, values, n):
        """(n,) float64: the sum of values (R,) over the rows of each group, in their order. See numpy_ops."""
        out = self.device.empty((n,), np.float64)
        launch.segment_sum(self.device, self._of_type(values, np.float64), *self._by_group(groups, n), out)
        return out

    def pooled(self, scores, lengths, width, kind):
        """(R,) the largest or the mean of `width` neighbours in their segment. See numpy_ops."""
        out = self.device.empty(scores.shape, np.float32)
        launch.pooled(self.device, self._floats(scores), self._first(lengths), out, width, kind == "max")
        return out

    def neighbours(self, stays, pos, lengths, reach):
        """(R,) the nearest row that stays, or -1. See numpy_ops."""
        out = self.device.empty(pos.shape, np.int32)
        launch.neighbours(self.device, stays.view(np.uint8), pos, self._first(lengths), out, reach)
        return out

    def fold(self, *arguments):
        """Which entry each row goes to. See numpy_ops."""
        return numpy_planning.fold(*arguments, ops=self)

    def merge(self, rows, dest, weight, n_entries):
        """entry[dest[r]] += weight[r] * rows[r], for dest >= 0. -> (n_entries, d)."""
        out = self.device.empty((n_entries, rows.shape[1]), np.uint16)
        rows = self._rows(self.gather(rows))
        launch.merge(self.device, rows, *self._by_group(dest, n_entries), self._floats(weight), out, self.real16)
        return out

    def merge_unrotated(self, rows, pos, dest, weight, entry_pos, cos, sin):
        """As `merge`, of keys: summed with RoPE undone, then turned to entry_pos (E,); what is one row of weight 1 at
        its own position is copied."""
        rows = self.gather(rows)
        rows_unrotated = self.unrotated(rows, pos, cos, sin)
        out = self.device.empty((len(entry_pos), rows.shape[1]), np.uint16)
        order, first = self._by_group(dest, len(entry_pos))
        weight, pos, entry_pos = self._floats(weight), self._indices(pos), self._indices(entry_pos)
        tables = self._upload_once(cos), self._upload_once(sin)
        launch.merge_unrotated(
            self.device, rows, rows_unrotated, pos, order, first, weight, entry_pos, *tables, out, self.real16
        )
        return out

    def _take(self, rows, index):
        """Rows `index` (n,) -> (n, d)."""
        out = self.device.empty((len(index), rows.shape[1]), np.uint16)
        launch.take(self.device, rows, self._indices(index), out)
        return out

    def window_scores(self, q, keys, lengths, log_size, pos, q_pos, scale, window=None):
        """Attention probabilities (G, w, R) of a few queries over the rows of a layer. q (Hq, w, d), keys (R, d): on
        the device, or float32; lengths and q_pos, which ascends, on the host. See numpy_ops."""
        rows, q, at = self._score_rows(q, keys, lengths, log_size, pos, q_pos)
        lse = self._score_lse(q, rows, at, scale, window)
        out = self.device.empty((len(q) // len(lengths), q.shape[1], len(pos)), np.float32)
        launch.window_scores(self.device, q, rows, at, lse, out, scale, window or 0, self.real16)
        return out

    def column_scores(
        self, q, keys, lengths, log_size, pos, q_pos, scale, window=None, *, reduce="sum", min_distance=0, lse=None
    ):
        """The sum or the largest (G, R) of the probabilities that many queries give to each row. Arguments as in
        window_scores; lse (Hq, n): on the device, as prefill attention returns it, where it is known. See numpy_ops."""
        assert reduce in ("sum", "max")
        rows, q, at = self._score_rows(q, keys, lengths, log_size, pos, q_pos)
        lse = self._score_lse(q, rows, at, scale, window) if lse is None else lse.reshape(1, *q.shape[:2])
        out = self.device.empty((len(q) // len(lengths), len(pos)), np.float32)
        largest, common = reduce == "max", (scale, window or 0)
        launch.column_scores(self.device, q, rows, at, lse, out, *common, largest, min_distance, self.real16)
        return out

    def _score_rows(self, q, keys, lengths, log_size, pos, q_pos):
        assert (np.diff(q_pos) >= 0).all()
        longest, log_size = int(np.max(lengths, initial=0)), self._floats(log_size)
        rows = launch.Rows(self._rows(keys), log_size, self._indices(pos), self._first(lengths), longest)
        return rows, self._rows(q), self._indices(q_pos)

    def _score_lse(self, q, rows, at, scale, window):
        lse = self.device.empty((launch.score_splits(self.device, q, rows), *q.shape[:2]), np.float32)
        launch.score_lse(self.device, q, rows, at, lse, scale, window or 0, self.real16)
        return lse

    def GreedyClusters(self, keys, rows, starts, lengths, rotation=None):
        n_rows, keys = len(keys), self._take(keys, rows)
        if rotation:
            pos, cos, sin = rotation
            keys = self.unrotated(keys, self.array(pos)[self.array(rows)], cos, sin)
        table = self._once(lengths, lambda: segments(self.device, self.array(starts), self.array(lengths)))
        return GreedyClusters(self.device, self.real16, keys, self.array(rows), n_rows, table)

    def nearest(self, keys, rows, others, first, last):
        """For each of some rows the one most like it of a segment of others. See numpy_ops."""
        found, cosine = (self.device.empty((len(rows),), dtype) for dtype in (np.int32, np.float32))
        arguments = (self._indices(array) for array in (rows, others, first, last))
        launch.nearest(self.device, self._rows(keys), *arguments, found, cosine, self.real16)
        return found, cosine

    def _by_group(self, groups, n):
        """order (R,): the rows, group by group, those of none (-1) before; first (n + 1,): where those of a group
        begin. Of the groups asked for last it is known: a Plan's rows are added up more than once."""
        order, first = self._once(groups, lambda: self._order(self._indices(groups), n))
        assert len(first) == n + 1
        return order, first

    def _order(self, groups, n):
        order = np.argsort(groups, kind="stable")
        first = np.searchsorted(groups[order], np.arange(n + 1, dtype=np.int32, like=groups))
        return self._indices(order), self._indices(first)

    def _indices(self, values):
        return self._of_type(values, np.int32)

    def _floats(self, values):
        return self._of_type(values, np.float32)

    def _of_type(self, values, dtype):
        """Values of the device or of the host on the device, in one piece."""
        if not self.device.owns(values):
            return self.device.upload(np.ascontiguousarray(values, dtype))
        values = values.astype(dtype, copy=False)
        return values if values.flags.c_contiguous else values.copy()

    def _upload_once(self, host):
        """The device's copy of an array that comes again and again, and is not written to: the tables of one pass."""
        return self._once(host, lambda: self.device.upload(host))

    def _once(self, array, make):
        """What `make` makes of an array that is not written to, known for the newest of them."""
        if id(array) not in self._made:
            if len(self._made) >= 16:
                self._made.pop(next(iter(self._made)))
            self._made[id(array)] = array, make()
        return self._made[id(array)][1]
