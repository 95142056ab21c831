"""Whole steps of the forward pass as one or two calls into C: several hundred small calls a token cost more than the
arithmetic of a small model. What they compute is minillm.model.Model._decode, .attention and .output, operation by
operation."""

import weakref
from ctypes import byref

import numpy as np

from minillm.files.config import ACTIVATIONS
from minillm.ops import cpu_lib
from minillm.ops.cpu_lib import floats, paged, pointer, slab_table
from minillm.sampling import sample_each


class Runner:
    """The prepared tables of one Model, whose weights are CpuWeights."""

    def __init__(self, model):
        c, self.lib, self.model = model.config, model.ops.lib, weakref.proxy(model)  # which owns this
        blocks = (cpu_lib.Block * c.n_layers)()
        for block, table in zip(model.blocks, blocks, strict=True):
            for name, kind in table._fields_[:-4]:
                if (weight := getattr(block, name)) is not None:
                    setattr(table, name, weight.matrix if kind is cpu_lib.Matrix else pointer(weight))
            table.rope, table.window = block.rope, block.window or 0
            table.linear, table.cubic = ACTIVATIONS[c.activation]
        sizes = ("n_layers", "n_heads", "n_kv_heads", "head_dim", "dim", "ffn_dim", "vocab_size")
        self.table = cpu_lib.Model(
            **{name: getattr(c, name) for name in sizes},
            eps=c.rms_eps,
            scale=model.scale,
            embedding_scale=c.embedding_scale,
            blocks=blocks,
            norm=pointer(model.norm),
            embedding=model.embedding.matrix,
            head=model.head.matrix,
        )

    def attention(self, layer, x, cos, sin, temperature, past, wants):
        """x (n, dim), cos and sin (n, d/2), temperature (n,) or None, past: PagedLayer -> q (Hq, n, d); lse (Hq, n) of
        its attention; k, v (H, n, d); q and k rotated; score (H, n); mixed (n, Hq * d). q and lse are None where
        `wants` lacks "queries", score where it lacks "scores"."""
        n, c, slabs = len(x), self.model.config, slab_table(past.pool)
        q, lse = None, None
        if "queries" in wants:
            q, lse = np.empty((c.n_heads, n, c.head_dim), np.float32), np.empty((c.n_heads, n), np.float32)
        score = np.empty((c.n_kv_heads, n), np.float32) if "scores" in wants else None
        k, v = (np.empty((c.n_kv_heads, n, c.head_dim), np.float32) for _ in "kv")
        mixed, cos, sin = np.empty((n, c.n_heads * c.head_dim), np.float32), floats(cos), floats(sin)
        tables = pointer(cos), pointer(sin), pointer(temperature), byref(paged(past, slabs))
        outputs = q, lse, k, v, score, mixed
        self.lib.layer_attention(byref(self.table), layer, pointer(x), n, *tables, *map(pointer, outputs))
        return outputs

    def output(self, layer, x, mixed):
        """x (n, dim) += what the layer makes of `mixed`, and its MLP. -> whether x is finite."""
        return bool(self.lib.layer_output(byref(self.table), layer, pointer(x), len(x), pointer(mixed)))

    def logits(self, hidden):
        """Hidden states (n, dim) before the last norm -> logits (n, vocab)."""
        hidden, out = floats(hidden), np.empty((len(hidden), self.model.config.vocab_size), np.float32)
        self.lib.logits(byref(self.table), pointer(hidden), len(hidden), pointer(out))
        return out

    def draw(self, hidden, draws):
        """Hidden states (B, dim) before the last norm -> the next token of each of B sequences, by B Draws, and whether
        the logits are finite: there is no token if not."""
        logits = self.logits(hidden)
        finite = np.isfinite(logits).all()
        return sample_each(logits, draws) if finite else None, finite

    def decode(self, token_ids, caches, cos, sin, temperature, draws=None):
        """One token of each of B sequences; the last entry of every head of the caches is the new token's and is
        written here. cos, sin (ropes, B, 1, d/2); temperature (B,) or None. -> logits (B, vocab), or by B Draws the
        next tokens; the first layer whose output is not finite, L for the logits, or None; rotated queries (L, B, Hq,
        d) and predicted scores (L, B, H), or None where no cache collects them. Where a layer is named, nothing else is
        there."""
        ids, slabs = np.array(token_ids, np.int64), slab_table(caches[0].pool)
        layers = [cache.layer(slice(None)) for cache in caches]
        tables = (cpu_lib.Paged * len(caches))(*(paged(layer, slabs) for layer in layers))
        c = self.model.config
        logits, queries, scores = np.empty((len(caches), c.vocab_size), np.float32), None, None
        if any(cache.left.queries is not None for cache in caches):
            queries = np.empty((c.n_layers, len(caches), c.n_heads, c.head_dim), np.float32)
        if any(cache.left.predicted is not None for cache in caches):
            scores = np.empty((c.n_layers, len(caches), c.n_kv_heads), np.float32)
        cos, sin, outputs = floats(cos), floats(sin), (logits, queries, scores)
        arguments = *map(pointer, (cos, sin, temperature)), tables, *map(pointer, outputs)
        bad_layer = self.lib.decode(byref(self.table), pointer(ids), len(ids), *arguments)
        if bad_layer >= 0:
            return None, bad_layer, None, None
        return sample_each(logits, draws), None, queries, scores
