"""A CUDA C source -> a translation unit for g++ -> kernels that are called as CuPy's are."""

import ctypes
import functools
import math
import platform
import re
import shutil
from pathlib import Path

import numpy as np

from .build import PRELUDE, EmulatorError, library

_TYPE = r"(?:__align__\([^)]*\)\s*)?[\w:]+(?:\s+(?!__align__)[\w:]+)*?"
_DYNAMIC = re.compile(rf"extern\s+__shared__\s+({_TYPE})\s+(\w+)\s*\[\s*\]\s*;")
_STATIC = re.compile(rf"(?<!\w)__shared__\s+({_TYPE})\s+(\w+(?:\[[^\]]*\])*(?:\s*,\s*\w+(?:\[[^\]]*\])*)*)\s*;")
_KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(')


@functools.cache
def available():
    """None, or why kernels cannot be run here."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "the CUDA emulator switches fibers on x86-64 only"
    cpu = Path("/proc/cpuinfo")
    if cpu.exists() and " f16c" not in cpu.read_text():
        return "the CUDA emulator needs a CPU that converts 16-bit floats (F16C)"
    return None if shutil.which("g++") else "the CUDA emulator needs g++ 11 or later"


class Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint),
    ]


def translation_unit(source):
    """What g++ compiles of a CUDA C source: shared memory as macros of cuda_cpu.h, and an entry for each kernel."""
    # A static __shared__ variable makes itself known when it is first met; a dynamic one is a pointer.
    body = _DYNAMIC.sub(lambda m: f"CUEMU_DYNAMIC_SHARED({_element(m[1])}, {m[2]});", source)
    body = _STATIC.sub(_static_shared, body)
    return f"{PRELUDE}{body}\n" + "".join(f"CUEMU_KERNEL({name})\n" for name in _KERNEL.findall(body))


class Module:
    """The kernels of one source text; each launch is told to started(kernel name)."""

    def __init__(self, source, started=lambda name: None):
        self.started = started
        self.lib = ctypes.CDLL(str(library(translation_unit(source))))

    def get_function(self, name):
        return Kernel(self.lib, name, self.started)


def _element(type_name):
    return re.sub(r"__align__\([^)]*\)\s*", "", type_name)


def _static_shared(declaration):
    element, variables = declaration.groups()
    parts = (re.fullmatch(r"(\w+)(.*)", variable.strip()) for variable in variables.split(","))
    return " ".join(
        f"CUEMU_SHARED({element}, {name}, {dimensions});" for name, dimensions in (p.groups() for p in parts)
    )


class Kernel:
    """Called as cupy.RawKernel is: (grid, block, args, shared_mem=). `order` of the threads: 0 forward, 1 reverse, 2
    shuffled by `seed`."""

    order, seed = 0, 0  # of all kernels: a test may set them on the class
    started_with = {}  # name -> (launches, blocks of the largest grid) of all kernels

    def __init__(self, lib, name, started=lambda name: None):
        self.started = started
        self.name, self.launch = name, getattr(lib, f"cuemu_launch_{name}")
        signature = getattr(lib, f"cuemu_signature_{name}")
        signature.restype = ctypes.c_char_p
        self.parameters = signature().decode().split()
        self.max_dynamic_shared_size_bytes = 48 << 10

    def __call__(self, grid, block, args, *, shared_mem=0):
        if len(args) != len(self.parameters):
            raise EmulatorError(f"{self.name}: {len(args)} arguments for {len(self.parameters)} parameters")
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise EmulatorError(f"{self.name}: {shared_mem} bytes of shared memory, above what was asked for")
        values = [self._value(i, *pair) for i, pair in enumerate(zip(args, self.parameters, strict=True))]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        grid, block = (tuple(size) + (1,) * (3 - len(size)) for size in (grid, block))
        config = Config((ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), shared_mem, self.order, self.seed)
        error = ctypes.create_string_buffer(2000)
        if self.launch(ctypes.byref(config), pointers, error, len(error)):
            raise EmulatorError(f"{self.name}: {error.value.decode()}")
        self.started(self.name)
        self.note(self.name, 1, int(math.prod(grid)))

    @classmethod
    def note(cls, name, launches, blocks):
        """So many launches, of so many blocks at most."""
        before, most = cls.started_with.get(name, (0, 0))
        cls.started_with[name] = before + launches, max(most, blocks)

    def _value(self, number, argument, parameter):
        """The bytes of one argument, as an array of one element. CuPy checks nothing of this."""
        if hasattr(argument, "data") and hasattr(argument.data, "ptr"):  # a device array
            if parameter[0] != "*":
                raise EmulatorError(f"{self.name}: argument {number} is an array for a number")
            size = parameter[2:]  # 16-bit floats are held as words of 16 bits
            if size and int(size) != argument.dtype.itemsize:
                raise EmulatorError(f"{self.name}: argument {number} is {argument.dtype} for {parameter}")
            return np.array([argument.data.ptr], np.uint64)
        if not isinstance(argument, np.generic):  # CuPy would pass an int as int64, a float as float64
            raise EmulatorError(f"{self.name}: argument {number} is a {type(argument).__name__}, not a NumPy scalar")
        code = f"{argument.dtype.kind}{argument.dtype.itemsize}"
        if code != parameter and not (parameter[0] == "*" and argument.dtype == np.uint64):
            raise EmulatorError(f"{self.name}: argument {number} is {argument.dtype} for {parameter}")
        return np.array([argument])
