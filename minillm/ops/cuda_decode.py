"""A decode step as one CUDA graph: the same kernels with the same arguments for every token."""

import weakref

import numpy as np

from minillm.errors import MinillmError
from minillm.ops import launch, say_once
from minillm.ops.pages import PAGE_SIZE
from minillm.sampling import GREEDY, PENALTY_WINDOW

FINE = 1 << 30  # "the first layer whose output is not finite" (the logits come after the last), where there is none


class DecodeStep:
    """A token of each of B sequences read, and the next of each drawn: device memory that is allocated once, and a
    graph.

    What changes from token to token is `control`, a few kilobytes that are copied to the device before a step; kernels
    read lengths, positions and pages there. The first step is launched kernel by kernel (they are compiled then), the
    second is captured. Another batch, or page tables that have outgrown their room, need another DecodeStep."""

    def __init__(self, runner, caches):
        c, device, batch = runner.model.config, runner.device, len(caches)
        self.runner = weakref.proxy(runner)  # which owns this
        self.device, self.pool, self.batch = runner.device, caches[0].pool, batch
        self.capacity = max(64, 2 * max(int(cache.n_pages().max()) for cache in caches))
        self.slabs = runner.ops.slab_table(self.pool)
        heads, half = (c.n_layers, batch, c.n_kv_heads), c.head_dim // 2
        self.host, self.control = {}, {}  # one buffer here and one there, and the parts of both by name
        self._divide(
            ids=((batch,), np.int32),
            seen=((batch,), np.int32),
            lengths=(heads, np.int32),
            last_pages=(heads, np.int32),
            reals=((batch, 5), np.float64),
            ints=((batch, 2 + PENALTY_WINDOW), np.int32),
            results=((1 + batch,), np.int32),  # the first layer whose output is not finite; the next tokens
            cos=((len(c.ropes), batch, half), np.float32),
            sin=((len(c.ropes), batch, half), np.float32),
            temperature=((batch,), np.float32),
        )
        self.pages = device.empty((*heads, self.capacity), np.int32)
        self.versions = [None] * batch  # of the page tables that `pages` holds
        self.starts = device.empty((c.n_layers, batch * c.n_kv_heads + 1), np.int32)
        items, group = batch * c.n_kv_heads, c.n_heads // c.n_kv_heads
        self.space = launch.decode_space(device, items, group, c.head_dim, self.pool.format)
        self.x = device.empty((batch, c.dim), np.float32)
        self.out = device.empty((batch, c.dim), np.float32)  # of a half of a layer whose norm comes before it is added
        self.qkv = device.empty((batch, (c.n_heads + 2 * c.n_kv_heads) * c.head_dim), np.uint16)
        self.q = device.empty((c.n_layers, batch, c.n_heads, c.head_dim), np.uint16)
        self.mixed = device.empty((batch, c.n_heads, c.head_dim), np.uint16)
        self.gate_up = device.empty((batch, 2 * c.ffn_dim), np.uint16)
        self.act = device.empty((batch, c.ffn_dim), np.uint16)
        self.logits = device.empty((batch, c.vocab_size), np.float32)
        self.predicts = _predicts(caches)  # whether scores are predicted
        self.scores = device.empty(heads, np.float32)
        self.sample_space = launch.sample_space(device, batch, c.vocab_size)
        self.graph, self.steps = None, 0

    def _divide(self, **parts):
        words = {name: int(np.prod(shape)) * np.dtype(dtype).itemsize // 4 for name, (shape, dtype) in parts.items()}
        rounded = {name: -(-n // 4) * 4 for name, n in words.items()}  # so that each part begins at 16 bytes
        self.host_words = np.zeros(sum(rounded.values()), np.int32)
        self.control_words = self.device.empty(self.host_words.shape, np.int32)
        at = 0
        for name, (shape, dtype) in parts.items():
            part = slice(at, at + words[name])
            self.host[name] = self.host_words[part].view(dtype).reshape(shape)
            self.control[name] = self.control_words[part].view(dtype).reshape(shape)
            at += rounded[name]

    def fits(self, caches):
        longest = max(int(cache.n_pages().max()) for cache in caches)
        same = len(caches) == self.batch and caches[0].pool is self.pool and _predicts(caches) == self.predicts
        return same and longest <= self.capacity

    def run(self, token_ids, caches, cos, sin, temperature, draws):
        """As Runner.decode."""
        self.device.use()
        self._update(token_ids, caches, cos, sin, temperature, draws or [GREEDY] * self.batch)
        if self.steps == 1:
            self._capture()
        if self.graph:
            self.graph.launch()
        else:
            self._launch()
        self.steps += 1
        bad, *tokens = self.control["results"].get().tolist()
        queries = scores = None
        if any(cache.left.queries is not None for cache in caches):
            queries = self.runner.ops.stored_rows(self.q.get())
        if self.predicts:
            scores = self.scores.get() + np.stack([block.b_score for block in self.runner.model.blocks])[:, None]
        return tokens if draws else self.logits.get(), None if bad == FINE else bad, queries, scores

    def _update(self, token_ids, caches, cos, sin, temperature, draws):
        """The device's control words, and its page tables where more than the newest page of a head has changed."""
        host = self.host
        host["ids"][:], host["results"][0] = token_ids, FINE
        host["reals"][:], host["ints"][:] = launch.draw_tables(draws)
        host["cos"][:], host["sin"][:] = cos[:, :, 0], sin[:, :, 0]
        host["temperature"][:] = 1 if temperature is None else temperature
        for b, cache in enumerate(caches):
            one_more = np.array_equal(host["lengths"][:, b] + 1, cache.lengths)
            if not one_more or cache.version != self.versions[b]:
                self._send_tables(b, cache.pages[:, :, : cache.n_pages().max()])
            self.versions[b] = cache.version
            host["seen"][b], host["lengths"][:, b] = cache.position, cache.lengths
            newest = ((cache.lengths - 1) // PAGE_SIZE)[:, :, None]
            host["last_pages"][:, b] = np.take_along_axis(cache.pages, newest, axis=2)[:, :, 0]
        self.runner.ops.slab_table(self.pool)
        self.control_words.set(self.host_words)

    def _send_tables(self, b, pages):
        tables = np.zeros((*pages.shape[:2], self.capacity), np.int32)
        tables[:, :, : pages.shape[2]] = pages
        for layer, table in enumerate(tables):
            self.pages[layer, b].set(table)

    def _capture(self):
        try:
            self.graph = self.device.capture(self._launch)
        except MinillmError as error:
            say_once(f"minillm: {error}; decoding goes on kernel by kernel, which is slower for small models")

    def _launch(self):
        runner, device, control, real16 = self.runner, self.device, self.control, self.runner.real16
        config, scale = runner.model.config, runner.model.scale
        eps = config.rms_eps
        launch.last_pages(device, self.pages, control["lengths"], control["last_pages"])
        launch.decode_plan(device, control["lengths"], self.starts)
        launch.embed(device, runner.model.embedding, control["ids"], self.x, config.embedding_scale)
        mixed = self.mixed.reshape(self.batch, -1)
        for index, layer in enumerate(runner.layers):
            pages, lengths = self.pages[index], control["lengths"][index]
            past = launch.Paged(self.pool.format, self.slabs, self.pool.slab_pages, pages, lengths, control["seen"])
            for rows in self._groups():
                x, scores = self.x[rows], self.scores[index][rows]
                for column, weight in layer.wqkv:
                    launch.norm_gemv(device, x, layer.attention_norm, eps, weight, self.qkv[rows], column)
                if self.predicts:
                    launch.norm_gemv(device, x, layer.attention_norm, eps, layer.w_score, scores)
            q, starts, window = self.q[index], self.starts[index], layer.window or 0
            turn = layer.head_norms, eps, control["cos"][layer.rope], control["sin"][layer.rope], control["temperature"]
            launch.rope_append(device, self.qkv, layer.bqkv, *turn, q, past, real16)
            launch.decode_attention(device, q, past, starts, self.space, self.mixed, scale, window, real16)
            self._product_onto(mixed, layer.wo, layer.bo, layer.attention_output_norm)
            for rows in self._groups():
                self._activate(layer, self.x[rows], self.gate_up[rows], self.act[rows])
            self._product_onto(self.act, layer.w_down, layer.b_down, layer.mlp_output_norm)
            launch.not_finite(device, self.x, index, control["results"][:1])
        for rows in self._groups():
            launch.norm_gemv(device, self.x[rows], runner.norm, eps, runner.model.head, self.logits[rows])
        launch.not_finite(device, self.logits, len(runner.layers), control["results"][:1])
        draws, tokens = (control["reals"], control["ints"]), control["results"][1:]
        launch.sample(device, self.logits, *draws, self.sample_space, tokens)

    def _product_onto(self, h, weight, bias, norm):
        """x += h W^T and its bias, over its norm where the layer has one."""
        y = self.x if norm is None else self.out
        for rows in self._groups():
            launch.gemv(self.device, h[rows], weight, y[rows], add=norm is None)
        if bias is not None:
            launch.add_bias(self.device, y, bias)
        if norm is not None:
            launch.add_rms_norm(self.device, y, norm, self.runner.model.config.rms_eps, self.x)

    def _activate(self, layer, x, gate_up, act):
        """act (rows, ffn) = act(gate) * up of the normed x; gate_up: where both lie if they are of two formats."""
        device, norm, eps = self.device, layer.mlp_norm, self.runner.model.config.rms_eps
        activation = self.runner.activation
        if len(layer.w_gate_up) == 1:
            launch.norm_gemv_glu(device, x, norm, eps, layer.w_gate_up[0][1], layer.b_gate_up, activation, act)
            return
        for column, weight in layer.w_gate_up:
            launch.norm_gemv(device, x, norm, eps, weight, gate_up, column)
        launch.glu(device, gate_up, layer.b_gate_up, activation, act, self.runner.real16)

    def _groups(self):
        """Slices of the batch that a kernel for few rows takes at once."""
        most = launch.rows_at_once(self.device, self.x.shape[1])
        return [slice(lo, lo + most) for lo in range(0, self.batch, most)]


def _predicts(caches):
    return any(cache.left.predicted is not None for cache in caches)
