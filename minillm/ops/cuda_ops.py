"""The contract of `minillm.ops` on kernels/cuda and cuBLAS.

Rows of K and V, hidden states and logits stay on the device, as its arrays, and so does what a Plan says about them
(scores, indices, weights, sizes, positions): NumPy's functions, called with CuPy's arrays, run on the device
(__array_ufunc__, __array_function__), and planning is written with those that do. The host knows what is small: how
many rows and entries each head has, budgets, thresholds. Activations, K and V are 16-bit floats of one type, bf16 where
most of the model's matrices are bf16 and none is in blocks, half otherwise; the residual stream and every sum is
float32. Pages may be of fewer bits: what goes in is rounded to 16 bits and then to those, what comes out is of 16 bits,
and back in it is the same words.
"""

import math

import numpy as np

from minillm.errors import MinillmError
from minillm.files.formats import BF16
from minillm.ops import cuda_device, launch
from minillm.ops.cuda_decode import FINE
from minillm.ops.cuda_planning import CudaPlanning
from minillm.ops.cuda_runner import Runner, product
from minillm.ops.cuda_weights import FLOATS, CudaWeight
from minillm.ops.numpy_planning import joined
from minillm.ops.pages import PAGE_SIZE, Slab, StoredRows

SLABS = 32768  # of 8 MiB, at most: more than any one device has


def open_ops(index):
    """CudaOps on GPU `index`. Raises MinillmError."""
    return CudaOps(cuda_device.open_device(index))


class CudaOps(CudaPlanning):
    """One model's operations on one device."""

    name = "cuda"
    READS_STORED = True

    def __init__(self, device):
        super().__init__()
        self.device, self.real16 = device, "half"
        self._slabs = None  # (addresses, the same on the device)

    @property
    def page_format(self):
        return FLOATS[self.real16]

    @property
    def DEVICE(self):
        return self.device.name

    # weights and the forward pass

    def expect(self, weights):
        """The 16-bit type is that of most bytes. Blocks meet half alone, and where there are any, all becomes half: of
        other words as many."""
        blocks = any(weight.format.device and weight.format.device.apart for weight in weights)
        bf16 = sum(weight.nbytes for weight in weights if weight.format is BF16)
        most = 2 * bf16 > sum(weight.nbytes for weight in weights)
        self.real16 = "bf16" if most and not blocks else "half"

    def held_bytes(self, format, shape):
        return format.device_bytes(math.prod(shape))

    def prepare(self, weight):
        return CudaWeight.of(self.device, weight, self.real16)

    def runner(self, model):
        d = model.config.head_dim
        if d not in launch.HEAD_SIZES:
            raise MinillmError(
                f"{model.config.name} has heads of {d} elements, and on a GPU minillm has kernels for multiples of 16 "
                f"from {min(launch.HEAD_SIZES)} to {max(launch.HEAD_SIZES)}: use --device cpu"
            )
        return Runner(model)

    def linear(self, x, weight, bias=None):
        """x is rounded to 16 bits."""
        y = self.device.empty((len(x), weight.shape[0]), np.float32)
        product(self.device, self._rows(x), weight, y, self.real16)
        if bias is not None:
            launch.add_bias(self.device, y, self._floats(bias))
        return y

    def rms_norm(self, x, weight, eps):
        out = self.device.empty(x.shape, np.uint16)
        launch.rms_norm(self.device, self._floats(x), self._floats(weight), eps, out, self.real16)
        return out

    def rope(self, x, cos, sin):
        x, half = self._rows(x), x.shape[-1] // 2
        row = np.arange(cos.size // half, dtype=np.int32).reshape(cos.shape[:-1])  # of the tables, for each row of x
        row = np.broadcast_to(row, x.shape[:-1]).ravel()
        tables = (self.device.upload(table.reshape(-1, half)) for table in (cos, -sin))
        out = self.device.empty((len(row), 2 * half), np.uint16)
        launch.unrotate(self.device, x.reshape(out.shape), self._indices(row), *tables, None, out, self.real16)
        return out.reshape(x.shape)

    def glu(self, gate, up, linear, cubic):
        both = np.concatenate([self._rows(gate), self._rows(up)], axis=1)
        out = self.device.empty(gate.shape, np.uint16)
        launch.glu(self.device, both, None, (linear, cubic), out, self.real16)
        return out

    def embed(self, table, ids):
        ids = np.ascontiguousarray(ids, np.int32)
        if ids.size and not 0 <= ids.min() <= ids.max() < table.shape[0]:
            raise IndexError(f"token ids are not all in 0..{table.shape[0] - 1}")
        out = self.device.empty((len(ids), table.shape[1]), np.float32)
        launch.embed(self.device, table, self.device.upload(ids), out)
        return out

    def prefill_attention(self, q, k, v, past, scale, window=None, q_pos=None):
        (n_heads, n, d), device, real16 = q.shape, self.device, self.real16
        out, lse = device.empty((n, n_heads, d), np.uint16), device.empty((n_heads, n), np.float32)
        q_pos = None if q_pos is None else device.upload(np.asarray(q_pos, np.int32))
        q, k, v, past = self._rows(q), self._rows(k), self._rows(v), self.paged_floats(past)
        launch.prefill_attention(device, q, k, v, past, out, lse, scale, window or 0, real16, q_pos)
        return out.reshape(n, -1), lse

    def decode_attention(self, q, past, scale, window=None):
        (batch, n_heads, d), n_kv_heads, device = q.shape, len(past[0].lengths), self.device
        q, out, table = self._rows(q), device.empty(q.shape, np.uint16), self.paged(*past)
        starts = device.empty((1, batch * n_kv_heads + 1), np.int32)
        launch.decode_plan(device, table.lengths.reshape(1, batch, n_kv_heads), starts)
        space = launch.decode_space(device, batch * n_kv_heads, n_heads // n_kv_heads, d, table.format)
        launch.decode_attention(device, q, table, starts[0], space, out, scale, window or 0, self.real16)
        return out.reshape(batch, -1)

    # pages

    def holds(self, format):
        return format.cuda is not None

    def new_slab(self, n_pages, page_size, head_dim, format):
        assert page_size == PAGE_SIZE
        memory = self.device.new_slab_memory((n_pages * page_size * format.entry_bytes(head_dim),), np.uint8)
        return Slab.within(memory, n_pages, page_size, head_dim, format)

    def slab_table(self, pool):
        """(SLABS,) uint64 on the device: where each slab begins. The array stays the same when slabs come and go."""
        addresses = [slab.memory.data.ptr for slab in pool.slabs]
        if self._slabs is None or self._slabs[0] != addresses:
            table = self.device.empty((SLABS,), np.uint64) if self._slabs is None else self._slabs[1]
            table.set(np.array(addresses + [0] * (SLABS - len(addresses)), np.uint64))
            self._slabs = addresses, table
        return self._slabs[1]

    def paged(self, *layers):
        """B PagedLayers of one pool as launch.Paged."""
        held = [layer.pages[:, : max(1, -(-int(layer.lengths.max()) // PAGE_SIZE))] for layer in layers]
        (n_heads, _), capacity, batch = held[0].shape, max(pages.shape[1] for pages in held), len(layers)
        pages = np.zeros((batch, n_heads, capacity), np.int32)
        for table, own in zip(pages, held, strict=True):
            table[:, : own.shape[1]] = own
        lengths, seen = [layer.lengths for layer in layers], [layer.seen for layer in layers]
        tables = self.device.upload(np.concatenate([pages.ravel(), *lengths, seen], dtype=np.int32))  # in one copy
        pool = layers[0].pool
        return launch.Paged(
            pool.format,
            self.slab_table(pool),
            pool.slab_pages,
            tables[: pages.size].reshape(pages.shape),
            tables[pages.size : -batch].reshape(batch, n_heads),
            tables[-batch:],
        )

    def paged_floats(self, layer):
        """The same in 16-bit floats, as the attention of a prompt needs them. Of other formats a copy, which lives as
        long as what is returned: of one layer in 8 bits, 1.9 times its bytes, written once and then read in place of
        them."""
        past = self.paged(layer)
        if past.format.exact:
            return past
        d, held = layer.pool.head_dim, -(-layer.lengths // PAGE_SIZE)
        n = int(held.sum())
        memory = self.device.empty((n * PAGE_SIZE * self.page_format.entry_bytes(d),), np.uint8)
        rows = Slab.within(memory, n, PAGE_SIZE, d, self.page_format).entries(slice(None), slice(None))
        first, start = self._offsets(held * PAGE_SIZE, np.zeros_like(held))  # whole pages, in their order
        launch.read_entries(self.device, past, first, start, d, self.real16, **rows)
        pages = (np.cumsum(held) - held)[:, None] + np.arange(past.pages.shape[2])
        return launch.Paged(
            self.page_format,
            self.device.upload(np.array([memory.data.ptr], np.uint64)),
            max(n, 1),
            self.device.upload(pages[None].astype(np.int32)),
            past.lengths,
            past.seen,
            memory,
        )

    def write_entries(self, layer, start, entries):
        if len(entries.pos):
            k, v = (self._rows(rows) for rows in (entries.k, entries.v))
            log_size, pos = self.array(entries.log_size), self._indices(entries.pos)
            first, start = self._offsets(entries.lengths, start)
            launch.write_entries(self.device, k, v, log_size, pos, self.paged(layer), first, start, self.real16)

    def gather(self, rows):
        if not isinstance(rows, StoredRows):
            return rows
        lengths = rows.past.lengths - rows.start
        stored = self.device.empty((int(lengths.sum()), rows.shape[1]), np.uint16)
        self._read(rows.past, rows.start, **{rows.field: stored})
        return stored if rows.new is None else joined(lengths, stored, self._rows(rows.new))

    def read_labels(self, layer, start):
        n = int((layer.lengths - start).sum())
        log_size, pos = self.device.empty((n,), np.float32), self.device.empty((n,), np.int32)
        self._read(layer, start, log_size=log_size, pos=pos)
        return log_size, pos

    def _read(self, layer, start, **out):
        """Fields of entries out of pages, into the arrays `out`."""
        first, start = self._offsets(layer.lengths - start, start)
        launch.read_entries(self.device, self.paged(layer), first, start, layer.pool.head_dim, self.real16, **out)

    def stored_rows(self, stored):
        return stored if stored.dtype == np.float32 else self.page_format.k.floats(stored)

    # the device

    def available_memory(self):
        return self.device.memory()[0]

    def trim(self):
        """Tables of the last pass, and memory of arrays that are gone, which CuPy keeps, go back to the device."""
        self._made.clear()
        self.device.trim()

    def random_words(self, shape, seed):
        words = self.device.empty(shape, np.uint16)
        launch.random_words(self.device, words, seed, (3 / shape[1]) ** 0.5, "bf16")
        return words

    def array(self, values):
        return values if self.device.owns(values) else self.device.upload(np.asarray(values))

    def host(self, values):
        if self.device.owns(values):
            values = values.get()
            self.device.use()  # get() of what is not contiguous leaves CuPy on another stream
        return values

    def reading(self, n_bytes):
        words, bad = self.device.empty((n_bytes // 4,), np.float32), self.device.upload(np.array([FINE], np.int32))
        words.fill(0)

        def read():
            launch.not_finite(self.device, words, 0, bad)
            self.device.synchronize()

        return read
