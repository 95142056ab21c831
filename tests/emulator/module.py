"""A CUDA C source -> a shared library built by g++ -> kernels that are called as CuPy's are."""

import ctypes
import hashlib
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SANITIZER = os.environ.get("MINILLM_EMULATOR", "")
SANITIZERS = {
    "": ["-O1"],
    "address": ["-O1", "-fsanitize=address,alignment,bounds", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "thread": ["-O1", "-fsanitize=thread"],
}
_TYPE = r"(?:__align__\([^)]*\)\s*)?[\w:]+(?:\s+(?!__align__)[\w:]+)*?"
_DYNAMIC = re.compile(rf"extern\s+__shared__\s+({_TYPE})\s+(\w+)\s*\[\s*\]\s*;")
_STATIC = re.compile(rf"(?<!\w)__shared__\s+({_TYPE})\s+(\w+(?:\[[^\]]*\])*(?:\s*,\s*\w+(?:\[[^\]]*\])*)*)\s*;")
_KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(')


def available():
    """None, or why kernels cannot be run here."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "the CUDA emulator switches fibers on x86-64 only"
    return None if shutil.which("g++") else "the CUDA emulator needs g++ 11 or later"


class EmulatorError(RuntimeError):
    """A kernel does what CUDA does not allow, or is called with what does not fit its parameters."""


class Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint),
    ]


class Module:
    """The kernels of one source text; each launch is told to started(kernel name). Libraries are kept by the hash of
    all that goes into them."""

    def __init__(self, source, started=lambda name: None):
        self.started = started
        # A static __shared__ variable makes itself known when it is first met; a dynamic one is a pointer.
        body = _DYNAMIC.sub(lambda m: f"CUEMU_DYNAMIC_SHARED({_element(m[1])}, {m[2]});", source)
        body = _STATIC.sub(_static_shared, body)
        unit = f'#include "cuda_cpu.h"\n{body}\n' + "".join(f"CUEMU_KERNEL({name})\n" for name in _KERNEL.findall(body))
        self.lib = ctypes.CDLL(str(_built(unit)))

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


def _built(unit):
    """The library of a translation unit, from the cache or new."""
    flags = ["-std=c++20", "-g1", "-shared", "-fPIC", "-w", "-ffp-contract=off", *SANITIZERS[SANITIZER]]
    headers = [text.read_bytes() for text in sorted(HERE.rglob("*.h"))]
    key = hashlib.sha256(b"\0".join([unit.encode(), " ".join(flags).encode(), *headers])).hexdigest()[:20]
    folder = Path(tempfile.gettempdir()) / f"minillm-emulator-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    library = folder / f"{key}.so"
    if not library.exists():
        unfinished = folder / f"{key}.{os.getpid()}"
        command = ["g++", *flags, f"-I{HERE}", f"-I{HERE}/include", "-xc++", "-", "-o", unfinished]
        environment = {
            name: value for name, value in os.environ.items() if name != "LD_PRELOAD"
        }  # for the kernels only
        done = subprocess.run(command, input=unit, text=True, capture_output=True, env=environment)
        if done.returncode:
            raise EmulatorError(done.stderr)
        unfinished.replace(library)
    return library


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
        launches, most = self.started_with.get(self.name, (0, 0))
        self.started_with[self.name] = launches + 1, max(most, math.prod(grid))

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
