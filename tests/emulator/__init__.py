"""Runs kernels/cuda/*.cu on the CPU, for tests: `EmulatedDevice` stands where minillm.ops has a CUDA device.

    scheduler.h       threads of a block as fibers; barriers, warp operations, what is wrong with them
    cuda_cpu.h        CUDA C on top of it: types, intrinsics, atomics
    tensor_core.h     mma.sync, ldmatrix, cp.async
    module.py         a source text -> a translation unit -> kernels that are called as CuPy's are
    build.py          a translation unit -> a library by g++, which is kept; `python -m emulator` makes all of them
    device.py         arrays in "device" memory, and the rest of what minillm asks of a device

MINILLM_EMULATOR=address or =thread builds the kernels with ASan and UBSan, or TSan (tools/sanitize_cuda.sh).
"""

from .build import SANITIZER, EmulatorError, start_ahead
from .device import Array, EmulatedDevice
from .module import Kernel, Module, available

__all__ = [
    "Array",
    "EmulatedDevice",
    "EmulatorError",
    "Kernel",
    "Module",
    "SANITIZER",
    "available",
    "cases",
    "start_ahead",
]


def cases(every, *, races):
    """What a test is parametrized with: `every` case; under TSan, to which a thread of a block is a thread and which
    takes fifty times as long, those of `races`: the smallest that have several blocks."""
    return races if SANITIZER == "thread" else every
