"""The same model on NumPy and on a device."""

from dataclasses import replace

import gguf
import numpy as np
from blocks import random_blocks
from cuda_words import to_words
from model_files import CONFIG

from minillm.cache.kv_cache import KVCache
from minillm.cache.page_pool import PagePool
from minillm.compress.compressor import Compressor
from minillm.compress.config import CacheConfig, Recipe
from minillm.compress.reading import extend
from minillm.files.formats import FORMATS
from minillm.files.stored_model import tensor_shapes
from minillm.files.weights import Weight
from minillm.model import Model
from minillm.ops.cuda_ops import CudaOps
from minillm.ops.numpy_ops import NUMPY as numpy_ops

SMALL = replace(CONFIG, head_dim=64, n_heads=4, n_kv_heads=2, dim=64, ffn_dim=96, vocab_size=72, context=512)


SHARE = {"F16": 6e-3, "BF16": 4e-2, "F32": 6e-3}
SHARE |= dict.fromkeys([name for name, format in FORMATS.items() if format.block > 1 and format.device], 8e-3)


# Times as much: a row that differs in its 12th bit is rounded elsewhere to 8, or to 5 and 4.
PACKED_SHARE = {"int8": 2, "k5v4": 12}


def weights_of(config, kind, others, seed=0):
    """Random Weights whose activations stay of size one; matrices of `kind`, or as `others` says by how their names
    end. Rows that are no whole blocks become Q8_0, as in llama.cpp."""
    rng, out = np.random.default_rng(seed), {}
    for name, shape in tensor_shapes(config).items():
        values = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            out[name] = Weight.floats(1 + values / 10 if "norm" in name else values / 10)
            continue
        values /= np.float32(np.sqrt(shape[1]))
        own = next((other for end, other in others.items() if name.endswith(f"{end}.weight")), kind)
        format = FORMATS[own if shape[1] % FORMATS[own].block == 0 else "Q8_0"]
        if format.name == "F32":
            data = values
        elif format.name == "F16":
            data = values.astype(np.float16)
        elif format.name == "BF16":
            data = to_words(values, "bf16")
        elif format.block == 256:  # which gguf does not make
            data = random_blocks(rng, format.name, *shape, 2 / np.sqrt(shape[1]))
        else:
            data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[format.name])
        out[name] = Weight(format, data, shape)
    return out


def score_projections(config):
    """What a profile says: weight (L, H, dim), bias (L, H)."""
    rng, shape = np.random.default_rng(7), (config.n_layers, config.n_kv_heads)
    weight = rng.normal(0, config.dim**-0.5, (*shape, config.dim)).astype(np.float32)
    return weight, rng.normal(size=shape).astype(np.float32)


class Twins:
    """The same model on both backends, each with a pool, and caches in pairs."""

    def __init__(self, device, config=SMALL, kind="F16", cache="full", dtype="auto", others=None, **options):
        cache = CacheConfig(cache, **options)
        if FORMATS[kind].block == 256:
            config = replace(config, dim=256, ffn_dim=256)
        weights = [weights_of(config, kind, others or {}) for _ in "ab"]
        backends = CudaOps(device), numpy_ops
        self.models = [Model(config, given, ops) for given, ops in zip(weights, backends, strict=True)]
        if cache.predicts:
            for model in self.models:
                model.predict(*score_projections(config))
        self.pools = [PagePool(model.ops, config.head_dim, slab_bytes=1 << 20, dtype=dtype) for model in self.models]
        classes = (np.arange(config.vocab_size) % 7 == 0).astype(np.uint8) * 2
        self.compressors = [Compressor(Recipe(cache, cache.options), model, classes) for model in self.models]
        self.config, self.share = config, SHARE[kind] * PACKED_SHARE.get(dtype, 1)

    def caches(self):
        return [KVCache(pool, self.config.n_layers, self.config.n_kv_heads) for pool in self.pools]

    def extend(self, ids, caches):
        """Logits of both models after each id."""
        parts = zip(self.models, caches, self.compressors, strict=True)
        return [model.logits(extend(model, ids, cache, compressor)) for model, cache, compressor in parts]

    def decode(self, ids, pairs):
        return [model.decode(ids, [pair[i] for pair in pairs]) for i, model in enumerate(self.models)]

    def close(self, logits, share=1.0):
        ours, expected = logits
        assert ours.shape == expected.shape and ours.dtype == np.float32
        error = np.sqrt(((ours - expected) ** 2).mean()) / np.sqrt((expected**2).mean())
        assert error <= share * self.share, error
