"""What memory something will take, computed before it is allocated; and the error where there is not so much."""

from minillm.errors import MinillmError
from minillm.model import MLP_ROWS
from minillm.ops.pages import PAGE_SIZE, page_bytes, stored_as


def gib(n):
    return f"{n / (1 << 30):.2f} GiB"


def cache_bytes(config, cache_config, ops, n):
    """About the bytes of the pages of n tokens at the budget of a CacheConfig (with tau: of a full cache)."""
    kept, whole = cache_config.budget.per_head(n) if cache_config.budget else n, 0
    if cache_config.method == "full" and config.sliding_window and n > config.sliding_window:
        kept, whole = config.sliding_window, n  # one layer has all of them for a while
    pages = config.n_layers * config.n_kv_heads * (kept / PAGE_SIZE + 1) + config.n_kv_heads * whole / PAGE_SIZE
    return int(pages * page_bytes(PAGE_SIZE, config.head_dim, stored_as(cache_config.dtype, ops)))


def workspace_bytes(config, n):
    """About the bytes that reading n tokens takes beside weights and cache: one layer's activations, in float32."""
    c = config
    attention = n * (4 * c.dim + 3 * c.n_heads * c.head_dim + 6 * c.n_kv_heads * c.head_dim)
    return 4 * (attention + 3 * min(n, MLP_ROWS) * c.ffn_dim + c.vocab_size)


def require(ops, name, n, *, weights=0, cache=0, workspace=0):
    """Raise MinillmError if these bytes do not fit into the free memory of the backend's device. n: the tokens that
    `cache` is for, or 0."""
    free, needed = ops.available_memory(), weights + cache + workspace
    if free is None or needed <= free:
        return
    parts = [f"weights {gib(weights)}"] if weights else []
    parts += [f"cache {gib(cache)} at {n} tokens", f"workspace {gib(workspace)}"] if n else []
    fixes = ["a shorter prompt", "-c N", "a smaller --kv-budget"] if n else []
    fixes += ["a smaller or quantised model", "--quantize q4_0 (of 16-bit ones)", "--dtype stored"] if weights else []
    raise MinillmError(
        f"{name} needs {gib(needed)} ({', '.join(parts)}) and {gib(free)} are free: try {' or '.join(fixes)}"
    )
