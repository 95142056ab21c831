"""Every kernel in the variants of five head sizes through NVRTC, for Ampere and Hopper, with the options that
cupy.RawModule uses: no GPU and no driver is needed. A kernel that spills registers to memory fails, and so does one
that needs more of them than is written down here: that is a change to look at, for it may cost occupancy."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from minillm.ops import launch

try:
    import cupy
    from cupy.cuda import nvrtc

    nvrtc.getVersion()
except (ImportError, RuntimeError) as error:
    pytest.skip(f"no CuPy or no NVRTC ({error}): pip install 'minillm-engine[nvrtc]'", allow_module_level=True)

ARCHS = (80, 90)
HEAD_SIZES = (64, 80, 128, 192, 256)  # each team, and rows that do not fill one
LIMITS = {  # registers a thread, of the variant and architecture that needs most: measured with NVRTC 13.5
    "add_bias": 16,
    "add_rms_norm": 26,
    "column_scores": 168,
    "segment_count": 32,
    "decode_attention": 128,
    "decode_combine": 32,
    "decode_plan": 32,
    "dequantize": 40,
    "embed": 40,
    "gemv": 218,
    "glu": 40,
    "keep_cosines": 168,
    "last_pages": 16,
    "long_clusters": 40,
    "merge": 34,
    "merge_unrotated": 40,
    "nearest": 40,
    "neighbours": 24,
    "norm_gemv": 128,
    "norm_gemv_logits": 128,
    "norm_gemv_glu": 128,
    "not_finite": 18,
    "compact": 32,
    "pooled": 32,
    "prefill_attention": 255,
    "random_words": 40,
    "read_entries": 40,
    "rms_norm": 24,
    "rope_append": 53,
    "rope_split": 40,
    "sample_best": 32,
    "sample_draw": 56,
    "sample_weights": 32,
    "score_lse": 128,
    "select_digit": 32,
    "select_mask": 32,
    "short_clusters": 56,
    "take": 16,
    "segment_sum": 32,
    "unit_rows": 24,
    "unrotate": 32,
    "window_scores": 128,
    "write_entries": 54,
}
LARGE_HEADS = LIMITS | {"decode_attention": 233, "decode_combine": 40}  # of more than 128 elements


def wanted(defines):
    """Of most head sizes one 16-bit type: registers are the same for both."""
    return defines.get("HEAD_DIM") in (None, "64", "128") or defines["real16"] == "bf16"


VARIANTS = [
    (file, tuple(defines.items()), arch)
    for file in launch.files()
    for defines in launch.variants(file, HEAD_SIZES)
    if wanted(defines)
    for arch in ARCHS
]


def compiled(file, defines, arch):
    """{kernel: (registers, bytes spilled)}"""
    options = cupy._core.core.assemble_cupy_compiler_options(())
    options += ("--device-as-default-execution-space", "-ftz=true", f"-arch=sm_{arch}", "--ptxas-options=-v")
    program = nvrtc.createProgram(launch.source(file, dict(defines)), f"{file}.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        assert nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise AssertionError(nvrtc.getProgramLog(program)) from error
    finally:
        log = nvrtc.getProgramLog(program)
        nvrtc.destroyProgram(program)
    out = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        kernel = part[: part.index("'")]
        spilled = sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()))
        out[kernel] = int(re.search(r"Used (\d+) registers", part)[1]), spilled
    return out


@pytest.fixture(scope="module")
def results():
    """All of them; NVRTC works in several threads at once."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(VARIANTS, pool.map(lambda variant: compiled(*variant), VARIANTS), strict=True))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join([v[0], *(x for _, x in v[1]), f"sm{v[2]}"]))
def test_compiles_without_spills(results, variant):
    kernels, head_dim = results[variant], int(dict(variant[1]).get("HEAD_DIM", 0))
    limits = LARGE_HEADS if head_dim > 128 else LIMITS
    assert kernels.keys() >= launch.kernels(variant[0])
    for kernel, (registers, spilled) in kernels.items():
        assert spilled == 0, f"{kernel} spills {spilled} bytes"
        assert registers <= limits[kernel], f"{kernel} needs {registers} registers, {limits[kernel]} are written down"
