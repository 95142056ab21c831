"""Small random models, their caches and compressors, and a literal float64 pass over the entries that are stored."""

from types import SimpleNamespace

import numpy as np
from literal import attend, rotated
from oracle import rms_norm

from minillm.cache.kv_cache import KVCache
from minillm.cache.page_pool import PagePool
from minillm.compress.compressor import Compressor
from minillm.compress.config import CacheConfig, Recipe
from minillm.files.config import ModelConfig, RopeConfig
from minillm.files.weights import Weight
from minillm.model import Model
from minillm.ops.numpy_ops import NUMPY as numpy_ops
from minillm.ops.pages import FLOAT32
from minillm.output_projection import OutputProjection

VOCAB = 40


CLASSES_OF_14 = np.array([0] * 10 + [1, 2, 3, 4], np.uint8)  # of 14 token ids: words, . , blank, special
CLASSES = np.array([0] * 34 + [1, 1, 2, 2, 3, 4], np.uint8)


def config_of(**changes):
    sizes = dict(name="tiny", architecture="LlamaForCausalLM", n_layers=2, n_heads=6, n_kv_heads=2, head_dim=8)
    sizes |= dict(dim=24, ffn_dim=40, vocab_size=VOCAB, context=4096, rms_eps=1e-5, rope=RopeConfig(theta=500.0))
    return ModelConfig(**sizes | changes)


def model_of(config, ops=numpy_ops, seed=0):
    rng = np.random.default_rng(seed)
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = {"model.embed_tokens": (VOCAB, config.dim), "model.norm": (config.dim,), "lm_head": (VOCAB, config.dim)}
    for i in range(config.n_layers):
        layer = f"model.layers.{i}."
        shapes |= {layer + "input_layernorm": (config.dim,), layer + "post_attention_layernorm": (config.dim,)}
        shapes |= {layer + f"self_attn.{x}_proj": (rows, config.dim) for x, rows in (("q", q), ("k", kv), ("v", kv))}
        shapes |= {layer + "self_attn.o_proj": (config.dim, q), layer + "mlp.down_proj": (config.dim, config.ffn_dim)}
        shapes |= {layer + f"mlp.{x}_proj": (config.ffn_dim, config.dim) for x in ("gate", "up")}
    values = {name: rng.normal(len(shape) == 1, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}
    model = Model(config, {f"{name}.weight": Weight.floats(x) for name, x in values.items()}, ops)
    score = rng.normal(0, 0.3, (config.n_layers, config.n_kv_heads, config.dim + 1)).astype(np.float32)
    model.predict(np.ascontiguousarray(score[:, :, 1:]), np.ascontiguousarray(score[:, :, 0]))
    return model


def new_cache(model, page_size=4):
    c = model.config
    pool = PagePool(numpy_ops, c.head_dim, page_size, 5 * page_size * FLOAT32.entry_bytes(c.head_dim))
    return KVCache(pool, c.n_layers, c.n_kv_heads)


def compressor_of(model, method="semanticache", budget=None, **options):
    config = CacheConfig(method, budget, **options)
    return Compressor(Recipe(config, config.options), model, CLASSES)


def bare_model(rope, wo, n_kv_heads, scale=1.0):
    """What compression sees of a model whose keys and values come from elsewhere. wo (L, dim, Hq * d) float32."""
    weights = [Weight.floats(w) for w in wo]
    projections = [OutputProjection(w, n_kv_heads, rope.head_dim, numpy_ops) for w in weights]
    blocks = [SimpleNamespace(wo=w, rope=0, window=None) for w in weights]
    model = SimpleNamespace(ops=numpy_ops, scale=scale, blocks=blocks, projections=projections)
    model.rotations = lambda positions, length: [rope.tables(positions, length)]
    return model


def bare_compressor(config, model):
    return Compressor(Recipe(config, config.options), model, CLASSES_OF_14)


def ids_of(n, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, n).tolist()


def literal_extend(model, ids, cache):
    """Logits (n, vocab) of new tokens over the entries of a cache, in float64, token by token and head by head."""
    c = model.config
    n, seen, group = len(ids), cache.seen, c.n_heads // c.n_kv_heads
    inv_freq = np.float64(c.rope.theta) ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
    angle = np.arange(seen, seen + n)[:, None] * inv_freq
    x = np.float64(model.embedding.data)[ids]
    for index, block in enumerate(model.blocks):
        h = rms_norm(x, block.attention_norm, c.rms_eps)
        q, k, v = (
            np.float64(h @ w.data.T).reshape(n, -1, c.head_dim).transpose(1, 0, 2)
            for w in (block.wq, block.wk, block.wv)
        )
        q, k = rotated(q, angle), rotated(k, angle)
        mixed = np.zeros((n, c.n_heads, c.head_dim))
        for head in range(c.n_heads):
            stored = cache.layer(index).read(head // group)
            fresh = (k[head // group], v[head // group], np.zeros(n), np.arange(seen, seen + n))
            for i in range(n):
                entries = [np.concatenate([old, new[: i + 1]]) for old, new in zip(stored, fresh, strict=True)]
                mixed[i, head] = attend(q[head, i], entries, c.head_dim**-0.5, seen + i, c.sliding_window)
        x = x + mixed.reshape(n, -1) @ block.wo.data.T
        h = rms_norm(x, block.mlp_norm, c.rms_eps)
        gate = h @ block.w_gate.data.T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ block.w_up.data.T)) @ block.w_down.data.T
    return rms_norm(x, model.norm, c.rms_eps) @ model.head.data.T


def same(actual, expected, atol=2e-4):
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)
