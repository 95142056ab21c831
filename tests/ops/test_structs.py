"""The structs of minillm_cpu.h and their twins in ops.cpu_lib: the same fields in the same order."""

import ctypes
import re

import pytest

from minillm.ops import cpu_lib
from minillm.ops.launch.sources import folder
from minillm.ops.pages import PAGE_FORMATS

HEADER = (folder() / "cpu" / "minillm_cpu.h").read_text(encoding="utf-8")
SIZES = {"int32_t": 4, "float": 4, "int64_t": 8}
TWINS = {
    name: struct
    for name, struct in vars(cpu_lib).items()
    if isinstance(struct, type) and issubclass(struct, ctypes.Structure) and struct is not ctypes.Structure
}


def declared(name):
    """[(field, whether it is a pointer, its type)] of a struct."""
    body = re.search(rf"typedef struct \{{([^}}]*)\}} {name};", HEADER)[1]
    fields = []
    for line in re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL).split(";"):
        if not line.strip():
            continue
        kind, names = re.fullmatch(r"\s*(?:const )?(\w+) (.*)", line.strip(), re.DOTALL).groups()
        fields += [(part.strip(" *"), "*" in part, kind) for part in names.split(",")]
    return fields


@pytest.mark.parametrize("name", TWINS)
def test_fields(name):
    fields = TWINS[name]._fields_
    wanted = declared(name)
    assert [field[0] for field in wanted] == [field for field, _ in fields]
    for (field, points, kind), (_, ours) in zip(wanted, fields, strict=True):
        size = 8 if points else SIZES.get(kind) or ctypes.sizeof(TWINS[kind])
        assert ctypes.sizeof(ours) == size, field


def test_page_formats_are_those_of_the_kernels():
    """Each has its number in rows.h and its struct in page_formats.cuh, and the kernels have no others."""
    c, cuda = ((folder() / file).read_text(encoding="utf-8") for file in ("cpu/rows.h", "cuda/page_formats.cuh"))
    short = {"float32": "ROW_F32", "bfloat16": "ROW_BF16", "int8": "ROW_I8", "q4": "ROW_Q4", "k5v4": "ROW_Q5"}
    kinds = {short[name]: format.k.kind for name, format in PAGE_FORMATS.items() if format.k.kind is not None}
    assert re.search(r"enum RowFormat \{ (.+?) \};", c)[1].split(", ") == sorted(kinds, key=kinds.get)
    assert sorted(kinds.values()) == list(range(len(kinds)))
    structs = set(re.findall(r"^struct (\w+) \{ typedef", cuda, re.MULTILINE))
    assert structs == {format.cuda for format in PAGE_FORMATS.values()} - {None}


def test_all_structs_that_python_fills_are_there():
    assert {"Matrix", "Product", "Block", "Model", "Paged", "Merge"} <= TWINS.keys()
