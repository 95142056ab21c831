"""The forward pass of a Llama: embed -> blocks -> norm -> head, as straight-line pages of code.

`layers` carries many tokens of one sequence through the blocks, a step at a time: whoever drives it stores their keys
and values. `decode` reads one token of each of several sequences and leaves its entries in their caches."""

from dataclasses import dataclass, replace

import numpy as np

from minillm.architectures import BLOCK
from minillm.errors import MinillmError
from minillm.files.config import ACTIVATIONS
from minillm.files.weights import Weight
from minillm.output_projection import OutputProjection
from minillm.rope import Rope
from minillm.sampling import sample_each

MLP_ROWS = 1024  # rows of the wide middle of the MLP, and of logits, that exist at a time


@dataclass
class Step:
    """One block of the model reading n tokens, between its two halves. Arrays of the backend, but for pos."""

    index: int  # of the block
    x: object  # (n, dim) float32, the residual stream before the block; after it, once the reading goes on
    pos: np.ndarray  # (n,)
    rotation: tuple  # cos, sin (n, d/2) of these positions; (n,) temperatures of queries there, or None
    hidden: object  # (n, dim) normed: what q, k and v are made from; None where nobody wants it
    q: object  # (Hq, n, d) rotated; may be None where nobody wants queries
    lse: object  # (Hq, n) the log of the sum of exponentials of each query's attention; as q
    k: object  # (H, n, d) rotated
    v: object  # (H, n, d)
    scores: object  # (H, n) predicted, on the host or the device; may be None where nobody wants scores
    mixed: object  # (n, Hq * d) the attention's output before W_O
    share: float = 0.0  # of a reading (compress.reading.read), what is done

    def first(self, n):
        """The Step of the first n tokens, as far as it can be stored."""
        k, v = self.k[:, :n].copy(), self.v[:, :n].copy()
        q, lse, scores = (None if part is None else part[:, :n] for part in (self.q, self.lse, self.scores))
        hidden = None if self.hidden is None else self.hidden[:n]
        return replace(self, pos=self.pos[:n], hidden=hidden, q=q, lse=lse, k=k, v=v, scores=scores, mixed=None)

    def release(self):
        """Give everything but x back: a block's worth of memory. -> mixed"""
        mixed = self.mixed
        self.hidden = self.q = self.lse = self.k = self.v = self.scores = self.mixed = None
        return mixed


class Block:
    """The weights of one layer, a field for each Part of architectures.BLOCK: matrices are Weights (out, in), norms and
    biases float32 vectors; None where the model has none.

    rope: which of Model.ropes turns its queries and keys. window: the sliding window, or None. w_score (n_kv_heads,
    dim), b_score (n_kv_heads,): what a token will be worth to a head, where a profile says so."""

    def __init__(self, weights, layer, config):
        for part in BLOCK:
            weight = weights.pop(f"model.layers.{layer}.{part.json}", None)
            setattr(self, part.field, weight if weight is None or part.columns else weight.data)
        attention = config.attention(layer)
        self.rope, self.window = config.ropes.index(attention.rope), attention.window
        self.w_score = self.b_score = None

    @property
    def weights(self):
        """Those there are."""
        named = (getattr(self, name) for name in (*(part.field for part in BLOCK), "w_score", "b_score"))
        return [weight for weight in named if weight is not None]


class Model:
    """Weights of one model and the operations of one backend. config: ModelConfig; weights: name -> Weight, which are
    taken out: what a runner puts together from them is then not there twice; scores: see `predict`."""

    def __init__(self, config, weights, ops, scores=None):
        self.config, self.ops = config, ops
        self.ropes = [Rope(rope, config.head_dim, config.rotated) for rope in config.ropes]
        matrices = [name for name, weight in weights.items() if len(weight.shape) > 1]
        ops.expect([weights[name] for name in matrices])
        for name in matrices:
            weights[name] = ops.prepare(weights[name])  # one at a time: the words it was made from are given back
        self.embedding = weights["model.embed_tokens.weight"]
        self.blocks = [Block(weights, layer, config) for layer in range(config.n_layers)]
        self.norm = weights["model.norm.weight"].data * np.float32(config.logit_scale)
        self.head = self.embedding if config.tied_head else weights["lm_head.weight"]
        self.scale = config.scale
        self.projections = [
            OutputProjection(block.wo, config.n_kv_heads, config.head_dim, ops) for block in self.blocks
        ]
        if scores:
            self._project(*scores)
        self.runner = ops.runner(self)  # the same steps in fewer calls, or None

    @property
    def nbytes(self):
        """Bytes of the weights that every token reads."""
        weights = [weight for block in self.blocks for weight in block.weights]
        return sum(weight.nbytes for weight in [*weights, self.norm, self.head])

    @property
    def norms(self):
        """Weights of the norms before attention and MLP of each layer in turn: 2 L vectors."""
        return [norm for block in self.blocks for norm in (block.attention_norm, block.mlp_norm)]

    def predict(self, weight, bias):
        """Predict scores with these projections from now on: weight (L, H, dim), bias (L, H), both float32."""
        self._project(weight, bias)
        self.runner = None  # on a GPU it holds matrices, which the new one makes again
        self.runner = self.ops.runner(self)

    def _project(self, weight, bias):
        for block, w, b in zip(self.blocks, weight, bias, strict=True):
            block.w_score, block.b_score = self.ops.prepare(Weight.floats(w)), b

    def layers(self, parts, past, wants=(), first=0, beyond=0):
        """Carry tokens through the blocks from `first` on: yields a Step between the halves of every (block, part).

        parts: list of (x (n, dim) float32 hidden states, position of the first token); x is updated in place. past:
        index of a block -> PagedLayer of the entries that the tokens attend to beside one another. wants: any of
        "hidden", "queries" and "scores". beyond: so many of the last tokens of each part will be no part of the
        sequence. Raises MinillmError where what a block makes is not finite."""
        positions = [np.arange(position, position + len(x)) for x, position in parts]
        rotations = [self.rotations(pos, parts[i][1] + len(pos) - beyond) for i, pos in enumerate(positions)]
        temperatures = [self.temperatures(pos) for pos in positions]
        for index in range(first, len(self.blocks)):
            for (x, _), pos, turns, warmth in zip(parts, positions, rotations, temperatures, strict=True):
                rotation = *turns[self.blocks[index].rope], warmth
                step = Step(
                    *(index, x, pos, rotation),
                    self.normed(index, x) if "hidden" in wants else None,
                    *self.attention(index, x, *rotation, past(index), wants),
                )
                yield step
                self._check_finite(self.output(index, x, step.release()), index)

    def normed(self, index, x):
        """x (n, dim) -> (n, dim) rows of the backend: what a block's q, k and v are made from."""
        return self.ops.rms_norm(x, self.blocks[index].attention_norm, self.config.rms_eps)

    def rotations(self, positions, length):
        """Of each of `ropes` cos and sin (n, d/2) of positions (n,) in a sequence of `length` tokens."""
        return [rope.tables(positions, length) for rope in self.ropes]

    def temperatures(self, positions):
        """(n,) what queries at positions (n,) are multiplied by; None: they are not."""
        beta, context = self.config.temperature, self.config.rope.original_context
        return np.float32(1 + beta * np.log(1 + positions // context)) if beta else None

    def embed(self, token_ids):
        """Token ids (n,) -> (n, dim) float32, the residual stream before the first block."""
        x = self.ops.embed(self.embedding, token_ids)
        return x if self.config.embedding_scale == 1 else x * np.float32(self.config.embedding_scale)

    def attention(self, index, x, cos, sin, temperature, past, wants=()):
        """The first half of a layer: x (n, dim), and a Step's rotation -> q (Hq, n, d); lse (Hq, n) of its attention;
        k, v (H, n, d); q and k rotated; predicted scores (H, n) on the host; mixed (n, Hq * d), the attention's output.
        q, lse and scores may be None where `wants` lacks "queries" or "scores"."""
        if self.runner:
            return self.runner.attention(index, x, cos, sin, temperature, past, wants)
        ops, block, config = self.ops, self.blocks[index], self.config
        h = ops.rms_norm(x, block.attention_norm, config.rms_eps)
        q, k, v = self._qkv(block, h)
        scores = self._scores(block, h) if "scores" in wants else None
        q, k = ops.rope(q, cos, sin), ops.rope(k, cos, sin)
        q = q if temperature is None else q * temperature[:, None]
        mixed, lse = ops.prefill_attention(q, k, v, past, self.scale, block.window)
        return q, lse, k, v, scores, mixed

    def output(self, index, x, mixed):
        """The second half: x += W_O mixed, x += mlp(norm(x)). -> whether x is finite."""
        if self.runner:
            return self.runner.output(index, x, mixed)
        block = self.blocks[index]
        x += self._attended(block, mixed)
        for lo in range(0, len(x), MLP_ROWS):
            x[lo : lo + MLP_ROWS] += self._mlp(block, x[lo : lo + MLP_ROWS])
        return np.isfinite(x).all()

    def decode(self, token_ids, caches, draws=None):
        """Read one token of each of B sequences: token_ids (B,), B caches of one pool. -> logits (B, vocab), or by B
        Draws the token that comes next in each.

        If anything is raised on the way the caches hold what they held before."""
        self.check_ids(token_ids)
        before = [cache.lengths.copy() for cache in caches]
        try:
            result, queries, scores = self._decode(token_ids, caches, draws)
        except BaseException:
            for cache, lengths in zip(caches, before, strict=True):
                cache.cut(lengths)
            raise
        for b, (token, cache) in enumerate(zip(token_ids, caches, strict=True)):
            cache.advance([token])
            cache.left.note(queries, scores, b)
        return result

    def _decode(self, token_ids, caches, draws):
        """-> logits (B, vocab) or the next tokens, and of every layer, where a cache collects them, rotated queries (B,
        Hq, d) and predicted scores (B, H)."""
        ops, eps = self.ops, self.config.rms_eps
        tables = [self.rotations(np.array([cache.position]), cache.position + 1) for cache in caches]
        cos, sin = np.array(tables).transpose(2, 1, 0, 3, 4)  # (ropes, B, 1, d/2)
        temperature = self.temperatures(np.array([cache.position for cache in caches]))
        if self.runner:
            for cache in caches:
                cache.make_room()
            result, bad_layer, queries, scores = self.runner.decode(token_ids, caches, cos, sin, temperature, draws)
            self._check_finite(bad_layer is None, bad_layer)
            return result, queries, scores
        x, queries, scores = self.embed(token_ids), [], []  # (B, dim)
        wants_scores = any(cache.left.predicted is not None for cache in caches)
        for index, block in enumerate(self.blocks):
            h = ops.rms_norm(x, block.attention_norm, eps)
            q, k, v = (y.transpose(1, 0, 2) for y in self._qkv(block, h))
            q, k = (ops.rope(x, cos[block.rope], sin[block.rope]) for x in (q, k))  # (B, heads, d)
            q = q if temperature is None else q * temperature[:, None, None]
            queries.append(q)
            if wants_scores:
                scores.append(self._scores(block, h).T)
            for b, cache in enumerate(caches):
                cache.append(index, k[b][:, None], v[b][:, None], [cache.position])
            mixed = ops.decode_attention(q, [cache.layer(index) for cache in caches], self.scale, block.window)
            x += self._attended(block, mixed)
            x += self._mlp(block, x)
            self._check_finite(np.isfinite(x).all(), index)
        return sample_each(self.logits(x), draws), queries, scores

    def logits(self, hidden):
        """Hidden states (n, dim) before the last norm -> logits (n, vocab) float32."""
        if self.runner:
            logits = self.runner.logits(hidden)
        else:
            logits = self.ops.linear(self.ops.rms_norm(hidden, self.norm, self.config.rms_eps), self.head)
        self._check_finite(np.isfinite(logits).all(), len(self.blocks))
        return logits

    def draw(self, hidden, draws):
        """Hidden states (B, dim) before the last norm -> the token that comes next in each of B sequences, by B
        Draws."""
        if not self.runner:
            return sample_each(self.logits(hidden), draws)
        tokens, finite = self.runner.draw(hidden, draws)
        self._check_finite(finite, len(self.blocks))
        return tokens

    def _qkv(self, block, x):
        """x (n, dim) -> q (Hq, n, d), k and v (H, n, d), not yet rotated."""
        return (
            self._heads(x, block.wq, block.bq, block.q_norm),
            self._heads(x, block.wk, block.bk, block.k_norm),
            self._heads(x, block.wv, block.bv),
        )

    def _heads(self, x, weight, bias, norm=None):
        d = self.config.head_dim
        rows = self._over_norm(self.ops.linear(x, weight, bias).reshape(-1, d), norm)
        return np.ascontiguousarray(rows.reshape(len(x), -1, d).transpose(1, 0, 2))

    def _scores(self, block, x):
        """x (n, dim) -> (H, n) what the profile predicts each token to be worth to the head: log of an attention."""
        return self.ops.linear(x, block.w_score, block.b_score).T

    def _attended(self, block, mixed):
        """What the attention's output adds to the residual stream."""
        return self._over_norm(self.ops.linear(mixed, block.wo, block.bo), block.attention_output_norm)

    def _mlp(self, block, x):
        """What the MLP adds to it."""
        ops = self.ops
        h = ops.rms_norm(x, block.mlp_norm, self.config.rms_eps)
        gate, up = ops.linear(h, block.w_gate, block.b_gate), ops.linear(h, block.w_up, block.b_up)
        h = ops.glu(gate, up, *ACTIVATIONS[self.config.activation])
        return self._over_norm(ops.linear(h, block.w_down, block.b_down), block.mlp_output_norm)

    def _over_norm(self, x, norm):
        return x if norm is None else self.ops.rms_norm(x, norm, self.config.rms_eps)

    def check_ids(self, token_ids):
        """Raise MinillmError where a token id has no row in the embedding."""
        ids, rows = np.asarray(token_ids), self.embedding.shape[0]
        wrong = ids[(ids < 0) | (ids >= rows)]
        if wrong.size:
            raise MinillmError(
                f"token {wrong[0]} is not in 0..{rows - 1}, the rows of the model's embedding: the ids are of another "
                "tokenizer; take the one that belongs to this model"
            )

    def _check_finite(self, finite, layer):
        """layer: whose output it is, or the number of layers: the logits."""
        if finite:
            return
        where, weights = f"output of layer {layer}", f"model.layers.{layer}"
        if layer == len(self.blocks):
            head = "model.embed_tokens, the head," if self.config.tied_head else "lm_head"
            where, weights = "logits", f"model.norm or {head}"
        raise MinillmError(
            f"NaN or infinity in the {where}: the weights of {weights} are damaged or do not fit this architecture; "
            "fetch the model again"
        )
