"""Where the kernel sources lie: kernels/ beside the package in a checkout, minillm/kernels in an installed wheel."""

from pathlib import Path


def folder() -> Path:
    package = Path(__file__).resolve().parents[1]
    return next(path for path in (package / "kernels", package.parent / "kernels") if path.is_dir())
