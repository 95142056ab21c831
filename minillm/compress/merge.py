"""What becomes of rows that are not kept: a Plan."""

from minillm.compress.cluster import cores as cores
from minillm.compress.plan import Plan


def drop(layer, kept):
    """They are gone (eviction). kept (R,) bool."""
    return Plan.keep(layer, kept)
