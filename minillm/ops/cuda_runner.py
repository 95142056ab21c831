"""The forward pass of one Model on a device: what Model._decode, .attention and .output of minillm.model compute.

q, k and v are made by one matrix where they are of one format, gate and up by another, and everything that can be fused
is one kernel."""

import itertools
import weakref

import numpy as np

from minillm.files.config import ACTIVATIONS
from minillm.ops import launch
from minillm.ops.cuda_decode import FINE, DecodeStep
from minillm.ops.cuda_weights import stacked

MLP_ROWS = 4096  # rows of the wide middle of the MLP that exist at a time
PRODUCT_BYTES = 128 << 20  # a matrix in blocks is widened in tiles of this many bytes for cuBLAS


class Layer:
    """The matrices and vectors of one layer on the device. The Block keeps views of them."""

    def __init__(self, ops, block):
        device = ops.device
        self.wqkv = _above(device, block, "wq", "wk", "wv")
        self.w_gate_up = _above(device, block, "w_gate", "w_up")
        self.wo, self.w_down = block.wo, block.w_down
        self.attention_norm, self.mlp_norm = device.upload(block.attention_norm), device.upload(block.mlp_norm)
        self.attention_output_norm = _uploaded(device, block.attention_output_norm)
        self.mlp_output_norm = _uploaded(device, block.mlp_output_norm)
        self.head_norms = _uploaded(device, block.q_norm), _uploaded(device, block.k_norm)
        self.bqkv = _uploaded(device, block.bq, block.bk, block.bv)
        self.b_gate_up = _uploaded(device, block.b_gate, block.b_up)
        self.bo, self.b_down = _uploaded(device, block.bo), _uploaded(device, block.b_down)
        self.w_score = block.w_score
        self.b_score = _uploaded(device, block.b_score)
        self.rope, self.window = block.rope, block.window


def _above(device, block, *names):
    """The matrices `names` of a Block, each above the next, as one for each run of them in the same format: a list of
    (its first row, CudaWeight). The block's own become views of these."""
    runs, first = [], 0
    for _, run in itertools.groupby(names, lambda name: getattr(block, name).format):
        run = list(run)
        whole, row = stacked(device, [getattr(block, name) for name in run]), 0
        for name in run:
            end = row + getattr(block, name).shape[0]
            setattr(block, name, whole.rows(row, end))
            row = end
        runs.append((first, whole))
        first += row
    return runs


def _uploaded(device, *parts):
    return None if parts[0] is None else device.upload(np.concatenate(parts))


class Runner:
    def __init__(self, model):
        self.model = weakref.proxy(model)  # which owns this
        self.ops, self.device, self.real16 = model.ops, model.ops.device, model.ops.real16
        self.layers = [Layer(self.ops, block) for block in model.blocks]
        self.norm = self.device.upload(model.norm)
        self.activation = ACTIVATIONS[model.config.activation]
        self.bad = self.device.upload(np.array([FINE], np.int32))
        self.step = None
        self.ops.trim()  # what the matrices were put together from

    # a prompt

    def attention(self, index, x, cos, sin, temperature, past, wants):
        """x (n, dim) float32, cos and sin (n, d/2), temperature (n,) or None on the host, past: PagedLayer -> q (Hq, n,
        d); lse (Hq, n) float32 of its attention; k, v (H, n, d); q and k rotated; predicted scores (H, n) float32, or
        None where `wants` lacks "scores"; mixed (n, Hq * d); the others of 16 bits."""
        c, layer, device, n = self.model.config, self.layers[index], self.device, len(x)
        cos, sin, temperature = (
            part if part is None else self.ops._upload_once(part) for part in (cos, sin, temperature)
        )
        normed = self._normed(x, layer.attention_norm)
        scores = self._scores(layer, normed) if "scores" in wants else None
        qkv = device.empty((n, (c.n_heads + 2 * c.n_kv_heads) * c.head_dim), np.uint16)
        self._products(normed, layer.wqkv, qkv)
        q = device.empty((c.n_heads, n, c.head_dim), np.uint16)
        k, v = (device.empty((c.n_kv_heads, n, c.head_dim), np.uint16) for _ in "kv")
        turn = layer.head_norms, c.rms_eps, cos, sin, temperature
        launch.rope_split(device, qkv, layer.bqkv, *turn, q, k, v, self.real16)
        del qkv, normed
        mixed, lse = self.ops.prefill_attention(q, k, v, past, self.model.scale, layer.window)
        return q, lse, k, v, scores, mixed

    def _scores(self, layer, normed):
        scores = self.device.empty((len(normed), layer.w_score.shape[0]), np.float32)
        self._product(normed, layer.w_score, scores)
        return scores.T + layer.b_score[:, None]

    def output(self, index, x, mixed):
        """x (n, dim) += what the layer makes of `mixed`, and its MLP. -> whether x is finite."""
        layer = self.layers[index]
        self._product_onto(x, mixed, layer.wo, layer.bo, layer.attention_output_norm)
        for lo in range(0, len(x), MLP_ROWS):
            self._mlp(layer, x[lo : lo + MLP_ROWS])
        return self._finite(x)

    def _finite(self, x):
        launch.not_finite(self.device, x, 0, self.bad)
        if self.bad.get()[0] == FINE:
            return True
        self.bad.fill(FINE)
        return False

    def _mlp(self, layer, x):
        ffn = self.model.config.ffn_dim
        gate_up, h = (self.device.empty((len(x), columns), np.uint16) for columns in (2 * ffn, ffn))
        self._products(self._normed(x, layer.mlp_norm), layer.w_gate_up, gate_up)
        launch.glu(self.device, gate_up, layer.b_gate_up, self.activation, h, self.real16)
        self._product_onto(x, h, layer.w_down, layer.b_down, layer.mlp_output_norm)

    def logits(self, hidden):
        """Hidden states (n, dim) before the last norm -> logits (n, vocab) float32 on the host."""
        return self._logits(hidden).get()

    def draw(self, hidden, draws):
        """Hidden states (B, dim) before the last norm -> the next token of each of B sequences, by B Draws, and whether
        the logits are finite: the tokens mean nothing if not."""
        device, logits, tokens = self.device, self._logits(hidden), self.device.empty((len(draws),), np.int32)
        finite = self._finite(logits)
        tables = (device.upload(table) for table in launch.draw_tables(draws))
        launch.sample(device, logits, *tables, launch.sample_space(device, *logits.shape), tokens)
        return tokens.get().tolist(), finite

    def _logits(self, hidden):
        logits = self.device.empty((len(hidden), self.model.head.shape[0]), np.float32)
        if len(hidden) <= launch.rows_at_once(self.device, hidden.shape[1]):
            launch.norm_gemv(self.device, hidden, self.norm, self.model.config.rms_eps, self.model.head, logits)
        else:
            self._product(self._normed(hidden, self.norm), self.model.head, logits)
        return logits

    def _normed(self, x, norm):
        h = self.device.empty(x.shape, np.uint16)
        launch.rms_norm(self.device, x, norm, self.model.config.rms_eps, h, self.real16)
        return h

    def _product_onto(self, x, h, weight, bias, norm):
        """x += h W^T and its bias, over its norm where the layer has one."""
        y = x if norm is None else self.device.empty(x.shape, np.float32)
        self._product(h, weight, y, add=norm is None)
        if bias is not None:
            launch.add_bias(self.device, y, bias)
        if norm is not None:
            launch.add_rms_norm(self.device, y, norm, self.model.config.rms_eps, x)

    def _products(self, h, runs, y):
        """y (n, columns) = h times the matrices of _above."""
        for column, weight in runs:
            self._product(h, weight, y[:, column : column + weight.shape[0]])

    def _product(self, h, weight, y, add=False):
        product(self.device, h, weight, y, self.real16, add)

    # a token of each sequence

    def decode(self, token_ids, caches, cos, sin, temperature, draws=None):
        """One token of each of B sequences; the last entry of every head of the caches is the new token's and is
        written here. cos, sin (ropes, B, 1, d/2); temperature (B,) or None. -> on the host: logits (B, vocab), or by B
        Draws the next tokens; the first layer whose output is not finite, L for the logits, or None; rotated queries
        (L, B, Hq, d) and predicted scores (L, B, H), or None where no cache collects them."""
        if self.step is None or not self.step.fits(caches):
            self.step = None  # its memory may serve the new one
            self.step = DecodeStep(self, caches)
        return self.step.run(token_ids, caches, cos, sin, temperature, draws)


def product(device, h, weight, y, real16, add=False):
    """y (n, out) = or += h (n, in) W^T with cuBLAS; h real16, y float32 or real16. Blocks are widened in tiles."""
    if weight.scales is None:
        device.gemm(h, weight.words.view(np.uint16), y, real16, add)
        return
    step = max(1, PRODUCT_BYTES // (2 * weight.shape[1]))
    for lo in range(0, weight.shape[0], step):
        words = device.empty((min(step, weight.shape[0] - lo), weight.shape[1]), np.uint16)
        launch.dequantize(device, weight, lo, words)
        device.gemm(h, words, y[:, lo : lo + len(words)], real16, add)
