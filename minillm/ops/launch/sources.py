"""Kernel files as text that compiles by itself, the variants they are made for, and what their kernels take."""

import functools
import itertools
import re
from pathlib import Path

from minillm.ops.launch.head_sizes import HEAD_SIZES
from minillm.ops.pages import PAGE_FORMATS

_INCLUDE = re.compile(r'^#include "([\w.]+)"$', re.MULTILINE)
_FORMATS = sorted({format.cuda for format in PAGE_FORMATS.values() if format.cuda})
_SIGNATURE = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(([^)]*)\)')


def folder() -> Path:
    """Of the kernel sources: kernels/ beside the package in a checkout, minillm/kernels in an installed wheel."""
    package = Path(__file__).resolve().parents[2]
    return next(path for path in (package / "kernels", package.parent / "kernels") if path.is_dir())


@functools.cache
def _text(name):
    """The text of a file of kernels/cuda with the project's own includes put in their place, each once: it compiles by
    itself, and a cache that goes by the text cannot miss a change of a header."""
    seen = {name}

    def inline(file):
        text = (folder() / "cuda" / file).read_text()

        def replaced(match):
            if match[1] in seen:
                return ""
            seen.add(match[1])
            line = text.count("\n", 0, match.start()) + 2
            return f'#line 1 "{match[1]}"\n{inline(match[1])}\n#line {line} "{file}"'

        return _INCLUDE.sub(replaced, text)

    return f'#line 1 "{name}"\n{inline(name)}'


def files():
    """Names of the kernel files, without .cu."""
    return sorted(path.stem for path in (folder() / "cuda").glob("*.cu"))


@functools.cache
def variants(file, head_sizes=tuple(HEAD_SIZES)):
    """What a file may be compiled with, as its line `// Defines: NAME = a, b; OTHER = c, d` says: a list of dicts, one
    for each combination. Instead of values stands what they are: page formats, head sizes (those asked for)."""
    named = {"page formats": _FORMATS, "head sizes": [str(d) for d in head_sizes]}
    match = re.search(r"^// Defines: (.*)$", _text(f"{file}.cu"), re.MULTILINE)
    names = [part.split(" = ") for part in match[1].split("; ")] if match else []
    choices = [[(name, value) for value in named.get(values) or values.split(", ")] for name, values in names]
    return [dict(choice) for choice in itertools.product(*choices)]


def source(file, defines):
    """The text that is compiled for one of the variants of a file."""
    assert defines in variants(file), f"{file}.cu is not made for {defines}"
    if "HEAD_DIM" in defines:
        defines = defines | HEAD_SIZES[int(defines["HEAD_DIM"])].defines()
    return "".join(f"#define {name} {value}\n" for name, value in defines.items()) + _text(f"{file}.cu")


def kernels(file):
    """Names of the kernels of a file."""
    return {name for name, _ in _SIGNATURE.findall(_text(f"{file}.cu"))}


@functools.cache
def parameters(file, kernel):
    """{name: (C type, whether it is a pointer)} of a kernel, in order."""
    lists = dict(_SIGNATURE.findall(_text(f"{file}.cu")))
    out = {}
    for parameter in lists[kernel].split(","):
        c_type, pointer, name = re.fullmatch(
            r"\s*(?:const )?([\w ]+?)\s*(\*?)\s*(?:__restrict__ )?(\w+)\s*", parameter
        ).groups()
        out[name] = c_type, bool(pointer)
    return out
