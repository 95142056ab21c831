"""What a request may come to hold, in pages, before it begins: the promise that a PagePool with a limit keeps."""

from minillm.compress.compressor import BLOCK_TOKENS
from minillm.compress.plan import SHORT


def promise(request):
    """Pages of its own (see KVCache.own_pages) that a request takes at most, on the way and in the end.

    Of any method: an entry a token in every head, what an undone reading or recompression would go back to beside it,
    and a second reading's one layer. Of scores that a profile predicts, with a budget: twice that budget, and a block
    of the prompt or what is generated between two compressions."""
    cache, compressor, config = request.cache, request.compressor, request.model.config
    size, heads = cache.pool.page_size, cache.lengths.size
    room = config.context if request.context is None else request.context
    params = request.params
    new = 0 if params is None else room if params.max_tokens is None else params.max_tokens
    prompt = cache.seen + len(request.unread)
    after = min(prompt + new, max(room, prompt)) - cache.settled_tokens
    whole = heads * (pages(after, size) + 2)
    if compressor is None or compressor.config.method == "full":
        return whole
    held = cache.lengths - cache.settled
    most = whole + (whole if compressor.config.generates else int(held.sum()) // size + heads)
    if compressor.config.reads == "again":
        most += config.n_kv_heads * (pages(prompt, size) + 1)
    return min(most, _predicted(request, after, prompt)) if compressor.config.predicts else most


def pages(n, size):
    return -(-n // size)


def _predicted(request, after, prompt):
    """The same where scores are predicted and cut once: see OneCut."""
    cache, compressor = request.cache, request.compressor
    size, heads, config = cache.pool.page_size, cache.lengths.size, compressor.config
    if config.budget is None:
        return float("inf")
    budget = config.budget.after(cache.settled)
    kept = max(budget.total(after, heads), int((cache.lengths - cache.settled).sum()))
    block = request.model.config.n_kv_heads * min(BLOCK_TOKENS, len(request.unread))
    short = heads * SHORT  # that are left whole
    way = 2 * (kept + short) + block + cache.pool.slab_entries
    window = config.protect(after, budget)[1]
    end = 2 * (kept + short + heads * (config.recompress + window))
    return pages(max(way, end), size) + 3 * heads if config.recompress else float("inf")
