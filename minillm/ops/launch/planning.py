"""What a Plan is made of beside keys and values: which rows score most, counts, sums over groups, neighbours."""

from dataclasses import dataclass

import numpy as np

from minillm.ops.launch.start import blocks, run

DIGIT, BINS = 11, 2048  # bits of a key that a launch decides, as in select.cu
NUMBERED = 8 * 256  # rows of a block of compact
ROWS = 4096  # of a segment that a block of a select reads at least


@dataclass
class SelectSpace:
    """What lies between the kernels of `segment_topk`."""

    low: int  # bits of a key that say which row it is
    histograms: object  # (passes, S, BINS) uint32
    begins: object  # (passes + 1, S) uint64
    left: object  # (passes + 1, S) int32


def select_space(device, n_segments, longest):
    """A SelectSpace for n_segments of `longest` rows at most."""
    low = max(longest - 1, 1).bit_length()
    passes = -(-(32 + low) // DIGIT)
    histograms, at = device.empty((passes, n_segments, BINS), np.uint32), (passes + 1, n_segments)
    return SelectSpace(low, histograms, device.empty(at, np.uint64), device.empty(at, np.int32))


def segment_topk(device, scores, first, counts, longest, space, taken):
    """taken (R,) uint8: whether a row is among the counts[s] largest of scores (R,) in its segment first[s] : first[s +
    1], of equal ones the earlier; first (S + 1,), counts (S,). longest: rows of the longest segment."""
    n_segments, passes = len(counts), len(space.histograms)
    assert space.histograms.shape[1] == n_segments and longest <= 1 << space.low
    space.histograms.fill(0)
    arguments = {"scores": scores, "first": first, "counts": counts, "histograms": space.histograms}
    arguments |= {"from": space.begins, "left": space.left, "low": space.low, "passes": passes}
    grid = min(blocks(longest, ROWS), blocks(4 * device.processors, n_segments)), n_segments
    for done in range(passes if len(scores) else 0):
        run(device, "select", "select_digit", grid, (256,), arguments | {"pass": done})
    run(device, "select", "select_mask", grid, (256,), arguments | {"taken": taken})


def segment_count(device, mask, first, counts):
    """counts (S,) int32: how many of mask[first[s] : first[s + 1]] uint8 are true; first (S + 1,); None: of every
    NUMBERED rows."""
    arguments = {"mask": mask, "first": first, "counts": counts, "n": len(mask)}
    run(device, "plan", "segment_count", (len(counts),), (256,), arguments)


def compact_space(device, n):
    """What lies between the kernels of `compact` of n rows: an int32 for every NUMBERED of them."""
    return device.empty((blocks(n, NUMBERED),), np.int32)


def compact(device, mask, space, rows, number):
    """rows (n,) int32: where mask (R,) uint8 is true, n times; number (R,) int32: which of them each is, or -1."""
    n = len(mask)
    assert len(space) == blocks(n, NUMBERED)
    segment_count(device, mask, None, space)
    arguments = {"mask": mask, "before": space, "rows": rows, "number": number, "n": n}
    run(device, "plan", "compact", (len(space),), (256,), arguments)


def segment_sum(device, values, order, first, out):
    """out (E,) float64: the sum of values (R,) float64 over r in order[first[e] : first[e + 1]]; first (E + 1,)."""
    n = len(out)
    assert len(first) == n + 1 and len(order) == len(values)
    arguments = {"values": values, "order": order, "first": first, "out": out, "n_groups": n}
    run(device, "plan", "segment_sum", (blocks(n, 256),), (256,), arguments)


def pooled(device, scores, first, out, width, largest):
    """out (R,): the largest or the mean of `width` neighbours of each of scores (R,) within first[s] : first[s + 1]."""
    n = len(scores)
    assert out.shape == (n,)
    arguments = {"scores": scores, "first": first, "out": out, "n_segments": len(first) - 1, "n_rows": n}
    run(device, "plan", "pooled", (blocks(n, 256),), (256,), arguments | {"width": width, "largest": largest})


def neighbours(device, stays, pos, first, out, reach):
    """out (R,) int32: the nearest row of the segment that stays (R,) uint8, within `reach` of pos (R,), or -1."""
    n = len(stays)
    assert pos.shape == out.shape == (n,)
    arguments = {"stays": stays, "pos": pos, "first": first, "out": out, "n_segments": len(first) - 1, "n_rows": n}
    run(device, "plan", "neighbours", (blocks(n, 256),), (256,), arguments | {"reach": reach})
