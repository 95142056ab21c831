"""Random weights in blocks of every kept format."""

import numpy as np

from minillm.files.formats import FORMATS

BLOCKS = [name for name, format in FORMATS.items() if not format.is_float]
# what a quant times its small scale is at most, about; what lies in the middle of the quants
_LARGEST = {"Q8_0": 127, "Q4_0": 8, "Q4_1": 8, "Q4_K": 8 * 40, "Q5_K": 16 * 40, "Q6_K": 32 * 80}
_MIDDLE = {"Q4_1": -8, "Q4_K": 8, "Q5_K": 16}


def random_blocks(rng, kind, n_out, n_in, scale):
    """(n_out, bytes of a row): random quants, scales of both signs, offsets about in the middle of the quants, values
    about `scale` large."""
    format = FORMATS[kind]
    blocks = rng.integers(0, 256, (n_out, n_in // format.block, format.block_bytes), np.uint8)
    d = rng.uniform(0.5, 1.5, blocks.shape[:2]) * scale / _LARGEST[kind] * rng.choice([-1, 1], blocks.shape[:2])
    halves = [d, _MIDDLE[kind] * d * rng.uniform(0.9, 1.1, d.shape)] if kind in _MIDDLE else [d]
    halves = np.stack(halves, axis=2).astype(np.float16).view(np.uint8)
    at = format.block_bytes - 2 if kind == "Q6_K" else 0
    blocks[..., at : at + halves.shape[2]] = halves
    return blocks.reshape(n_out, -1)
