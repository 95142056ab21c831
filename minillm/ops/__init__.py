"""Numerical operations. `contract.Backend` says what a backend does; `numpy_ops` is the specification, `cpu_ops` and
`cuda_ops` are the fast ones."""

import functools
import re
import sys

from minillm.errors import UsageError


def backend(device: str, threads: int | None = None):
    """A contract.Backend for one model on `device`. "auto" and "cpu": compiled kernels where they were built (cpu_lib
    says which instructions they use), else NumPy; "cuda", "cuda:1": a GPU. threads: of the processor (None: all).
    Raises MinillmError."""
    if device in ("auto", "cpu"):
        return _on_cpu(threads)
    if match := re.fullmatch(r"cuda(?::(\d+))?", device):
        from minillm.ops import cuda_ops

        return cuda_ops.open_ops(int(match[1] or 0))
    raise UsageError(f"device {device!r} is not known: it is auto, cpu, cuda or cuda:1 (the second GPU)")


def _on_cpu(threads):
    from minillm.ops import cpu_lib
    from minillm.ops.numpy_ops import NumpyOps

    path = cpu_lib.choose_path()
    if path != "numpy":
        from minillm.ops.cpu_ops import CpuOps

        return CpuOps(path, threads)
    if cpu_lib.library() is None:
        say_once(
            "minillm: the compiled CPU kernels are not there, NumPy is used, which is several times slower: "
            "install a C compiler (gcc or clang) and then minillm again"
        )
    return NumpyOps(threads)


@functools.cache
def say_once(notice):
    """Print a notice to stderr, once for each text."""
    print(notice, file=sys.stderr)
