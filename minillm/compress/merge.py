"""What becomes of the rows that do not stay: a Merge(layer, scores, into, **options) -> Plan. into (R,): see allocate.

Protected rows stay, and nothing is merged into them."""

from dataclasses import dataclass

import numpy as np

from minillm.compress.cluster import OPTIONS, ROPE, parse_chunking
from minillm.compress.options import Option, Part, number, one_of
from minillm.compress.plan import Plan


@dataclass(frozen=True)
class Merge(Part):
    """joined: whether it is for allocations whose rows join others (True), for those whose rows do not (False), or for
    both (None). compares: it weighs rows by their scores. by_head: what becomes of a row depends on its head alone, so
    that the heads may be of several layers. reads: as of a Score."""

    joined: bool | None = False
    compares: bool = False
    by_head: bool = False
    reads: str | None = None


def drop(layer, scores, into, positions):
    """They are gone (eviction); with positions "cache" the others move up, and so does the next token (StreamingLLM):
    positions never grow beyond the entries there are."""
    plan = Plan.keep(layer, into == np.arange(len(into), like=into))
    if positions == "cache":
        starts = layer.ops.array(np.cumsum(plan.lengths) - plan.lengths)[layer.ops.segment_ids(plan.lengths)]
        plan.pos = (np.arange(len(plan.pos), like=into) - starts).astype(np.int32)
        plan.unrotate, plan.next_pos = True, int(plan.lengths.max())
    return plan


def cores(layer, scores, into, rope, log_size):
    """SemantiCache (eqs. 2-4): a row that stays becomes the mean of itself and the rows that join it, weighted by their
    sizes, at their mean position, and of the size of them all; what joins none is dropped."""
    stays, joined = into == np.arange(len(into), like=into), into >= 0
    lengths = layer.count(stays)
    n = int(lengths.sum())
    rows, number = layer.ops.compact(stays, n)
    dest = np.where(joined, number[into], -1)
    size = layer.ops.segment_sum(dest, layer.size, n).astype(np.float32)
    weight = np.where(joined, layer.size / of_entries(size, dest), np.float32(0))
    pos = np.rint(layer.ops.segment_sum(dest, weight * layer.pos, n)).astype(np.int32)
    return Plan(dest, weight, size if log_size else np.ones_like(size), pos, lengths, rows, rope == "unrotated")


def average(layer, scores, into, chunking, rope, log_size):
    """Each joins the row that stays in its chunk whose key is most like its own, and they become cores; in a chunk of
    which no row stays, and outside the chunks, it is dropped."""
    rows, starts, lengths = parse_chunking(chunking).segments(layer)
    stays, into = into[rows] >= 0, into.copy()
    number = np.cumsum(stays)
    gone = np.flatnonzero(~stays)
    chunk = np.searchsorted(starts, gone, side="right") - 1
    first, last = starts[chunk] - 1, (starts + lengths)[chunk] - 1  # of those that stay, how many there are up to each
    chunks = np.where(first < 0, 0, number[first]), number[last]
    keys = layer.k_unrotated if rope == "unrotated" else layer.k
    into[rows[gone]] = layer.ops.nearest(keys, rows[gone], rows[np.flatnonzero(stays)], *chunks)[0]
    return cores(layer, scores, into, rope, log_size)


def fold(layer, scores, into, reach, counts):
    """The value of each is folded into that of the row nearest to it in its head, of those that stay within `reach`
    positions (of two as near the earlier); it `counts` for so much of itself, times its score over that row's. Keys
    stay as they are. Where none is near it is dropped."""
    kept = into >= 0
    rows = scores, layer.size, layer.pos, kept, layer.protected
    dest, weight, size, kept_rows = layer.ops.fold(*rows, layer.lengths, reach, counts)
    plan = Plan(dest, weight, size, layer.pos[kept_rows], layer.count(kept), kept_rows)
    plan.key_weight = kept.astype(np.float32)
    return plan


def nearest(layer, scores, into, weights, log_size):
    """D2O (Wan et al. 2024): each looks for the row that stays in its head whose key, as it is stored, is most like its
    own, and joins it where they are no less alike than the threshold: their mean, and of later compressions the mean of
    that and the last threshold. Keys and values of a row and those that join it are averaged, weighted by exp(cosine)
    ("exp"), or the joining ones multiplied by their cosines and averaged as they are ("code")."""
    stays, gone = np.flatnonzero((into >= 0) & ~layer.protected), np.flatnonzero(into < 0)
    of_head = (np.searchsorted(layer.heads[stays], layer.heads[gone], side) for side in ("left", "right"))
    target, alike = np.full_like(into, -1), np.zeros_like(layer.size)
    target[gone], alike[gone] = layer.ops.nearest(layer.k, gone, stays, *of_head)
    found, plan = target >= 0, Plan.keep(layer, into >= 0)
    n_found = int(np.count_nonzero(found))
    if not n_found:
        return plan
    mean = float(alike[layer.ops.nonzero(found, n_found)].mean())
    threshold = mean if layer.threshold is None else 0.5 * (layer.threshold + mean)
    plan.threshold = threshold
    joins = found & (alike >= np.float32(threshold))
    plan.dest, n = np.where(joins, plan.dest[target], plan.dest), len(plan.size)
    similarity = np.where(joins, alike, np.float32(1))
    share = np.exp(similarity) if weights == "exp" else similarity
    total = layer.ops.segment_sum(plan.dest, share if weights == "exp" else np.ones_like(share), n).astype(np.float32)
    plan.weight = share / of_entries(total, plan.dest)
    if log_size:
        plan.size = layer.ops.segment_sum(plan.dest, layer.size, n).astype(np.float32)
    return plan


def pass_on(layer, scores, into, spread, expected, seed):
    """CaM (Zhang et al. 2024): with a probability, the attention of the newest query to it over the mean of its
    attention to the rows after it that stay (at most 1), its value is shared out in equal parts over the `spread` first
    of them; its key is dropped. expected: the probability itself is the factor, not a throw."""
    attention = layer.window_scores(1).mean(axis=(0, 1))
    throws = np.random.default_rng((seed, layer.index, int(layer.pos.max()))).random(len(into))
    throws, v, end = layer.ops.array(throws), layer.values.copy(), 0
    for n in layer.lengths.tolist():
        end, kept, free = end + n, into[end : end + n] >= 0, ~layer.protected[end : end + n]
        stays, gone = end - n + np.flatnonzero(kept), end - n + np.flatnonzero(~kept)
        receiving = end - n + np.flatnonzero(kept & free)
        first, edges = np.searchsorted(stays, gone).tolist(), np.flatnonzero(np.diff(gone, prepend=-2) > 1).tolist()
        for lo, hi in zip(edges, [*edges[1:], len(gone)], strict=False):  # those between one that stays and the next
            after, between = stays[first[lo] :], gone[lo:hi]
            if not len(after):
                continue
            with np.errstate(divide="ignore", invalid="ignore"):
                chance = np.clip(np.nan_to_num(attention[between] / attention[after].mean(), posinf=1), 0, 1)
            factor = chance if expected else (throws[between] < chance).astype(np.float32)
            receive = receiving[int(np.searchsorted(receiving, after[:1])[0]) :][:spread]
            v[receive] += factor @ layer.values[between] / np.float32(max(len(receive), 1))
    plan = Plan.keep(layer, into >= 0)
    plan.v = v
    return plan


def of_entries(values, dest):
    """values (E,) of the entry that each row goes to; of one that goes to none anything."""
    return values[dest] if len(values) else np.ones_like(values, shape=len(dest))


LOG_SIZE = Option(True, one_of(True, False), "count an entry as often as it has tokens")
POSITIONS = Option("original", one_of("original", "cache"), "of keys: of their tokens, or their number in the cache")
REACH = Option(16, number(1, 1 << 10, int), "positions between a row and the one it is folded into")
COUNTS = Option(0.75, number(0, 1), "of a row that is folded into one that scores as much")
WEIGHTS = Option("exp", one_of("exp", "code"), "exp(cosine), or the cosine as the authors' code has it")
SPREAD = Option(32, number(1, 1 << 10, int), "rows that share a value that is passed on")
EXPECTED = Option(False, one_of(True, False), "weigh by the probability in place of a throw")
SEED = Option(0, number(0, 1 << 30, int), "of the throws")

MERGES = {
    "drop": Merge(drop, "they are dropped", {"positions": POSITIONS}, joined=None, by_head=True),
    "cores": Merge(cores, "averaged with the row they join", {"rope": ROPE, "log_size": LOG_SIZE}, joined=True),
    "average": Merge(
        average,
        "averaged with the row of their chunk whose key is most like theirs",
        {"chunking": OPTIONS["chunking"], "rope": ROPE, "log_size": LOG_SIZE},
    ),
    "fold": Merge(
        fold,
        "their values folded into a neighbour's, by score",
        {"reach": REACH, "counts": COUNTS},
        compares=True,
        by_head=True,
    ),
    "nearest": Merge(
        nearest, "averaged with the row most like them, if it is alike", {"weights": WEIGHTS, "log_size": LOG_SIZE}
    ),
    "pass_on": Merge(
        pass_on,
        "their values shared out over the rows after them",
        {"spread": SPREAD, "expected": EXPECTED, "seed": SEED},
        reads="new",
    ),
}
