"""The forward pass of a Llama: embed -> blocks -> norm -> head, as straight-line pages of code.

`extend` reads many new tokens of one sequence (a prompt, or a later turn over a compressed cache); `decode` reads one
token of each of several sequences. Both leave the new entries in the cache."""

from dataclasses import dataclass, replace

import numpy as np

from minillm.cache.kv_cache import KVCache
from minillm.compress.plan import Queries
from minillm.errors import MinillmError
from minillm.files.weights import Weight
from minillm.rope import Rope
from minillm.sampling import sample_each

MLP_ROWS = 1024  # rows of the wide middle of the MLP, and of logits, that exist at a time


@dataclass
class Block:
    """The weights of one layer: Weights (out, in); norms and biases float32 vectors, None where the model has none."""

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
    w_score: object = None  # (n_kv_heads, dim): what a token will be worth to a head, where a profile says so
    b_score: np.ndarray | None = None

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
    """Weights of one model and the operations of one backend. config: ModelConfig; weights: name -> Weight; scores: see
    `foresee`."""

    def __init__(self, config, weights, ops, scores=None):
        self.config, self.ops, self.rope = config, ops, Rope(config)
        for name in [name for name, weight in weights.items() if len(weight.shape) > 1]:
            weights[name] = ops.prepare(weights[name])  # one at a time: the words it was made from are given back
        self.embedding = weights["model.embed_tokens.weight"]
        self.blocks = [Block.of(weights, layer) for layer in range(config.n_layers)]
        self.norm = weights["model.norm.weight"].data
        self.head = self.embedding if config.tied_head else weights["lm_head.weight"]
        self.scale = config.head_dim**-0.5
        if scores:
            self._project(*scores)
        self.runner = ops.runner(self)  # the same steps in fewer calls, or None

    @property
    def nbytes(self):
        """Bytes of the weights that every token reads."""
        matrices = (w for block in self.blocks for w in vars(block).values() if w is not None)
        return sum(w.nbytes for w in matrices) + self.norm.nbytes + self.head.nbytes

    @property
    def norms(self):
        """Weights of the norms before attention and MLP of each layer in turn: 2 L vectors."""
        return [norm for block in self.blocks for norm in (block.attention_norm, block.mlp_norm)]

    def foresee(self, weight, bias):
        """Predict scores with these projections from now on: weight (L, H, dim), bias (L, H), both float32."""
        self._project(weight, bias)
        self.runner = None  # on a GPU it holds matrices, which the new one makes again
        self.runner = self.ops.runner(self)

    def _project(self, weight, bias):
        for block, w, b in zip(self.blocks, weight, bias, strict=True):
            block.w_score, block.b_score = self.ops.prepare(Weight("F32", w, w.shape)), b

    def extend(self, token_ids, cache, compressor=None, progress=None):
        """Read n new tokens of one sequence. -> hidden states (n, dim) before the last norm.

        Only one layer's keys and values exist in full: each layer's are compressed and stored in pages before the
        next begins; where the compressor can tell at once what to keep, only a block of that layer's. progress(layers
        done, layers) is called after every layer. If anything is raised on the way the cache is cleared."""
        n, hidden = len(token_ids), []
        step = compressor.block_tokens if compressor and compressor.block_tokens else max(n, 1)
        for lo in range(0, max(n, 1), step):
            hi = min(lo + step, n)
            hidden.append(self.extend_each(token_ids[lo:hi], [cache], [compressor], _part(progress, lo, hi, n), n - hi))
        return hidden[0] if len(hidden) == 1 else self.ops.concatenate(hidden)

    def extend_each(self, token_ids, caches, compressors, progress=None, coming=0):
        """`extend` of several caches that hold the same (nothing, where there are several) by the same tokens, each
        stored as its own compressor has it (None: whole): one reading for all. coming: tokens of the prompt that follow
        in later blocks."""
        if len(caches) > 1 and any(cache.seen for cache in caches):
            raise ValueError("caches that are extended together must be empty: what they attend to must be the same")
        try:
            return self._extend(token_ids, caches, compressors, progress, coming)
        except BaseException:
            for cache in caches:
                cache.clear()
            raise

    def _extend(self, token_ids, caches, compressors, progress, coming):
        first, compressions = caches[0], []
        for cache, compressor in zip(caches, compressors, strict=True):
            compressions.append(compressor.begin(cache, token_ids, coming) if compressor else None)
        reads = {compression.reads for compression in compressions if compression}
        noting = [cache for cache in caches if cache.predicted is not None]
        wants = {name for name, wanted in (("queries", "new" in reads), ("scores", noting)) if wanted}
        pos = np.arange(first.position, first.position + len(token_ids))
        cos, sin = self.rope.tables(pos, first.position + len(pos))
        x = self.ops.embed(self.embedding, token_ids)  # (n, dim), the residual stream
        again = Rereading(self, token_ids, first) if "again" in reads else None
        for index, block in enumerate(self.blocks):
            q, lse, k, v, scores, mixed = self.attention(index, x, cos, sin, first.layer(index), wants)
            for cache in noting:
                cache.predicted[index].append(scores)
            queries = {"new": [Queries(q, pos, lse)]}
            if again:
                queries["again"] = again.layer(index, k, v, pos)
            for cache, compression in zip(caches, compressions, strict=True):
                if compression:
                    compression.store(index, k, v, queries.get(compression.reads, ()), block.wo)
                else:
                    cache.append(index, k, v, pos)
                    cache.forget()
            del q, lse, k, v, queries
            self._check_finite(self.output(index, x, mixed), index)
            if progress:
                progress(index + 1, len(self.blocks))
        for cache, compression in zip(caches, compressions, strict=True):
            if compression:
                compression.finish()
            else:
                cache.advance(token_ids)
        return x

    def attention(self, index, x, cos, sin, past, wants=()):
        """The first half of a layer: x (n, dim) -> q (Hq, n, d); lse (Hq, n) of its attention; k, v (H, n, d); q and k
        rotated; predicted scores (H, n) on the host; mixed (n, Hq * d), the attention's output. q, lse and scores may
        be None where `wants` lacks "queries" or "scores"."""
        if self.runner:
            return self.runner.attention(index, x, cos, sin, past, wants)
        ops, block, config = self.ops, self.blocks[index], self.config
        h = ops.rms_norm(x, block.attention_norm, config.rms_eps)
        q, k, v = self._qkv(block, h)
        scores = self._scores(block, h) if "scores" in wants else None
        q, k = ops.rope(q, cos, sin), ops.rope(k, cos, sin)
        mixed, lse = ops.prefill_attention(q, k, v, past, self.scale, config.sliding_window)
        return q, lse, k, v, scores, mixed

    def output(self, index, x, mixed):
        """The second half: x += W_O mixed, x += mlp(norm(x)). -> whether x is finite."""
        if self.runner:
            return self.runner.output(index, x, mixed)
        block = self.blocks[index]
        x += self.ops.linear(mixed, block.wo, block.bo)
        for lo in range(0, len(x), MLP_ROWS):
            x[lo : lo + MLP_ROWS] += self._mlp(block, x[lo : lo + MLP_ROWS])
        return np.isfinite(x).all()

    def decode(self, token_ids, caches, draws=None):
        """Read one token of each of B sequences: token_ids (B,), B caches of one pool. -> logits (B, vocab), or by B
        Draws the token that comes next in each.

        If anything is raised on the way the caches hold what they held before."""
        before = [cache.lengths.copy() for cache in caches]
        try:
            result, queries, scores = self._decode(token_ids, caches, draws)
        except BaseException:
            for cache, lengths in zip(caches, before, strict=True):
                cache.cut(lengths)
            raise
        for b, (token, cache) in enumerate(zip(token_ids, caches, strict=True)):
            cache.advance([token])
            if cache.queries is not None:
                cache.queries.append(np.stack([q[b] for q in queries]))
            if cache.predicted is not None:
                for noted, layer in zip(cache.predicted, scores, strict=True):
                    noted.append(layer[b][:, None])
        return result

    def _decode(self, token_ids, caches, draws):
        """-> logits (B, vocab) or the next tokens, and of every layer, where a cache collects them, rotated queries (B,
        Hq, d) and predicted scores (B, H)."""
        ops, eps, window = self.ops, self.config.rms_eps, self.config.sliding_window
        tables = [self.rope.tables(np.array([cache.position]), cache.position + 1) for cache in caches]
        cos, sin = (np.stack(parts) for parts in zip(*tables, strict=True))  # (B, 1, d/2)
        if self.runner:
            for cache in caches:
                cache.make_room()
            result, bad_layer, queries, scores = self.runner.decode(token_ids, caches, cos, sin, draws)
            self._check_finite(bad_layer is None, bad_layer)
            return result, queries, scores
        x, queries, scores = ops.embed(self.embedding, token_ids), [], []  # (B, dim)
        wants_scores = any(cache.predicted is not None for cache in caches)
        for index, block in enumerate(self.blocks):
            h = ops.rms_norm(x, block.attention_norm, eps)
            q, k, v = (y.transpose(1, 0, 2) for y in self._qkv(block, h))
            q, k = ops.rope(q, cos, sin), ops.rope(k, cos, sin)  # (B, heads, d)
            queries.append(q)
            if wants_scores:
                scores.append(self._scores(block, h).T)
            for b, cache in enumerate(caches):
                cache.append(index, k[b][:, None], v[b][:, None], [cache.position])
            mixed = ops.decode_attention(q, [cache.layer(index) for cache in caches], self.scale, window)
            x += ops.linear(mixed, block.wo, block.bo)
            x += self._mlp(block, x)
            self._check_finite(np.isfinite(x).all(), index)
        return sample_each(self.logits(x), draws), queries, scores

    def logits(self, hidden):
        """Hidden states (n, dim) before the last norm -> logits (n, vocab) float32."""
        if self.runner:
            return self.runner.logits(hidden)
        return self.ops.linear(self.ops.rms_norm(hidden, self.norm, self.config.rms_eps), self.head)

    def draw(self, hidden, draws):
        """Hidden states (B, dim) before the last norm -> the token that comes next in each of B sequences, by B
        Draws."""
        if self.runner:
            return self.runner.draw(hidden, draws)
        return sample_each(self.logits(hidden), draws)

    def recompress(self, cache, compressor):
        """Compress what was generated since the last time. If anything is raised on the way the cache is cleared."""
        try:
            compression = compressor.begin(cache, [], generated=True)
            if compression:
                for index, block in enumerate(self.blocks):
                    compression.store(index, wo=block.wo)
                compression.finish()
        except BaseException:
            cache.clear()
            raise

    def _qkv(self, block, x):
        """x (n, dim) -> q (Hq, n, d), k and v (H, n, d), not yet rotated."""
        heads = ((block.wq, block.bq), (block.wk, block.bk), (block.wv, block.bv))
        outputs = (self.ops.linear(x, weight, bias) for weight, bias in heads)
        return [np.ascontiguousarray(y.reshape(len(x), -1, self.config.head_dim).transpose(1, 0, 2)) for y in outputs]

    def _scores(self, block, x):
        """x (n, dim) -> (H, n) what the profile predicts each token to be worth to the head: log of an attention."""
        return self.ops.linear(x, block.w_score, block.b_score).T

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


class Rereading:
    """A second reading of the new tokens, carried through the layers beside the first: in blocks, each of which sees
    the text and itself. What it attends to says what the text needs (KVzip, KVCompose, hindsight).

    Beside what the first reading takes, it takes a hidden state a token and one layer's keys and values once more."""

    BLOCK = 2048  # tokens

    def __init__(self, model, token_ids, cache):
        self.model, self.cache, n = model, cache, len(token_ids)
        self.position = cache.position + n  # of the second reading's first token
        self.text = KVCache(cache.pool, 1, model.config.n_kv_heads)  # one layer of it, whole
        self.blocks = [slice(lo, min(lo + self.BLOCK, n)) for lo in range(0, n, self.BLOCK)]
        self.x = model.ops.embed(model.embedding, token_ids)

    def layer(self, index, k, v, pos):
        """Read on through layer `index`, whose new keys and values are k, v (H, n, d). -> a list of Queries."""
        model, text, queries = self.model, self.text, []
        text.cut(np.zeros_like(text.lengths))
        if self.cache.seen:
            text.write(0, self.cache.read(index))
        text.append(0, k, v, pos)
        past = replace(text.layer(0), seen=self.position)
        for rows in self.blocks:
            x, pos = self.x[rows], self.position + np.arange(rows.stop - rows.start)
            tables = model.rope.tables(pos, int(pos[-1]) + 1)
            q, lse, _, _, _, mixed = model.attention(index, x, *tables, past, {"queries"})
            model.output(index, x, mixed)
            queries.append(Queries(q, pos, lse))
        return queries


def _part(progress, lo, hi, n):
    """The progress of the tokens lo..hi of n: it goes on from what the blocks before it have done."""
    if progress is None:
        return None
    return lambda done, layers: progress((lo + (hi - lo) * done / layers) * layers / n, layers)
