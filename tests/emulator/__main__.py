"""Compiles every kernel file in every variant, side by side: python -m emulator, in tests/."""

from concurrent.futures import ThreadPoolExecutor

from minillm.ops import launch

from .build import forget, library
from .module import translation_unit

forget()
units = [translation_unit(launch.source(file, defines)) for file in launch.files() for defines in launch.variants(file)]
with ThreadPoolExecutor() as pool:
    print(f"{len(set(pool.map(library, units)))} libraries")
