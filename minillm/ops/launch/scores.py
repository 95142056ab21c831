"""Attention probabilities, which say what a row is worth."""

from dataclasses import dataclass

from minillm.ops.launch.head_sizes import HEAD_SIZES
from minillm.ops.launch.start import blocks, head_defines, run


@dataclass
class Rows:
    """Rows of a layer that queries give attention to: device arrays, KV heads one after another."""

    keys: object  # (R, d) real16
    log_size: object  # (R,) float32
    pos: object  # (R,) int32
    starts: object  # (H + 1,) int32: rows of head h are starts[h] : starts[h + 1]
    longest: int  # rows of the longest head

    def arguments(self, q, q_pos, scale, window):
        _, n, d = q.shape
        n_kv_heads = len(self.starts) - 1
        assert self.keys.shape == (len(self.pos), d) and len(self.log_size) == len(self.pos) and q_pos.shape == (n,)
        arguments = {"q": q, "keys": self.keys, "log_size": self.log_size, "pos": self.pos, "starts": self.starts}
        return arguments | {"q_pos": q_pos, "n": n, "group": len(q) // n_kv_heads, "scale": scale, "window": window}


def score_splits(device, q, rows):
    """Into how many parts score_lse should split the rows of a head to fill the card."""
    n_kv_heads = len(rows.starts) - 1
    here = n_kv_heads * blocks(len(q) // n_kv_heads * q.shape[1], HEAD_SIZES[q.shape[2]].queries)
    return max(1, min(2 * device.processors // max(here, 1), rows.longest // 512))


def score_lse(device, q, rows, q_pos, lse, scale, window, real16):
    """lse (splits, Hq, n) float32: the log of each query's sum of exponentials over each part of the rows it sees; q
    (Hq, n, d) at q_pos (n,), ascending."""
    arguments = rows.arguments(q, q_pos, scale, window) | {"lse": lse}
    assert lse.shape[1:] == q.shape[:2]
    grid = blocks(arguments["group"] * q.shape[1], HEAD_SIZES[q.shape[2]].queries), len(rows.starts) - 1, len(lse)
    _scores(device, "score_lse", grid, q.shape[2], 1, 2 * 64, 2, arguments, real16)


def window_scores(device, q, rows, q_pos, lse, out, scale, window, real16):
    """out (G, n, R) float32: the attention probabilities of q (Hq, n, d) over the rows."""
    total, arguments = len(rows.pos), rows.arguments(q, q_pos, scale, window)
    assert out.shape == (arguments["group"], q.shape[1], total) and lse.shape[1:] == q.shape[:2]
    arguments |= {"lse": lse, "splits": len(lse), "out": out, "total": total}
    tiles = blocks(arguments["group"] * q.shape[1], HEAD_SIZES[q.shape[2]].queries)
    grid = blocks(rows.longest, 64), tiles, len(rows.starts) - 1
    _scores(device, "window_scores", grid, q.shape[2], 1, 64, 1, arguments, real16)


def column_scores(device, q, rows, q_pos, lse, out, scale, window, largest, min_distance, real16):
    """out (G, R) float32: the sum, or the largest, of the probabilities that q (Hq, n, d) give to each row from
    min_distance positions away or more."""
    total, arguments = len(rows.pos), rows.arguments(q, q_pos, scale, window)
    assert out.shape == (arguments["group"], total) and lse.shape[1:] == q.shape[:2]
    arguments |= {"lse": lse, "splits": len(lse), "out": out, "total": total}
    arguments |= {"largest": largest, "min_distance": min_distance}
    grid = blocks(rows.longest, 64), len(q)
    _scores(device, "column_scores", grid, q.shape[2], 2, 64, 1, arguments, real16)


def _scores(device, kernel, grid, head_dim, n_tiles, n_keys, n_biases, arguments, real16):
    """n_tiles: of queries in shared memory."""
    shared = (n_tiles * HEAD_SIZES[head_dim].queries + n_keys) * head_dim * 2 + n_biases * 64 * 8
    run(device, "scores", kernel, grid, (128,), arguments, defines=head_defines(head_dim, real16), shared=shared)
