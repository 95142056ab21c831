"""The compiled kernels where the system has no memory or no thread left, and in a forked child.

Each test is a program of its own, in which aligned_alloc or pthread_create fails when it is told to."""

import os
import shlex
import shutil
import subprocess
import sys
import textwrap

import pytest
from paths import ROOT, TESTS

CC = shlex.split(os.environ.get("CC", "cc"))
if not sys.platform.startswith("linux") or not shutil.which(CC[0]):
    pytest.skip("failing calls are put in with LD_PRELOAD and need a C compiler", allow_module_level=True)

from compiled import PATHS  # noqa: E402 (it skips where there are no kernels)

PROLOGUE = """
import ctypes, os, sys
import numpy as np
from small_models import VOCAB, config_of, ids_of, model_of
from minillm.cache.kv_cache import KVCache
from minillm.cache.page_pool import PagePool
from minillm.compress.compressor import Compressor
from minillm.compress.config import CacheConfig
from minillm.compress.reading import extend
from minillm.ops import backend, cpu_lib

faults = ctypes.CDLL(os.environ["FAULTS"])
cpu_ops = backend("cpu", 3)
rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape, np.float32)

def failures(operation, expected, rtol=2e-2):
    '''How many allocations `operation` needs: each fails in turn. After that, it gives what is expected.'''
    for n in range(1, 200):
        cpu_ops.trim()
        faults.fail_memory(n)
        try:
            found = operation()
        except MemoryError as error:
            assert "the system has no" in str(error), error
            continue
        faults.fail_memory(0)
        np.testing.assert_allclose(found, expected, rtol, rtol * np.abs(expected).max())
        return n - 1
    raise AssertionError("it never ends")

def model_and_cache():
    model = model_of(config_of(dim=64, head_dim=16, ffn_dim=96, n_heads=4), cpu_ops)
    pool = PagePool(cpu_ops, 16)
    return model, KVCache(pool, 2, 2)
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run([*CC, "-O1", "-shared", "-fPIC", TESTS / "ops/memory_faults.c", "-o", library, "-ldl"], check=True)
    return library


@pytest.fixture
def program(faults):
    """Runs Python text after the PROLOGUE; -> what it printed. It must end without a word on stderr."""

    def run(text, path=PATHS[0]):
        preload = f"{faults} {os.environ.get('LD_PRELOAD', '')}"
        folders = f"{os.environ.get('PYTHONPATH', ROOT)}{os.pathsep}{TESTS}"
        sanitizer = f"{os.environ.get('ASAN_OPTIONS', '')}:verify_asan_link_order=0"  # memory_faults.c comes first
        env = os.environ | {"LD_PRELOAD": preload, "PYTHONPATH": folders, "FAULTS": str(faults), "MINILLM_CPU": path}
        command = [sys.executable, "-c", f"{PROLOGUE}\n{textwrap.dedent(text)}"]
        done = subprocess.run(
            command, env=env | {"ASAN_OPTIONS": sanitizer}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("path", PATHS)
def test_an_operation_that_cannot_have_memory_raises_and_the_next_one_is_right(program, path):
    """Products of few rows and of many, attention, scores, sums, nearest rows and planning: whatever allocation fails,
    in the caller's thread or in another."""
    said = program(
        """
        from minillm.files.formats import FORMATS
        from minillm.files.weights import Weight
        from minillm.ops.numpy_ops import NUMPY as numpy_ops
        import gguf
        w = normal(96, 64)
        f32 = Weight.floats(w)
        blocks = Weight(FORMATS["Q8_0"], gguf.quants.quantize(w, gguf.GGMLQuantizationType.Q8_0), w.shape)
        for weight in (f32, blocks):
            for n in (1, 70):
                x, prepared = normal(n, 64), cpu_ops.prepare(weight)
                at_least = 0 if weight is f32 and n == 1 else 1
                assert failures(lambda: cpu_ops.linear(x, prepared), numpy_ops.linear(x, weight)) >= at_least
        cache = model_and_cache()[1]
        past, q, k, v = cache.layer(0), normal(4, 90, 16), normal(2, 90, 16), normal(2, 90, 16)
        expected = numpy_ops.prefill_attention(q, k, v, past, 0.25)[0]
        assert failures(lambda: cpu_ops.prefill_attention(q, k, v, past, 0.25)[0], expected) > 3
        cache.append(0, k, v, np.arange(90))
        rows, lengths, pos = k.reshape(-1, 16), np.array([90, 90]), np.tile(np.arange(90), 2)
        sizes = np.zeros(180, np.float32)
        arguments = q, rows, lengths, sizes, pos, np.arange(90), 0.25
        assert failures(lambda: cpu_ops.column_scores(*arguments), numpy_ops.column_scores(*arguments), 5e-2) > 2
        dest, weight = np.arange(180) // 3, normal(180)
        assert failures(lambda: cpu_ops.merge(rows, dest, weight, 60), numpy_ops.merge(rows, dest, weight, 60)) > 0
        some = np.arange(0, 90, 3), np.arange(90), np.zeros(30, np.int64), np.full(30, 90)
        assert failures(lambda: cpu_ops.nearest(rows, *some)[1], numpy_ops.nearest(rows, *some)[1]) > 0
        kept = np.arange(180) % 4 == 0
        plan = np.abs(normal(180)), np.ones(180, np.float32), pos.astype(np.int32), kept, kept & False, lengths, 90, 1.0
        assert failures(lambda: cpu_ops.fold(*plan)[1], numpy_ops.fold(*plan)[1]) == 1
        print("done")
        """,
        path,
    )
    assert said == "done\n"


@pytest.mark.parametrize("path", PATHS)
def test_a_step_without_memory_leaves_the_caches_as_promised(program, path):
    """decode: as they were; extend and recompress: empty. After it the same step gives what it gave before."""
    assert "done" in program(
        """
        model, cache = model_and_cache()
        extend(model, ids_of(70), cache)
        before, held, failed = cache.lengths.copy(), cache.read(0).k.copy(), 0
        logits = model.decode([5], [cache.fork()])
        for n in range(1, 200):
            cpu_ops.trim()
            faults.fail_memory(n)
            try:
                found = model.decode([5], [cache])
                break
            except MemoryError:
                failed += 1
                np.testing.assert_array_equal(cache.lengths, before)
                np.testing.assert_array_equal(cache.read(0).k, held)
        faults.fail_memory(0)
        np.testing.assert_array_equal(found, logits)
        assert failed > 2, failed

        def compressor(method):
            config = CacheConfig(method, 0.3)
            classes = np.zeros(VOCAB, np.uint8)
            return Compressor(config.resolve(), model, classes)

        for method in ("snapkv", "semanticache", "h2o"):
            cache, failed = KVCache(PagePool(cpu_ops, 16), 2, 2), 0
            expected = np.array(extend(model, ids_of(70), cache, compressor(method)))
            for n in range(1, 400):
                cache = KVCache(PagePool(cpu_ops, 16), 2, 2)
                cpu_ops.trim()
                faults.fail_memory(n)
                try:
                    found = extend(model, ids_of(70), cache, compressor(method))
                    break
                except MemoryError:
                    failed += 1
                    assert cache.seen == 0 and not cache.lengths.any()
            faults.fail_memory(0)
            np.testing.assert_array_equal(found, expected)
            assert failed > 5, failed
        print("done")
        """,
        path,
    )


@pytest.mark.parametrize("fails_at, there", [(1, 1), (2, 2), (3, 3), (4, 4)])
def test_fewer_threads_where_the_system_has_no_more(program, fails_at, there):
    assert f"{there} threads" in program(
        f"""
        w = normal(96, 64)
        from minillm.files.weights import Weight
        x, weight = normal(5, 64), Weight.floats(w)
        faults.fail_thread({fails_at})
        library = cpu_lib.library()
        print(library.functions["set_threads"](4), "threads")
        library.threads = cpu_ops.lib.threads = 4
        np.testing.assert_allclose(cpu_ops.linear(x, weight), x @ w.T, 1e-4, 1e-4)
        """
    )


def test_the_system_refuses_the_pages(program):
    """A limit on address space, as `ulimit -v` sets it, for pages and for weights."""
    assert program(
        """
        import resource
        from minillm.ops.pages import BFLOAT16
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), resource.RLIM_INFINITY))
        for ask in (lambda: cpu_ops.new_slab(1 << 14, 32, 16, BFLOAT16), lambda: cpu_lib.huge_pages(1 << 26)):
            try:
                ask()
                print("no error")
            except MemoryError as error:
                print("the system has no" in str(error))
        """
    ).split() == ["True", "True"] or "asan" in os.environ.get("LD_PRELOAD", "")


@pytest.mark.parametrize("start", ["os.fork", "multiprocessing"])
def test_a_forked_child_reads_on(program, start):
    """It was forked while another thread of its parent was in a kernel, and held the lock."""
    assert program(
        f"""
        import multiprocessing, threading, time
        model, cache = model_and_cache()
        extend(model, ids_of(70), cache)
        other = cache.fork()
        expected = model.decode([5], [cache])
        lock, release = cpu_lib.library().lock, threading.Event()

        def hold():
            with lock:
                release.wait()

        def child():
            np.testing.assert_array_equal(model.decode([5], [other]), expected)
            cpu_ops.lib.threads = 2
            np.testing.assert_array_equal(model.decode([5], [other.fork()]).shape, expected.shape)

        holder = threading.Thread(target=hold)
        holder.start()
        while not lock.locked():
            time.sleep(0.001)
        if {start!r} == "os.fork":
            pid = os.fork()
            if not pid:
                try:
                    child()
                    os._exit(0)
                except BaseException as error:
                    print(error, file=sys.stderr, flush=True)
                    os._exit(1)
            status = os.waitpid(pid, 0)[1]
        else:
            process = multiprocessing.get_context("fork").Process(target=child)
            process.start()
            process.join()
            status = process.exitcode
        release.set()
        holder.join()
        print(status)
        """
    ).split() == ["0"]
