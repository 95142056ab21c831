"""Which rows a layer keeps, given a score for each and a number of entries: (R,) bool."""

import numpy as np


def per_head(layer, scores, target):
    """The same number of rows in every head (the first heads take one more where it does not divide): the protected
    ones and, of the others, those with the best scores; of equal ones the earlier."""
    kept = layer.protected.copy()
    n_heads = len(layer.lengths)
    for head in range(n_heads):
        rows = np.flatnonzero((layer.heads == head) & ~kept)
        room = target // n_heads + (head < target % n_heads) - (layer.lengths[head] - len(rows))
        kept[rows[np.argsort(-scores[rows], kind="stable")[: max(room, 0)]]] = True
    return kept
