"""What memory something will take, computed before it is allocated: the error where there is not so much, and the
promise in pages that a PagePool with a limit keeps."""

from dataclasses import dataclass

import numpy as np

from minillm.compress.compressor import BLOCK_TOKENS
from minillm.compress.plan import SHORT
from minillm.errors import MemoryShort, UsageError
from minillm.files.formats import QUANTIZED
from minillm.model import MLP_ROWS
from minillm.ops.pages import PAGE_FORMATS, PAGE_SIZE, page_format

DTYPES = ("auto", "float32", "stored")  # how weights may be held, beside QUANTIZED
LEAST_LOST = ("k5v4", "int8")  # the dtypes in which entries of a share of memory lose least, the first that there is


HELD = (
    "the memory for the cache is held by open sessions and by answers that nobody takes: "
    "close some, or raise cache_limit"
)


def promise(request):
    """Pages of its own (see KVCache.own_pages) that a request takes at most, on the way and in the end: of each part of
    its prompt, since what was read before has settled by then, and of the answer after the last.

    Of any method: an entry a token in every head, what an undone reading or recompression would go back to beside it,
    and a second reading's one layer. Of scores that a profile predicts, with a budget: twice that budget, and a block
    of the prompt or what is generated between two compressions.

    Where several answers follow in forks, one of them after the other may take what it does after the last part, beside
    what was read of that."""
    cache, config = request.cache, request.model.config
    room = config.context if request.context is None else request.context
    lengths = [params.max_tokens for params in (request.params, *request.answers) if params is not None]
    new = max((room if n is None else n for n in lengths), default=0)
    prompt = cache.seen + len(request.unread)
    answer = min(new, max(room - prompt, 0))
    first, *later = request.parts
    held = cache.lengths - cache.settled
    parts = [_Part(first, cache.seen - cache.settled_tokens, held, True)]
    parts += [_Part(n, 0, np.zeros_like(held), False) for n in later]
    parts[-1].answer = answer
    *before, last = (_pages_of(request, part) for part in parts)
    most = sum(before) + last * (2 if request.answers else 1)
    if request.hidden is None and request.compressor and request.compressor.config.reads == "again":
        most += config.n_kv_heads * (pages(prompt, cache.pool.page_size) + 1)
    return most


@dataclass
class _Part:
    """A part of a prompt, read after what has settled."""

    n: int  # tokens that are read
    since: int  # tokens read before them that have not settled
    held: np.ndarray  # (L, H) entries of those
    first: bool  # whether what has settled is known already
    answer: int = 0  # tokens that are generated after it


def _pages_of(request, part):
    """Pages that a part takes at most."""
    cache, compressor = request.cache, request.compressor
    size, heads, after = cache.pool.page_size, cache.lengths.size, part.since + part.n + part.answer
    whole = heads * (pages(after, size) + 2)
    if compressor is None or compressor.config.method == "full":
        return whole
    most = whole + (whole if compressor.config.generates else int(part.held.sum()) // size + heads)
    return min(most, _predicted(request, part, after)) if compressor.config.predicts else most


def check(request):
    """Raise MemoryLimit if a request takes more than there ever is."""
    request.cache.pool.check(promise(request))


def pages(n, size):
    return -(-n // size)


def _predicted(request, part, after):
    """The same where scores are predicted and cut once: see OneCut."""
    cache, compressor = request.cache, request.compressor
    size, heads, config = cache.pool.page_size, cache.lengths.size, compressor.config
    if config.budget is None:
        return float("inf")
    budget = config.budget.after(cache.settled) if part.first else config.budget
    kept = max(budget.total(after, heads), int(part.held.sum()))
    kept = kept if part.first else max(kept, heads * SHORT)  # the least that Budget.after leaves
    block = request.model.config.n_kv_heads * min(BLOCK_TOKENS, part.n)
    short = heads * SHORT  # that are left whole
    way = 2 * (kept + short) + block + cache.pool.slab_entries
    window = config.protect(after, budget)[1]
    end = 2 * (kept + short + heads * (config.recompress + window))
    return pages(max(way, end), size) + 3 * heads if config.recompress else float("inf")


def gib(n):
    return f"{n / (1 << 30):.2f} GiB"


def in_entries(cache_config, ops, head_dim):
    """A CacheConfig whose share of memory has become a dtype and a budget in entries."""
    if cache_config.memory is None:
        return cache_config
    floats, dtype = ops.page_format, cache_config.dtype
    if dtype == "auto":
        dtype = next(name for name in LEAST_LOST if ops.holds(PAGE_FORMATS[name]))
    share = cache_config.memory * floats.entry_bytes(head_dim) / page_format(dtype, ops).entry_bytes(head_dim)
    return cache_config.replace(memory=None, dtype=dtype, budget=min(1.0, share))


def cache_bytes(config, cache_config, ops, n):
    """About the bytes of the pages of n tokens at the budget of a CacheConfig (with tau: of a full cache)."""
    cache_config = in_entries(cache_config, ops, config.head_dim)
    kept, whole = cache_config.budget.per_head(n) if cache_config.budget else n, 0
    if cache_config.method == "full" and config.reach and n > config.reach:
        kept, whole = config.reach, n  # one layer has all of them for a while
    pages = config.n_layers * config.n_kv_heads * (kept / PAGE_SIZE + 1) + config.n_kv_heads * whole / PAGE_SIZE
    return int(pages * PAGE_SIZE * page_format(cache_config.dtype, ops).entry_bytes(config.head_dim))


def workspace_bytes(config, n):
    """About the bytes that reading n tokens takes beside weights and cache: one layer's activations, in float32."""
    c = config
    attention = n * (4 * c.dim + 3 * c.n_heads * c.head_dim + 6 * c.n_kv_heads * c.head_dim)
    return 4 * (attention + 3 * min(n, MLP_ROWS) * c.ffn_dim + c.vocab_size)


def require(ops, name, n, *, weights=0, cache=0, workspace=0, fixes=()):
    """Raise MemoryShort if these bytes do not fit into the free memory of the backend's device. n: the tokens that
    `cache` is for, or 0; fixes: what makes weights smaller."""
    free, needed = ops.available_memory(), weights + cache + workspace
    if free is None or needed <= free:
        return
    parts = [f"weights {gib(weights)}"] if weights else []
    parts += [f"cache {gib(cache)} at {n} tokens", f"workspace {gib(workspace)}"] if n else []
    fixes = [*(["a shorter prompt", "-c N", "a smaller --kv-budget"] if n else []), *fixes]
    fixes += ["a smaller model"] if weights else []
    raise MemoryShort(
        f"{name} needs {gib(needed)} ({', '.join(parts)}) and {gib(free)} are free: try {' or '.join(fixes)}"
    )


def asked_dtype(dtype, quantize):
    """How weights are to be held: one of DTYPES or of QUANTIZED. Raises UsageError."""
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if quantize is None:
        return dtype
    if quantize not in QUANTIZED:
        raise UsageError(f"quantize {quantize!r} is not one of {', '.join(QUANTIZED)}")
    if dtype != "auto":
        raise UsageError(f"dtype {dtype} and quantize {quantize} exclude each other: leave one out")
    return quantize


def fitting_dtype(stored, dtype, backend):
    """`dtype`, or for "auto" what suits the backend and its free memory."""
    if dtype != "auto":
        return dtype
    free = backend.available_memory()
    fits = free is None or stored.weight_bytes("float32", backend) < 0.9 * free
    return "stored" if backend.READS_STORED or not fits else "float32"


def require_room(stored, dtype, backend, cache, context):
    """Raise MinillmError where the weights do not fit into memory, or with them a context that was asked for (the
    model's own is only a limit)."""
    config, promised = stored.config, {}
    if context is not None:
        if not 1 <= context <= config.context:
            raise UsageError(f"context {context} is not in 1..{config.context}, what {stored.name} was made for")
        promised["cache"] = cache_bytes(config, cache, backend, context)
        promised["workspace"] = workspace_bytes(config, context)
    formats = stored.formats("stored")
    words = any(formats[name].is_float for name, tensor in stored.tensors.items() if len(tensor.shape) > 1)
    fixes = ["--quantize q4_0"] if words and dtype not in QUANTIZED else []
    fixes += ["--dtype stored"] if dtype == "float32" else []
    weights = stored.weight_bytes(dtype, backend)
    require(backend, stored.name, context or 0, weights=weights, fixes=fixes, **promised)
