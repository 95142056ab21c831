"""Weight formats: everything that Python knows of how weights lie in files and in memory.

A format is floats of one kind, or ggml's blocks of weights that share a scale:

Q8_0  32 weights, 34 bytes: float16 d, 32 x int8 q                            w = d * q
Q4_0  32 weights, 18 bytes: float16 d, 16 bytes of two 4-bit q                w = d * (q - 8)
Q4_1  32 weights, 20 bytes: float16 d, float16 m, 16 bytes of two 4-bit q     w = d * q + m
Q5_0  32 weights, 22 bytes: float16 d, 4 bytes of fifth bits, 16 of two 4-bit q   w = d * (q - 16)
Q5_1  32 weights, 24 bytes: float16 d, float16 m, and the same                w = d * q + m
In a byte of 4-bit q, the low half is weight i and the high half weight i + 16.

K-quants have 256 weights a block, in parts with a small whole scale each. Of byte l of 32 with 4-bit q, the low half is
weight l and the high half weight l + 32 of 64 (Q6_K: byte l of 64, weights l and l + 64 of 128).
Q4_K  144 bytes: float16 d and dmin, 12 of packed 6-bit s and m for 8 parts, 128 of 4-bit q     w = d * s * q - dmin * m
Q5_K  176 bytes: as Q4_K, before the 4-bit q 32 bytes of fifth bits: bit i of byte l is weight l of part i
Q6_K  210 bytes: 128 of 4-bit q, 64 of two high bits each, 16 x int8 s, float16 d                w = d * s * (q - 32)

Other types of ggml are read, and held as others. Where the kernels are compiled they become, once, the smallest of the
above that holds them without loss or nearly so: Q8_0, and Q3_K becomes Q6_K. Without those NumPy widens them as stored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

_CHUNK = 2**18  # weights of blocks to_float32 at a time: their temporaries stay in the cache, which is twice as fast


@dataclass(frozen=True)
class DeviceFormat:
    """How a GPU holds a format: as a struct of kernels/cuda/weights.cuh, of which `chunk` weights lie in 16 bytes and
    meet activations of the type real16 ("half" or "bf16").

    apart: blocks (n, block_bytes) -> words (n, bytes of the chunks), scales (n, bytes of the rest), all uint8; None:
    the words are as stored, without scales."""

    name: str  # of the struct
    chunk: int
    real16: str = "half"
    scales: int = 0  # bytes of a block that lie apart from the chunks
    apart: Callable[[np.ndarray, np.ndarray, np.ndarray], None] | None = None


@dataclass(frozen=True)
class WeightFormat:
    """One format of weights. Formats are the objects of FORMATS: two are the same if they are one object."""

    name: str  # ggml's and safetensors'
    number: int  # ggml's, in a .gguf file
    kind: int | None  # of enum Kind in kernels/cpu/minillm_cpu.h; None: no kernel reads it, `held` is made at load
    block: int  # weights that share a scale; 1: floats
    block_bytes: int
    words: type[np.generic]  # of an array of them: float32, float16, uint16 of bfloat16; uint8 of blocks
    to_float32: Callable[[np.ndarray, np.ndarray], None]  # blocks (n, block_bytes), or words -> out (n, block) float32
    device: DeviceFormat | None = None  # None: a GPU gets 16-bit words
    becomes: str | None = None  # the format that it is held as, by name; None: itself

    @property
    def held(self) -> "WeightFormat":
        """The format that weights of this one have in memory, where kernels multiply by them."""
        return FORMATS[self.becomes] if self.becomes else self

    @property
    def is_float(self) -> bool:
        return self.block == 1

    def nbytes(self, n: int) -> int:
        """Bytes of n weights, a multiple of `block`."""
        return n // self.block * self.block_bytes

    def device_bytes(self, n: int) -> int:
        """Bytes of n weights of a matrix on a GPU, a multiple of `block`."""
        if self.device is None:
            return 2 * n
        return n // self.device.chunk * 16 + n // self.block * self.device.scales

    def apart(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Blocks (out, bytes of a row) as the struct `device` has them: words (out, bytes of the chunks) uint8, scales
        (out, 16-bit words of the rest) uint16."""
        n_out, blocks = len(data), data.reshape(-1, self.block_bytes)
        words = np.empty((len(blocks), self.block // self.device.chunk * 16), np.uint8)
        scales = np.empty((len(blocks), self.device.scales), np.uint8)
        step = _CHUNK // self.block
        for lo in range(0, len(blocks), step):
            self.device.apart(*(part[lo : lo + step] for part in (blocks, words, scales)))
        return words.reshape(n_out, -1), scales.reshape(n_out, -1).view(np.uint16)

    def widen(self, data: np.ndarray, out: np.ndarray) -> None:
        """Writes `data` (words, or uint8 blocks) to out, float32 and contiguous, of as many weights. Bit for bit what
        gguf.quants computes."""
        if self.is_float:
            self.to_float32(data, out)
            return
        blocks, weights = data.reshape(-1, self.block_bytes), out.reshape(-1, self.block)
        step = _CHUNK // self.block
        for lo in range(0, len(blocks), step):
            self.to_float32(blocks[lo : lo + step], weights[lo : lo + step])

    def quantize(self, rows: np.ndarray) -> np.ndarray:
        """rows (n, in) float32, in a multiple of `block` -> uint8 (n, bytes of a row) of Q8_0 or Q4_0, rounded as
        ggml's reference rounds: by gguf.quants."""
        import gguf

        with np.errstate(all="ignore"):  # a block of tiny weights has the scale 0, whatever is divided by it
            return gguf.quantize(rows, gguf.GGMLQuantizationType(self.number))


def _copy(data, out):
    out[...] = data


def _bf16(data, out):  # the upper half of a float32
    np.left_shift(data, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)


def _halves(blocks, at, n=1):
    """n float16 of each block, from byte `at` on, as (blocks, n) float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2 * n]).view(np.float16).astype(np.float32)


def _nibbles(bytes_, out):
    """Bytes (n, 16) of two 4-bit numbers -> out (n, 32): the low halves, then the high ones."""
    halves = np.empty((len(bytes_), 32), np.uint8)
    np.bitwise_and(bytes_, 15, out=halves[:, :16])
    np.right_shift(bytes_, 4, out=halves[:, 16:])
    out[...] = halves


def _q8_0(blocks, out):
    out[...] = blocks[:, 2:].view(np.int8)
    out *= _halves(blocks, 0)


def _q4_0(blocks, out):
    _nibbles(blocks[:, 2:], out)
    out -= 8
    out *= _halves(blocks, 0)


def _q4_1(blocks, out):
    _nibbles(blocks[:, 4:], out)
    out *= _halves(blocks, 0)
    out += _halves(blocks, 2)


def _five_bits(fifth, bytes_, out):
    """Fifth bits (n, 4) of the numbers whose others are in bytes (n, 16) -> out (n, 32)."""
    _nibbles(bytes_, out)
    out += np.unpackbits(fifth, axis=1, bitorder="little") << np.uint8(4)


def _q5_0(blocks, out):
    _five_bits(blocks[:, 2:6], blocks[:, 6:], out)
    out -= 16
    out *= _halves(blocks, 0)


def _q5_1(blocks, out):
    _five_bits(blocks[:, 4:8], blocks[:, 8:], out)
    out *= _halves(blocks, 0)
    out += _halves(blocks, 2)


def _packed_scales(packed):
    """12 bytes of 6-bit scales and mins -> scales (n, 8), mins (n, 8) uint8."""
    low_scales, low_mins, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low_scales & 63, rest & 15 | low_scales >> 6 << 4], axis=1)
    mins = np.concatenate([low_mins & 63, rest >> 4 | low_mins >> 6 << 4], axis=1)
    return scales, mins


def _low_bits(bytes_, run):
    """Bytes of two 4-bit numbers -> (n, parts, run) uint8: the low halves of `run` bytes, then their high ones."""
    runs = bytes_.reshape(len(bytes_), -1, 1, run)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(bytes_), -1, run)


def _offset_parts(q, blocks, out):
    """q (n, 8, 32) of Q4_K or Q5_K -> out."""
    scales, mins = (packed[..., None].astype(np.float32) for packed in _packed_scales(blocks[:, 4:16]))
    halves, parts = _halves(blocks, 0, 2)[:, :, None], out.reshape(q.shape)
    np.multiply(halves[:, :1] * scales, q, out=parts)
    parts -= halves[:, 1:] * mins


def _q4_k(blocks, out):
    _offset_parts(_low_bits(blocks[:, 16:], 32), blocks, out)


def _fifth_bits(blocks):
    """Of blocks of Q5_K: (n, 8, 32) uint8."""
    return blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1


def _q5_k(blocks, out):
    _offset_parts(_low_bits(blocks[:, 48:], 32) | _fifth_bits(blocks) << 4, blocks, out)


def _high_bits(blocks):
    """Of blocks of Q6_K: the two high bits of each quant, (n, 256) uint8."""
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    return high.reshape(-1, 256)


def _q6_k(blocks, out):
    low = _low_bits(blocks[:, :128], 64).reshape(-1, 256)
    q = (low | _high_bits(blocks) << 4).view(np.int8).reshape(-1, 16, 16) - np.int8(32)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    np.multiply((_halves(blocks, 208) * scales)[..., None], q, out=out.reshape(q.shape))


def _before_quants(blocks, words, scales):
    """Blocks that end with their quants, 32 of them in chunks of 16 bytes or 32 bytes."""
    n = scales.shape[1]
    scales[...], words[...] = blocks[:, :n], blocks[:, n:]


def _chunked(bytes_, run, words):
    """Bytes of two 4-bit numbers in runs -> the numbers in chunks of 32, as Q4_0 has them."""
    halves = _low_bits(bytes_, run).reshape(len(bytes_), -1, 2, 16)
    np.bitwise_or(halves[:, :, 0], halves[:, :, 1] << 4, out=words.reshape(len(bytes_), -1, 16))


def _q4_k_apart(blocks, words, scales):
    _chunked(blocks[:, -128:], 32, words)
    scales[:, :4] = blocks[:, :4]
    scales[:, 4:20:2], scales[:, 5:20:2] = _packed_scales(blocks[:, 4:16])


def _q5_k_apart(blocks, words, scales):
    _q4_k_apart(blocks, words, scales)
    scales[:, 20:] = np.packbits(_fifth_bits(blocks), axis=2, bitorder="little").reshape(-1, 32)


def _q6_k_apart(blocks, words, scales):
    _chunked(blocks[:, :128], 64, words)
    scales[:, :4], scales[:, 4:20] = _halves(blocks, 208).view(np.uint8), blocks[:, 192:208]
    fours = _high_bits(blocks).view("<u4")  # two bits in each byte: they meet in the lowest
    fours |= fours >> 6
    scales[:, 20:] = fours | fours >> 12


def _by_gguf(number, blocks, out):
    import gguf  # takes 0.1 s

    out[...] = gguf.dequantize(blocks, gguf.GGMLQuantizationType(number))


def _other(name, number, kind, block, block_bytes, becomes="Q8_0"):
    return WeightFormat(name, number, kind, block, block_bytes, np.uint8, partial(_by_gguf, number), becomes=becomes)


def _plain(name, chunk, scales):
    return DeviceFormat(name, chunk, scales=scales, apart=_before_quants)


_ALL = (
    WeightFormat("F32", 0, 0, 1, 4, np.float32, _copy),
    WeightFormat("F16", 1, 1, 1, 2, np.float16, _copy, DeviceFormat("F16", 8)),
    WeightFormat("BF16", 30, 2, 1, 2, np.uint16, _bf16, DeviceFormat("BF16", 8, "bf16")),
    WeightFormat("Q8_0", 8, 3, 32, 34, np.uint8, _q8_0, _plain("Q8_0", 16, 2)),
    WeightFormat("Q4_0", 2, 4, 32, 18, np.uint8, _q4_0, _plain("Q4_0", 32, 2)),
    WeightFormat("Q4_1", 3, 5, 32, 20, np.uint8, _q4_1, _plain("Q4_1", 32, 4)),
    WeightFormat("Q5_0", 6, 9, 32, 22, np.uint8, _q5_0, _plain("Q5_0", 32, 6)),
    WeightFormat("Q5_1", 7, 10, 32, 24, np.uint8, _q5_1, _plain("Q5_1", 32, 8)),
    WeightFormat("Q4_K", 12, 6, 256, 144, np.uint8, _q4_k, DeviceFormat("Q4_K", 32, scales=20, apart=_q4_k_apart)),
    WeightFormat("Q5_K", 13, 7, 256, 176, np.uint8, _q5_k, DeviceFormat("Q5_K", 32, scales=52, apart=_q5_k_apart)),
    WeightFormat("Q6_K", 14, 8, 256, 210, np.uint8, _q6_k, DeviceFormat("Q6_K", 32, scales=84, apart=_q6_k_apart)),
    _other("Q2_K", 10, 11, 256, 84),
    _other("Q3_K", 11, 12, 256, 110, becomes="Q6_K"),
    _other("IQ4_NL", 20, 13, 32, 18),
    _other("IQ4_XS", 23, 14, 256, 136),
    _other("MXFP4", 39, 15, 32, 17),
    _other("IQ1_S", 19, None, 256, 50),
    _other("IQ1_M", 29, None, 256, 56),
    _other("IQ2_XXS", 16, None, 256, 66),
    _other("IQ2_XS", 17, None, 256, 74),
    _other("IQ2_S", 22, None, 256, 82),
    _other("IQ3_XXS", 18, None, 256, 98),
    _other("IQ3_S", 21, None, 256, 110),
    _other("TQ1_0", 34, None, 256, 54),
    _other("TQ2_0", 35, None, 256, 66),
    _other("NVFP4", 40, None, 64, 36),
)
FORMATS = {format.name: format for format in _ALL}
F32, F16, BF16 = _ALL[:3]
FLOATS = (F32, F16, BF16)
WORDS = {"half": F16.device, "bf16": BF16.device}  # real16 -> how a GPU holds plain 16-bit words

# what a user asks for -> the format of matrices, and of the head: llama.cpp too keeps that finer than the rest
QUANTIZED = {"q8_0": (FORMATS["Q8_0"], FORMATS["Q8_0"]), "q4_0": (FORMATS["Q4_0"], FORMATS["Q8_0"])}
