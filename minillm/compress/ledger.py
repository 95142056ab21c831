"""Ledger: the entries that the layers of one pass may make together."""

from collections import defaultdict

import numpy as np


class Ledger:
    """What a rule needs to spread a budget over the layers of one pass, which come one after another.

    `targets` are the entries of the layers seen so far; a later layer may lower what an earlier one was given, and then
    that is compressed again. So whatever the rule, the total is met exactly, and no more is held than it and a layer
    or two."""

    def __init__(self, total, rows, protected=0):
        self.total = total  # entries of all layers together
        self.rows = list(rows)  # (L,) rows of each layer
        self.protected = protected  # rows of each layer that stay whatever happens
        self.targets = []
        self.held = []  # entries that each layer seen holds now
        self.weights = []  # of the layers seen, where a rule shares out in proportion
        self.pool = []  # of each layer seen the scores that may be kept, where a rule cuts through them
        self.counts = defaultdict(list)  # for a rung of a ladder, the entries it makes in the layers where it was tried
        self.rung = 0  # that the last layer came to

    @property
    def left(self):
        """Entries that the layers to come may make."""
        return self.total - sum(self.targets)

    @property
    def to_come(self):
        """Layers to come, the next one among them."""
        return len(self.rows) - len(self.targets)

    @property
    def room(self):
        """Entries of all layers together beside the protected ones."""
        return max(self.total - self.protected * len(self.rows), 0)

    def bounded(self, entries):
        """`entries` for the next layer, or what is nearest to it and leaves the layers after it no more than they
        have."""
        rows, *later = self.rows[len(self.targets) :]
        return max(self.left - sum(later), min(entries, rows, self.left if not later else rows))

    def forecast(self, rung, count):
        """Entries that the next layer and those after it will make at `rung` of a ladder, which makes `count` in the
        next: the others are taken to resemble the layers seen."""
        self.counts[rung].append(count)
        return count + (self.to_come - 1) * sum(self.counts[rung]) / len(self.counts[rung])

    def shared(self, weights):
        """Targets of the layers seen so far if all room is theirs, in proportion to `weights`. None gets more than it
        still holds: what an earlier cut took does not come back."""
        most = np.array([*self.held, self.rows[len(self.held)]]) - self.protected
        return (self.protected + split(self.room, weights, most)).tolist()

    def fixed(self, weights):
        """Targets of the layers seen so far and the next, where the `weights` (L,) of all are known from the start."""
        rows = np.array(self.rows) - self.protected
        return (self.protected + split(self.room, weights, rows)).tolist()[: len(self.targets) + 1]


def others(scores, kept):
    """Scores that put the rows `kept` (R,) behind all others."""
    return np.where(kept, scores.dtype.type(-np.inf), scores)


def split(total, weights, most):
    """Whole numbers in proportion to `weights` (n,), none above `most` (n,); their sum is `total`, or that of `most`
    where that is less. What a bound takes from one goes to the others; fractions by the largest remainder, of equal
    ones to the first."""
    weights, most = np.asarray(weights, np.float64), np.asarray(most, np.int64)
    total, given = min(int(total), int(most.sum())), np.zeros(len(most))
    open_ = most > 0
    while open_.any():
        w = np.where(open_, weights, 0.0)
        w = w if w.sum() > 0 else open_.astype(float)  # nobody weighs anything: all alike
        given[open_] = ((total - given[~open_].sum()) * w / w.sum())[open_]
        full = open_ & (given >= most)
        if not full.any():
            break
        given[full], open_ = most[full], open_ & ~full
    whole = np.floor(given + 1e-9).astype(np.int64)
    by_remainder = np.argsort(-np.round(given - whole, 9), kind="stable")  # equal where they are on paper
    by_remainder = by_remainder[whole[by_remainder] < most[by_remainder]]
    whole[by_remainder[: total - whole.sum()]] += 1
    return whole
