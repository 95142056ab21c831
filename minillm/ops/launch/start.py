"""One kernel is compiled, its arguments are checked, and it is started. CUDA itself would check nothing of it.

A kernel is called with keyword arguments that carry the names of its parameters in the .cu file: their order and their
C types are read there, and an array of another dtype, one that is not contiguous or lies elsewhere, or a missing
argument is an error before anything runs."""

import math

import numpy as np

from minillm.ops.launch.head_sizes import HEAD_SIZES
from minillm.ops.launch.sources import parameters, source

WARP = 32
_TYPES = {
    "float": np.float32,
    "double": np.float64,
    "int": np.int32,
    "unsigned": np.uint32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "unsigned char": np.uint8,
    "unsigned short": np.uint16,
    "half": np.uint16,  # 16-bit floats are words on the host
    "bf16": np.uint16,
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
    device.use()
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


def blocks(n, size):
    """Blocks of `size` that n takes."""
    return math.ceil(n / size)


def blocks_of_rows(n, d):
    """Blocks of 256 threads that n rows of d elements take, a team to each."""
    return blocks(n * HEAD_SIZES[d].team, 256)


def head_defines(d, real16):
    """Defines of a kernel made for one head_dim and one 16-bit type."""
    return {"real16": real16, "HEAD_DIM": str(d)}


def page_defines(d, real16, format):
    """And for one PageFormat."""
    return head_defines(d, real16) | {"FORMAT": format.cuda}
