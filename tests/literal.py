"""What the cache and its compression are compared with: attention, greedy clustering and SemantiCache in float64, a
query, a pair or a row at a time, as the papers print them. Nothing here calls the operations under test; pages are
filled by hand. Symbols as in minillm.ops."""

from dataclasses import dataclass

import numpy as np

from minillm.cache.kv_cache import PagedLayer
from minillm.cache.page_pool import PagePool
from minillm.compress.plan import Layer
from minillm.ops.numpy_ops import NUMPY as numpy_ops
from minillm.ops.pages import FLOAT32

NEEDS = {"razor": {"retrieval_heads": "0:1"}}  # options without a default, by method


def attend(q, entries, scale, query_pos, window=None):
    """softmax(q.k * scale + log s) v over the entries a query at `query_pos` sees. q (d,); entries: k (m, d), v (m, d),
    log_size (m,), pos (m,) -> (d,)."""
    return attend_and_sum(q, entries, scale, query_pos, window)[0]


def attend_and_sum(q, entries, scale, query_pos, window=None):
    """`attend`, and the log of the sum of exponentials that it divides by."""
    k, v, log_size, pos = (np.asarray(column, np.float64) for column in entries)
    logits = k @ np.float64(q) * scale + log_size
    if window is not None:
        logits[pos <= query_pos - window] = -np.inf
    top = logits.max(initial=-np.inf)
    if top == -np.inf:
        return np.zeros(v.shape[1]), top
    p = np.exp(logits - top)
    return p @ v / p.sum(), top + np.log(p.sum())


def prefill(q, k, v, past, seen, scale, window=None, rows=None, q_pos=None):
    """Causal attention of queries at q_pos (None: of the new tokens) over stored entries `past` (one tuple as in
    `attend` a KV head) and new tokens, of all queries or of `rows` of them. -> (rows, Hq * d); (Hq, rows) logs of the
    sums of exponentials"""
    n_heads, n, d = q.shape
    q_pos = range(seen, seen + n) if q_pos is None else q_pos
    rows = range(n) if rows is None else rows
    out, lse = np.zeros((len(rows), n_heads, d)), np.zeros((n_heads, len(rows)))
    for head in range(n_heads):
        kv_head = head * len(k) // n_heads
        k_past, v_past, log_size, pos = past[kv_head]
        for row, i in enumerate(rows):
            new = [j for j in range(k.shape[1]) if seen + j <= q_pos[i]]
            entries = (
                np.concatenate([k_past, k[kv_head, new]]),
                np.concatenate([v_past, v[kv_head, new]]),
                np.concatenate([log_size, np.zeros(len(new))]),
                np.concatenate([pos, seen + np.array(new, int)]),
            )
            out[row, head], lse[head, row] = attend_and_sum(q[head, i], entries, scale, q_pos[i], window)
    return out.reshape(len(rows), -1), lse


def rotated(x, angle, factor=1.0):
    """Half-split RoPE as multiplication of complex numbers: x (..., d), angle (..., d/2); float64."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.asarray(angle, np.float64)) * factor
    return np.concatenate([z.real, z.imag], axis=-1)


@dataclass
class FakeRope:
    """Stands in for minillm.rope.Rope: plain frequencies, and a factor on cos and sin as yarn has it."""

    head_dim: int
    theta: float = 100.0
    factor: float = 1.0

    def angles(self, pos):
        """(..., head_dim // 2) float64"""
        inv_freq = self.theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        return np.asarray(pos, np.float64)[..., None] * inv_freq

    def tables(self, positions, length):
        angles = self.angles(positions)
        return np.float32(np.cos(angles) * self.factor), np.float32(np.sin(angles) * self.factor)

    def rotated(self, x, pos):
        return rotated(x, self.angles(pos), self.factor)

    def undone(self, x, pos):
        return rotated(x, -self.angles(pos), 1 / self.factor)


def gated(activation, gate, up):
    """act(gate) * up in float64."""
    gate = np.float64(gate)
    if activation == "gelu_tanh":
        return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * up


def random_entries(rng, m, d, seen):
    """k, v, log_size, pos of m stored entries: sizes 1 to 9, positions below `seen` in no order."""
    k, v = rng.normal(size=(2, m, d)).astype(np.float32)
    log_size = np.log(rng.integers(1, 10, m)).astype(np.float32)
    return k, v, log_size, rng.integers(0, seen, m).astype(np.int32)


def paged_layer(heads, seen, *, page_size=4, slab_pages=3, rng=None):
    """A PagedLayer with these entries (one tuple as in `attend` a head) in pages of small slabs: scattered by `rng`, or
    in order."""
    d = heads[0][0].shape[1]
    pool = PagePool(numpy_ops, d, page_size, slab_pages * page_size * FLOAT32.entry_bytes(d))
    lengths = np.array([len(head[0]) for head in heads])
    n_pages = -(-lengths // page_size)
    ids = pool.alloc(2 * int(n_pages.sum()) + 1)
    if rng is not None:
        ids = rng.permutation(ids)
    pages = np.zeros((len(heads), int(n_pages.max(initial=0)) + 2), np.int32)
    for h, head in enumerate(heads):
        pages[h, : n_pages[h]], ids = ids[: n_pages[h]], ids[n_pages[h] :]
        for i in range(lengths[h]):
            slab, page = divmod(int(pages[h, i // page_size]), slab_pages)
            for name, column in zip(("k", "v", "log_size", "pos"), head, strict=True):
                pool.slabs[slab].fields[name][page, i % page_size] = column[i]
    return PagedLayer(pool, pages, lengths, seen)


def greedy_seeds(keys, tau):
    """Algorithm 1 of SemantiCache on one chunk, keys (l, d): the seed of each row, and whether a comparison was too
    near to tau for float32 to decide (cosine of a zero key: exactly 0)."""
    keys = [np.float64(key) for key in keys]
    norms = [float(np.sqrt(key @ key)) for key in keys]
    seed, near = [None] * len(keys), False
    for i in range(len(keys)):
        if seed[i] is not None:
            continue
        seed[i] = i
        for j in range(i + 1, len(keys)):
            if seed[j] is None:
                product = norms[i] * norms[j]
                cosine = float(keys[i] @ keys[j]) / product if product else 0.0
                near = near or (product > 0 and abs(cosine - tau) < 2e-6)
                if cosine > tau:
                    seed[j] = i
    return seed, near


def make_layer(heads, rope, *, n_positions=None):
    """A Layer of rows given head by head as dicts: k (stored, rotated), v, size, pos, classes, protected."""
    columns = {name: np.concatenate([head[name] for head in heads]) for name in heads[0]}
    n_positions = n_positions or int(columns["pos"].max(initial=0)) + 1
    return Layer(
        index=0,
        k_rows=columns["k"].astype(np.float32),
        v_rows=columns["v"].astype(np.float32),
        size=columns["size"].astype(np.float32),
        pos=columns["pos"].astype(np.int32),
        find_tokens=lambda: (None, columns["classes"].astype(np.uint8)),
        protected=columns["protected"].astype(bool),
        lengths=np.array([len(head["pos"]) for head in heads]),
        cos=rope.tables(np.arange(n_positions), n_positions)[0],
        sin=rope.tables(np.arange(n_positions), n_positions)[1],
        ops=numpy_ops,
    )


def chunks_between_delimiters(head, longest):
    """Lists of row numbers of one head (a dict as in make_layer): SemantiCache's C1, C2, ... A delimiter or a protected
    row ends a chunk and belongs to none; a chunk of more than `longest` rows is split."""
    chunks, chunk = [], []
    for row in range(len(head["pos"])):
        if head["protected"][row] or head["classes"][row] > 0:
            chunks.append(chunk)
            chunk = []
        else:
            chunk.append(row)
    return [part[lo : lo + longest] for part in [*chunks, chunk] for lo in range(0, len(part), longest)]


def semanticache(head, chunks, tau, rope, *, unrotate):
    """Clusters of one head for one tau: for each entry, in the order of the seeds, the list of its rows."""
    keys = rope.undone(head["k"], head["pos"]) if unrotate else head["k"]
    members = {row: [row] for row in range(len(head["pos"]))}
    for chunk in chunks:
        seeds, near = greedy_seeds(keys[chunk], tau)
        assert not near, "take another seed for the random keys: a cosine is too near to tau"
        for row, seed in zip(chunk, seeds, strict=True):
            if chunk[seed] != row:
                members[chunk[seed]].append(row)
                del members[row]
    return list(members.values())


def check_entries(entries, heads, clusters, rope, *, unrotate, log_size=True):
    """The Entries are the means of these clusters (lists of rows, a list a head; eqs. 2-4), weighted by the sizes."""
    assert entries.lengths.tolist() == [len(rows) for rows in clusters]
    numbered = [(head, rows) for head, of_head in zip(heads, clusters, strict=True) for rows in of_head]
    assert len(numbered) == len(entries.k) == len(entries.v) == len(entries.log_size) == len(entries.pos)
    for e, (head, rows) in enumerate(numbered):
        k, v, pos = head["k"][rows], head["v"][rows], head["pos"][rows]
        if len(rows) == 1:
            np.testing.assert_array_equal(entries.k[e], k[0].astype(np.float32))
            np.testing.assert_array_equal(entries.v[e], v[0].astype(np.float32))
            assert entries.pos[e] == pos[0]
            continue
        size = np.float64(head["size"][rows])
        share = size / size.sum()
        assert abs(entries.pos[e] - share @ pos) < 0.501  # a tie may be rounded either way
        if unrotate:
            core = rope.rotated(share @ rope.undone(k, pos), entries.pos[e])
        else:
            core = share @ np.float64(k)
        np.testing.assert_allclose(entries.k[e], core, rtol=0, atol=5e-6)
        np.testing.assert_allclose(entries.v[e], share @ np.float64(v), rtol=0, atol=2e-6)
        np.testing.assert_allclose(entries.log_size[e], np.log(size.sum()) if log_size else 0.0, atol=1e-6)


NEAREST = [(1, 0, 0, 8), (5, 3, 1, 20), (60, 40, 30, 6), (200, 150, 100, 64), (900, 97, 800, 80)]  # keys, n, m, d


def check_nearest(ops, rng, n_keys, n, m, d, *, first_of_equals):
    """A backend's `nearest` on random keys, some of them equal, some zero: a pair at a time in float64.
    first_of_equals: its products of equal keys are equal to the bit, wherever they stand."""
    keys = rng.normal(size=(n_keys, d)).astype(np.float32)[rng.integers(0, max(n_keys * 3 // 4, 1), n_keys)]
    keys[rng.random(n_keys) < 0.05] = 0
    rows, others = rng.integers(0, n_keys, n), rng.permutation(n_keys)[:m]
    ends = np.sort(rng.integers(0, m + 1, (2, n)), axis=1)
    first, last = ends.min(axis=0), ends.max(axis=0)
    found, cosine = ops.nearest(keys, rows, others, first, last)
    assert cosine.dtype == np.float32 and len(found) == len(cosine) == n
    norms = [float(np.sqrt(np.float64(key) @ np.float64(key))) for key in keys]
    for i, row in enumerate(rows):
        segment = others[first[i] : last[i]]
        products = [norms[row] * norms[other] for other in segment]
        exact = [np.float64(keys[row]) @ np.float64(keys[o]) / p if p else 0.0 for o, p in zip(segment, products)]  # noqa: B905
        if not len(segment):
            assert found[i] == -1 and cosine[i] == 0
            continue
        at = int(np.flatnonzero(segment == found[i])[0])
        assert abs(exact[at] - max(exact)) < 2e-6 and abs(cosine[i] - exact[at]) < 2e-6
        assert not first_of_equals or not any(np.array_equal(keys[other], keys[found[i]]) for other in segment[:at])
