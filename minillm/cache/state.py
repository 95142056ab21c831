"""A cache as plain arrays, which is what a session file holds, and a cache out of them."""

import numpy as np

from minillm.cache.kv_cache import Entries
from minillm.errors import MinillmError
from minillm.ops.pages import from_int8, from_words, layout, to_int8, to_words

LEFT = ("queries", "predicted", "scores", "thresholds")  # what a compression may leave for the next one


def state(cache):
    """Everything that a KVCache stores, on the host, keys and values in the words of its pages: name -> array."""
    stored = [
        _words(cache.read(layer).on_host(cache.pool.ops), cache.pool.dtype) for layer in range(len(cache.lengths))
    ]
    return {
        **{name: np.concatenate([layer[name] for layer in stored]) for name in stored[0]},
        "lengths": cache.lengths.copy(),
        "token_ids": np.array(cache.token_ids, np.int64),
        "tail": np.array(cache.tail),
        "shift": np.array(cache.shift),
        **_left(cache),
    }


def _words(entries, dtype):
    words = {"log_size": entries.log_size, "pos": entries.pos}
    for name, rows in (("k", entries.k), ("v", entries.v)):
        if dtype == "int8":
            words[name], words[f"{name}_scale"] = to_int8(rows)
        else:
            words[name] = to_words(rows, dtype)
    return words


def _left(cache):
    """What the last compression left for the next one, as plain arrays."""
    (n_layers, n_heads), d, host = cache.lengths.shape, cache.pool.head_dim, cache.pool.ops.host
    left = {}
    if cache.queries is not None:
        left["queries"] = (
            np.stack(list(cache.queries)) if cache.queries else np.zeros((0, n_layers, n_heads, d), np.float32)
        )
    if cache.predicted is not None:
        left["predicted"] = np.stack([host(cache.noted(layer)) for layer in range(n_layers)])
    if cache.scores is not None:
        left["scores"] = np.concatenate([host(scores) for scores in cache.scores])
    if cache.thresholds is not None:
        left["thresholds"] = cache.thresholds.copy()
    return left


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
    cache.advance(arrays["token_ids"].tolist(), int(arrays["tail"]))
    cache.shift, cache.thresholds = int(arrays["shift"]), arrays.get("thresholds")
    cache.queries = list(arrays["queries"]) if "queries" in arrays else None
    cache.predicted = [[noted] for noted in arrays["predicted"]] if "predicted" in arrays else None
    if "scores" in arrays:
        since = (int(lengths.sum()) - len(arrays["scores"])) // lengths.size
        scored = (lengths - since).sum(axis=1)
        cache.scores = [cache.pool.ops.array(part) for part in np.split(arrays["scores"], np.cumsum(scored)[:-1])]


def _floats(cache, arrays, name, rows=slice(None)):
    """Keys or values (n, d) float32 of some rows."""
    if cache.pool.dtype == "int8":
        return from_int8(arrays[name][rows], arrays[f"{name}_scale"][rows])
    return from_words(arrays[name][rows], cache.pool.dtype)


def _fits(cache, arrays):
    """Whether each array is there, of the type and shape it must have, and with values that can be."""
    types = {name: word for name, (_, word) in layout(1, 1, cache.pool.dtype).items()}
    if any(name not in arrays or arrays[name].dtype != word for name, word in types.items()):
        return False
    if any(name not in arrays or arrays[name].dtype.kind != "i" for name in ("lengths", "token_ids", "tail", "shift")):
        return False
    left = arrays.keys() & set(LEFT)
    if any(arrays[name].dtype.kind != "f" for name in left):
        return False
    lengths, token_ids, tail, shift = (arrays[name] for name in ("lengths", "token_ids", "tail", "shift"))
    if lengths.shape != cache.lengths.shape or token_ids.ndim != 1 or tail.ndim or shift.ndim or (lengths < 0).any():
        return False
    total, seen = int(lengths.sum()), len(token_ids)
    if any(arrays[name].shape != ((total, cache.pool.head_dim) if name in "kv" else (total,)) for name in types):
        return False
    if not all(np.isfinite(arrays[name]).all() for name in ("log_size", *(left - {"thresholds"}))):
        return False
    if not all(np.isfinite(_floats(cache, arrays, name)).all() for name in ("k", "v")):
        return False
    if not (0 <= tail <= min(lengths.min(), seen) and 0 <= shift <= seen and (token_ids >= 0).all()):
        return False
    pos = arrays["pos"]
    return ((pos >= 0) & (pos < seen - shift)).all() and _left_fits(cache, arrays, lengths, int(tail))


def _left_fits(cache, arrays, lengths, tail):
    """Whether what a compression left (see `_left`) fits the tokens since then, of which there are `tail` at most."""
    n_layers, n_heads = lengths.shape
    queries, predicted, scores, thresholds = map(arrays.get, LEFT)
    if thresholds is not None and thresholds.shape != (n_layers,):
        return False
    if queries is not None:
        if queries.ndim != 4 or queries.shape[1::2] != (n_layers, cache.pool.head_dim):
            return False
        if queries.shape[2] % n_heads or not queries.shape[2] or len(queries) > tail:
            return False
    since = tail  # tokens read since the last compression; with scores of its entries it is known how many
    if scores is not None:
        since, rest = divmod(int(lengths.sum()) - len(scores.ravel()), lengths.size)
        if scores.ndim != 1 or rest or not 0 <= since <= tail or (queries is not None and since != len(queries)):
            return False
    return predicted is None or predicted.shape == (n_layers, n_heads, since)
