"""What minillm asks of a device, on the CPU: arrays in memory of their own, kernels, matrix products."""

import ctypes
import math
import weakref
from types import SimpleNamespace

import numpy as np
from cuda_words import from_words, to_words

from .module import Module

_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]


class Array:
    """The part of cupy.ndarray that minillm uses. It does not mix with NumPy arrays, as CuPy's do not: a missing copy
    between host and device fails here too. Memory is a malloc of exactly its size, filled with 0xff, so that ASan sees
    the first byte beyond it and a value never written shows as NaN."""

    def __init__(self, words):
        self._words = words

    @classmethod
    def of_malloc(cls, shape, dtype, freed):
        shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        address = _libc.malloc(max(n_bytes, 1))
        memory = (ctypes.c_uint8 * n_bytes).from_address(address)
        words = np.frombuffer(memory, np.uint8)
        words[:] = 0xFF
        weakref.finalize(memory, _release, address, n_bytes, freed)
        return cls(words.view(dtype).reshape(shape))

    shape = property(lambda self: self._words.shape)
    dtype = property(lambda self: self._words.dtype)
    ndim = property(lambda self: self._words.ndim)
    size = property(lambda self: self._words.size)
    nbytes = property(lambda self: self._words.nbytes)
    flags = property(lambda self: SimpleNamespace(c_contiguous=self._words.flags.c_contiguous))
    strides = property(lambda self: self._words.strides)
    data = property(lambda self: SimpleNamespace(ptr=self._words.ctypes.data))

    def __len__(self):
        return len(self._words)

    def __getitem__(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(part, int | slice | np.integer) for part in parts):
            raise TypeError("device arrays are cut by numbers and slices; anything else is a kernel's work")
        part = self._words[index]
        assert isinstance(part, np.ndarray), "one number of a device array: download the array"
        return Array(part)

    def __setitem__(self, index, value):
        if not isinstance(value, Array) or value.dtype != self.dtype:
            raise TypeError("only a device array of the same dtype can be assigned to a device array")
        self._words[index] = value._words

    def reshape(self, *shape):
        words = self._words.view()
        words.shape = shape[0] if isinstance(shape[0], tuple) else shape  # never a copy
        return Array(words)

    def view(self, dtype):
        return Array(self._words.view(dtype))

    def fill(self, value):
        self._words.fill(value)

    def get(self):
        return self._words.copy()

    def set(self, host):
        assert isinstance(host, np.ndarray) and host.dtype == self.dtype and host.shape == self.shape
        self._words[...] = host

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed: use .get()")


def _release(address, n_bytes, freed):
    _libc.free(address)
    freed(n_bytes)


class EmulatedDevice:
    """The interface of minillm.ops.cuda_device.CudaDevice. `total` bytes are there; what is allocated is counted."""

    name, arch = "emulator", 90
    processors, shared_memory = 2, 227 << 10

    def __init__(self, total=8 << 30):
        self.total, self.used, self.peak, self.allocations = total, 0, 0, 0
        self.kernels = {}  # launch keeps compiled kernels here
        self.capturing = False

    def use(self):
        pass

    def empty(self, shape, dtype):
        assert not self.capturing, "memory allocated while a graph is captured"
        array = Array.of_malloc(shape, dtype, self._freed)
        self.used += array.nbytes
        self.peak, self.allocations = max(self.peak, self.used), self.allocations + 1
        return array

    new_slab_memory = empty

    def _freed(self, n_bytes):
        self.used -= n_bytes

    def upload(self, host):
        array = self.empty(host.shape, host.dtype)
        array.set(np.ascontiguousarray(host))
        return array

    def owns(self, array):
        return isinstance(array, Array)

    def module(self, source):
        return Module(source)

    def gemm(self, x, w, y, real16, add):
        product = from_words(x.get(), real16) @ from_words(w.get(), real16).T
        if y.dtype == np.uint16:
            y._words[...] = to_words(product + (from_words(y.get(), real16) if add else 0), real16)
        else:
            y._words[...] = product + (y._words if add else 0)

    def capture(self, launches):
        """A graph that does the same again; while it is made, nothing may be allocated or copied."""
        self.capturing = True
        try:
            launches()
        finally:
            self.capturing = False
        return SimpleNamespace(launch=launches)

    def memory(self):
        return self.total - self.used, self.total

    memory_info = memory

    def trim(self):
        pass

    def synchronize(self):
        pass
