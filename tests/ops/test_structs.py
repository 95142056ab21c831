"""The structs of minillm_cpu.h and their twins in ops.cpu_lib: the same fields in the same order."""

import ctypes
import re

import pytest

from minillm.ops import cpu_lib
from minillm.ops.launch.sources import folder

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


def test_all_structs_that_python_fills_are_there():
    assert {"Matrix", "Product", "Block", "Model", "Paged", "Merge"} <= TWINS.keys()
