"""The contract: every numerical operation minillm needs, with shapes; and the choice of who carries it out.

A backend is a module with these functions. `numpy_ops` is the specification: float32, readable, works everywhere.

    embed(table, ids)                                    rows of the embedding
    linear(x, weight, bias)                              x @ W.T + b
    rms_norm(x, weight, eps)                             x / rms(x) * w
    rope(x, cos, sin)                                    half-split rotation
    swiglu(gate, up)                                     silu(gate) * up
    prefill_attention(q, k, v, past, scale, window, q_pos)
                                                         queries over stored entries and new tokens; log of each sum
    decode_attention(q, past, scale, window)             one token of each sequence over its stored entries
    window_scores(q, keys, lengths, log_size, pos, q_pos, scale, window)
                                                         attention probabilities of a few queries over rows
    column_scores(... as above, reduce, min_distance, lse)
                                                         their sum or maximum over many queries, for each row
    new_slab(n_pages, page_size, head_dim, dtype)        memory for pages (their layout: minillm.ops.pages)
    GreedyClusters(keys, rows, starts, lengths, rotation)
                                                         greedy seed-based clustering inside segments, for any tau
    gather(rows)                                         StoredRows as an array
    segment_topk(scores, lengths, counts)                which are the largest of each of some segments
    pooled(scores, lengths, width, kind)                 the largest or the mean of neighbours in their segment
    neighbours(stays, pos, lengths, reach)               the nearest row of the segment that stays
    fold(scores, size, pos, kept, protected, lengths, reach, counts)
                                                         each row that does not stay joins a neighbour that does
    segment_sum(groups, values, n)                       sums over groups of rows
    segment_count(mask, lengths)                         how many are true of each segment, on the host
    nonzero(mask, n), compact(mask, n)                   where the n that are true are; and which of them each is
    segment_ids(lengths)                                 of each row the number of its segment
    array(values), host(values)                          from the host, to the host
    merge(rows, dest, weight, n_entries)                 weighted sums of rows: any Plan
    nearest(keys, rows, others, first, last)             of a segment of other rows the one most alike, for each row
    unrotated(rows, pos, cos, sin)                       keys with RoPE undone
    merge_unrotated(rows, pos, dest, weight, entry_pos, cos, sin)
                                                         merge of keys: summed without their rotation
    concatenate(parts)                                   rows of several arrays
    write_entries(layer, start, entries)                 Entries into the pages of a layer
    rewrite(layer, start, dest, weights, entries)        entries become sums of themselves, in their place
    read_labels(layer, start)                            log s and positions of entries out of them
    stored_rows(stored, scale)                           K or V of a slab's words as float32
    prepare(weight)                                      a Weight as this backend reads it best
    random_words(shape, seed)                            a matrix in bf16 words for LLM.random
    runner(model)                                        whole steps in a few calls; None: model.py's own pages
    DEVICE                                               "cpu", "cuda:0", ...
    available_memory()                                   bytes that can still be had on it, or None
    CACHE_DTYPE                                          of K and V in pages, by name, if not int8
    READS_STORED                                         whether weights as they are stored are the fast ones
    trim()                                               memory that the backend keeps for itself goes back
    set_threads(n)                                       threads of the linear algebra
    bandwidth()                                          bytes a second that these threads read from memory

Symbols: n tokens, B sequences, Hq query heads, H KV heads, G = Hq / H query heads a KV head, d head_dim.
`ops` knows nothing of models and methods. Arrays are float32 unless said, and of the backend: on a GPU they stay there,
as CuPy's, on which NumPy's functions run. Only these functions touch rows of K and V, and hidden states. What there is
of each head or segment (lengths, counts, start) is in NumPy everywhere.
"""

import functools
import re
import sys

from minillm.errors import UsageError


def backend(device: str):
    """What carries out the contract on `device`. "auto" and "cpu": compiled kernels where they were built (cpu_lib says
    which instructions they use), else NumPy; "cuda", "cuda:1": a GPU, for one model. Raises MinillmError."""
    if device in ("auto", "cpu"):
        from minillm.ops import cpu_lib

        if cpu_lib.choose_path() != "numpy":
            from minillm.ops import cpu_ops

            return cpu_ops
        if cpu_lib.library() is None:
            say_once(
                "minillm: the compiled CPU kernels are not there, NumPy is used, which is several times slower: "
                "install a C compiler (gcc or clang) and then minillm again"
            )
        from minillm.ops import numpy_ops

        return numpy_ops
    if match := re.fullmatch(r"cuda(?::(\d+))?", device):
        from minillm.ops import cuda_ops

        return cuda_ops.open_ops(int(match[1] or 0))
    raise UsageError(f"device {device!r} is not known: it is auto, cpu, cuda or cuda:1 (the second GPU)")


@functools.cache
def say_once(notice):
    """Print a notice to stderr, once for each text."""
    print(notice, file=sys.stderr)
