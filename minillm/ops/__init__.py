"""The contract: every numerical operation minillm needs, with shapes; and the choice of who carries it out.

A backend is a module with these functions. `numpy_ops` is the specification: float32, readable, works everywhere.

    embed(table, ids)                                    rows of the embedding
    linear(x, weight, bias)                              x @ W.T + b
    rms_norm(x, weight, eps)                             x / rms(x) * w
    rope(x, cos, sin)                                    half-split rotation
    swiglu(gate, up)                                     silu(gate) * up
    prefill_attention(q, k, v, past, scale, window)      new tokens over stored entries and themselves
    decode_attention(q, past, scale, window)             one token of each sequence over its stored entries
    new_slab(n_pages, page_size, head_dim)               memory for pages
    page_bytes(page_size, head_dim)                      bytes of one page
    GreedyClusters(keys, starts, lengths)                greedy seed-based clustering inside segments, for any tau
    merge(rows, dest, weight, n_entries)                 weighted sums of rows: any Plan
    set_threads(n)                                       threads of the linear algebra

Symbols: n tokens, B sequences, Hq query heads, H KV heads, G = Hq / H query heads a KV head, d head_dim.
`ops` knows nothing of models and methods. Arrays are float32 unless said.
"""

from minillm.errors import UsageError


def backend(device: str):
    """The module that carries out the contract on `device` ("auto" or "cpu")."""
    if device in ("auto", "cpu"):
        from minillm.ops import numpy_ops

        return numpy_ops
    raise UsageError(f"device {device!r} is not supported: this version runs on the CPU; use --device cpu")
