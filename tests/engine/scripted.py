"""A model that is a script: blocks are counted, pages are real, and there is no arithmetic."""

from types import SimpleNamespace

import numpy as np

from minillm.cache.kv_cache import KVCache
from minillm.cache.page_pool import PagePool
from minillm.compress.compressor import Compressor
from minillm.compress.config import CacheConfig
from minillm.engine.request import Request
from minillm.model import Step
from minillm.ops.numpy_ops import NUMPY
from minillm.ops.pages import FLOAT32
from minillm.sampling import SamplingParams

LAYERS, HEADS, DIM, PAGE = 3, 2, 4, 4
PAGE_BYTES = PAGE * FLOAT32.entry_bytes(DIM)


class ScriptedModel:
    """Says number + 1 after every number. bad: ids at which a reading or a step of decoding fails."""

    def __init__(self, bad=(), together=True):
        self.config = SimpleNamespace(context=1000, n_kv_heads=HEADS, sliding_window=None)
        self.blocks, self.ops, self.scale = [None] * LAYERS, NUMPY, 1.0
        self.bad, self.runner, self.log = set(bad), object() if together else None, []

    def check_ids(self, token_ids):
        pass

    def embed(self, token_ids):
        return np.array(token_ids, np.float32)[:, None]

    def layers(self, parts, past, wants=(), beyond=0):
        ((x, position),) = parts
        ids = x[:, 0].astype(int).tolist()
        for index in range(LAYERS):
            self.log.append(("read", ids[0], index))
            if index == 1 and self.bad & set(ids):
                raise RuntimeError("a bad prompt")
            k = np.zeros((HEADS, len(x), DIM), np.float32)
            yield Step(index, x, np.arange(position, position + len(x)), (), None, None, None, k, k, None, None)

    def decode(self, token_ids, caches, draws=None):
        self.log.append(("decode", tuple(token_ids)))
        if self.bad & set(token_ids):
            raise RuntimeError("a bad token")
        for token, cache in zip(token_ids, caches, strict=True):
            cache.make_room()
            cache.advance([token])
        return [token + 1 for token in token_ids]

    def draw(self, hidden, draws):
        return [int(x[0]) + 1 for x in hidden]


def pool_of(limit_pages=None):
    limit = None if limit_pages is None else limit_pages * PAGE_BYTES
    return PagePool(NUMPY, DIM, PAGE, slab_bytes=8 * PAGE_BYTES, limit=limit)


def request_of(model, pool, ids, n=4, pull=False):
    """A Request of the full cache for n tokens after `ids`."""
    compressor = Compressor(CacheConfig("full").resolve(), model, np.zeros(1, np.uint8))
    request = Request(model, compressor, KVCache(pool, LAYERS, HEADS), list(ids), SamplingParams(max_tokens=n))
    request.pull = pull
    return request
