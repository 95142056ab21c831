"""What planning needs beside NumPy's own functions, compiled: the results of numpy_planning."""

from ctypes import byref

import numpy as np

from minillm.ops import cpu_lib
from minillm.ops.contract import Planning
from minillm.ops.cpu_lib import floats, pointer, pointing, whole


class CpuPlanning(Planning):
    """By the Kernels of `self.lib`."""

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
