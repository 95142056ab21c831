"""One NVIDIA GPU through CuPy: memory, compiled kernels, matrix products, graphs. The only file that imports cupy, and
it does so when a GPU is asked for."""

import functools
import os
from types import SimpleNamespace

import numpy as np

from minillm.errors import MinillmError, UsageError

MIN_ARCH = 80  # bf16 and cp.async came with Ampere
_PROBE = "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n"


def open_device(index):
    """The CudaDevice `index`. Raises UsageError with what is missing: CuPy, a driver, NVRTC, its headers, cuBLAS."""
    try:
        import cupy
    except ImportError as error:
        raise UsageError(
            f"a GPU needs CuPy ({error}): pip install 'minillm-engine[cuda13]' (or [cuda12] for a driver of CUDA 12), "
            "or use --device cpu"
        ) from None
    _check_driver(cupy, index)
    _check_compiler(cupy)
    return CudaDevice(cupy, _cublas(cupy), index)


def _check_driver(cupy, index):
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        driver, package = runtime.driverGetVersion(), runtime.runtimeGetVersion()
        if driver == 0:
            raise UsageError(
                f"no NVIDIA driver answers ({error}): install one (nvidia-smi must show the GPU), or use --device cpu"
            ) from None
        raise UsageError(
            f"CuPy is built for CUDA {_version(package)} and the driver supports {_version(driver)} ({error}): pip "
            f"install 'minillm-engine[cuda{driver // 1000}]' in a fresh environment, or update the driver"
        ) from None
    if index >= count:
        raise UsageError(f"device cuda:{index} is not there: this machine has {count} GPU(s); use --device cpu")
    arch = int(cupy.cuda.Device(index).compute_capability)
    if arch < MIN_ARCH:
        raise UsageError(
            f"GPU {index} is of compute capability {arch / 10}, and minillm needs {MIN_ARCH / 10} (A100, RTX 30 or "
            "later): use --device cpu"
        )


def _check_compiler(cupy):
    nvrtc = cupy.cuda.nvrtc
    try:
        program = nvrtc.createProgram(_PROBE, "probe.cu", (), ())
    except (ImportError, RuntimeError, OSError) as error:
        raise UsageError(f"NVRTC cannot be loaded ({error}): pip install {_packages(cupy)}") from None
    try:
        nvrtc.compileProgram(program, cupy._core.core.assemble_cupy_compiler_options(()))
    except nvrtc.NVRTCError:
        log = nvrtc.getProgramLog(program).strip().splitlines()
        raise UsageError(
            f"NVRTC does not find CUDA's headers ({log[0] if log else 'no log'}): pip install {_packages(cupy)}"
        ) from None
    finally:
        nvrtc.destroyProgram(program)


def _cublas(cupy):
    """CuPy's binding of cuBLAS, which is no public part of it: used in CudaDevice.gemm alone."""
    try:
        from cupy_backends.cuda.libs import cublas
    except ImportError as error:
        major = cupy.cuda.runtime.runtimeGetVersion() // 1000
        package = "nvidia-cublas-cu12" if major == 12 else f"'nvidia-cublas=={major}.*'"
        reason = str(error).splitlines()[0]
        raise UsageError(f"cuBLAS cannot be loaded ({reason}): pip install {package}, or use --device cpu") from None
    return cublas


def _packages(cupy):
    major = cupy.cuda.runtime.runtimeGetVersion() // 1000
    if major == 12:
        return "nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12"
    return f"'nvidia-cuda-nvrtc=={major}.*' 'nvidia-cuda-runtime=={major}.*' 'nvidia-cuda-crt=={major}.*'"


def _version(number):
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def _stream(cupy, index):
    """The stream of GPU `index`, which is current, for all models and threads of this process: in the order in which
    they ask."""
    return cupy.cuda.Stream(non_blocking=True)


class CudaDevice:
    """Arrays are cupy.ndarray; 16-bit floats are uint16 words. Everything runs on one stream, in order."""

    def __init__(self, cupy, cublas, index):
        self.cupy, self.cublas, self.index, self.name = cupy, cublas, index, f"cuda:{index}"
        self.process = os.getpid()
        self.device = cupy.cuda.Device(index)
        self.device.use()
        self.stream = _stream(cupy, index)
        self.arch = int(self.device.compute_capability)
        self.processors = self.device.attributes["MultiProcessorCount"]
        self.shared_memory = self.device.attributes["MaxSharedMemoryPerBlockOptin"]  # bytes
        self.kernels = {}  # launch keeps compiled kernels here

    def use(self):
        """Have CuPy work on this GPU and its stream from here on. It remembers both for each thread, and is back on its
        default stream after a `with stream`, its own too (get() of what is not contiguous): nothing waits for work
        there, and a graph would not have it. So this comes before every launch, allocation and copy. MinillmError in
        a process that was forked: CUDA has no way into it."""
        if os.getpid() != self.process:
            raise MinillmError(
                f"{self.name} was opened before this process was forked, and CUDA does not work in such a child: load "
                'the model in the child, which multiprocessing\'s "spawn" starts afresh'
            )
        self.device.use()
        self.stream.use()

    def empty(self, shape, dtype):
        self.use()
        return self.cupy.empty(shape, dtype)

    def new_slab_memory(self, shape, dtype):
        """An array that is its own cudaMalloc, and its cudaFree when the last reference to it goes: CuPy's pool would
        keep the bytes."""
        self.use()
        n_bytes, cuda = int(np.prod(shape)) * np.dtype(dtype).itemsize, self.cupy.cuda
        try:
            memory = cuda.Memory(n_bytes)
        except cuda.runtime.CUDARuntimeError:
            self.trim()  # what the pool keeps is free, too
            try:
                memory = cuda.Memory(n_bytes)
            except cuda.runtime.CUDARuntimeError as error:
                raise MemoryError(f"{self.name} has no {n_bytes} bytes left ({error})") from None
        return self.cupy.ndarray(shape, dtype, self.cupy.cuda.MemoryPointer(memory, 0))

    def upload(self, host):
        array = self.empty(host.shape, host.dtype)
        array.set(np.ascontiguousarray(host))
        return array

    def owns(self, array):
        return isinstance(array, self.cupy.ndarray) and array.device.id == self.index

    def module(self, source):
        return self.cupy.RawModule(code=source, options=("--std=c++17",))

    def gemm(self, x, w, y, real16, add):
        """y (n, out) = x (n, in) W^T, or += with `add`; x and W (out, in) real16, y real16 or float32; sums in float32.
        Rows of y may lie apart."""
        runtime, cublas = self.cupy.cuda.runtime, self.cublas
        kind = {"half": runtime.CUDA_R_16F, "bf16": runtime.CUDA_R_16BF}[real16]
        kind_of_y = runtime.CUDA_R_32F if y.dtype == np.float32 else kind
        one, beta = np.array(1, np.float32), np.array(add, np.float32)
        (n, n_in), n_out, stride = x.shape, len(w), y.strides[0] // y.dtype.itemsize
        self.use()
        cublas.gemmEx(  # column-major: y^T (out, n) = W (out, in) x^T
            *(self.device.cublas_handle, cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, n_out, n, n_in, one.ctypes.data),
            *(w.data.ptr, kind, n_in, x.data.ptr, kind, n_in, beta.ctypes.data, y.data.ptr, kind_of_y, stride),
            *(cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT),
        )

    def capture(self, launches):
        """The kernels that `launches()` starts, as a graph with a method launch(). MinillmError if it cannot be had."""
        cuda = self.cupy.cuda
        self.use()
        try:
            self.stream.begin_capture()
            try:
                launches()
            finally:
                graph = self.stream.end_capture()
        except (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError, NotImplementedError) as error:
            raise MinillmError(f"no CUDA graph could be captured ({error})") from error
        return SimpleNamespace(launch=lambda: graph.launch(self.stream))

    def memory(self):
        """Bytes that are free, and all there are. What CuPy's pool keeps unused counts as free."""
        free, total = self.memory_info()
        return free + self.cupy.get_default_memory_pool().free_bytes(), total

    def memory_info(self):
        """Bytes that are free and all there are, as cudaMemGetInfo has them."""
        self.use()
        return self.cupy.cuda.runtime.memGetInfo()

    def description(self):
        """The card's name and memory, driver and runtime."""
        runtime = self.cupy.cuda.runtime
        name = runtime.getDeviceProperties(self.index)["name"].decode()
        driver, package = _version(runtime.driverGetVersion()), _version(runtime.runtimeGetVersion())
        return f"{name}, {self.memory()[1] / (1 << 30):.0f} GiB, driver for CUDA {driver}, CuPy for CUDA {package}"

    def trim(self):
        self.cupy.get_default_memory_pool().free_all_blocks()

    def synchronize(self):
        self.stream.synchronize()
