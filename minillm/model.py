"""The forward pass of a Llama: embed -> blocks -> norm -> head, as straight-line pages of code.

`extend` reads many new tokens of one sequence (a prompt, or a later turn over a compressed cache); `decode` reads one
token of each of several sequences. Both leave the new entries in the cache."""

from dataclasses import dataclass

import numpy as np

from minillm.errors import MinillmError
from minillm.rope import Rope

MLP_ROWS = 1024  # rows of the wide middle of the MLP, and of logits, that exist at a time


@dataclass
class Block:
    """The weights of one layer: Weights (out, in); norms and biases float32 vectors, a bias None where the model has
    none."""

    attention_norm: np.ndarray
    wq: object  # (n_heads * head_dim, dim)
    wk: object  # (n_kv_heads * head_dim, dim)
    wv: object
    wo: object  # (dim, n_heads * head_dim)
    bq: np.ndarray | None
    bk: np.ndarray | None
    bv: np.ndarray | None
    bo: np.ndarray | None
    mlp_norm: np.ndarray
    w_gate: object  # (ffn_dim, dim)
    w_up: object
    w_down: object  # (dim, ffn_dim)
    b_gate: np.ndarray | None
    b_up: np.ndarray | None
    b_down: np.ndarray | None

    @classmethod
    def of(cls, weights, layer):
        def get(name, kind="weight"):
            return weights.get(f"model.layers.{layer}.{name}.{kind}")

        attention = [f"self_attn.{x}_proj" for x in "qkvo"]
        mlp = [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
        vector = lambda weight: None if weight is None else weight.data  # noqa: E731
        return cls(
            vector(get("input_layernorm")),
            *(get(name) for name in attention),
            *(vector(get(name, "bias")) for name in attention),
            vector(get("post_attention_layernorm")),
            *(get(name) for name in mlp),
            *(vector(get(name, "bias")) for name in mlp),
        )


class Model:
    """Weights of one model and the operations of one backend. config: ModelConfig; weights: name -> Weight."""

    def __init__(self, config, weights, ops):
        self.config, self.ops, self.rope = config, ops, Rope(config)
        for name in [name for name, weight in weights.items() if len(weight.shape) > 1]:
            weights[name] = ops.prepare(weights[name])  # one at a time: the words it was made from are given back
        self.embedding = weights["model.embed_tokens.weight"]
        self.blocks = [Block.of(weights, layer) for layer in range(config.n_layers)]
        self.norm = weights["model.norm.weight"].data
        self.head = self.embedding if config.tied_head else weights["lm_head.weight"]
        self.scale = config.head_dim**-0.5
        self.runner = ops.runner(self)  # the same steps in fewer calls, or None

    @property
    def nbytes(self):
        """Bytes of the weights that every token reads."""
        matrices = (w for block in self.blocks for w in vars(block).values() if w is not None)
        return sum(w.nbytes for w in matrices) + self.norm.nbytes + self.head.nbytes

    def extend(self, token_ids, cache, compressor=None, progress=None):
        """Read n new tokens of one sequence. -> hidden states (n, dim) before the last norm.

        Only one layer's keys and values exist in full: each layer's are compressed and stored in pages before the
        next begins. progress(layers done, layers) is called after every layer. If anything is raised on the way the
        cache is cleared."""
        try:
            hidden = self._extend(token_ids, cache, compressor, progress)
        except BaseException:
            cache.clear()
            raise
        return hidden

    def _extend(self, token_ids, cache, compressor, progress):
        ops, eps, window = self.ops, self.config.rms_eps, self.config.sliding_window
        compression = compressor.begin(cache, token_ids) if compressor else None
        pos = np.arange(cache.seen, cache.seen + len(token_ids))
        cos, sin = self.rope.tables(pos, cache.seen + len(pos))
        x = ops.embed(self.embedding, token_ids)  # (n, dim), the residual stream
        for index, block in enumerate(self.blocks):
            if self.runner:
                k, v, mixed = self.runner.attention(index, x, cos, sin, cache.layer(index))
            else:
                q, k, v = self._qkv(block, ops.rms_norm(x, block.attention_norm, eps))
                q, k = ops.rope(q, cos, sin), ops.rope(k, cos, sin)
                mixed = ops.prefill_attention(q, k, v, cache.layer(index), self.scale, window)
                del q
            if compression:
                compression.store(index, k, v)
            else:
                cache.append(index, k, v, pos)
            del k, v
            if self.runner:
                self._check_finite(self.runner.output(index, x, mixed), index)
            else:
                x += ops.linear(mixed, block.wo, block.bo)
                for lo in range(0, len(x), MLP_ROWS):
                    x[lo : lo + MLP_ROWS] += self._mlp(block, x[lo : lo + MLP_ROWS])
                self._check_finite(np.isfinite(x).all(), index)
            if progress:
                progress(index + 1, len(self.blocks))
        cache.advance(token_ids, compression.tail if compression else None)
        return x

    def decode(self, token_ids, caches):
        """Read one token of each of B sequences: token_ids (B,), B caches of one pool. -> logits (B, vocab).

        If anything is raised on the way the caches hold what they held before."""
        before = [cache.lengths.copy() for cache in caches]
        try:
            logits = self._decode(token_ids, caches)
        except BaseException:
            for cache, lengths in zip(caches, before, strict=True):
                cache.cut(lengths)
            raise
        for token, cache in zip(token_ids, caches, strict=True):
            cache.advance([token])
        return logits

    def _decode(self, token_ids, caches):
        ops, eps, window = self.ops, self.config.rms_eps, self.config.sliding_window
        tables = [self.rope.tables(np.array([cache.seen]), cache.seen + 1) for cache in caches]
        cos, sin = (np.stack(parts) for parts in zip(*tables, strict=True))  # (B, 1, d/2)
        if self.runner:
            for cache in caches:
                cache.make_room()
            logits, bad_layer = self.runner.decode(token_ids, caches, cos, sin)
            self._check_finite(bad_layer is None, bad_layer)
            return logits
        x = ops.embed(self.embedding, token_ids)  # (B, dim)
        for index, block in enumerate(self.blocks):
            q, k, v = (y.transpose(1, 0, 2) for y in self._qkv(block, ops.rms_norm(x, block.attention_norm, eps)))
            q, k = ops.rope(q, cos, sin), ops.rope(k, cos, sin)  # (B, heads, d)
            for b, cache in enumerate(caches):
                cache.append(index, k[b][:, None], v[b][:, None], [cache.seen])
            mixed = ops.decode_attention(q, [cache.layer(index) for cache in caches], self.scale, window)
            x += ops.linear(mixed, block.wo, block.bo)
            x += self._mlp(block, x)
            self._check_finite(np.isfinite(x).all(), index)
        return self.logits(x)

    def logits(self, hidden):
        """Hidden states (n, dim) before the last norm -> logits (n, vocab) float32."""
        return self.ops.linear(self.ops.rms_norm(hidden, self.norm, self.config.rms_eps), self.head)

    def recompress(self, cache, compressor):
        """Compress the closed chunks of what was generated since the last time."""
        compression = compressor.begin(cache, [], closed_only=True)
        if compression:
            for index in range(len(self.blocks)):
                compression.store(index)
            cache.advance([], compression.tail)

    def _qkv(self, block, x):
        """x (n, dim) -> q (Hq, n, d), k and v (H, n, d), not yet rotated."""
        heads = ((block.wq, block.bq), (block.wk, block.bk), (block.wv, block.bv))
        outputs = (self.ops.linear(x, weight, bias) for weight, bias in heads)
        return [np.ascontiguousarray(y.reshape(len(x), -1, self.config.head_dim).transpose(1, 0, 2)) for y in outputs]

    def _mlp(self, block, x):
        ops = self.ops
        h = ops.rms_norm(x, block.mlp_norm, self.config.rms_eps)
        h = ops.swiglu(ops.linear(h, block.w_gate, block.b_gate), ops.linear(h, block.w_up, block.b_up))
        return ops.linear(h, block.w_down, block.b_down)

    def _check_finite(self, finite, layer):
        if not finite:
            raise MinillmError(
                f"NaN or infinity in the output of layer {layer}: the weights of model.layers.{layer} are damaged or "
                "do not fit this architecture; fetch the model again"
            )
