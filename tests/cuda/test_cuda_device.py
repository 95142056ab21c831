"""Opening a GPU, what is said where that fails, and where the bytes go: with a CuPy made of nothing, and an LLM on the
emulated device."""

import builtins
import ctypes
import gc
import os
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import emulator
import numpy as np
import pytest
from conftest import cuda_device_or_skip
from cuda_words import from_words, to_words
from model_files import CONFIG

from minillm import LLM, CacheConfig, SamplingParams, ops
from minillm.errors import MinillmError, UsageError
from minillm.ops import cuda_device, launch

SMALL = replace(CONFIG, head_dim=64, dim=64, vocab_size=72, context=512)


class FakeError(Exception):
    pass


class Module(SimpleNamespace):
    """Hashable, as modules are."""

    __hash__ = object.__hash__


def fake_cupy(driver=13000, package=13000, devices=1, arch="90", compiler=True, headers=True):
    """As much of CuPy as opening a device asks for."""

    def count():
        if driver < package:
            raise FakeError("cudaErrorInsufficientDriver")
        return devices

    def create(*_):
        if not compiler:
            raise RuntimeError("libnvrtc.so.13: cannot open shared object file")
        return "program"

    def compiled(*_):
        if not headers:
            raise FakeError("NVRTC_ERROR_COMPILATION")

    runtime = SimpleNamespace(
        CUDARuntimeError=FakeError,
        getDeviceCount=count,
        driverGetVersion=lambda: driver,
        runtimeGetVersion=lambda: package,
    )
    log = 'probe.cu(1): error: could not open source file "cuda_fp16.h"'
    nvrtc = SimpleNamespace(
        NVRTCError=FakeError,
        createProgram=create,
        compileProgram=compiled,
        destroyProgram=lambda _: None,
        getProgramLog=lambda _: log,
    )
    core = SimpleNamespace(assemble_cupy_compiler_options=lambda options: options)
    cuda = SimpleNamespace(runtime=runtime, nvrtc=nvrtc, Device=lambda i: SimpleNamespace(compute_capability=arch))
    return SimpleNamespace(cuda=cuda, _core=SimpleNamespace(core=core))


@pytest.mark.parametrize(
    "has, parts",
    [
        ({"driver": 0}, ["no NVIDIA driver", "--device cpu"]),
        ({"driver": 12040}, ["built for CUDA 13.0", "driver supports 12.4", "minillm-engine[cuda12]"]),
        ({"devices": 0}, ["cuda:0 is not there", "0 GPU"]),
        ({"arch": "75"}, ["compute capability 7.5", "needs 8.0", "--device cpu"]),
        ({"compiler": False}, ["NVRTC cannot be loaded", "nvidia-cuda-nvrtc==13.*"]),
        ({"driver": 12040, "package": 12000, "compiler": False}, ["nvidia-cuda-nvrtc-cu12"]),
        ({"headers": False}, ["CUDA's headers", "cuda_fp16.h", "nvidia-cuda-crt==13.*"]),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(monkeypatch, has, parts):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(**has))
    with pytest.raises(MinillmError) as error:
        ops.backend("cuda")
    assert all(part in str(error.value) for part in parts), error.value


def test_without_cupy(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "cupy":
            raise ImportError("No module named 'cupy'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MinillmError, match=r"CuPy.*minillm-engine\[cuda13\].*--device cpu"):
        ops.backend("cuda")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA"])
def test_a_device_that_is_not_known(name):
    with pytest.raises(UsageError, match="auto, cpu, cuda or cuda:1"):
        ops.backend(name)


@pytest.mark.parametrize("real16", ["half", "bf16"])
@pytest.mark.parametrize("wide", [False, True])  # y in float32
@pytest.mark.parametrize("add", [False, True])
def test_what_cublas_is_asked_for(real16, wide, add):
    """gemmEx as its manual has it, column-major, on what the pointers point to; y is a stretch of the columns of a
    larger matrix."""
    types = {2: "half", 14: "bf16", 0: None}

    def matrix(pointer, kind, rows, cols, leading):
        words = (ctypes.c_uint8 * (leading * cols * (2 if types[kind] else 4))).from_address(pointer)
        words = np.frombuffer(words, np.uint16 if types[kind] else np.float32)
        return np.lib.stride_tricks.as_strided(words, (rows, cols), (words.itemsize, leading * words.itemsize))

    def values(words, kind):
        return from_words(words, types[kind]) if types[kind] else words

    def gemm_ex(
        handle, op_a, op_b, m, n, k, alpha, a, a_kind, lda, b, b_kind, ldb, beta, c, c_kind, ldc, compute, algo
    ):
        assert (handle, op_a, op_b, compute, algo) == ("handle", "T", "N", "32F", "default")
        alpha, beta = (ctypes.c_float.from_address(p).value for p in (alpha, beta))
        product = values(matrix(a, a_kind, k, m, lda), a_kind).T @ values(matrix(b, b_kind, k, n, ldb), b_kind)
        out = matrix(c, c_kind, m, n, ldc)
        total = alpha * product + beta * (values(out, c_kind) if beta else 0)
        out[...] = to_words(total, types[c_kind]) if types[c_kind] else total

    cublas = SimpleNamespace(gemmEx=gemm_ex, CUBLAS_OP_T="T", CUBLAS_OP_N="N", CUBLAS_COMPUTE_32F="32F")
    cublas.CUBLAS_GEMM_DEFAULT = "default"
    device = object.__new__(cuda_device.CudaDevice)
    runtime = SimpleNamespace(CUDA_R_16F=2, CUDA_R_16BF=14, CUDA_R_32F=0)
    device.cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    device.cublas, device.device, device.use = cublas, SimpleNamespace(cublas_handle="handle"), lambda: None
    rng, host = np.random.default_rng(0), emulator.EmulatedDevice()
    x, w = (to_words(rng.normal(size=shape), real16) for shape in ((3, 16), (5, 16)))
    before = rng.normal(size=(3, 9)).astype(np.float32)
    y = host.upload(before if wide else to_words(before, real16))
    device.gemm(host.upload(x), host.upload(w), y[:, 2:7], real16, add)
    after = y.get() if wide else from_words(y.get(), real16)
    exact = from_words(x, real16) @ from_words(w, real16).T + add * before[:, 2:7]
    np.testing.assert_allclose(after[:, 2:7], exact, atol=1e-5 if wide else 0.1)
    np.testing.assert_allclose(after[:, [0, 1, 7, 8]], before[:, [0, 1, 7, 8]], atol=0 if wide else 0.02)


class Streams:
    """CuPy's bookkeeping of streams (cupy/cuda/stream.pyx): a current one for each thread, and a stack, of which
    `use()` knows nothing: after a `with` the default stream is current."""

    def __init__(self):
        self.thread, outer = threading.local(), self

        class Stream:
            def __init__(self, non_blocking=False):
                assert non_blocking

            def use(self):
                outer.thread.current = self

            def __enter__(self):
                outer.thread.current = self

            def __exit__(self, *_):
                outer.thread.current = None

        self.Stream = Stream

    @property
    def current(self):
        return getattr(self.thread, "current", None)


def fake_device(streams, calls):
    """A CudaDevice whose CuPy notes on which stream it is asked for memory, products and kernels."""

    def note(*_, **__):
        calls.append(streams.current)

    def empty(shape, dtype):
        note()
        return SimpleNamespace(set=note, shape=shape, dtype=dtype)

    attributes = {"MultiProcessorCount": 132, "MaxSharedMemoryPerBlockOptin": 232448}
    gpu = SimpleNamespace(use=lambda: None, compute_capability="90", attributes=attributes, cublas_handle=1)
    kernel = SimpleNamespace(get_function=lambda name: note)
    runtime = SimpleNamespace(CUDA_R_16F=2, CUDA_R_16BF=14, CUDA_R_32F=0)
    cuda = SimpleNamespace(Device=lambda index: gpu, Stream=streams.Stream, runtime=runtime)
    cublas = SimpleNamespace(gemmEx=note, CUBLAS_OP_T=1, CUBLAS_OP_N=0, CUBLAS_COMPUTE_32F=68, CUBLAS_GEMM_DEFAULT=-1)
    cupy = Module(cuda=cuda, empty=empty, RawModule=lambda **_: kernel, ndarray=emulator.device.Array)
    note.max_dynamic_shared_size_bytes = 48 << 10
    return cupy, cublas


def test_a_forked_child_is_told_that_the_gpu_is_its_parents():
    streams = Streams()
    device = cuda_device.CudaDevice(*fake_device(streams, []), 0)
    device.empty((1,), np.float32)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            device.empty((1,), np.float32)
        except MinillmError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert "cuda:0 was opened before this process was forked" in said and "load the model in the child" in said
    device.empty((1,), np.float32)


def test_all_work_is_on_one_stream(monkeypatch):
    """Of two models on a GPU, from two threads, and after CuPy has gone back to its default stream."""
    streams, calls, host = Streams(), [], emulator.EmulatedDevice()
    cupy, cublas = fake_device(streams, calls)
    monkeypatch.setattr(cuda_device.CudaDevice, "owns", lambda self, array: True)
    devices = [cuda_device.CudaDevice(cupy, cublas, 0) for _ in "ab"]
    x, bias, words = host.empty((2, 8), np.float32), host.empty((8,), np.float32), host.empty((8, 8), np.uint16)

    def work(device):
        device.upload(np.zeros(3))
        launch.add_bias(device, x, bias)
        device.gemm(words, words, words, "half", False)
        launch.add_bias(device, x, bias)
        with streams.Stream(non_blocking=True):
            pass
        launch.add_bias(device, x, bias)

    for device in devices:
        work(device)
    thread = threading.Thread(target=work, args=devices[:1])
    thread.start()
    thread.join()
    assert len(calls) == 3 * 6 and set(calls) == {devices[0].stream} == {devices[1].stream}


@pytest.mark.parametrize("shared_memory, dim, rows", [(101_376, 4096, 8), (101_376, 8192, 6), (232_448, 16_384, 7)])
def test_rows_that_fit_in_shared_memory(shared_memory, dim, rows):
    """Of an RTX 30 and of an H100."""
    assert launch.rows_at_once(SimpleNamespace(shared_memory=shared_memory), dim) == rows


def test_slabs_get_what_the_pool_keeps(monkeypatch):
    """cudaMalloc knows nothing of the blocks that CuPy's pool has free."""

    class OutOfMemory(RuntimeError):
        pass

    def malloc(n):
        if n > free[0]:
            raise OutOfMemory("cudaErrorMemoryAllocation")
        return n

    free, device = [100], object.__new__(cuda_device.CudaDevice)
    device.name, device.use = "cuda:0", lambda: None
    runtime = SimpleNamespace(CUDARuntimeError=OutOfMemory)
    cuda = SimpleNamespace(Memory=malloc, MemoryPointer=lambda memory, at: memory, runtime=runtime)
    pool = SimpleNamespace(free_all_blocks=lambda: free.append(free.pop() + 60))
    array = lambda shape, dtype, pointer: (shape, dtype, pointer)  # noqa: E731
    device.cupy = SimpleNamespace(cuda=cuda, ndarray=array, get_default_memory_pool=lambda: pool)
    assert device.new_slab_memory((80,), np.uint16) == ((80,), np.uint16, 160)
    with pytest.raises(MemoryError, match="cuda:0 has no 2000 bytes left"):
        device.new_slab_memory((1000,), np.uint16)


# an LLM


@pytest.fixture
def emulated(monkeypatch):
    if emulator.available():
        pytest.skip(emulator.available())
    device = emulator.EmulatedDevice()
    monkeypatch.setattr(cuda_device, "open_device", lambda index: device)
    return device


@pytest.fixture
def prompts():
    return np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 140)).tolist()


def test_answers_of_a_random_model(emulated, prompts):
    """Greedy answers do not depend on what else is in the batch, and repeat."""
    params = SamplingParams(max_tokens=6)
    with LLM.random(SMALL, device="cuda", cache=CacheConfig("full")) as llm:
        alone = []
        for prompt in prompts:
            alone.append([piece.token_id for piece in llm.stream(prompt, params)])
        session = llm.session()
        session.feed(prompts[0])
        assert next(session.stream(params)).token_id == alone[0][0] and session.stats["device"] == "emulator"
        session.close()
        assert alone[0] != alone[1] and all(len(ids) == 6 for ids in alone)
        again = [piece.token_id for piece in llm.stream(prompts[0], params)]
        assert again == alone[0]


def test_every_byte_comes_back(emulated, prompts):
    """Weights are what they are counted as; pages come and go; after close nothing is left."""
    llm = LLM.random(SMALL, device="cuda", cache=CacheConfig("semanticache", 0.3))
    assert emulated.used >= llm.model.nbytes
    loaded = emulated.used
    session = llm.session()
    session.feed(prompts[0])
    session.read()
    pages = llm.pool.bytes_held
    assert pages == len(llm.pool.slabs) * llm.pool.slab_pages * llm.pool.page_bytes and session.cache.kept < 0.5
    assert emulated.used >= loaded + pages
    session.close()
    assert llm.pool.bytes_held == 0
    kept = emulated.used - loaded
    assert 0 <= kept < 1 << 20  # tables of one pass and the slab table
    list(llm.stream(prompts[1], SamplingParams(max_tokens=3)))
    llm.close()
    assert emulated.used <= kept
    del llm, session
    gc.collect()
    assert emulated.used == 0


def test_what_a_gpu_says_is_free():
    """cudaMemGetInfo, with nothing kept by CuPy's pool: pages come back at trim, weights at close."""
    device = cuda_device_or_skip()
    used = lambda: np.subtract(*device.memory_info()[::-1])  # noqa: E731
    config = replace(SMALL, n_layers=4, n_kv_heads=8, n_heads=8, head_dim=128, dim=1024, ffn_dim=4096, context=20000)
    ids = np.random.default_rng(0).integers(0, SMALL.vocab_size, 16000).tolist()
    with LLM.random(config, device="cuda", cache=CacheConfig("full")) as llm:  # what CUDA itself takes, once
        list(llm.stream(ids, SamplingParams(max_tokens=3)))
    device.trim()
    before = used()
    llm = LLM.random(config, device="cuda", cache=CacheConfig("full"))
    session = llm.session()
    session.feed(ids)
    session.read()
    llm.pool.trim()
    pages = session.cache.bytes_in_use
    loaded = used() - before
    assert llm.model.nbytes + pages <= loaded < 1.1 * (llm.model.nbytes + pages) + (64 << 20)
    session.close()
    assert loaded - (used() - before) >= 0.95 * pages
    llm.close()
    assert used() - before < 32 << 20


def test_what_does_not_fit_is_refused_before_it_is_allocated(emulated, prompts):
    emulated.total = 100_000
    with pytest.raises(MinillmError, match="a random tiny needs .* are free"):
        LLM.random(SMALL, device="cuda")
    assert emulated.used == 0
    emulated.total = 8 << 30
    with LLM.random(SMALL, device="cuda") as llm:
        emulated.total = emulated.used + 1000
        with pytest.raises(MinillmError, match="the prompt needs"):
            llm.generate(prompts[0])


def test_random_weights_are_of_the_size_they_are_meant_to_be(emulated):
    device_ops = ops.backend("cuda")
    for random_ops in (device_ops, ops.backend("cpu")):
        words, other = random_ops.random_words((60, 300), 1), random_ops.random_words((60, 300), 2)
        words, other = (np.asarray(x.get() if random_ops is device_ops else x) for x in (words, other))
        values = (words.astype(np.uint32) << 16).view(np.float32)
        assert abs(values.std() * 300**0.5 - 1) < 0.03 and abs(values.mean()) * 300**0.5 < 0.03
        assert (words == other).mean() < 0.02 and len(np.unique(words)) > 1000
