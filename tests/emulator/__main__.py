"""Compiles every kernel file in every variant that is tested, side by side: python -m emulator, in tests/."""

from concurrent.futures import ThreadPoolExecutor

from head_sizes import tested

from minillm.ops import launch

from .build import forget, library
from .module import translation_unit

forget()
variants = [(file, defines) for file in launch.files() for defines in launch.variants(file) if tested(defines)]
units = [translation_unit(launch.source(*variant)) for variant in variants]
with ThreadPoolExecutor() as pool:
    print(f"{len(set(pool.map(library, units)))} libraries")
