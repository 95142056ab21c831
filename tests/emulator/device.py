"""What minillm asks of a device, on the CPU: arrays in memory of their own, kernels, matrix products."""

import ctypes
import functools
import inspect
import math
import weakref
from collections import Counter
from types import SimpleNamespace

import numpy as np
from cuda_words import from_words, to_words

from .module import Module
from .numpy_functions import check_function, check_ufunc

_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]


class Array(np.lib.mixins.NDArrayOperatorsMixin):
    """The part of cupy.ndarray that minillm uses. It does not mix with NumPy arrays, as CuPy's do not: a missing copy
    between host and device fails here too. NumPy's functions and operators work on it as far as numpy_functions.py
    says that they work on CuPy's. Memory is a malloc of exactly its size, filled with 0xff, so that ASan sees the first
    byte beyond it and a value never written shows as NaN."""

    __slots__ = ("__weakref__", "_device", "_words")

    def __init__(self, words, device):
        self._words, self._device = words, device

    @classmethod
    def of_malloc(cls, shape, dtype, device):
        shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        address = _libc.malloc(max(n_bytes, 1))
        memory = (ctypes.c_uint8 * n_bytes).from_address(address)
        words = np.frombuffer(memory, np.uint8)
        words[:] = 0xFF
        weakref.finalize(memory, _release, address, n_bytes, device._freed)
        return cls(words.view(dtype).reshape(shape), device)

    shape = property(lambda self: self._words.shape)
    dtype = property(lambda self: self._words.dtype)
    ndim = property(lambda self: self._words.ndim)
    size = property(lambda self: self._words.size)
    nbytes = property(lambda self: self._words.nbytes)
    flags = property(lambda self: SimpleNamespace(c_contiguous=self._words.flags.c_contiguous))
    strides = property(lambda self: self._words.strides)
    data = property(lambda self: SimpleNamespace(ptr=self._words.ctypes.data))
    T = property(lambda self: Array(self._words.T, self._device))

    def __len__(self):
        return len(self._words)

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        check_ufunc(ufunc, method, inputs, kwargs)
        out = kwargs.pop("out", (None,))[0]
        if out is not None:
            kwargs["out"] = out._words
        result = getattr(ufunc, method)(*map(_words, inputs), **kwargs)
        self._device.count(method)
        return self._device.own(result) if out is None and result is not None else out

    def __array_function__(self, function, types, args, kwargs):
        launches, syncs = check_function(function, args, kwargs)
        result = function(*map(_words, args), **{name: _words(value) for name, value in kwargs.items()})
        self._device.count(function.__name__, launches(args, kwargs), syncs)
        return self._device.own(result)

    def __getitem__(self, index):
        return self._device.own(self._words[self._indices(index)])

    def __setitem__(self, index, value):
        index = self._indices(index)
        if isinstance(value, np.ndarray | list | tuple):
            raise TypeError("a device array takes device arrays and single numbers")
        self._words[index] = _words(value)
        self._device.count("setitem")

    def _indices(self, index):
        """What stands in brackets, of NumPy."""
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, np.ndarray | list):
                raise TypeError("a device array is not indexed by what is on the host")
            if isinstance(part, Array):
                mask = part.dtype == bool
                self._device.count("mask" if mask else "take", 4 if mask else 1, int(mask))
        return tuple(map(_words, index)) if isinstance(index, tuple) else _words(index)

    def reshape(self, *shape):
        return Array(self._words.reshape(*shape), self._device)

    def view(self, dtype):
        return Array(self._words.view(dtype), self._device)

    def transpose(self, *axes):
        return Array(self._words.transpose(*axes), self._device)

    def astype(self, dtype, copy=True):
        if self.dtype == dtype and not copy:
            return self
        return self._new("astype", self._words.astype(dtype))

    def copy(self):
        return self._new("copy", self._words.copy())

    def fill(self, value):
        self._words.fill(value)
        self._device.count("fill")

    def get(self):
        self._device.downloaded(self.nbytes)
        return self._words.copy()

    def set(self, host):
        assert isinstance(host, np.ndarray) and host.dtype == self.dtype and host.shape == self.shape
        self._words[...] = host
        self._device.uploaded(self.nbytes)

    def tolist(self):
        return self.get().tolist()

    def item(self):
        return self.get().item()

    def __bool__(self):
        return bool(self.get())

    def __int__(self):
        return int(self.get())

    def __float__(self):
        return float(self.get())

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def _new(self, name, words):
        self._device.count(name)
        return self._device.own(words)

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed: use .get()")


def _reduction(name):
    def method(self, *args, **kwargs):
        return getattr(np, name)(self, *args, **kwargs)

    return method


for _name in ("sum", "mean", "var", "max", "min", "any", "all", "cumsum", "argmax", "argsort", "ravel"):
    setattr(Array, _name, _reduction(_name))


def _words(value):
    """A device array, or those in a list, as NumPy arrays on the same memory."""
    if isinstance(value, Array):
        return value._words
    return type(value)(map(_words, value)) if isinstance(value, list | tuple) else value


def _is_malloc(words):
    """Whether an array is a view of device memory."""
    while isinstance(words.base, np.ndarray):
        words = words.base
    return isinstance(words.base, ctypes.Array)


def _release(address, n_bytes, freed):
    _libc.free(address)
    freed(n_bytes)


class EmulatedDevice:
    """The interface of minillm.ops.cuda_device.CudaDevice. `total` bytes are there; what is allocated is counted, and
    so are kernels (of NumPy functions as many as CuPy starts, about), waits for the device, and copies over the bus."""

    name, arch = "emulator", 90
    processors, shared_memory = 2, 227 << 10

    def __init__(self, total=8 << 30):
        self.total, self.used, self.peak, self.allocations = total, 0, 0, 0
        self.kernels = {}  # launch keeps compiled kernels here
        self.capturing = False
        self.launches, self.waits, self.bytes_up, self.bytes_down = Counter(), Counter(), Counter(), Counter()

    def use(self):
        pass

    def count(self, name, launches=1, waits=0):
        """A kernel or function was started."""
        self.launches[name] += launches
        self.waits[name] += waits

    def uploaded(self, n_bytes):
        self.bytes_up[n_bytes] += 1

    def downloaded(self, n_bytes):
        self.bytes_down[n_bytes] += 1
        self.waits["get"] += 1

    def own(self, result):
        """The result of a NumPy function as an Array, in device memory; those of a list or tuple."""
        if isinstance(result, list | tuple):
            return type(result)(map(self.own, result))
        words = np.asarray(result)
        if _is_malloc(words):
            return Array(words, self)
        array = self.empty(words.shape, words.dtype)
        array._words[...] = words
        return array

    def empty(self, shape, dtype):
        assert not self.capturing, "memory allocated while a graph is captured"
        array = Array.of_malloc(shape, dtype, self)
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
        return Module(source, self.count)

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
        if inspect.ismethod(launches):  # a graph holds kernels, and not who launched them
            launches = functools.partial(launches.__func__, weakref.proxy(launches.__self__))
        return SimpleNamespace(launch=launches)

    def memory(self):
        return self.total - self.used, self.total

    memory_info = memory

    def trim(self):
        pass

    def synchronize(self):
        pass
