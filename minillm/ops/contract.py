"""The contract: every numerical operation that minillm needs of a backend, with shapes.

Symbols: n tokens, B sequences, Hq query heads, H KV heads, G = Hq / H query heads a KV head, d head_dim, R rows, E
entries, S segments. Arrays are float32 unless said and of the backend: NumPy's, or on a GPU CuPy's, on which NumPy's
functions run. `Rows` are what goes between products: hidden states after a norm, queries, keys, values. A backend may
hold them in 16-bit words; `stored_rows` gives float32, and every operation that takes them takes float32, too. What
there is of each head or segment (lengths, counts, starts) is NumPy's everywhere. Rows and entries of several heads lie
one head after another. Backends know nothing of models and methods.

`NumpyOps` is the specification. A backend begins with the forward pass, pages and the device; planning has a default
that goes through the host."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from minillm.ops import numpy_planning
from minillm.ops.pages import FLOAT32, PageFormat, StoredRows

Array = Any  # np.ndarray, or on a GPU cupy.ndarray
Rows = Any  # an Array of float32 or of the backend's 16-bit words
Lengths = np.ndarray | list  # (S,) whole numbers on the host
Stored = Any  # an Array of rows (R, d), or minillm.ops.pages.StoredRows
Layer = Any  # minillm.cache.kv_cache.PagedLayer


class Forward:
    """The forward pass."""

    def expect(self, weights: list) -> None:
        """The matrices of a model, Weights: told once, before the first is prepared."""

    def held_bytes(self, format: Any, shape: tuple[int, int]) -> int:
        """Bytes of a matrix (out, in) that is loaded in this WeightFormat, once it is prepared."""
        return format.held.nbytes(math.prod(shape))

    def prepare(self, weight: Any) -> Any:
        """A Weight (out, in) as this backend reads it best. What is prepared has `shape` and `nbytes`."""
        raise NotImplementedError

    def runner(self, model: Any) -> Any:
        """Whole steps of a Model in fewer calls; None: the pages of model.py are taken. Raises MinillmError for a
        model that this backend has no kernels for."""
        return None

    def embed(self, table: Any, ids: Any) -> Array:
        """Rows `ids` (n,) of the embedding table, a Weight (vocab, dim) -> (n, dim)."""
        raise NotImplementedError

    def linear(self, x: Rows, weight: Any, bias: np.ndarray | None = None) -> Array:
        """x (n, in) times the transpose of a Weight (out, in), plus bias (out,) of the host -> (n, out) float32."""
        raise NotImplementedError

    def rms_norm(self, x: Array, weight: np.ndarray, eps: float) -> Rows:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, eq. 4). x (n, dim), weight
        (dim,) of the host -> (n, dim)."""
        raise NotImplementedError

    def rope(self, x: Rows, cos: np.ndarray, sin: np.ndarray) -> Rows:
        """Rotate the halves of the last axis: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin). x (..., d); cos, sin of
        the host, which broadcast to (..., d/2). With -sin it is the inverse rotation."""
        raise NotImplementedError

    def glu(self, gate: Rows, up: Rows, linear: float, cubic: float) -> Rows:
        """act(gate) * up, elementwise; may overwrite `gate`. Both (n, ffn). act(g) = g / (1 + exp(-(linear g + cubic
        g^3))): SwiGLU with 1 and 0, GEGLU (Shazeer 2020) with gelu's two by tanh."""
        raise NotImplementedError

    def prefill_attention(
        self, q: Rows, k: Rows, v: Rows, past: Layer, scale: float, window: int | None = None, q_pos: Any = None
    ) -> tuple[Rows, Array]:
        """Causal attention of n queries over stored entries and m new tokens.

        q (Hq, n, d), k and v (H, m, d), rotated; past: PagedLayer, whose entries all come before the new tokens, at
        the positions from past.seen on. q_pos (n,) of the host: positions of the queries, ascending; None: they are
        the new tokens'. The logit of an entry is q.k * scale + log s (SemantiCache eq. 4). window: a query at position
        p sees positions > p - window. -> (n, Hq * d); lse (Hq, n), the natural log of each query's sum of
        exponentials; zeros and -inf of a query that sees nothing."""
        raise NotImplementedError

    def decode_attention(self, q: Rows, past: list, scale: float, window: int | None = None) -> Rows:
        """Attention of one token of each of B sequences over its stored entries (its own entry among them).

        q (B, Hq, d) rotated; past: B PagedLayers of one pool and one layer of the model, heads of any lengths -> (B,
        Hq * d)."""
        raise NotImplementedError


class Pages:
    """Slabs of pages (their fields: minillm.ops.pages), and entries in and out of them."""

    page_format = FLOAT32  # of K and V where none is asked for

    def holds(self, format: PageFormat) -> bool:
        """Whether there are kernels for pages of this format."""
        return True

    def new_slab(self, n_pages: int, page_size: int, head_dim: int, format: PageFormat) -> Any:
        """A Slab, whose memory goes back with the last reference to it."""
        raise NotImplementedError

    def write_entries(self, layer: Layer, start: np.ndarray, entries: Any) -> None:
        """Entries into the pages of a PagedLayer, after the first `start` (H,) of each head."""
        raise NotImplementedError

    def read_labels(self, layer: Layer, start: np.ndarray) -> tuple[Array, Array]:
        """log_size, pos (E,) of the entries of a PagedLayer after the first `start` (H,) of each head."""
        raise NotImplementedError

    def gather(self, rows: Stored) -> Rows:
        """(R, d): StoredRows as an array of their own; an array is itself."""
        raise NotImplementedError

    def stored_rows(self, stored: Rows) -> Array:
        """Rows as an operation has them -> float32, of the same shape; a view where they are float32."""
        raise NotImplementedError

    def rewrite(self, layer: Layer, start: np.ndarray, dest: Array, weights: tuple, entries: Any) -> None:
        """The entries of a PagedLayer after the first `start` (H,) of each head, R in all, become others where they
        lie: K and V of entry dest[r] the sum of weights[0][r] x K, weights[1][r] x V. dest, weights (R,): as of
        `merge`; each row goes to an entry of its head. entries: their Entries, without k and v. No head gets longer."""
        rows, n = (StoredRows(layer, start, field) for field in ("k", "v")), len(entries.pos)
        k, v = (self.merge(of, dest, weight, n) for of, weight in zip(rows, weights, strict=True))
        self.write_entries(replace(layer, lengths=start + entries.lengths), start, replace(entries, k=k, v=v))


class Compression:
    """What rows score, what they are like, and their sums."""

    def window_scores(
        self,
        q: Rows,
        keys: Rows,
        lengths: Lengths,
        log_size: Array,
        pos: Array,
        q_pos: np.ndarray,
        scale: float,
        window: int | None = None,
    ) -> Array:
        """Attention probabilities of a few queries over the rows of a layer.

        q (Hq, w, d) rotated, q_pos (w,) their positions, ascending, of the host; keys (R, d) rotated, log_size (R,)
        log s, pos (R,): rows of the H KV heads one after another, lengths (H,) of them each. A query sees the rows of
        its KV head at positions up to its own, with `window` only those at positions > its own - window; its logits
        are q.k * scale + log s, and the softmax is over all it sees. -> (G, w, R): [g, i, r] is what query i of the
        g-th query head of row r's KV head gives to r, 0 where it does not see r."""
        raise NotImplementedError

    def column_scores(
        self,
        q: Rows,
        keys: Rows,
        lengths: Lengths,
        log_size: Array,
        pos: Array,
        q_pos: np.ndarray,
        scale: float,
        window: int | None = None,
        *,
        reduce: str = "sum",
        min_distance: int = 0,
        lse: Array | None = None,
    ) -> Array:
        """What many queries give to each row: the sum or the largest of their attention probabilities.

        Arguments as in window_scores; q (Hq, n, d). reduce: "sum" (H2O) or "max" (KVzip, KVCompose). Only queries at
        least min_distance positions after a row count for it; rows nearer than that, and rows that a caller appends
        to each head and then slices off, are in the normaliser all the same. lse (Hq, n): the natural log of each
        query's sum of exponentials (-inf for none), where it is known already. -> (G, R), 0 for a row that no query
        counts for."""
        raise NotImplementedError

    def merge(self, rows: Stored, dest: Array, weight: Array, n_entries: int) -> Rows:
        """entry[dest[r]] += weight[r] * rows[r], for dest >= 0. rows (R, d) or StoredRows, dest, weight (R,) ->
        (n_entries, d)."""
        raise NotImplementedError

    def unrotated(self, rows: Rows, pos: Array, cos: np.ndarray, sin: np.ndarray) -> Rows:
        """rows (R, d) with RoPE undone: what it was applied to at pos (R,). cos, sin (positions, d/2) of the host, with
        yarn's factor."""
        raise NotImplementedError

    def merge_unrotated(
        self,
        rows: Stored,
        pos: Array,
        dest: Array,
        weight: Array,
        entry_pos: Array,
        cos: np.ndarray,
        sin: np.ndarray,
    ) -> Rows:
        """`merge` of keys, rotated at pos (R,): they are summed with RoPE undone and the sum is rotated to entry_pos
        (E,). An entry that is one row of weight 1, at its own position, is that row. -> (E, d)"""
        raise NotImplementedError

    def nearest(self, keys: Rows, rows: Array, others: Array, first: Any, last: Any) -> tuple[Array, Array]:
        """For each of some rows the one most like it, by the cosine of their keys, of a segment of others.

        keys (R, d); rows (n,), others (m,): numbers of rows. rows[i] looks among others[first[i] : last[i]]; first and
        last (n,) ascend. -> found (n,): number of the row, of equal ones the first in `others`, -1 where the segment is
        empty; cosine (n,) float32, 0 for none. A key of norm zero is similar to nothing (cosine 0)."""
        raise NotImplementedError

    def greedy_clusters(
        self, keys: Rows, rows: Array, starts: Any, lengths: Any, rotation: tuple | None = None
    ) -> "Clusters":
        """Greedy seed-based clustering (SemantiCache, algorithm 1) of segments of rows, for any tau.

        keys (R, d); rows (C,); starts, lengths (M,): segment m is rows[starts[m] : starts[m] + lengths[m]], and
        clusters stay inside it. rotation: (pos (R,), cos, sin (positions, d/2)) that the keys have and that is undone
        first; None: they are compared as they are. Scanning a segment, a row without a cluster becomes a seed and
        absorbs every later free row whose cosine similarity with the seed is greater (strictly) than tau; no cosine is
        greater than 1, rounded or not. A key of norm zero is similar to nothing (cosine 0)."""
        raise NotImplementedError


class Clusters:
    """What `greedy_clusters` gives."""

    AROUND: int  # taus on either side of one that are counted with it

    def counts(self, taus: list[float]) -> list[int]:
        """For each of `taus` the number of clusters of all segments together."""
        raise NotImplementedError

    def assign(self, tau: float) -> tuple[Array, Array]:
        """seed (R,) int64: the row that is the seed of each row's cluster; a row of no segment is its own seed.
        similarity (R,): cosine of each row with its seed, 1 for seeds."""
        raise NotImplementedError


class Planning:
    """What planning needs beside NumPy's own functions. Here through the host; segments lie one after another."""

    def segment_ids(self, lengths: Lengths) -> Array:
        """lengths (S,) -> (R,): of each row the number of its segment."""
        return self.array(numpy_planning.segment_ids(lengths))

    def segment_count(self, mask: Array, lengths: Lengths) -> np.ndarray:
        """(S,) on the host: how many are true of each segment of mask (R,) bool, of `lengths` (S,)."""
        return numpy_planning.segment_count(self.host(mask), lengths)

    def segment_sum(self, groups: Array, values: Array, n: int) -> Array:
        """(n,) float64: the sum of values (R,) over the rows of each group; groups (R,): 0 .. n - 1, or -1 for none."""
        return self.array(numpy_planning.segment_sum(self.host(groups), self.host(values), n))

    def segment_topk(self, scores: Array, lengths: Lengths, counts: Lengths) -> Array:
        """(R,) bool: which are the counts[s] largest of each segment of scores (R,), of equal ones the earlier.
        lengths, counts (S,)."""
        return self.array(numpy_planning.segment_topk(self.host(scores), lengths, counts))

    def nonzero(self, mask: Array, n: int) -> Array:
        """(n,) whole numbers: where the n that are true of mask (R,) bool are."""
        return self.array(np.flatnonzero(self.host(mask)))

    def compact(self, mask: Array, n: int) -> tuple[Array, Array]:
        """rows (n,) where the n that are true of mask (R,) bool are, and (R,) the number in `rows` that each has, or
        -1."""
        rows, number = numpy_planning.compact(self.host(mask), n)
        return self.array(rows), self.array(number)

    def pooled(self, scores: Array, lengths: Lengths, width: int, kind: str) -> Array:
        """The largest ("max") or the mean ("avg": zeros beyond the ends count) of `width` neighbours of each of scores
        (R,) in its segment, of `lengths` (S,): width // 2 before it, itself, and the others after it. -> (R,)"""
        return self.array(numpy_planning.pooled(self.host(scores), lengths, width, kind))

    def neighbours(self, stays: Array, pos: Array, lengths: Lengths, reach: int) -> Array:
        """For each row the nearest row of its segment that stays (R,) bool, within `reach` positions, of two as near
        the earlier; -1 where none is. pos (R,) int32 ascend in each segment, of `lengths` (S,). Of a row that stays
        something is returned that means nothing."""
        return self.array(numpy_planning.neighbours(self.host(stays), self.host(pos), lengths, reach))

    def fold(
        self,
        scores: Array,
        size: Array,
        pos: Array,
        kept: Array,
        protected: Array,
        lengths: Lengths,
        reach: int,
        counts: float,
    ) -> tuple[Array, Array, Array, Array]:
        """Which entry each row goes to, where those `kept` (R,) become entries and each other row is folded into the
        nearest of these, but the protected ones, that its segment has within `reach` positions: for so much of its
        size as `counts`, times its score over that row's, 1 at most.

        scores, size, pos, protected (R,): segments of `lengths` (S,). -> dest (R,), -1 for no entry; weight (R,)
        float32, the share in its entry; sizes (E,) float32; rows (E,), the row that each entry was."""
        return numpy_planning.fold(self, scores, size, pos, kept, protected, lengths, reach, counts)


class Device:
    """Where it happens."""

    name: str  # of the backend, and on a processor of the path that is taken: "numpy", "avx2", "cuda", ...
    DEVICE = "cpu"  # "cpu", "cuda:0", ...
    READS_STORED = False  # whether weights as they are stored are the fast ones

    def array(self, values: Any) -> Array:
        """Values of the host as an array of this backend; what is one already is itself."""
        raise NotImplementedError

    def host(self, values: Any) -> np.ndarray:
        """An array of this backend, or of the host, as NumPy's."""
        raise NotImplementedError

    def concatenate(self, parts: list) -> Array:
        """Rows of several arrays of one dtype, one after another."""
        return np.concatenate(parts)

    def random_words(self, shape: tuple[int, int], seed: int) -> Array:
        """A random matrix (out, in) in bf16 words: uniform, of variance 1 / in, so that products keep the size of what
        they meet."""
        raise NotImplementedError

    def available_memory(self) -> int | None:
        """Bytes that can still be had on the device; None where the system does not say."""
        raise NotImplementedError

    def bandwidth(self, n_bytes: int = 256 << 20, repeats: int = 5) -> float:
        """Bytes a second that are read from the device's memory: the best of some repeats."""
        read, seconds = self.reading(n_bytes), []
        for _ in range(repeats):
            start = time.perf_counter()
            read()
            seconds.append(time.perf_counter() - start)
        return n_bytes / min(seconds)

    def reading(self, n_bytes: int) -> Callable[[], Any]:
        """A function that reads n_bytes of the device's memory, the same each time, and returns when it has."""
        raise NotImplementedError

    def trim(self) -> None:
        """Memory that the backend keeps for itself goes back."""


class Backend(Forward, Pages, Compression, Planning, Device):
    """All of it."""
