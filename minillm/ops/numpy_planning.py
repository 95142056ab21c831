"""What planning needs beside NumPy's own functions, in NumPy. The contract says what each function gives."""

import numpy as np


def segment_ids(lengths):
    return np.repeat(np.arange(len(lengths)), lengths)


def joined(lengths, old, new):
    """old (sum of lengths, ...), segments of `lengths` (S,) one after another, and after each its new ones of (S, n,
    ...): arrays of any backend."""
    ends = np.cumsum(lengths).tolist()
    segments = zip([0, *ends], ends, range(len(ends)), strict=False)
    return np.concatenate([part for lo, hi, i in segments for part in (old[lo:hi], new[i])])


def segment_count(mask, lengths):
    return np.diff(np.append(0, np.cumsum(mask))[np.append(0, np.cumsum(lengths))])


def compact(mask, n):
    return np.flatnonzero(mask), np.where(mask, np.cumsum(mask) - 1, -1)


def segment_topk(scores, lengths, counts):
    taken, start = np.zeros(len(scores), bool), 0
    for n, count in zip(lengths, counts, strict=True):
        part, taken_of_part = scores[start : start + n], taken[start : start + n]
        start += n
        if count >= n:
            taken_of_part[:] = True
        elif count > 0:
            last = np.partition(part, -count)[-count]
            np.greater(part, last, out=taken_of_part)
            taken_of_part[np.flatnonzero(part == last)[: count - np.count_nonzero(taken_of_part)]] = True
    return taken


def segment_sum(groups, values, n):
    return np.bincount(groups + 1, values, n + 1)[1:]


def pooled(scores, lengths, width, kind):
    beyond, together = (-np.inf, np.maximum) if kind == "max" else (0, np.add)
    between, ends = np.full(width - 1, beyond, scores.dtype), np.cumsum(lengths).tolist()
    parts = [part for lo, hi in zip([0, *ends], ends, strict=False) for part in (scores[lo:hi], between)]
    padded = np.concatenate([np.full(width // 2, beyond, scores.dtype), *parts])
    at = np.arange(len(scores)) + (width - 1) * segment_ids(lengths)
    around = padded[: len(padded) - width + 1].copy()
    for shift in range(1, width):
        together(around, padded[shift : shift + len(around)], out=around)
    return around[at] if kind == "max" else around[at] / np.float32(width)


def neighbours(stays, pos, lengths, reach):
    number, i = np.append(np.flatnonzero(stays), -1), np.cumsum(stays)
    beside = np.stack([number[i - 1], number[i]])  # of those that stay, the one before each and the one after
    place = (segment_ids(lengths) << 32) + pos
    far = np.where(beside < 0, reach + 1, np.abs(place[beside] - place))
    return np.where(far.min(axis=0) > reach, -1, np.where(far[1] < far[0], beside[1], beside[0]))


def fold(ops, scores, size, pos, kept, protected, lengths, reach, counts):
    target = ops.neighbours(kept > protected, pos, lengths, reach)
    rows, dest = ops.compact(kept, int(ops.segment_count(kept, lengths).sum()))
    folded = (target >= 0) > kept
    most = np.maximum(scores[target], np.finfo(np.float32).tiny)
    ratio = np.minimum(np.maximum(scores, np.float32(0)), most) / most
    mass = np.where(folded, size * (np.float32(counts) * ratio), size).astype(np.float32, copy=False)
    dest = np.where(folded, dest[target], dest)
    sizes = ops.segment_sum(dest, mass, len(rows)).astype(np.float32)
    return dest, mass / sizes[dest] if len(rows) else mass, sizes, rows
