"""Everything there is to ask of a GPU, in one call of less than nine minutes: are the kernels right, how fast are they
against what the card can do, and what does a model of Llama-3-8B's shape take in time and memory.

    python tools/gpu_check.py [--out gpu.json] [--device 0] [--seconds 520]

It needs minillm with the extra cuda12 or cuda13, pytest and pytest-xdist; compute-sanitizer, torch and transformers are
used where they are. A part that fails or finds no time left is reported as such, and the others go on. The file is
written after every part; a table comes last. Exit status 1: a part failed, or a test."""

import argparse
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import numpy as np

from minillm import LLM, CacheConfig
from minillm.cache.kv_cache import Entries, KVCache
from minillm.cache.page_pool import PagePool
from minillm.errors import MinillmError
from minillm.files.config import ACTIVATIONS, ModelConfig, RopeConfig
from minillm.files.formats import BF16, FORMATS
from minillm.files.profile_file import Profile
from minillm.files.weights import Weight
from minillm.ops import launch
from minillm.ops.cuda_ops import CudaOps, open_ops
from minillm.ops.cuda_weights import CudaWeight
from minillm.sampling import GREEDY, Sampler, SamplingParams
from minillm.session import Session

ROOT = Path(__file__).resolve().parents[1]
CUDA_TESTS = ROOT / "tests" / "cuda"
SILU = ACTIVATIONS["silu"]
HEAD_DIMS = (64, 80, 128, 256)  # that kernels are compiled for ahead
LLAMA_3_8B = ModelConfig(
    name="Llama-3-8B",
    architecture="LlamaForCausalLM",
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    dim=4096,
    ffn_dim=14336,
    vocab_size=128256,
    context=131072,
    rms_eps=1e-5,
    rope=RopeConfig(theta=500000.0),
)
CACHES = {
    "full": lambda: CacheConfig("full"),
    "full, 8 bits": lambda: CacheConfig("full", dtype="int8"),
    "foresight 20 %": lambda: CacheConfig("foresight", 0.2),
    "semanticache 20 %": lambda: CacheConfig("semanticache", 0.2),
    "hindsight 20 %": lambda: CacheConfig("hindsight", 0.2),
    "streaming 20 %": lambda: CacheConfig("streaming", 0.2),
    "semanticache 50 %": lambda: CacheConfig("semanticache", 0.5),
    "semanticache 35 %": lambda: CacheConfig("semanticache", 0.35),
}
SAMPLING = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=0.8),
    "top-k, top-p, min-p": SamplingParams(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05),
}
CONTEXTS, BATCHES = (8192, 32768), (1, 8)
GIB = 1 << 30
REPEATS = 20  # of a short kernel, in one graph
LATER = 110  # seconds that are left to what comes after the model


class Report:
    """Results by part, written to a file after each; and how much time is left."""

    def __init__(self, path, seconds):
        self.path, self.end, self.results = path, time.monotonic() + seconds, {}

    @property
    def left(self):
        return self.end - time.monotonic()

    def part(self, name, needs, run, *arguments):
        """results[name] = run(*arguments); why not, where it fails or less than `needs` seconds are left."""
        start = time.monotonic()
        if self.left < needs:
            self.results[name] = {"skipped": f"{self.left:.0f} s left, {needs} needed"}
        else:
            try:
                self.results[name] = run(*arguments)
            except Exception as error:
                traceback.print_exc()
                self.results[name] = {"failed": f"{type(error).__name__}: {error}"}
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        self.path.write_text(json.dumps(self.results, indent=1))
        gc.collect()

    @property
    def failed(self):
        """Names of parts that failed, or whose tests did."""
        parts = {name: part for name, part in self.results.items() if isinstance(part, dict)}
        parts |= parts.get("sanitizers", {})
        return [
            name
            for name, part in parts.items()
            if isinstance(part, dict) and ("failed" in part or part.get("passed") is False)
        ]


# (a) right or wrong


def compiled(device):
    """Every kernel in every variant for HEAD_DIMS, side by side, into the cache that CuPy keeps on disk; -> how many,
    and seconds."""
    start = time.perf_counter()
    variants = [(file, defines) for file in launch.files() for defines in launch.variants(file, HEAD_DIMS)]

    def one(file, defines):
        device.use()
        module = device.module(launch.source(file, defines))
        for kernel in launch.kernels(file):
            module.get_function(kernel)

    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(one, *variant) for variant in variants]:
            done.result()
    return {"variants": len(variants), "seconds": time.perf_counter() - start}


def kernel_tests(seconds):
    """The kernel and model tests on the device."""
    return pytest_run([], seconds, "-k", "gpu", *sorted(map(str, CUDA_TESTS.glob("test_cuda_*.py"))))


def sanitizers(seconds):
    """compute-sanitizer on a few tests."""
    if not shutil.which("compute-sanitizer"):
        return {"skipped": "no compute-sanitizer on PATH"}
    names = "test_cuda_kernels.py", "test_cuda_attention.py", "test_cuda_sampling.py"
    chosen = "gpu and (merge or entries or append or clusters or decode or ties)"
    out = {}
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        out[tool] = pytest_run(command, seconds / 2, "-k", chosen, *(str(CUDA_TESTS / name) for name in names))
    return out


def pytest_run(before, seconds, *arguments):
    """pytest under the command `before`: whether all passed, and its last lines; where it takes too long, those too."""
    options = ["-n", "0", "-p", "no:cacheprovider", "--maxfail=5"]
    command = [*before, sys.executable, "-m", "pytest", *options, *arguments]
    environment = os.environ | ({"MINILLM_SANITIZER": "1"} if before else {})
    with tempfile.TemporaryFile("w+") as out:
        try:
            status = subprocess.run(
                command, cwd=ROOT, stdout=out, stderr=out, timeout=seconds, env=environment
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
        out.seek(0)
        said = [line[:200] for line in out.read().strip().splitlines()[-15:]]
    result = {"passed": status == 0, "said": said}
    return result if status is not None else {"skipped": f"more than {seconds:.0f} s", "said": said}


# (b) what the card can do


def timed(device, repeats, function, *arguments):
    """Seconds of function(device, *arguments), which only launches kernels: repeated in a graph, the best of five."""

    def run():
        for _ in range(repeats):
            function(device, *arguments)

    function(device, *arguments)  # compiles
    try:
        run = device.capture(run).launch
    except MinillmError:  # cuBLAS is not captured; such products are long
        pass
    seconds = []
    for _ in range(5):
        device.synchronize()
        start = time.perf_counter()
        run()
        device.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds) / repeats


def ceilings(device, n_bytes=4 * GIB, size=8192):
    """Bytes a second that a kernel reads, and operations a second of a large bf16 product."""
    words, bad = device.empty(n_bytes // 4, np.float32), device.upload(np.zeros(1, np.int32))
    words.fill(0)
    read = n_bytes / timed(device, 4, launch.not_finite, words, 0, bad)
    del words
    a, b, y = (device.empty((size, size), np.uint16) for _ in range(3))
    launch.random_words(device, a, 1, 1.0, "bf16")
    launch.random_words(device, b, 2, 1.0, "bf16")
    product = 2 * size**3 / timed(device, 5, type(device).gemm, a, b, y, "bf16", False)
    return {"read_bytes_per_s": read, "bf16_flop_per_s": product}


# (c) each kernel


class Kernels:
    """Times of single kernels at a model's shapes: microseconds, and how near they are to their floor, which is bytes /
    bandwidth or operations / the speed of a large product."""

    def __init__(self, device, config, ceiling):
        self.device, self.c, self.ceiling, self.rows = device, config, ceiling, {}
        self.ops = CudaOps(device)
        self.ops.real16 = "bf16"

    def add(self, name, n_bytes, flop, function, *arguments):
        seconds = timed(self.device, 3 if flop else REPEATS, function, *arguments)
        floor = max(n_bytes / self.ceiling["read_bytes_per_s"], flop / self.ceiling["bf16_flop_per_s"])
        self.rows[name] = {"us": seconds * 1e6, "share_of_floor": floor / seconds}

    def matrix(self, n_out, n_in):
        words = self.ops.random_words((n_out, n_in), 1)
        return CudaWeight.of(self.device, Weight(BF16, words, (n_out, n_in)), "bf16")

    def random(self, *shape):
        return self.ops.random_words(shape, 3)

    def products(self, batches=(1, 8)):
        """What a decode step reads of the weights of a layer."""
        c, d = self.c, self.c.head_dim
        wqkv, wo = self.matrix((c.n_heads + 2 * c.n_kv_heads) * d, c.dim), self.matrix(c.dim, c.n_heads * d)
        w_gate_up, w_down = self.matrix(2 * c.ffn_dim, c.dim), self.matrix(c.dim, c.ffn_dim)
        norm = self.device.upload(np.ones(c.dim, np.float32))
        for rows in batches:
            x = self.device.upload(np.ones((rows, c.dim), np.float32))
            qkv, act, mixed = (self.random(rows, n) for n in (wqkv.shape[0], c.ffn_dim, c.n_heads * d))
            self.add(f"norm_gemv qkv x {rows}", wqkv.nbytes, 0, launch.norm_gemv, x, norm, 1e-5, wqkv, qkv)
            self.add(f"gemv o x {rows}", wo.nbytes, 0, launch.gemv, mixed, wo, x)
            mlp = x, norm, 1e-5, w_gate_up, None, SILU, act
            self.add(f"norm_gemv_glu x {rows}", w_gate_up.nbytes, 0, launch.norm_gemv_glu, *mlp)
            self.add(f"gemv down x {rows}", w_down.nbytes, 0, launch.gemv, act, w_down, x)

    def attention(self, context=32768, prompt=8192):
        c, d, heads, device = self.c, self.c.head_dim, self.c.n_kv_heads, self.device
        scale, starts = d**-0.5, device.empty((1, heads + 1), np.int32)
        q, out = self.random(1, c.n_heads, d), device.empty((1, c.n_heads, d), np.uint16)
        for dtype in ("int8", "auto"):
            pool = PagePool(self.ops, d, dtype=dtype)
            cache = filled(self.ops, pool, replace(c, n_layers=1), context)
            past, space = (
                self.ops.paged(cache.layer(0)),
                launch.decode_space(device, heads, c.n_heads // heads, d, pool.format),
            )
            launch.decode_plan(device, past.lengths.reshape(1, 1, heads), starts)
            step, name = (
                (q, past, starts[0], space, out, scale, 0, "bf16"),
                f"decode_attention {pool.format.name} {context}",
            )
            self.add(name, cache.bytes_in_use, 0, launch.decode_attention, *step)
        n, empty = prompt, self.ops.paged(KVCache(pool, 1, heads).layer(0))
        q, k, v = self.random(c.n_heads, n, d), self.random(heads, n, d), self.random(heads, n, d)
        mixed, lse = device.empty((n, c.n_heads, d), np.uint16), device.empty((c.n_heads, n), np.float32)
        flop = 2 * n * n * d * c.n_heads
        step = q, k, v, empty, mixed, lse, scale, 0, "bf16"
        self.add(f"prefill_attention {n}", 0, flop, launch.prefill_attention, *step)

    def quantised(self):
        """The MLP's first product of a decode step, its weights in blocks."""
        c = self.c
        x, norm = (self.device.upload(np.ones(shape, np.float32)) for shape in ((1, c.dim), (c.dim,)))
        for format in (FORMATS[kind] for kind in ("Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K")):
            if c.dim % format.block:
                continue
            held, n_out = format.device, 2 * c.ffn_dim
            words = self.random(n_out, c.dim // held.chunk * 8).view(np.uint8)
            scales = self.random(n_out, c.dim // format.block * held.scales // 2)
            weight = CudaWeight(held, (n_out, c.dim), words, scales)
            arguments = x, norm, 1e-5, weight, None, SILU, self.random(1, c.ffn_dim)
            self.add(f"norm_gemv_glu {format.name}", weight.nbytes, 0, launch.norm_gemv_glu, *arguments)

    def prompt(self, n=8192):
        """What a prompt needs beside attention and large products."""
        c, d, device = self.c, self.c.head_dim, self.device
        x, h = device.empty((n, c.dim), np.float32), device.empty((n, c.dim), np.uint16)
        x.fill(1)
        norm = device.upload(np.ones(c.dim, np.float32))
        self.add(f"rms_norm x {n}", x.nbytes + h.nbytes, 0, launch.rms_norm, x, norm, 1e-5, h, "bf16")
        qkv, tables = self.random(n, (c.n_heads + 2 * c.n_kv_heads) * d), device.empty((2, n, d // 2), np.float32)
        tables.fill(1)
        q, k, v = (device.empty((heads, n, d), np.uint16) for heads in (c.n_heads, c.n_kv_heads, c.n_kv_heads))
        arguments = qkv, None, (None, None), 1e-5, tables[0], tables[1], None, q, k, v, "bf16"
        self.add(f"rope_split x {n}", 2 * qkv.nbytes + tables.nbytes, 0, launch.rope_split, *arguments)
        gate_up, act = self.random(n, 2 * c.ffn_dim), device.empty((n, c.ffn_dim), np.uint16)
        self.add(f"glu x {n}", gate_up.nbytes + act.nbytes, 0, launch.glu, gate_up, None, SILU, act, "bf16")

    def compression(self, n=32768, chunk=12, queries=32):
        """What compressing a layer of n tokens takes on the device: into pages, scores, clusters, merges by fives."""
        c, d, heads, device, ops = self.c, self.c.head_dim, self.c.n_kv_heads, self.device, self.ops
        n_rows, up = heads * n, device.upload
        keys, values, log_size = self.random(n_rows, d), self.random(n_rows, d), up(np.zeros(n_rows, np.float32))
        pos, cache = (
            up(np.tile(np.arange(n, dtype=np.int32), heads)),
            filled(ops, PagePool(ops, d), replace(c, n_layers=1), n),
        )
        first, start = up(np.arange(heads + 1, dtype=np.int32) * n), up(np.zeros(heads, np.int32))
        past, moved = ops.paged(cache.layer(0)), 2 * (keys.nbytes + values.nbytes + 2 * log_size.nbytes)
        arguments = keys, values, log_size, pos, past, first, start, "bf16"
        self.add(f"write_entries {n}", moved, 0, launch.write_entries, *arguments)
        read = partial(launch.read_entries, k=keys, v=values, log_size=log_size, pos=pos)
        self.add(f"read_entries {n}", moved, 0, read, past, first, start, d, "bf16")

        rows, q = launch.Rows(keys, log_size, pos, first, n), self.random(c.n_heads, queries, d)
        at, scale = up(np.arange(n - queries, n, dtype=np.int32)), d**-0.5
        lse = device.empty((launch.score_splits(device, q, rows), c.n_heads, queries), np.float32)
        out = device.empty((c.n_heads // heads, n_rows), np.float32)
        self.add(f"score_lse {queries} x {n}", keys.nbytes, 0, launch.score_lse, q, rows, at, lse, scale, 0, "bf16")
        arguments = q, rows, at, lse, out, scale, 0, False, 0, "bf16"
        self.add(f"column_scores {queries} x {n}", keys.nbytes, 0, launch.column_scores, *arguments)
        out = device.empty((c.n_heads // heads, queries, n_rows), np.float32)
        arguments = q, rows, at, lse, out, scale, 0, "bf16"
        self.add(f"window_scores {queries} x {n}", keys.nbytes + out.nbytes, 0, launch.window_scores, *arguments)

        starts = np.arange(0, n_rows, chunk)
        made = ops.greedy_clusters(keys, np.arange(n_rows), starts, np.diff(starts, append=n_rows))
        tables = made.segments.starts, made.segments.lengths, made.segments.place
        taus, counts = up(np.float32([0.7, 0.75, 0.8])), up(np.zeros(3, np.int32))
        self.add(f"unit_rows {n}", 3 * keys.nbytes, 0, launch.unit_rows, keys, made.unit, "bf16")
        both = made.unit.nbytes + made.kept.nbytes
        self.add(f"keep_cosines {n}", both, 0, launch.keep_cosines, made.unit, *tables, made.kept, "bf16")
        arguments = made.unit, made.kept, *tables, taus, counts, None, None, None, "bf16"
        self.add(f"clusters {n} x 3 taus", made.kept.nbytes, 0, launch.clusters, *arguments)

        n_entries, weight = -(-n_rows // 5), up(np.full(n_rows, 0.2, np.float32))
        order, fives = up(np.arange(n_rows, dtype=np.int32)), np.arange(n_entries + 1, dtype=np.int32) * 5
        fives, entries = up(np.minimum(fives, n_rows)), device.empty((n_entries, d), np.uint16)
        moved = keys.nbytes + entries.nbytes
        self.add(f"merge {n}", moved, 0, launch.merge, keys, order, fives, weight, entries, "bf16")
        turn, to = (
            up(np.ones((2, n, d // 2), np.float32)),
            up(np.minimum(np.arange(n_entries) * 5, n - 1).astype(np.int32)),
        )
        arguments = keys, pos, turn[0], turn[1], None, values, "bf16"
        self.add(f"unrotate {n}", 2 * keys.nbytes, 0, launch.unrotate, *arguments)
        arguments = keys, values, pos, order, fives, weight, to, turn[0], turn[1], entries, "bf16"
        self.add(f"merge_unrotated {n}", moved, 0, launch.merge_unrotated, *arguments)

    def planning(self, n=32768, chunk=12, width=7):
        """What deciding about the rows of a layer of n tokens takes beside scores and clusters: a fifth of them stays,
        and each of the others looks for one that does, in its chunk or in its whole head."""
        c, heads, device, up = self.c, self.c.n_kv_heads, self.device, self.device.upload
        n_rows, rng = heads * n, np.random.default_rng(1)
        scores, first = up(rng.random(n_rows, np.float32)), up(np.arange(heads + 1, dtype=np.int32) * n)
        mask, taken = np.arange(n_rows) % 5 == 0, device.empty((n_rows,), np.uint8)
        n_stays, counts = int(mask.sum()), up(np.full(heads, n // 5, np.int32))
        arguments = scores, first, counts, n, launch.select_space(device, heads, n), taken
        self.add(f"segment_topk {n}", scores.nbytes + taken.nbytes, 0, launch.segment_topk, *arguments)

        stays, number, rows = (
            up(mask.view(np.uint8)),
            device.empty((n_rows,), np.int32),
            device.empty((n_stays,), np.int32),
        )
        self.add(
            f"segment_count {n}", stays.nbytes, 0, launch.segment_count, stays, first, device.empty((heads,), np.int32)
        )
        arguments, moved = (stays, launch.compact_space(device, n_rows), rows, number), stays.nbytes + number.nbytes
        self.add(f"compact {n}", moved + rows.nbytes, 0, launch.compact, *arguments)
        values, order = up(rng.random(n_rows)), up(np.arange(n_rows, dtype=np.int32))
        fives = up(np.minimum(np.arange(n_stays + 1) * 5, n_rows).astype(np.int32))
        sums = device.empty((n_stays,), np.float64)
        moved = values.nbytes + order.nbytes + fives.nbytes + sums.nbytes
        self.add(f"segment_sum {n}", moved, 0, launch.segment_sum, values, order, fives, sums)
        out, pos = device.empty((n_rows,), np.float32), up(np.tile(np.arange(n, dtype=np.int32), heads))
        self.add(f"pooled {n}", 2 * scores.nbytes, 0, launch.pooled, scores, first, out, width, True)
        moved = stays.nbytes + pos.nbytes + number.nbytes
        self.add(f"neighbours {n}", moved, 0, launch.neighbours, stays, pos, first, number, n)

        keys, rest, stayed = self.random(n_rows, c.head_dim), np.flatnonzero(~mask), np.flatnonzero(mask)
        gone, others = (up(which.astype(np.int32)) for which in (rest, stayed))
        found, cosine = device.empty((len(rest),), np.int32), device.empty((len(rest),), np.float32)
        for of, size in (("chunk", chunk), ("head", n)):
            begin = rest // size * size
            segment = np.searchsorted(stayed, [begin, begin + size])
            compared = int(np.diff(segment, axis=0).sum())
            arguments = keys, gone, others, *map(up, segment.astype(np.int32)), found, cosine, "bf16"
            flop = 2 * c.head_dim * compared if size == n else 0
            self.add(f"nearest of a {of} {n}", keys.nbytes, flop, launch.nearest, *arguments)

    def sampling(self, batch=8):
        """Logits as a model's: a few likely tokens and a long tail."""
        device, rng = self.device, np.random.default_rng(0)
        logits = device.upload(rng.normal(0, 3, (batch, self.c.vocab_size)).astype(np.float32))
        space, tokens = launch.sample_space(device, *logits.shape), device.empty((batch,), np.int32)
        for name, params in SAMPLING.items():
            draws = [Sampler(replace(params, seed=seed)).draw([]) for seed in range(batch)]
            tables = (device.upload(table) for table in launch.draw_tables(draws))
            self.add(f"sample {name} x {batch}", logits.nbytes, 0, launch.sample, logits, *tables, space, tokens)


def kernels(device, config, ceiling):
    timing = Kernels(device, config, ceiling)
    parts = timing.products, timing.quantised, timing.attention, timing.prompt
    for part in (*parts, timing.compression, timing.planning, timing.sampling):
        part()
    device.trim()
    return timing.rows


def filled(ops, pool, config, n):
    """A cache of n random entries in every head."""
    cache, heads, d = KVCache(pool, config.n_layers, config.n_kv_heads), config.n_kv_heads, config.head_dim
    k, v = ops.random_words((heads * n, d), 1), ops.random_words((heads * n, d), 2)
    pos, zeros = np.tile(np.arange(n, dtype=np.int32), heads), np.zeros(heads * n, np.float32)
    for layer in range(config.n_layers):
        cache.write(layer, Entries(k, v, zeros, pos, np.full(heads, n)))
    cache.advance(range(n))
    return cache


# (d) a model


def model(device_number, config, bandwidth, contexts, batches, report, tokens=32):
    """TTFT, TPOT and memory for each context, cache and batch; a list of rows. tokens: as many as cross a page."""
    rows = []
    rng, before = np.random.default_rng(0), memory_used(open_ops(device_number))
    with LLM.random(config, device=f"cuda:{device_number}") as llm:
        llm.set_profile(noise_profile(config))
        loaded = memory_used(llm.model.ops)
        delimiters = (rng.random(config.vocab_size) < 1 / 12).astype(np.uint8) * 2  # as often as in prose
        for context in contexts:
            ids, longest = rng.integers(0, config.vocab_size, context).tolist(), 0.0
            for name, make in CACHES.items():
                if report.left < LATER + 1.5 * longest:
                    rows.append({"skipped": f"{name} at {context}: {report.left:.0f} s left"})
                    continue
                start = time.monotonic()
                llm.set_cache(make())
                llm.compressor.classes = delimiters
                rows += one_cache(llm, name, ids, batches, bandwidth, tokens)
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                longest = max(longest, time.monotonic() - start)
        ops = llm.model.ops
        caches_gone = memory_used(ops)
    gc.collect()  # compressors that were timed
    memory = {"before": before, "weights": loaded - before, "caches_gone": caches_gone, "closed": memory_used(ops)}
    return [*rows, {"memory_gib": {name: n_bytes / GIB for name, n_bytes in memory.items()}}]


def noise_profile(config):
    """A Profile that predicts noise, whose logs spread as real ones do."""
    shape, rng = (config.n_layers, config.n_kv_heads), np.random.default_rng(0)
    weight = rng.normal(0, 2 / config.dim**0.5, (*shape, config.dim)).astype(np.float32)
    return Profile(weight, *np.zeros((2, *shape), np.float32), {}, {"model": config.name})


def memory_used(ops, kept=False):
    """Bytes of the card that are in use, by cudaMemGetInfo; kept: what CuPy's pool keeps among them, and so the most
    that was since the last time without."""
    if not kept:
        ops.trim()
    free, total = ops.device.memory_info()
    return total - free


def timed_compression(llm, seconds):
    """The llm's compressor adds to the list what it takes for each layer, its kernels among it."""
    begin, device = llm.compressor.begin, llm.model.ops.device

    def timing(function):
        def run(*arguments, **options):
            device.synchronize()
            start = time.perf_counter()
            function(*arguments, **options)
            device.synchronize()
            seconds.append(time.perf_counter() - start)

        return run

    def begun(*arguments, **options):
        if compression := begin(*arguments, **options):
            compression.store, compression.finish = timing(compression.store), timing(compression.finish)
        return compression

    llm.compressor.begin = begun


def one_cache(llm, name, ids, batches, bandwidth, tokens):
    session, rows, ops, ttft, spent = Session(llm), [], llm.model.ops, [], []
    timed_compression(llm, spent)
    memory_used(ops)
    for attempt in range(2):  # the first compiles
        session.cache.clear()
        spent.clear()
        session.feed(ids)
        start = time.perf_counter()
        session.read()
        ttft.append(time.perf_counter() - start)
        if attempt == 0 and ttft[0] > 15:
            break
    peak = memory_used(ops, kept=True)
    for batch in batches:
        caches = [session.cache] + [copied(session.cache) for _ in range(batch - 1)]
        bytes_read = llm.model.nbytes + sum(cache.bytes_in_use for cache in caches)
        for _ in range(3):
            llm.model.decode([1] * batch, caches, [GREEDY] * batch)
        start = time.perf_counter()
        for _ in range(tokens):
            llm.model.decode([1] * batch, caches, [GREEDY] * batch)
        tpot = (time.perf_counter() - start) / tokens
        rows.append(
            {
                "context": len(ids),
                "cache": name,
                "batch": batch,
                "ttft_s": ttft[-1],
                "compression_share": sum(spent) / ttft[-1],
                "prompt_peak_gib": peak / GIB,
                "tpot_ms": tpot * 1e3,
                "tpot_over_floor": tpot / (bytes_read / bandwidth),
                "tokens_per_s": batch / tpot,
                "cache_gib": session.cache.bytes_in_use / GIB,
                "cache_share": session.cache.bytes_in_use / session.cache.full_bytes,
                "kept": session.cache.kept,
                "used_gib": memory_used(ops) / GIB,
                "graph": llm.model.runner.step.graph is not None,
            }
        )
        for cache in caches[1:]:
            cache.clear()
    session.close()
    return rows


def copied(cache):
    """Another sequence with the same entries, on pages of its own."""
    other = KVCache(cache.pool, *cache.lengths.shape)
    for layer in range(len(cache.lengths)):
        other.write(layer, cache.read(layer))
    other.advance(cache.token_ids, cache.left.tail)
    return other


# (e) the peer


def peer(config, contexts, tokens=16):
    """The same shape with transformers and torch SDPA: TTFT and TPOT at batch 1."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        return {"skipped": "no torch or no transformers"}
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    c = config
    shape = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        intermediate_size=c.ffn_dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        max_position_embeddings=c.context,
        rope_theta=c.rope.theta,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"), torch.inference_mode():
        llama, rows = LlamaForCausalLM._from_config(shape, attn_implementation="sdpa").eval(), []
        for context in contexts:
            ids, ttft = torch.randint(c.vocab_size, (1, context)), []
            for _ in range(2):
                past = None
                torch.cuda.synchronize()
                start = time.perf_counter()
                out = llama(ids, use_cache=True, logits_to_keep=1)
                torch.cuda.synchronize()
                ttft.append(time.perf_counter() - start)
                past = out.past_key_values
            token = ids[:, :1]
            for step in range(tokens + 3):
                if step == 3:
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                out = llama(token, past_key_values=past, use_cache=True)
            torch.cuda.synchronize()
            tpot = (time.perf_counter() - start) / tokens
            rows.append({"context": context, "ttft_s": min(ttft), "tpot_ms": tpot * 1e3})
        return rows


def table(results):
    """The short table: what a README would show."""
    lines = [f"{key}: {value}" for key, value in results["run"].items()]
    for name in ("tests", "sanitizers"):
        lines.append(f"{name}: {json.dumps(results.get(name))[:300]}")
    if "read_bytes_per_s" in results.get("ceilings", {}):
        ceiling = results["ceilings"]
        lines.append(
            f"reads {ceiling['read_bytes_per_s'] / 1e9:.0f} GB/s, bf16 {ceiling['bf16_flop_per_s'] / 1e12:.0f} TFLOP/s"
        )
    for name, row in results.get("kernels", {}).items():
        if isinstance(row, dict):
            lines.append(f"{name:<36}{row['us']:>10.1f} us {100 * row['share_of_floor']:>5.0f} % of the floor")
    header = (
        f"{'cache':<20}{'context':>8}{'batch':>6}{'TTFT s':>8}{'compr. %':>9}{'TPOT ms':>9}{'/floor':>7}{'tok/s':>8}"
    )
    lines.append(f"{header}{'cache GiB':>10}{'% of full':>10}")
    models = results.get("model", [])
    for row in models if isinstance(models, list) else []:
        if "cache" in row:
            times = f"{row['ttft_s']:>8.2f}{100 * row['compression_share']:>9.1f}{row['tpot_ms']:>9.2f}"
            numbers = f"{times}{row['tpot_over_floor']:>7.2f}{row['tokens_per_s']:>8.1f}{row['cache_gib']:>10.3f}"
            share = 100 * row["cache_share"]
            lines.append(f"{row['cache']:<20}{row['context']:>8}{row['batch']:>6}{numbers}{share:>10.1f}")
        else:
            lines.append(json.dumps(row))
    peers = results.get("peer", [])
    for row in peers if isinstance(peers, list) else []:
        lines.append(f"{'torch SDPA':<20}{row['context']:>8}{1:>6}{row['ttft_s']:>8.2f}{'':>9}{row['tpot_ms']:>9.2f}")
    for name, value in results.items():
        if isinstance(value, dict) and {"failed", "skipped"} & value.keys():
            lines.append(f"{name}: {value}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=520)
    args = parser.parse_args()
    report = Report(args.out, args.seconds)
    ops = open_ops(args.device)
    device = ops.device
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    report.results["run"] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "card": device.description(),
        "commit": commit.strip(),
    }
    report.part("compiled", 10, compiled, device)
    report.part("ceilings", 10, ceilings, device)
    ceiling = report.results["ceilings"]
    measured = not {"failed", "skipped"} & ceiling.keys()
    if measured:
        report.part("kernels", 30, kernels, device, LLAMA_3_8B, ceiling)
    device.trim()
    report.part("tests", 60, kernel_tests, 150)
    del ops, device
    if measured:
        bandwidth = ceiling["read_bytes_per_s"]
        report.part("model", LATER + 60, model, args.device, LLAMA_3_8B, bandwidth, CONTEXTS, BATCHES, report)
    report.part("peer", 40, peer, LLAMA_3_8B, CONTEXTS)
    report.part("sanitizers", 40, sanitizers, max(20, report.left - 10))
    print(table(report.results))
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
