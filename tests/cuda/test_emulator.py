"""The emulator finds what is wrong with a kernel: each of these has one planted fault. Faults in memory and races are
found under sanitizers, which tools/sanitize_cuda.sh turns on; a child process runs them here where they are."""

import os
import re
import subprocess
import sys

import emulator
import numpy as np
import pytest
from emulator.module import Kernel
from paths import TESTS

if emulator.available():
    pytest.skip(emulator.available(), allow_module_level=True)

F32 = np.float32
KERNELS = """
#include <cuda_fp16.h>
extern "C" __global__ void fine(float* y) {
    __shared__ float s[64];
    s[threadIdx.x] = threadIdx.x;
    __syncthreads();
    y[threadIdx.x] = s[63 - threadIdx.x];
}
extern "C" __global__ void divergent(float* y) {
    if (threadIdx.x < 32) { y[threadIdx.x] = 1.f; __syncthreads(); } else {
        __syncthreads(); }
}
extern "C" __global__ void early_exit(float* y) {
    if (threadIdx.x >= 40) return;
    __syncthreads();
    y[threadIdx.x] = 1.f;
}
extern "C" __global__ void half_a_warp(float* y) {
    float v = threadIdx.x;
    if (threadIdx.x < 16) v += __shfl_xor_sync(0xffffffffu, v, 8);
    __syncthreads();
    y[threadIdx.x] = v;
}
extern "C" __global__ void dead_lane(float* y) { y[threadIdx.x] = __shfl_down_sync(0xffffu, (float)threadIdx.x, 1); }
extern "C" __global__ void uninitialised(float* y) {
    __shared__ float s[64];
    if (threadIdx.x < 63) s[threadIdx.x] = 1.f;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void no_barrier(float* y) {
    __shared__ float s[64];
    s[threadIdx.x] = threadIdx.x;
    y[threadIdx.x] = s[63 - threadIdx.x];
}
extern "C" __global__ void global_race(float* y) { y[0] += 1.f; }
extern "C" __global__ void atomics(float* y) { atomicAdd(y, 1.f); }
extern "C" __global__ void beyond_global(float* y) { y[threadIdx.x + 1] = 1.f; }
extern "C" __global__ void beyond_shared(float* y) {
    extern __shared__ float s[];
    s[threadIdx.x + 1] = 1.f;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void beyond_array(float* y) { float a[4] = {1, 2, 3, 4}; y[threadIdx.x] = a[threadIdx.x & 7]; }
extern "C" __global__ void misaligned(float* y) {
    float4 v = *reinterpret_cast<const float4*>(y + (threadIdx.x & 31));
    y[threadIdx.x] = v.x;
}
extern "C" __global__ void no_wait(float* y) {
    __shared__ float s[64];
    cuemu_cp_async(s + threadIdx.x, y + threadIdx.x, 4, 4);
    cuemu_cp_async_commit();
    cuemu_cp_async_wait(1);
    y[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void waited(float* y) {
    __shared__ float s[64];
    cuemu_cp_async(s + threadIdx.x, y + threadIdx.x, 4, 4);
    cuemu_cp_async_commit();
    cuemu_cp_async_commit();
    cuemu_cp_async_wait(1);
    y[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void apart(float* y) {
    __shared__ float s[64], last;
    s[threadIdx.x] = threadIdx.x;
    if (threadIdx.x == 63) last = s[63];
    __syncthreads();
    if (threadIdx.x < 16) y[blockIdx.x * 16 + threadIdx.x] = last - s[63 - threadIdx.x];
}
extern "C" __global__ void columns(float* y) {
    __syncthreads();
    if (threadIdx.x < 32) y[blockIdx.x * 32 + threadIdx.x] = 1.f;
}
extern "C" __global__ void two_unwritten(float* y) {
    __shared__ float a[64], b[64];
    y[threadIdx.x] = threadIdx.x < 32 ? a[threadIdx.x] : b[threadIdx.x];
}
extern "C" __global__ void scaled(float* y, float by, int n) { if (threadIdx.x < n) y[threadIdx.x] *= by; }
"""


def run(name, shared=0, grid=(1,)):
    """The 64 results of a kernel that begins with 0, 1, ..."""
    device = emulator.EmulatedDevice()
    y = device.upload(np.arange(64, dtype=F32))
    device.module(KERNELS).get_function(name)(grid, (64,), (y,), shared_mem=shared)
    return y.get()


def test_what_is_right_passes():
    np.testing.assert_array_equal(run("fine"), np.arange(64)[::-1])
    np.testing.assert_array_equal(run("waited"), np.arange(64))
    assert run("atomics")[0] == 64
    np.testing.assert_array_equal(run("apart", grid=(4,)), np.tile(np.arange(16), 4))


@pytest.mark.parametrize(
    "name, message",
    [
        ("divergent", r"divergent __syncthreads.*thread \(0,0,0\).*thread \(32,0,0\)"),
        ("early_exit", "by part of the block: 24 threads have exited"),
        ("half_a_warp", "deadlock: warp operation by thread"),
        ("dead_lane", "shuffle reads lane 16, which takes no part|its own lane is not in the mask"),
    ],
)
def test_barriers_and_warps(name, message):
    with pytest.raises(emulator.EmulatorError, match=message):
        run(name)


def test_what_was_never_written_is_nan():
    assert np.isnan(run("uninitialised")[63])
    assert np.isnan(run("no_wait")).all() and np.isnan(run("two_unwritten")).all()


def test_a_missing_barrier_depends_on_the_order_of_threads(monkeypatch):
    results = []
    for order in (0, 1, 2):
        monkeypatch.setattr(Kernel, "order", order)
        results.append(run("no_barrier"))
        np.testing.assert_array_equal(run("fine"), np.arange(64)[::-1])
    assert not all(np.array_equal(results[0], result, equal_nan=True) for result in results[1:])


def test_arguments_are_checked():
    device = emulator.EmulatedDevice()
    kernel, y = device.module(KERNELS).get_function("scaled"), device.upload(np.ones(4, F32))
    kernel((1,), (32,), (y, F32(3), np.int32(2)))
    np.testing.assert_array_equal(y.get(), [3, 3, 1, 1])
    for arguments, message in [
        ((y, F32(3)), "2 arguments for 3 parameters"),
        ((y, 3.0, np.int32(4)), "argument 1 is a float"),
        ((y, np.float64(3), np.int32(4)), "argument 1 is float64"),
        ((y, F32(3), np.int64(4)), "argument 2 is int64"),
        ((device.upload(np.ones(4)), F32(3), np.int32(4)), "argument 0 is float64"),
        ((y, y, np.int32(4)), "argument 1 is an array"),
    ]:
        with pytest.raises(emulator.EmulatorError, match=message):
            kernel((1,), (32,), arguments)
    with pytest.raises(emulator.EmulatorError, match="above what was asked for"):
        kernel((1,), (32,), (y, F32(3), np.int32(4)), shared_mem=49 << 10)
    with pytest.raises(emulator.EmulatorError, match="a block of 2048 threads"):
        kernel((1,), (2048,), (y, F32(3), np.int32(4)))


def test_arrays_do_not_mix_with_numpy():
    array = emulator.EmulatedDevice().upload(np.ones(4, F32))
    for mistake in (
        lambda: np.asarray(array),
        lambda: array[np.arange(2)],
        lambda: array.__setitem__(slice(0, 4), np.ones(4, F32)),
        lambda: np.ones(4, F32) + array,
    ):
        with pytest.raises(TypeError):
            mistake()


FAULTS = [  # kernel, grid, sanitizer, what its report says
    ("beyond_global", (1,), "address", "heap-buffer-overflow"),
    ("beyond_shared", (1,), "address", "use-after-poison|heap-buffer-overflow"),
    ("beyond_array", (1,), "address", "out of bounds"),
    ("misaligned", (1,), "address", "misaligned address"),
    ("no_barrier", (1,), "thread", "data race"),
    ("global_race", (1,), "thread", "data race"),
    ("fine", (2,), "thread", "data race"),  # both blocks write the same
    ("columns", (2, 2), "thread", "data race"),  # those of a column do, each after a barrier
]


def sanitized(sanitizer, *kernels):
    """Run kernels, (name, grid) each, in a process whose kernels are built with a sanitizer. -> (exit code, report)"""
    libraries = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}[sanitizer]
    found = [subprocess.run(["g++", f"-print-file-name={x}"], capture_output=True, text=True).stdout for x in libraries]
    if not all(path.startswith("/") for path in found):
        pytest.skip(f"g++ comes without {' and '.join(libraries)}")
    environment = os.environ | {
        "MINILLM_EMULATOR": sanitizer,
        "LD_PRELOAD": " ".join(path.strip() for path in found),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "exitcode=66",
        "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS / 'cuda'}",
    }
    runs = "; ".join(f"test_emulator.run({name!r}, 256, {grid})" for name, grid in kernels)
    program = f"import test_emulator; {runs}"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("TSan does not start under this kernel's address layout: setarch -R python -m pytest")
    return done.returncode, done.stderr


@pytest.mark.parametrize("name, grid, sanitizer, report", FAULTS)
def test_sanitizers(name, grid, sanitizer, report):
    code, text = sanitized(sanitizer, (name, grid))
    assert code and re.search(report, text), text[-2000:]


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_are_content_with_what_is_right(sanitizer):
    code, text = sanitized(sanitizer, ("fine", (1,)), ("atomics", (3, 3)), ("apart", (4,)), ("columns", (2,)))
    assert code == 0, text[-2000:]


def test_numpy_functions_on_device_arrays():
    """What CuPy refuses is refused, what it does is done in device memory, and all of it is counted."""
    device = emulator.EmulatedDevice()
    ours, host = device.upload(np.arange(6, dtype=F32)), np.ones(6, F32)
    doubled = np.where(ours > 2, ours * np.float32(2), 0)
    assert isinstance(doubled, emulator.Array) and doubled.get().tolist() == [0, 0, 0, 6, 8, 10]
    assert device.launches == {"__call__": 2, "where": 1} and device.waits["get"] == 1
    assert device.bytes_up == device.bytes_down == {24: 1}
    rows = np.flatnonzero(doubled)
    assert rows.get().tolist() == [3, 4, 5] and device.waits["flatnonzero"] == 1
    assert np.zeros(3, np.int32, like=ours).get().tolist() == [0, 0, 0] and ours[rows].get().tolist() == [3, 4, 5]
    refused = [
        lambda: ours + host,
        lambda: host + ours,
        lambda: np.concatenate([ours, host]),
        lambda: np.asarray(ours),
        lambda: ours[host > 0],
        lambda: ours.__setitem__(slice(None), host),
        lambda: np.where(ours > 2),
        lambda: np.repeat(ours, rows),  # waits for the sum
        lambda: np.ones(3, like=ours),  # CuPy's takes no device=
        lambda: np.maximum.accumulate(ours),
        lambda: np.isin(ours, (1, 2)),
    ]
    for call in refused:
        with pytest.raises(TypeError):
            call()
