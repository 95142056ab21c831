"""Builds kernels/cpu into one shared library, if there is a C compiler that can; without one the install succeeds all
the same.

Files that say FN(...) are compiled once for each path of the processor, each with that path's instructions; which path
runs is decided when the library is loaded. The rest of the package is described in pyproject.toml."""

import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("kernels/cpu")
ONCE = ["threads", "repack", "plan", "dispatch", "step"]
PER_PATH = ["linear", "many", "many_blocks", "mlp", "panels", "mm", "elementwise", "merge", "entries", "rewrite"]
PER_PATH += ["clusters", "nearest", "scores", "prefill_attention", "decode_attention", "path"]
FLAGS = ["-O3", "-std=gnu11", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{x}" for x in ("f", "bw", "dq", "vl", "vnni", "bf16")), "-mprefer-vector-width=512"]
PATHS = {"portable": [], "avx2": AVX2, "avx512": AVX512, "amx": [*AVX512, "-DMINILLM_AMX"]}


class BuildKernels(build_ext):
    def build_extension(self, ext):
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        paths = PATHS if x86 else {"portable": []}
        jobs = [(name, "once", ["-DMINILLM_X86"] if x86 else []) for name in ONCE]
        jobs += [(name, path, [f"-DMINILLM_PATH={path}", *flags]) for path, flags in paths.items() for name in PER_PATH]

        headers = max(header.stat().st_mtime for header in KERNELS.glob("*.h"))

        def compile_one(job):
            name, path, flags = job
            source = KERNELS / f"{name}.c"
            folder = Path(self.build_temp) / path
            folder.mkdir(parents=True, exist_ok=True)
            target = folder / f"{name}.o"
            if target.exists() and target.stat().st_mtime > max(headers, source.stat().st_mtime):
                return str(target)
            command = [*self.compiler.compiler_so, *FLAGS, *ext.extra_compile_args, *flags, f"-I{KERNELS}"]
            subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
            return str(target)

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compile_one, jobs))
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), libraries=["m", "pthread"], extra_postargs=ext.extra_link_args
        )

    def run(self):
        try:
            super().run()
        except Exception as error:  # no compiler, an old one, one that is not GCC or Clang: NumPy carries the package
            print(f"warning: the CPU kernels were not built ({error}); minillm will run on NumPy, several times slower")


setup(ext_modules=[Extension("minillm.ops._cpu", [])], cmdclass={"build_ext": BuildKernels})
