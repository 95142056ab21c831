"""What planning needs beside NumPy's own functions, compiled: see numpy_planning, whose results these are."""

from ctypes import byref

import numpy as np

from minillm.ops import cpu_lib
from minillm.ops.cpu_lib import floats, pointer

_lib = cpu_lib.library()


def segment_count(mask, lengths):
    """(S,): how many are true of each segment of mask (R,), of `lengths` (S,) one after another."""
    mask, lengths = np.ascontiguousarray(mask, bool), np.ascontiguousarray(lengths, np.int64)
    assert lengths.sum() == len(mask)
    out = np.empty(len(lengths), np.int64)
    _lib.segment_count(pointer(mask), pointer(lengths), len(lengths), pointer(out))
    return out


def nonzero(mask, n):
    """(n,) where the n that are true of mask (R,) are."""
    return compact(mask, n)[0]


def compact(mask, n):
    """rows (n,) where the n that are true of mask (R,) are, and (R,) the number in `rows` that each has, or -1."""
    mask = np.ascontiguousarray(mask, bool)
    assert np.count_nonzero(mask) == n
    rows, number = np.empty(n, np.int64), np.empty(len(mask), np.int64)
    _lib.compact(pointer(mask), len(mask), pointer(rows), pointer(number))
    return rows, number


def segment_topk(scores, lengths, counts):
    """Which are the counts[s] largest of each segment of scores (R,), of `lengths` (S,) one after another; of equal
    ones the earlier. -> (R,) bool"""
    scores, lengths, counts = floats(scores), *(np.ascontiguousarray(a, np.int64) for a in (lengths, counts))
    assert lengths.sum() == len(scores) and len(counts) == len(lengths)
    taken = np.empty(len(scores), bool)
    _lib.segment_topk(pointer(scores), pointer(lengths), pointer(counts), len(lengths), pointer(taken))
    return taken


def neighbours(stays, pos, lengths, reach):
    """For each row the nearest row of its segment that stays (R,), within `reach` positions, of two as near the
    earlier; -1 where none is. pos (R,) ascend in each segment, of `lengths` (S,) one after another."""
    stays, pos = np.ascontiguousarray(stays, bool), np.ascontiguousarray(pos, np.int32)
    lengths, near = np.ascontiguousarray(lengths, np.int64), np.empty(len(pos), np.int64)
    assert lengths.sum() == len(pos) == len(stays)
    _lib.neighbours(pointer(stays), pointer(pos), pointer(lengths), len(lengths), reach, pointer(near))
    return near


def fold(scores, size, pos, kept, protected, lengths, reach, counts):
    """dest, weight (R,), sizes and rows (E,) of rows that stay or are folded into one that does."""
    n, n_rows = int(np.count_nonzero(kept)), len(pos)
    given = floats(scores), floats(size), np.ascontiguousarray(pos, np.int32)
    given += tuple(np.ascontiguousarray(a, kind) for a, kind in ((kept, bool), (protected, bool), (lengths, np.int64)))
    assert given[5].sum() == n_rows and all(len(array) == n_rows for array in given[:5])
    made = np.empty(n_rows, np.int64), np.empty(n_rows, np.float32), np.empty(n, np.float32), np.empty(n, np.int64)
    _lib.fold(byref(cpu_lib.Fold(*map(pointer, (*given, *made)), len(lengths), reach, counts)))
    return made
