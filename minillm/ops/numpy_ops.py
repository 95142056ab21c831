"""The reference backend: the contract of `minillm.ops` in NumPy, float32. What this file computes is right by
definition."""

import numpy as np

from minillm.files.formats import F32
from minillm.memory import available_memory
from minillm.ops.contract import Backend
from minillm.ops.numpy_clusters import GreedyClusters
from minillm.ops.pages import Slab, StoredRows, anonymous

ROW_BLOCK = 256  # queries of prefill attention at a time: bounds the score buffer to G x 256 x n
NEAREST_ROWS = 128  # rows that look for the nearest at a time: their products stay in the L2 cache
LINEAR_BYTES = 4 << 20  # a stored weight is widened in tiles of this many bytes, which stay in the L2/L3 cache


class NumpyOps(Backend):
    """threads: of the linear algebra library under NumPy, which all of a process share; None: as it is."""

    name = "numpy"

    def __init__(self, threads=None):
        if threads is not None:
            set_blas_threads(threads)

    # the forward pass

    def prepare(self, weight):
        return weight

    def embed(self, table, ids):
        unique, inverse = np.unique(np.asarray(ids, np.int64), return_inverse=True)
        if unique.size and not 0 <= unique[0] <= unique[-1] < table.shape[0]:
            raise IndexError(f"token ids are not all in 0..{table.shape[0] - 1}")
        if table.format is F32:
            return table.data[unique][inverse]
        return np.concatenate([table.rows(i, i + 1) for i in unique])[inverse]

    def linear(self, x, weight, bias=None):
        if weight.format is F32:
            y = x @ weight.data.T
        else:
            n_out, n_in = weight.shape
            y = np.empty((x.shape[0], n_out), np.float32)
            step = max(1, LINEAR_BYTES // (4 * n_in))
            for lo in range(0, n_out, step):
                hi = min(lo + step, n_out)
                np.matmul(x, weight.rows(lo, hi).T, out=y[:, lo:hi])
        if bias is not None:
            y += bias
        return y

    def rms_norm(self, x, weight, eps):
        mean_square = np.einsum("nd,nd->n", x, x) / x.shape[-1]
        return x * (1.0 / np.sqrt(mean_square + eps)).astype(np.float32)[:, None] * weight

    def rope(self, x, cos, sin):
        half = x.shape[-1] // 2
        x1, x2 = x[..., :half], x[..., half:]
        out = np.empty_like(x)
        np.multiply(x1, cos, out=out[..., :half])
        out[..., :half] -= x2 * sin
        np.multiply(x2, cos, out=out[..., half:])
        out[..., half:] += x1 * sin
        return out

    def glu(self, gate, up, linear, cubic):
        with np.errstate(over="ignore"):  # exp(-x) = inf for very negative x gives the right limit, -0
            denominator = np.exp(gate * -(np.float32(linear) + np.float32(cubic) * gate * gate) if cubic else -gate)
        denominator += 1.0
        gate /= denominator
        gate *= up
        return gate

    def prefill_attention(self, q, k, v, past, scale, window=None, q_pos=None):
        (n_heads, n, d), (n_kv_heads, m, _) = q.shape, k.shape
        group = n_heads // n_kv_heads
        out, lse = np.empty((n, n_heads, d), np.float32), np.empty((n_heads, n), np.float32)
        new_pos = np.arange(past.seen, past.seen + m)
        q_pos = new_pos if q_pos is None else q_pos
        for head in range(n_kv_heads):
            keys, values, pos, stored = k[head], v[head], new_pos, 0
            if past.lengths[head]:
                k_past, v_past, log_size, pos_past = past.read(head)
                keys, values, pos = (
                    np.concatenate([k_past, keys]),
                    np.concatenate([v_past, values]),
                    np.append(pos_past, new_pos),
                )
                stored = len(pos_past)
            query_heads = slice(head * group, (head + 1) * group)
            for lo in range(0, n, ROW_BLOCK):
                hi = min(lo + ROW_BLOCK, n)
                # The columns that some row of this block can see are left .. right, and all see those before `causal`.
                causal, right = stored + np.clip(q_pos[[lo, hi - 1]] - past.seen + 1, 0, m)
                left = 0
                if window is not None:
                    left = int(np.argmax(np.append(pos[:right] > q_pos[lo] - window, True)))
                rows = (q[query_heads, lo:hi] * np.float32(scale)).reshape(-1, d)
                scores = (rows @ keys[left:right].T).reshape(group, hi - lo, right - left)
                if left < stored:
                    scores[:, :, : stored - left] += log_size[left:]
                causal = max(causal, left)
                np.copyto(scores[:, :, causal - left :], -np.inf, where=pos[causal:right] > q_pos[lo:hi, None])
                if window is not None:
                    np.copyto(scores, -np.inf, where=pos[left:right] <= q_pos[lo:hi, None] - window)
                mixed, log_sums = _softmax_values(scores.reshape(len(rows), right - left), values[left:right])
                out[lo:hi, query_heads] = mixed.reshape(group, hi - lo, d).transpose(1, 0, 2)
                lse[query_heads, lo:hi] = log_sums.reshape(group, hi - lo)
        return out.reshape(n, n_heads * d), lse

    def decode_attention(self, q, past, scale, window=None):
        out = np.empty_like(q)
        for b, layer in enumerate(past):
            n_kv_heads = len(layer.lengths)
            group = q.shape[1] // n_kv_heads
            for head in range(n_kv_heads):
                k, v, log_size, pos = layer.read(head)  # in one piece: where pages lie must not change a sum
                scores = (q[b, head * group : (head + 1) * group] * np.float32(scale)) @ k.T + log_size
                if window is not None:
                    scores[:, pos <= layer.seen - window] = -np.inf
                mixed, _ = _softmax_values(scores, v)
                out[b, head * group : (head + 1) * group] = mixed
        return out.reshape(q.shape[0], -1)

    # pages

    def new_slab(self, n_pages, page_size, head_dim, format):
        memory = np.frombuffer(anonymous(n_pages * page_size * format.entry_bytes(head_dim)), np.uint8)
        return Slab.within(memory, n_pages, page_size, head_dim, format)

    def write_entries(self, layer, start, entries):
        stored, done = layer.pool.format.stored(entries), 0
        for head, first in enumerate(start.tolist()):
            for run in layer.runs(head, first):
                n = len(run["pos"])
                for name, field in run.items():
                    field[:] = stored[name][done : done + n]
                done += n
        assert done == len(entries.pos)

    def read_labels(self, layer, start):
        runs = [run for head, first in enumerate(start.tolist()) for run in layer.runs(head, first)]
        log_size = np.concatenate([np.zeros(0, np.float32), *(run["log_size"] for run in runs)])
        return log_size, np.concatenate([np.zeros(0, np.int32), *(run["pos"] for run in runs)])

    def gather(self, rows):
        if not isinstance(rows, StoredRows):
            return rows
        parts, format = [], rows.past.pool.format
        for head, start in enumerate(rows.start.tolist()):
            parts += [format.rows(rows.field, run, rows.shape[1]) for run in rows.past.runs(head, start)]
            parts += [] if rows.new is None else [rows.new[head]]
        return np.concatenate(parts) if parts else np.zeros(rows.shape, np.float32)

    def stored_rows(self, stored):
        return stored

    # compression

    def window_scores(self, q, keys, lengths, log_size, pos, q_pos, scale, window=None):
        group = len(q) // len(lengths)
        out = np.zeros((group, q.shape[1], len(keys)), np.float32)
        for head, rows in _heads(lengths):
            logits = q[head * group : (head + 1) * group] @ keys[rows].T * np.float32(scale) + log_size[rows]
            logits[:, ~_visible(pos[rows], q_pos, window)] = -np.inf
            out[:, :, rows] = _softmax(logits)
        return out

    def column_scores(
        self, q, keys, lengths, log_size, pos, q_pos, scale, window=None, *, reduce="sum", min_distance=0, lse=None
    ):
        assert reduce in ("sum", "max")
        group = len(q) // len(lengths)
        out = np.zeros((group, len(keys)), np.float32)
        for head, rows in _heads(lengths):
            for lo in range(0, q.shape[1], ROW_BLOCK):
                block = (slice(head * group, (head + 1) * group), slice(lo, lo + ROW_BLOCK))
                logits = q[block] @ keys[rows].T * np.float32(scale) + log_size[rows]
                logits[:, ~_visible(pos[rows], q_pos[block[1]], window)] = -np.inf
                p = _softmax(logits, None if lse is None else lse[block])
                p[:, pos[rows] > q_pos[block[1], None] - min_distance] = 0
                if reduce == "sum":
                    out[:, rows] += p.sum(axis=1)
                else:
                    np.maximum(out[:, rows], p.max(axis=1), out=out[:, rows])
        return out

    def merge(self, rows, dest, weight, n_entries):
        rows, taken = self.gather(rows), np.flatnonzero(dest >= 0)
        order = taken[np.argsort(dest[taken], kind="stable")]  # rows, entry by entry
        count = np.bincount(dest[taken], minlength=n_entries)
        first = np.cumsum(count) - count
        by_count = np.argsort(-count, kind="stable")  # most rows first: entries with more than r rows are a prefix
        total = np.zeros((n_entries, rows.shape[1]), np.float32)
        for r in range(int(count.max(initial=0))):
            more = by_count[: np.searchsorted(-count[by_count], -r)]
            source = order[first[more] + r]
            total[: len(more)] += rows[source] * weight[source, None]
        out = np.empty_like(total)
        out[by_count] = total
        return out

    def unrotated(self, rows, pos, cos, sin):
        norm = cos[0] ** 2  # cos and sin carry a factor: position 0 shows which, pair by pair
        cos, sin = cos / norm, -sin / norm
        return self.rope(rows, cos.take(pos, axis=0), sin.take(pos, axis=0))

    def merge_unrotated(self, rows, pos, dest, weight, entry_pos, cos, sin):
        rows, n_rows = self.gather(rows), np.bincount(dest[dest >= 0], minlength=len(entry_pos))
        copied = (dest >= 0) & (weight == 1)
        copied &= (n_rows[dest] == 1) & (entry_pos[dest] == pos)
        made = np.ones(len(entry_pos), bool)
        made[dest[copied]] = False
        number = np.where(made, np.cumsum(made) - 1, -1)  # of an entry among those that are made
        summed = self.merge(
            self.unrotated(rows, pos, cos, sin), np.where(dest >= 0, number[dest], -1), weight, int(made.sum())
        )
        out = np.empty((len(entry_pos), rows.shape[1]), np.float32)
        out[made] = self.rope(summed, cos.take(entry_pos[made], axis=0), sin.take(entry_pos[made], axis=0))
        out[dest[copied]] = rows[copied]
        return out

    def nearest(self, keys, rows, others, first, last):
        norms = np.linalg.norm(keys, axis=1, keepdims=True)
        unit = np.divide(keys, norms, out=np.zeros_like(keys), where=norms > 0)
        looking, among = unit[rows], unit[others]
        found, cosine = np.full(len(rows), -1), np.zeros(len(rows), np.float32)
        for lo in range(0, len(rows), NEAREST_ROWS):
            block = slice(lo, min(lo + NEAREST_ROWS, len(rows)))
            start, stop, own = first[lo], last[block.stop - 1], np.arange(block.stop - lo)
            if start == stop:
                continue
            products = looking[block] @ among[start:stop].T
            if first[block.stop - 1] > start or last[lo] < stop:
                column = np.arange(start, stop)
                products[(column < first[block, None]) | (column >= last[block, None])] = -np.inf
            best, some = products.argmax(axis=1), last[block] > first[block]
            found[block] = np.where(some, others[start + best], -1)
            cosine[block] = np.where(some, products[own, best], 0)
        return found, cosine

    def greedy_clusters(self, keys, rows, starts, lengths, rotation=None):
        n_rows, keys = len(keys), keys[rows]
        if rotation:
            pos, cos, sin = rotation
            keys = self.unrotated(keys, pos[rows], cos, sin)
        return GreedyClusters(keys, rows, starts, lengths, n_rows)

    # the device

    def array(self, values):
        return values

    def host(self, values):
        return values

    def random_words(self, shape, seed):
        bound = np.float32((3 / shape[1]) ** 0.5)
        values = np.random.default_rng(seed).random(shape, np.float32) * (2 * bound) - bound
        return (values.view(np.uint32) >> 16).astype(np.uint16)

    def available_memory(self):
        return available_memory()

    def reading(self, n_bytes):
        matrix = np.ones((n_bytes // 4096, 1024), np.float32)
        vector = matrix[0].copy()
        return lambda: matrix @ vector  # which is how weights are read


def set_blas_threads(n):
    """Threads of the linear algebra library under NumPy, for the whole process."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(limits=n)


def _softmax_values(scores, v):
    """softmax of scores (rows, m) times v (m, d), and the log of each row's sum of exponentials (rows,); zeros and -inf
    where all scores of a row are -inf. Overwrites `scores`. Normalised after the product: d < m."""
    top = np.maximum(scores.max(axis=1, keepdims=True, initial=-np.inf), np.finfo(np.float32).min)
    scores -= top
    np.exp(scores, out=scores)
    total = scores.sum(axis=1, keepdims=True)
    seen = total > 0
    out = scores @ v
    np.divide(out, total, out=out, where=seen)
    return out, (top + np.log(total, out=np.full_like(total, -np.inf), where=seen))[:, 0]


def _heads(lengths):
    """(head, slice of its rows) of each KV head that has any."""
    ends = np.cumsum(lengths)
    return [(head, slice(end - n, end)) for head, (n, end) in enumerate(zip(lengths, ends, strict=True)) if n]


def _visible(pos, q_pos, window):
    """(queries, rows) bool: which rows each query sees."""
    visible = pos <= q_pos[:, None]
    return visible if window is None else visible & (pos > q_pos[:, None] - window)


def _softmax(logits, lse=None):
    """exp(logits) over the sum of their last axis, whose log is lse (...,) if it is known; 0 where all are -inf.
    Overwrites `logits`."""
    top = logits.max(axis=-1, keepdims=True) if lse is None else lse[..., None]
    logits -= np.maximum(top, np.finfo(np.float32).min)
    p = np.exp(logits, out=logits)
    if lse is None:
        p /= np.maximum(p.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    return p


NUMPY = NumpyOps()
