"""The reference backend: the contract of `minillm.ops` in NumPy, float32. What this file computes is right by
definition."""

from dataclasses import replace

import numpy as np

from minillm.memory import available_memory as available_memory
from minillm.ops.numpy_clusters import GreedyClusters as GreedyClusters
from minillm.ops.numpy_planning import (  # noqa: F401
    compact,
    fold,
    neighbours,
    nonzero,
    pooled,
    segment_count,
    segment_ids,
    segment_sum,
    segment_topk,
)
from minillm.ops.numpy_rope import rope, unrotated
from minillm.ops.pages import StoredRows, from_int8, to_int8
from minillm.ops.pages import new_slab as new_slab

ROW_BLOCK = 256  # queries of prefill attention at a time: bounds the score buffer to G x 256 x n
NEAREST_ROWS = 128  # rows that look for the nearest at a time: their products stay in the L2 cache
LINEAR_BYTES = 4 << 20  # a stored weight is widened in tiles of this many bytes, which stay in the L2/L3 cache


def embed(table, ids):
    """Rows `ids` (n,) of the embedding table, a Weight (vocab, dim) -> (n, dim)."""
    unique, inverse = np.unique(np.asarray(ids, np.int64), return_inverse=True)
    if unique.size and not 0 <= unique[0] <= unique[-1] < table.shape[0]:
        raise IndexError(f"token ids are not all in 0..{table.shape[0] - 1}")
    if table.kind == "F32":
        return table.data[unique][inverse]
    return np.concatenate([table.rows(i, i + 1) for i in unique])[inverse]


def linear(x, weight, bias=None):
    """x (n, in) times the transpose of a Weight (out, in), plus bias (out,) -> (n, out).

    A Weight that is not float32 is widened tile by tile on every call: slow, and no memory beyond the stored words."""
    if weight.kind == "F32":
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


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, eq. 4). x (n, dim), weight
    (dim,)."""
    mean_square = np.einsum("nd,nd->n", x, x) / x.shape[-1]
    return x * (1.0 / np.sqrt(mean_square + eps)).astype(np.float32)[:, None] * weight


def swiglu(gate, up):
    """silu(gate) * up, elementwise; overwrites and returns `gate`."""
    with np.errstate(over="ignore"):  # exp(-x) = inf for very negative x gives the right limit, -0
        denominator = np.exp(-gate)
    denominator += 1.0
    gate /= denominator
    gate *= up
    return gate


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


def prefill_attention(q, k, v, past, scale, window=None, q_pos=None):
    """Causal attention of n queries over stored entries and m new tokens.

    q (Hq, n, d), k and v (H, m, d), rotated; past: PagedLayer, whose entries all come before the new tokens, at the
    positions from past.seen on. q_pos (n,): those of the queries, ascending; None: they are the new tokens'. The
    logit of an entry is q.k * scale + log s (SemantiCache eq. 4). window: a query at position p sees positions > p -
    window. -> (n, Hq * d); lse (Hq, n), the natural log of each query's sum of exponentials; zeros and -inf of a query
    that sees nothing. No more than G x ROW_BLOCK x (entries + m) scores exist at a time."""
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


def decode_attention(q, past, scale, window=None):
    """Attention of one token of each of B sequences over its stored entries (its own entry among them).

    q (B, Hq, d) rotated; past: B PagedLayers of one model layer, heads of any lengths -> (B, Hq * d)."""
    out = np.empty_like(q)
    for b, layer in enumerate(past):
        n_kv_heads = len(layer.lengths)
        group = q.shape[1] // n_kv_heads
        for head in range(n_kv_heads):
            k, v, log_size, pos = layer.read(head)  # in one piece: where pages lie must not change how sums are rounded
            scores = (q[b, head * group : (head + 1) * group] * np.float32(scale)) @ k.T + log_size
            if window is not None:
                scores[:, pos <= layer.seen - window] = -np.inf
            mixed, _ = _softmax_values(scores, v)
            out[b, head * group : (head + 1) * group] = mixed
    return out.reshape(q.shape[0], -1)


def window_scores(q, keys, lengths, log_size, pos, q_pos, scale, window=None):
    """Attention probabilities of a few queries over the rows of a layer.

    q (Hq, w, d) rotated, q_pos (w,) their positions; keys (R, d) rotated, log_size (R,) log s, pos (R,): rows of the H
    KV heads one after another, lengths (H,) of them each. A query sees the rows of its KV head at positions up to its
    own, with `window` only those at positions > its own - window; its logits are q.k * scale + log s, and the softmax
    is over all it sees. -> (G, w, R): [g, i, r] is what query i of the g-th query head of row r's KV head gives to r,
    0 where it does not see r."""
    group = len(q) // len(lengths)
    out = np.zeros((group, q.shape[1], len(keys)), np.float32)
    for head, rows in _heads(lengths):
        logits = q[head * group : (head + 1) * group] @ keys[rows].T * np.float32(scale) + log_size[rows]
        logits[:, ~_visible(pos[rows], q_pos, window)] = -np.inf
        out[:, :, rows] = _softmax(logits)
    return out


def column_scores(
    q, keys, lengths, log_size, pos, q_pos, scale, window=None, *, reduce="sum", min_distance=0, lse=None
):
    """What many queries give to each row: the sum or the largest of their attention probabilities.

    Arguments as in window_scores; q (Hq, n, d). reduce: "sum" (H2O) or "max" (KVzip, KVCompose). Only queries at least
    min_distance positions after a row count for it; rows nearer than that, and rows that a caller appends to each head
    and then slices off, are in the normaliser all the same. lse (Hq, n): the natural log of each query's sum of
    exponentials (-inf for none), where it is known already. -> (G, R), 0 for a row that no query counts for. The
    probabilities of ROW_BLOCK queries exist at a time."""
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


def gather(rows):
    """(R, d) float32: StoredRows as an array of their own; an array is itself."""
    if not isinstance(rows, StoredRows):
        return rows
    parts = []
    for head, start in enumerate(rows.start.tolist()):
        for run in rows.past.runs(head, start):
            stored = (run.k, run.k_scale) if rows.field == "k" else (run.v, run.v_scale)
            parts.append(rows.past.pool.ops.stored_rows(*stored))
        parts += [] if rows.new is None else [rows.new[head]]
    return np.concatenate(parts) if parts else np.zeros(rows.shape, np.float32)


def merge(rows, dest, weight, n_entries):
    """entry[dest[r]] += weight[r] * rows[r], for dest >= 0. rows (R, d) or StoredRows, dest, weight (R,) -> (n_entries,
    d) float32."""
    rows, taken = gather(rows), np.flatnonzero(dest >= 0)
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


def nearest(keys, rows, others, first, last):
    """For each of some rows the one most like it, by the cosine of their keys, of a segment of others.

    keys (R, d); rows (n,), others (m,): numbers of rows. rows[i] looks among others[first[i] : last[i]]; first and last
    (n,) ascend. -> (found (n,): number of the row, of equal ones the first in `others`, -1 where the segment is empty;
    cosine (n,) float32, 0 for none). A key of norm zero is similar to nothing (cosine 0)."""
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


def merge_unrotated(rows, pos, dest, weight, entry_pos, cos, sin):
    """`merge` of keys, rotated at pos (R,): they are summed with RoPE undone and the sum is rotated to
    entry_pos (E,). An entry that is one row of weight 1, at its own position, is that row. -> (E, d)"""
    rows, n_rows = gather(rows), np.bincount(dest[dest >= 0], minlength=len(entry_pos))
    copied = (dest >= 0) & (weight == 1)
    copied &= (n_rows[dest] == 1) & (entry_pos[dest] == pos)
    made = np.ones(len(entry_pos), bool)
    made[dest[copied]] = False
    number = np.where(made, np.cumsum(made) - 1, -1)  # of an entry among those that are made
    summed = merge(unrotated(rows, pos, cos, sin), np.where(dest >= 0, number[dest], -1), weight, int(made.sum()))
    out = np.empty((len(entry_pos), rows.shape[1]), np.float32)
    out[made] = rope(summed, cos.take(entry_pos[made], axis=0), sin.take(entry_pos[made], axis=0))
    out[dest[copied]] = rows[copied]
    return out


def concatenate(parts):
    """Rows of several arrays, one after another."""
    return np.concatenate(parts)


def write_entries(layer, start, entries):
    """Entries into the pages of a PagedLayer, after the first `start` (H,) of each head."""
    done = 0
    for head, first in enumerate(start.tolist()):
        for run in layer.runs(head, first):
            rows = slice(done, done + len(run.pos))
            if run.k_scale is None:
                run.k[:], run.v[:] = entries.k[rows], entries.v[rows]
            else:
                run.k[:], run.k_scale[:] = to_int8(entries.k[rows])
                run.v[:], run.v_scale[:] = to_int8(entries.v[rows])
            run.log_size[:], run.pos[:] = entries.log_size[rows], entries.pos[rows]
            done = rows.stop
    assert done == len(entries.pos)


def rewrite(layer, start, dest, weights, entries):
    """The entries of a PagedLayer after the first `start` (H,) of each head, R in all, become others where they lie:
    K and V of entry dest[r] the sum of weights[0][r] x K, weights[1][r] x V. dest, weights (R,): as of `merge`; each
    row goes to an entry of its head. entries: their Entries, without k and v. No head gets longer."""
    ops, n = layer.pool.ops, len(entries.pos)
    rows = (StoredRows(layer, start, field) for field in ("k", "v"))
    k, v = (ops.merge(of, dest, weight, n) for of, weight in zip(rows, weights, strict=True))
    shorter = replace(layer, lengths=start + entries.lengths)
    ops.write_entries(shorter, start, replace(entries, k=k, v=v))


def read_labels(layer, start):
    """log_size, pos (E,) of the entries of a PagedLayer after the first `start` (H,) of each head."""
    runs = [run for head, first in enumerate(start.tolist()) for run in layer.runs(head, first)]
    log_size = np.concatenate([np.zeros(0, np.float32), *(run.log_size for run in runs)])
    return log_size, np.concatenate([np.zeros(0, np.int32), *(run.pos for run in runs)])


def array(values):
    """Values of the host as an array of this backend; what is one already is itself."""
    return values


def host(values):
    """An array of this backend as NumPy's."""
    return values


def stored_rows(stored, scale=None):
    """Rows of K or V as a slab has them, with their scales (n,) where they are int8 -> float32 (n, d)."""
    return stored if scale is None else from_int8(stored, scale)


DEVICE = "cpu"
CACHE_DTYPE = "float32"  # of K and V in pages, where int8 is not asked for
READS_STORED = False  # they are widened again in every product


def random_words(shape, seed):
    """A random matrix (out, in) in bf16 words: uniform, of variance 1 / in, so that products keep the size of what they
    meet."""
    bound = np.float32((3 / shape[1]) ** 0.5)
    values = np.random.default_rng(seed).random(shape, np.float32) * (2 * bound) - bound
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def prepare(weight):
    """The Weight itself."""
    return weight


def runner(model):
    """None: the forward pass is the one that model.py spells out."""
    return None


def trim():
    """There is nothing to give back."""


def set_threads(n):
    """Threads of the linear algebra library under NumPy, for the whole process."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(limits=n)


def bandwidth(n_bytes=256 << 20, repeats=5):
    """Bytes a second that the linear algebra reads from memory in a matrix times a vector, which is how it reads
    weights: the best of some repeats."""
    import time

    matrix, seconds = np.ones((n_bytes // 4096, 1024), np.float32), []
    vector = matrix[0].copy()
    for _ in range(repeats):
        start = time.perf_counter()
        matrix @ vector
        seconds.append(time.perf_counter() - start)
    return n_bytes / min(seconds)
