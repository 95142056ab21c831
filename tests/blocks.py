"""Random weights in blocks of every format."""

import numpy as np

from minillm.files.formats import FORMATS

BLOCKS = [name for name, format in FORMATS.items() if not format.is_float and format.held is format]
# where the float16 d of a block lies (and m or dmin after it): at byte 0 if not said
_AT = {"Q6_K": 208, "Q2_K": 80, "Q3_K": 108, "TQ1_0": 52, "TQ2_0": 64}
# what a quant times its small scale is at most, about; what lies in the middle of the quants, of formats with offsets
_LARGEST = {"Q8_0": 127, "Q5_0": 16, "Q5_1": 16, "Q4_K": 8 * 40, "Q5_K": 16 * 40, "Q6_K": 32 * 80}
_MIDDLE = {"Q4_1": -8, "Q4_K": 8, "Q5_K": 16, "Q5_1": -16, "Q2_K": 1.5}


def random_blocks(rng, kind, n_out, n_in, scale):
    """(n_out, bytes of a row): random quants, scales of both signs, offsets about in the middle of the quants, values
    of kept formats about `scale` large."""
    format = FORMATS[kind]
    blocks = rng.integers(0, 256, (n_out, n_in // format.block, format.block_bytes), np.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = rng.integers(118, 125, blocks.shape[:2])  # the exponent, less 128
    elif kind == "NVFP4":
        blocks[..., :4] &= 63  # floats of 8 bits: none that is NaN
    elif kind == "IQ1_M":  # a half in the high four bits of four words
        blocks[..., 49:56:2] = blocks[..., 49:56:2] & 15 | np.array([0, 0, 12, 2], np.uint8) << 4
    else:
        signs = rng.choice([-1, 1], blocks.shape[:2])
        d = rng.uniform(0.5, 1.5, blocks.shape[:2]) * scale / _LARGEST.get(kind, 8) * signs
        halves = [d, _MIDDLE[kind] * d * rng.uniform(0.9, 1.1, d.shape)] if kind in _MIDDLE else [d]
        halves = np.stack(halves, axis=2).astype(np.float16).view(np.uint8)
        at = _AT.get(kind, 0)
        blocks[..., at : at + halves.shape[2]] = halves
    return blocks.reshape(n_out, -1)
