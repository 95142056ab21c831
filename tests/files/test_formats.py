"""The table of weight formats against ggml's, and against what the C and CUDA sources say of the same formats."""

import re

import gguf
import numpy as np
import pytest
from paths import ROOT

from minillm.files.formats import FLOATS, FORMATS
from minillm.ops import cpu_lib


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_ggmls(name):
    format, number = FORMATS[name], gguf.GGMLQuantizationType[name]
    assert (format.number, format.block, format.block_bytes) == (number, *gguf.GGML_QUANT_SIZES[number])
    assert format.is_float == (format in FLOATS) == (np.dtype(format.words).itemsize == format.block_bytes)


def test_kinds_are_those_of_the_kernels():
    """enum Kind of minillm_cpu.h: every weight format has the number it has there."""
    source = (ROOT / "kernels/cpu/minillm_cpu.h").read_text()
    names = re.search(r"enum Kind \{ (.+?) \};", source)[1].split(", ")
    assert {format.name: format.kind for format in FORMATS.values() if format.kind is not None} == {
        name: number for number, name in enumerate(names)
    }


@pytest.mark.skipif(cpu_lib.library() is None, reason="the kernels were not built")
@pytest.mark.parametrize(
    "name", [n for n, format in FORMATS.items() if format.kind is not None and not format.is_float]
)
@pytest.mark.parametrize("n_out, n_in", [(1, 256), (16, 512), (40, 768)])
def test_panels_are_as_large_as_the_blocks_of_a_file(name, n_out, n_in):
    """In panels of 16 rows, each rounded up to 64 bytes; 6-bit scales have bytes there, 4 more a block."""
    format, size = FORMATS[name], cpu_lib.library().functions["panels_bytes"]
    unpacked = 4 * n_in // 256 if name in ("Q4_K", "Q5_K") else 0
    panel = -(-16 * (format.held.nbytes(n_in) + unpacked) // 64) * 64
    assert size(format.kind, n_out, n_in) == -(-n_out // 16) * panel


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.device])
def test_structs_are_those_of_the_cuda_kernels(name):
    device, source = FORMATS[name].device, (ROOT / "kernels/cuda/weights.cuh").read_text()
    struct = device.name
    while (body := re.search(rf"struct {struct}\b.*?\}};", source, re.S)[0]) and "CHUNK = " not in body:
        struct = re.match(rf"struct {struct} : (\w+)", body)[1]
    assert int(re.search(r"CHUNK = (\d+);", body)[1]) == device.chunk
    real16 = "bf16" if f"struct {device.name} : Dense<bf16>" in source else "half"
    assert device.real16 == real16


def test_bytes_on_a_device():
    """Of a matrix of 2 rows of 512: blocks take what they take in a file, or little more; others 16 bits a weight."""
    grows = {"Q4_K": 4, "Q5_K": 4, "Q6_K": 2}  # bytes a block
    for name, format in FORMATS.items():
        if format.device is None or format.is_float:
            assert format.device_bytes(1024) == 2048
            continue
        words, scales = format.apart(np.zeros((2, format.nbytes(512)), np.uint8))
        assert len(words) == len(scales) == 2 and scales.dtype == np.uint16
        expected = format.nbytes(1024) + 1024 // format.block * grows.get(name, 0)
        assert format.device_bytes(1024) == words.nbytes + scales.nbytes == expected


def test_what_is_held_is_kept():
    """What a format is held as is held as itself, and its blocks fit into the rows."""
    for format in FORMATS.values():
        assert format.held.held is format.held and format.held.kind is not None
        assert format.block % format.held.block == 0
