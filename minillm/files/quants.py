"""Between stored weights and float32: 16-bit floats, and the ggml blocks of 32 weights that share a scale.

Q8_0  34 bytes: float16 d, 32 x int8 q                            w = d * q
Q4_0  18 bytes: float16 d, 16 bytes of two 4-bit q                w = d * (q - 8)
Q4_1  20 bytes: float16 d, float16 m, 16 bytes of two 4-bit q     w = d * q + m
In a byte of 4-bit q, the low half is weight i and the high half weight i + 16.
"""

import numpy as np

FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}  # kind -> type of its words
BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}
BLOCK_WEIGHTS = 32
KINDS = (*FLOATS, *BLOCK_BYTES)  # what a Weight may be
_CHUNK = (
    8192  # blocks: what passes through the temporaries at a time stays in the cache (measured: twice as fast as all)
)


def kind_bytes(kind: str, n: int) -> int:
    """Bytes of n weights of a kind; of blocks, n is a multiple of BLOCK_WEIGHTS."""
    return n // BLOCK_WEIGHTS * BLOCK_BYTES[kind] if kind in BLOCK_BYTES else n * np.dtype(FLOATS[kind]).itemsize


def widen(kind: str, data: np.ndarray, out: np.ndarray) -> None:
    """Writes `data` of kind F16 (float16), BF16 (uint16 words), Q8_0, Q4_0 or Q4_1 (uint8 blocks) to out, float32 and
    contiguous, of as many elements."""
    if kind == "F16":
        out[...] = data
    elif kind == "BF16":  # bfloat16 is the upper half of a float32
        np.left_shift(data, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
    else:
        blocks, weights = data.reshape(-1, BLOCK_BYTES[kind]), out.reshape(-1, BLOCK_WEIGHTS)
        for lo in range(0, len(blocks), _CHUNK):
            _widen_blocks(kind, blocks[lo : lo + _CHUNK], weights[lo : lo + _CHUNK])


def _widen_blocks(kind: str, blocks: np.ndarray, out: np.ndarray) -> None:
    """blocks (n, block bytes) uint8 -> out (n, 32) float32, bit for bit what gguf.quants computes."""
    scale_bytes = 4 if kind == "Q4_1" else 2
    scales = np.ascontiguousarray(blocks[:, :scale_bytes]).view(np.float16).astype(np.float32)  # (n, 1 or 2)
    q = blocks[:, scale_bytes:]
    if kind == "Q8_0":
        out[...] = q.view(np.int8)
    else:
        halves = np.empty((len(blocks), 32), np.uint8)
        np.bitwise_and(q, 15, out=halves[:, :16])
        np.right_shift(q, 4, out=halves[:, 16:])
        out[...] = halves
    if kind == "Q4_0":
        out -= 8
    out *= scales[:, :1]
    if kind == "Q4_1":
        out += scales[:, 1:]


def quantize(kind: str, rows: np.ndarray) -> np.ndarray:
    """rows (n, in) float32, in a multiple of 32 -> uint8 (n, bytes of a row) of kind Q8_0 or Q4_0, rounded as ggml's
    reference rounds: by gguf.quants."""
    import gguf

    with np.errstate(all="ignore"):  # a block of tiny weights has the scale 0, whatever is divided by it
        return gguf.quantize(rows, gguf.GGMLQuantizationType[kind])
