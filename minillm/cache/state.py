"""A cache as plain arrays, which is what a session file holds, and a cache out of them."""

import numpy as np

from minillm.cache.kv_cache import Entries
from minillm.cache.left import Left
from minillm.errors import MinillmError
from minillm.ops.pages import from_int8, from_words, layout, to_int8, to_words

COUNTS = ("lengths", "token_ids", "settled", "settled_tokens")  # whole numbers


def state(cache):
    """Everything that a KVCache stores, on the host, keys and values in the words of its pages: name -> array."""
    stored = [
        _words(cache.read(layer).on_host(cache.pool.ops), cache.pool.dtype) for layer in range(len(cache.lengths))
    ]
    return {
        **{name: np.concatenate([layer[name] for layer in stored]) for name in stored[0]},
        "lengths": cache.lengths.copy(),
        "token_ids": np.array(cache.token_ids, np.int64),
        "settled": cache.settled.copy(),
        "settled_tokens": np.array(cache.settled_tokens),
        **cache.left.arrays(cache.lengths.shape, cache.pool.head_dim, cache.pool.ops),
    }


def _words(entries, dtype):
    words = {"log_size": entries.log_size, "pos": entries.pos}
    for name, rows in (("k", entries.k), ("v", entries.v)):
        if dtype == "int8":
            words[name], words[f"{name}_scale"] = to_int8(rows)
        else:
            words[name] = to_words(rows, dtype)
    return words


def restore(cache, arrays):
    """Have a KVCache take the arrays of `state` over in place of what it stores. Arrays that do not fit its model, its
    pages or one another raise MinillmError and change nothing."""
    if not _fits(cache, arrays):
        raise MinillmError("its entries do not fit one another or this model")
    cache.clear()
    lengths = arrays["lengths"]
    ends = np.cumsum(lengths.sum(axis=1))
    for layer, end in enumerate(ends):
        rows = slice(end - lengths[layer].sum(), end)
        k, v = (_floats(cache, arrays, name, rows) for name in ("k", "v"))
        cache.write(layer, Entries(k, v, arrays["log_size"][rows], arrays["pos"][rows], lengths[layer]))
    cache.advance(arrays["token_ids"].tolist())
    cache.settled, cache.settled_tokens = arrays["settled"].copy(), int(arrays["settled_tokens"])
    cache.left = Left.of_arrays(arrays, lengths - cache.settled, cache.pool.ops)


def _floats(cache, arrays, name, rows=slice(None)):
    """Keys or values (n, d) float32 of some rows."""
    if cache.pool.dtype == "int8":
        return from_int8(arrays[name][rows], arrays[f"{name}_scale"][rows])
    return from_words(arrays[name][rows], cache.pool.dtype)


def _fits(cache, arrays):
    """Whether each array is there, of the type and shape it must have, and with values that can be."""
    return (
        _typed(cache, arrays)
        and _shaped(cache, arrays)
        and _possible(cache, arrays)
        and Left.fits(arrays, arrays["lengths"] - arrays["settled"], cache.pool.head_dim)
    )


def _typed(cache, arrays):
    words = {name: word for name, (_, word) in layout(1, 1, cache.pool.dtype).items()}
    counted = (*COUNTS, *Left.COUNTS)
    return (
        all(name in arrays and arrays[name].dtype == word for name, word in words.items())
        and all(name in arrays and arrays[name].dtype.kind == "i" for name in counted)
        and all(arrays[name].dtype.kind == "f" for name in arrays.keys() & set(Left.FLOATS))
    )


def _shaped(cache, arrays):
    lengths, numbers = arrays["lengths"], ("settled_tokens", *Left.COUNTS)
    if not lengths.shape == arrays["settled"].shape == cache.lengths.shape or arrays["token_ids"].ndim != 1:
        return False
    n, fields = int(lengths.sum()), layout(1, 1, cache.pool.dtype)
    rows = {name: (n, cache.pool.head_dim) if name in "kv" else (n,) for name in fields}
    return all(arrays[name].ndim == 0 for name in numbers) and all(arrays[name].shape == rows[name] for name in rows)


def _possible(cache, arrays):
    lengths, settled, pos = arrays["lengths"], arrays["settled"], arrays["pos"]
    seen, settled_tokens = len(arrays["token_ids"]), int(arrays["settled_tokens"])
    finite = (arrays["log_size"], *(_floats(cache, arrays, name) for name in ("k", "v")))
    return (
        all(np.isfinite(values).all() for values in finite)
        and bool(((settled >= 0) & (settled <= lengths)).all() and (arrays["token_ids"] >= 0).all())
        and 0 <= settled_tokens <= seen
        and bool(((pos >= 0) & (pos < seen - int(arrays["shift"]))).all())
    )
