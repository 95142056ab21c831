"""For the tests of the compiled kernels: the paths of this machine. Where the kernels were not built, what imports this
is skipped."""

import os
import shutil

import pytest
from conftest import NO_COMPILER

from minillm.ops import cpu_lib

PATHS = cpu_lib.available_paths()
if not PATHS:
    names = (os.environ.get("CC", "cc").split()[0], "gcc", "clang")
    built = "there is a C compiler, but the kernels were not built: install minillm again and see what it says"
    pytest.skip(built if any(map(shutil.which, names)) else NO_COMPILER, allow_module_level=True)

from minillm.ops.cpu_ops import CpuOps  # noqa: E402 (it needs the library)

cpu_ops = CpuOps(PATHS[0])
