"""Compression on the device: what a Plan is made of, and what becomes of rows.

Nobody waits for the device where the host knows what is small: how many rows and entries there are of each head."""

import numpy as np

from minillm.ops import launch
from minillm.ops.contract import Backend
from minillm.ops.cuda_clusters import GreedyClusters, segments


class CudaPlanning(Backend):
    """By the kernels of `self.device`, in words of the type `self.real16`."""

    def __init__(self):
        self._made = {}  # id -> (array, what was made of it), the newest of them

    def unrotated(self, rows, pos, cos, sin):
        out = self.device.empty(rows.shape, np.uint16)
        tables = self._upload_once(cos), self._upload_once(sin)
        launch.unrotate(self.device, self._rows(rows), self._indices(pos), *tables, tables[0][0], out, self.real16)
        return out

    def segment_ids(self, lengths):
        ends = self.device.upload(np.cumsum(lengths))
        return np.searchsorted(ends, np.arange(int(np.sum(lengths)), like=ends), side="right")

    def nonzero(self, mask, n):
        return self.compact(mask, n)[0]  # the host knows how many, and nobody waits to be told

    def compact(self, mask, n):
        rows, number = self.device.empty((n,), np.int32), self.device.empty(mask.shape, np.int32)
        space = launch.compact_space(self.device, len(mask))
        launch.compact(self.device, mask.view(np.uint8), space, rows, number)
        return rows, number

    def segment_count(self, mask, lengths):
        counts = self.device.empty((len(lengths),), np.int32)
        launch.segment_count(self.device, mask.view(np.uint8), self._first(lengths), counts)
        return counts.get().astype(np.int64)

    def segment_topk(self, scores, lengths, counts):
        counts = np.clip(counts, 0, lengths)
        taken = self.device.empty(scores.shape, np.uint8)
        tables, longest = self._offsets(lengths, counts), int(np.max(lengths, initial=0))
        space = launch.select_space(self.device, len(counts), longest)
        launch.segment_topk(self.device, self._floats(scores), *tables, longest, space, taken)
        return taken.view(bool)

    def segment_sum(self, groups, values, n):
        out = self.device.empty((n,), np.float64)
        launch.segment_sum(self.device, self._of_type(values, np.float64), *self._by_group(groups, n), out)
        return out

    def pooled(self, scores, lengths, width, kind):
        out = self.device.empty(scores.shape, np.float32)
        launch.pooled(self.device, self._floats(scores), self._first(lengths), out, width, kind == "max")
        return out

    def neighbours(self, stays, pos, lengths, reach):
        out = self.device.empty(pos.shape, np.int32)
        launch.neighbours(self.device, stays.view(np.uint8), pos, self._first(lengths), out, reach)
        return out

    def merge(self, rows, dest, weight, n_entries):
        out = self.device.empty((n_entries, rows.shape[1]), np.uint16)
        rows = self._rows(self.gather(rows))
        launch.merge(self.device, rows, *self._by_group(dest, n_entries), self._floats(weight), out, self.real16)
        return out

    def merge_unrotated(self, rows, pos, dest, weight, entry_pos, cos, sin):
        rows = self._rows(self.gather(rows))
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
        launch.take(self.device, self._rows(rows), self._indices(index), out)
        return out

    def window_scores(self, q, keys, lengths, log_size, pos, q_pos, scale, window=None):
        rows, q, at = self._score_rows(q, keys, lengths, log_size, pos, q_pos)
        lse = self._score_lse(q, rows, at, scale, window)
        out = self.device.empty((len(q) // len(lengths), q.shape[1], len(pos)), np.float32)
        launch.window_scores(self.device, q, rows, at, lse, out, scale, window or 0, self.real16)
        return out

    def column_scores(
        self, q, keys, lengths, log_size, pos, q_pos, scale, window=None, *, reduce="sum", min_distance=0, lse=None
    ):
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

    def greedy_clusters(self, keys, rows, starts, lengths, rotation=None):
        n_rows, keys = len(keys), self._take(keys, rows)
        if rotation:
            pos, cos, sin = rotation
            keys = self.unrotated(keys, self.array(pos)[self.array(rows)], cos, sin)
        table = self._once(lengths, lambda: segments(self.device, self.array(starts), self.array(lengths)))
        return GreedyClusters(self.device, self.real16, keys, self.array(rows), n_rows, table)

    def nearest(self, keys, rows, others, first, last):
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

    def _offsets(self, lengths, others):
        """(S + 1,) int32: where each of S segments of `lengths` begins; and others (n,) int32."""
        tables = self.device.upload(np.concatenate([[0], np.cumsum(lengths), others]).astype(np.int32))
        return tables[: len(lengths) + 1], tables[len(lengths) + 1 :]

    def _first(self, lengths):
        """The first of _offsets, of lengths that come again."""
        return self._once(lengths, lambda: self._offsets(lengths, [])[0])

    def _rows(self, rows):
        if not self.device.owns(rows):
            return self.device.upload(self.page_format.k.words(rows))
        if rows.dtype == np.float32:
            return self.page_format.k.words(rows)
        if rows.flags.c_contiguous:
            return rows
        together = self.device.empty(rows.shape, rows.dtype)
        together[:] = rows
        return together
