"""The formats of pages, 16-bit types and head sizes that CUDA kernels are tested with: they take minutes to compile for
all of them. Each size that a known model has is there; 80 is the first that is no multiple of 32, 256 the largest,
whose rows are taken in halves."""

from emulator import cases

from minillm.ops.pages import PAGE_FORMATS

SIZES = cases([("half", 64), ("bf16", 128), ("half", 80), ("bf16", 256)], races=[("half", 64)])  # real16, head_dim
LEVELS = cases(
    [("k5v4", "half", 64), ("k5v4", "half", 96), ("k5v4", "bf16", 256), ("q4", "half", 112), ("q4", "bf16", 192)],
    races=[("k5v4", "half", 64)],
)
STORED = [("int8", *size) for size in SIZES] + LEVELS  # format, real16, head_dim
PAGES = [("float16", *size) for size in SIZES] + STORED
_MODELS = ("half", 64), ("bf16", 64)  # of small models
_TESTED = {(PAGE_FORMATS[dtype].cuda, *rest) for dtype, *rest in PAGES}
_TESTED |= {(cuda, *size) for cuda in ("Words", "Int8") for size in _MODELS}


def tested(defines):
    """Whether some test asks for this variant of a kernel file."""
    if "HEAD_DIM" not in defines:
        return True
    return (defines.get("FORMAT", "Words"), defines["real16"], int(defines["HEAD_DIM"])) in _TESTED
