"""A cache as plain arrays, which is what a session file holds, and a cache out of them."""

import numpy as np

from minillm.cache.kv_cache import Entries
from minillm.cache.left import Left
from minillm.errors import MinillmError

COUNTS = ("lengths", "token_ids", "settled", "settled_tokens")  # whole numbers


def state(cache):
    """Everything that a KVCache stores, on the host, keys and values in the words of its pages: name -> array."""
    ops, format = cache.pool.ops, cache.pool.format
    stored = [format.stored(cache.read(layer).on_host(ops)) for layer in range(len(cache.lengths))]
    return {
        **{name: np.concatenate([layer[name] for layer in stored]) for name in stored[0]},
        "lengths": cache.lengths.copy(),
        "token_ids": np.array(cache.token_ids, np.int64),
        "settled": cache.settled.copy(),
        "settled_tokens": np.array(cache.settled_tokens),
        **cache.left.arrays(cache.lengths.shape, cache.pool.head_dim, ops),
    }


def restore(cache, arrays):
    """Have a KVCache take the arrays of `state` over in place of what it stores. Arrays that do not fit its model, its
    pages or one another raise MinillmError and change nothing."""
    if not _fits(cache, arrays):
        raise MinillmError("its entries do not fit one another or this model")
    cache.clear()
    lengths, format = arrays["lengths"], cache.pool.format
    ends = np.cumsum(lengths.sum(axis=1))
    for layer, end in enumerate(ends):
        here = slice(end - lengths[layer].sum(), end)
        stored = {name: arrays[name][here] for name in format.layout(cache.pool.head_dim)}
        k, v = (format.rows(field, stored, cache.pool.head_dim) for field in "kv")
        cache.write(layer, Entries(k, v, stored["log_size"], stored["pos"], lengths[layer]))
    cache.advance(arrays["token_ids"].tolist())
    cache.settled, cache.settled_tokens = arrays["settled"].copy(), int(arrays["settled_tokens"])
    cache.left = Left.of_arrays(arrays, lengths - cache.settled, cache.pool.ops)


def _fits(cache, arrays):
    """Whether each array is there, of the type and shape it must have, and with values that can be."""
    return (
        _typed(cache, arrays)
        and _shaped(cache, arrays)
        and _possible(cache, arrays)
        and Left.fits(arrays, arrays["lengths"] - arrays["settled"], cache.pool.head_dim)
    )


def _typed(cache, arrays):
    counted, layout = (*COUNTS, *Left.COUNTS), cache.pool.format.layout(cache.pool.head_dim)
    return (
        all(name in arrays and arrays[name].dtype == word for name, (_, word) in layout.items())
        and all(name in arrays and arrays[name].dtype.kind == "i" for name in counted)
        and all(arrays[name].dtype.kind == "f" for name in arrays.keys() & set(Left.FLOATS))
    )


def _shaped(cache, arrays):
    lengths, numbers = arrays["lengths"], ("settled_tokens", *Left.COUNTS)
    if not lengths.shape == arrays["settled"].shape == cache.lengths.shape or arrays["token_ids"].ndim != 1:
        return False
    n, layout = int(lengths.sum()), cache.pool.format.layout(cache.pool.head_dim)
    fitting = all(arrays[name].shape == (n, *shape) for name, (shape, _) in layout.items())
    return fitting and all(arrays[name].ndim == 0 for name in numbers)


def _possible(cache, arrays):
    lengths, settled, pos = arrays["lengths"], arrays["settled"], arrays["pos"]
    seen, settled_tokens = len(arrays["token_ids"]), int(arrays["settled_tokens"])
    finite = (arrays["log_size"], *(cache.pool.format.rows(field, arrays, cache.pool.head_dim) for field in "kv"))
    return (
        all(np.isfinite(values).all() for values in finite)
        and bool(((settled >= 0) & (settled <= lengths)).all() and (arrays["token_ids"] >= 0).all())
        and 0 <= settled_tokens <= seen
        and bool(((pos >= 0) & (pos < seen - int(arrays["shift"]))).all())
    )
