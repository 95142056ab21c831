"""Attention: a token of each sequence over its pages, and a prompt."""

from dataclasses import dataclass

import numpy as np

from minillm.ops.launch.head_sizes import HEAD_SIZES
from minillm.ops.launch.start import WARP, blocks, head_defines, page_defines, run
from minillm.ops.pages import PAGE_SIZE


@dataclass
class DecodeSpace:
    """Where the partial results of decode_attention lie, and its grid, which fills the card at any lengths."""

    blocks: int
    warps: int  # a block
    out: object  # (blocks * warps + items, G, d) float32
    lse: object  # (blocks * warps + items, G) float32


def decode_space(device, items, group, head_dim, format):
    """A DecodeSpace for up to `items` pairs of a sequence and a KV head; format: of Paged."""
    warps = min(8, device.shared_memory // _decode_warp_bytes(head_dim, format))
    rows = device.processors * warps + items
    out = device.empty((rows, group, head_dim), np.float32)
    return DecodeSpace(device.processors, warps, out, device.empty((rows, group), np.float32))


def _decode_warp_bytes(head_dim, format):
    rows = format.k.row_bytes(head_dim) + format.v.row_bytes(head_dim)
    room = PAGE_SIZE * head_dim if format.k.turned else 0  # for a tile of numbers
    return 16 * 2 * head_dim + 2 * PAGE_SIZE * rows + room  # q, and two pages of K and of V


def decode_plan(device, lengths, starts):
    """starts (L, B * H + 1) int32: pages of all heads before, layer by layer; lengths (L, B, H) int32. Once a step."""
    n_layers, batch, n_kv_heads = lengths.shape
    assert starts.shape == (n_layers, batch * n_kv_heads + 1)
    arguments = {"lengths": lengths, "starts": starts, "n_items": batch * n_kv_heads}
    run(device, "decode_plan", "decode_plan", (n_layers,), (WARP,), arguments)


def decode_attention(device, q, past, starts, space, out, scale, window, real16):
    """out (B, Hq, d) = attention of one token of each sequence, q (B, Hq, d), over its stored entries, its own among
    them. past: Paged; starts (B * H + 1,): this layer's row of decode_plan; window: 0 for none."""
    (batch, n_heads, head_dim), n_kv_heads = q.shape, past.lengths.shape[1]
    items, group, n_warps = batch * n_kv_heads, n_heads // n_kv_heads, space.blocks * space.warps
    assert out.shape == q.shape and past.lengths.shape[0] == len(past.seen) == batch and starts.shape == (items + 1,)
    assert space.out.shape[0] >= n_warps + items and space.out.shape[1:] == (group, head_dim)
    partial = {"partial_out": space.out, "partial_lse": space.lse, "starts": starts, "n_items": items}
    arguments = {"q": q, "seen": past.seen, "scale": scale, "window": window, "n_kv_heads": n_kv_heads, "group": group}
    arguments |= past.arguments() | partial
    grid, block = (space.blocks, blocks(group, 16)), (space.warps * WARP,)
    defines = page_defines(head_dim, real16, past.format)
    shared = space.warps * _decode_warp_bytes(head_dim, past.format)
    run(device, "decode_attention", "decode_attention", grid, block, arguments, defines=defines, shared=shared)
    arguments = partial | {"out": out, "n_warps": n_warps}
    run(device, "decode_attention", "decode_combine", (items, group), (8 * WARP,), arguments, defines=defines)


def prefill_attention(device, q, k, v, past, out, lse, scale, window, real16, q_pos=None):
    """out (n, Hq, d), lse (Hq, n) float32 = causal attention of n queries of one sequence, q (Hq, n, d), over its
    stored entries and m new tokens, k and v (H, m, d). past: Paged, of 16-bit floats; window: 0 for none; q_pos (n,)
    int32: positions of the queries, ascending; None: they are the new tokens'."""
    (n_heads, n, head_dim), (n_kv_heads, m, _) = q.shape, k.shape
    assert past.format.exact and (m == n if q_pos is None else q_pos.shape == (n,))
    assert k.shape == v.shape == (n_kv_heads, m, head_dim) and past.lengths.shape == (1, n_kv_heads)
    assert out.shape == (n, n_heads, head_dim) and lse.shape == (n_heads, n)
    arguments = {"q": q, "k": k, "v": v, "q_pos": q_pos, "out": out, "lse": lse}
    arguments |= {"n": n, "m": m, "group": n_heads // n_kv_heads}
    arguments |= past.arguments() | {"seen": past.seen, "scale": scale, "window": window}
    queries = HEAD_SIZES[head_dim].queries
    shared = (queries + 2 * 64) * head_dim * 2 + 2 * 64 * 8
    grid, defines = (n_heads, blocks(n, queries)), head_defines(head_dim, real16)
    run(device, "prefill_attention", "prefill_attention", grid, (128,), arguments, defines=defines, shared=shared)
