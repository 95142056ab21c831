"""From kernels/cuda/*.cu to a launch: where sources are found and compiled, arguments checked, and grid, block, shared
memory and argument order computed. A device (cuda_device.py, or the emulator of the tests) compiles and starts what it
is given here, and knows nothing of any kernel.

A kernel is called with keyword arguments that carry the names of its parameters in the .cu file: their order and their
C types are read there, and an array of another dtype, one that is not contiguous or lies elsewhere, or a missing
argument is an error before anything runs. CUDA itself would check nothing of it.
"""

import functools
import itertools
import math
import re
from dataclasses import dataclass

import numpy as np

from minillm.ops.kernels import folder

WARP = 32
_TYPES = {
    "float": np.float32,
    "int": np.int32,
    "unsigned": np.uint32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "unsigned char": np.uint8,
    "half": np.uint16,  # 16-bit floats are words on the host
    "bf16": np.uint16,
}
_INCLUDE = re.compile(r'^#include "([\w.]+)"$', re.MULTILINE)
_SIGNATURE = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(([^)]*)\)')


# sources


@functools.cache
def _text(name):
    """The text of a file of kernels/cuda with the project's own includes put in their place, each once: it compiles by
    itself, and a cache that goes by the text cannot miss a change of a header."""
    seen = {name}

    def inline(file):
        text = (folder() / "cuda" / file).read_text()

        def replaced(match):
            if match[1] in seen:
                return ""
            seen.add(match[1])
            line = text.count("\n", 0, match.start()) + 2
            return f'#line 1 "{match[1]}"\n{inline(match[1])}\n#line {line} "{file}"'

        return _INCLUDE.sub(replaced, text)

    return f'#line 1 "{name}"\n{inline(name)}'


def files():
    """Names of the kernel files, without .cu."""
    return sorted(path.stem for path in (folder() / "cuda").glob("*.cu"))


@functools.cache
def variants(file):
    """What a file may be compiled with, as its line `// Defines: NAME = a, b; OTHER = c, d` says: a list of dicts, one
    for each combination."""
    match = re.search(r"^// Defines: (.*)$", _text(f"{file}.cu"), re.MULTILINE)
    names = [part.split(" = ") for part in match[1].split("; ")] if match else []
    choices = [[(name, value) for value in values.split(", ")] for name, values in names]
    return [dict(choice) for choice in itertools.product(*choices)]


def source(file, defines):
    """The text that is compiled for one of the variants of a file."""
    assert defines in variants(file), f"{file}.cu is not made for {defines}"
    return "".join(f"#define {name} {value}\n" for name, value in defines.items()) + _text(f"{file}.cu")


@functools.cache
def parameters(file, kernel):
    """{name: (C type, whether it is a pointer)} of a kernel, in order."""
    lists = dict(_SIGNATURE.findall(_text(f"{file}.cu")))
    out = {}
    for parameter in lists[kernel].split(","):
        c_type, pointer, name = re.fullmatch(
            r"\s*(?:const )?([\w ]+?)\s*(\*?)\s*(?:__restrict__ )?(\w+)\s*", parameter
        ).groups()
        out[name] = c_type, bool(pointer)
    return out


# launching


@dataclass
class Paged:
    """The stored entries of one layer of B sequences, as kernels/cuda/pages.cuh reads them: device arrays."""

    slabs: object  # (slabs,) uint64 addresses
    slab_pages: int  # pages a slab
    pages: object  # (B, H, capacity) int32 page ids; a row holds the pages of a head, the first of them are meant
    lengths: object  # (B, H) int32 entries of each head
    seen: object  # (B,) int32 tokens seen before the new ones: the position of the first of them

    def arguments(self):
        return {
            "slabs": self.slabs,
            "slab_pages": self.slab_pages,
            "pages": self.pages,
            "capacity": self.pages.shape[2],
            "lengths": self.lengths,
        }


def run(device, file, kernel, grid, block, arguments, *, defines=None, shared=0):
    """Start a kernel of `file`.cu: grid, block as tuples; shared: bytes of dynamic shared memory; arguments: values by
    the names of the parameters, device arrays for pointers (None: a null pointer)."""
    defines = defines or {}
    if 0 in grid:
        return
    key = file, kernel, *defines.items()
    if key not in device.kernels:
        device.kernels[key] = _compiled(device, file, kernel, defines)
    function, declared = device.kernels[key]
    assert arguments.keys() == declared.keys(), f"{kernel}: {arguments.keys() ^ declared.keys()} missing or unknown"
    values = [_checked(device, kernel, name, arguments[name], *declared[name]) for name in declared]
    if shared > function.max_dynamic_shared_size_bytes:
        function.max_dynamic_shared_size_bytes = shared
    function(grid, block, tuple(values), shared_mem=shared)


def _compiled(device, file, kernel, defines):
    """(the function, {parameter: (dtype, whether it is a pointer)})"""
    key = file, *defines.items()
    if key not in device.kernels:
        device.kernels[key] = device.module(source(file, defines))
    types = {
        name: (_TYPES[defines.get(c_type, c_type)], pointer)
        for name, (c_type, pointer) in parameters(file, kernel).items()
    }
    return device.kernels[key].get_function(kernel), types


def _checked(device, kernel, name, value, dtype, pointer):
    if not pointer:
        return dtype(value)
    if value is None:
        return np.uint64(0)
    assert device.owns(value), f"{kernel}: {name} is not an array of {device.name}"
    assert value.dtype == dtype, f"{kernel}: {name} is {value.dtype}, not {np.dtype(dtype)}"
    assert value.flags.c_contiguous, f"{kernel}: {name} is not contiguous"
    return value


def _blocks(n, size):
    return math.ceil(n / size)


# kernels, one function each


def rms_norm(device, x, weight, eps, out, real16):
    """out (n, dim) real16 = x / rms(x) * weight; x (n, dim) float32, weight (dim,) float32."""
    n, dim = x.shape
    assert weight.shape == (dim,) and out.shape == x.shape and dim % 4 == 0
    arguments = {"x": x, "weight": weight, "eps": eps, "out": out, "dim": dim}
    run(device, "rms_norm", "rms_norm", (n,), (256,), arguments, defines={"real16": real16})
