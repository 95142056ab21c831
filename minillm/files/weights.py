"""Weights in memory, and how they get there from a StoredModel.

Its files are mapped. "stored" keeps tensors as they lie in the file, as views of the map; those of formats that no
kernel reads become Q8_0, a part at a time, and packed ones of a checkpoint the format that holds them. "float32" widens
tensor after tensor and gives the mapped pages back; "q8_0" and "q4_0" make blocks of matrices of floats just so.
"""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from minillm.files.formats import F32, FORMATS, WeightFormat
from minillm.files.mapped_file import StoredTensor
from minillm.files.packed_tensor import PackedTensor, Tensors
from minillm.files.stored_model import StoredModel

_PART = 2**18  # weights converted at a time: a millisecond or some of work, and temporaries of a few MB
_THREADS = min(8, os.cpu_count() or 1)  # for widening; more than that wait for memory


@dataclass(frozen=True)
class Weight:
    """One tensor of shape (out, in), or (n,) and then always F32."""

    format: WeightFormat
    data: np.ndarray  # floats: the format's words, of `shape`; blocks: uint8 (out, bytes of a row)
    shape: tuple[int, ...]

    @classmethod
    def floats(cls, array: np.ndarray) -> "Weight":
        """A float32 array as it is."""
        return cls(F32, array, array.shape)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def rows(self, lo: int, hi: int) -> np.ndarray:
        """(hi - lo, in) float32: a view of float32 data, else a fresh array."""
        part = self.data[lo:hi]
        if self.format is F32:
            return part
        out = np.empty((len(part), *self.shape[1:]), np.float32)
        self.format.widen(part, out)
        return out

    def widened(self, run=map) -> "Weight":
        """The same weight as F32; itself if it is. `run`: the map of a thread pool, for parts of the rows."""
        if self.format is F32:
            return self
        out = np.empty(self.shape, np.float32)

        def widen_rows(part):
            self.format.widen(self.data[part], out[part])

        for _ in run(widen_rows, _parts(self.shape)):
            pass
        return Weight.floats(out)

    def quantized(self, format: WeightFormat, run=map) -> "Weight":
        """The same matrix in blocks of Q8_0 or Q4_0. `run` as in `widened`."""
        n_out, n_in = self.shape
        out = np.empty((n_out, format.nbytes(n_in)), np.uint8)

        def quantize_rows(part):
            out[part] = format.quantize(self.rows(part.start, part.stop))

        for _ in run(quantize_rows, _parts(self.shape)):
            pass
        return Weight(format, out, self.shape)


def _parts(shape):
    """Slices of the rows of a tensor, about _PART elements each."""
    step = max(1, _PART // math.prod(shape[1:]))
    return [slice(lo, lo + step) for lo in range(0, shape[0], step)]


def load_weights(
    stored: StoredModel, *, dtype: str, progress: bool = False, only=lambda name: True
) -> dict[str, Weight]:
    """The weights of a StoredModel by name; no lm_head.weight if the head is tied.

    dtype: "float32"; "stored" (16-bit and quantised matrices stay what they are); "q8_0" or "q4_0" (matrices of
    floats become such blocks; under q4_0 the head, also where the embedding is the head, becomes Q8_0: llama.cpp too
    keeps it finer than the rest). Norms and biases become F32.
    progress: show a bar on stderr, if that is a terminal. only: name -> whether to load it.
    Raises MinillmError naming file and tensor of a type that cannot be read or turned into blocks.
    """
    weights, formats = {}, stored.formats(dtype)
    wanted = {name: tensor for name, tensor in stored.tensors.items() if only(name)}
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, tensor in _shown(wanted, progress):
            format = formats[name]
            weight = _in_order(_load(tensor, format, pool.map), stored.order_of(name))
            if weight.format is not format:
                weight = weight.widened(pool.map) if format is F32 else weight.quantized(format, pool.map)
            if stored.norm_offset and name.endswith("norm.weight"):
                weight = Weight(F32, weight.data + np.float32(stored.norm_offset), weight.shape)
            for part in tensor.parts:
                if not np.may_share_memory(weight.data, part.bytes):
                    part.file.release(part.offset, part.nbytes)
            weights[name] = weight
    return weights


def _shown(tensors: Tensors, progress: bool) -> Iterator[tuple[str, StoredTensor | PackedTensor]]:
    """The items of `tensors`, with a progress bar of their bytes while they are used."""
    if not progress:
        yield from tensors.items()
        return
    from tqdm import tqdm

    total = sum(tensor.nbytes for tensor in tensors.values())
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for name, tensor in tensors.items():
            yield name, tensor
            bar.update(tensor.nbytes)


def _load(tensor: StoredTensor | PackedTensor, format: WeightFormat, run) -> Weight:
    """The tensor as it is stored, or, a packed one, in this format. `run`: as in Weight.widened."""
    if isinstance(tensor, PackedTensor):
        return _unpacked(tensor, format, run)
    format = FORMATS[tensor.kind]
    data = tensor.bytes.view(format.words).reshape(*tensor.shape[:-1], -1)
    data = data if data.flags.aligned else data.copy()  # BLAS would copy it at every product
    return Weight(format, data, tensor.shape)


def _unpacked(tensor: PackedTensor, format: WeightFormat, run) -> Weight:
    n_out, n_in = tensor.shape
    words = format.nbytes(n_in) // np.dtype(format.words).itemsize
    out = np.empty((n_out, words), format.words)

    def read_rows(part):
        out[part] = tensor.read(part.start, min(part.stop, n_out), format)

    for _ in run(read_rows, _parts(tensor.shape)):
        pass
    return Weight(format, out, tensor.shape)


def _in_order(weight: Weight, order: np.ndarray | None) -> Weight:
    """The rows of each head in this order."""
    if order is None:
        return weight
    data = weight.data
    return replace(weight, data=data.reshape(-1, len(order), *data.shape[1:])[:, order].reshape(data.shape))
