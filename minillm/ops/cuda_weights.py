"""Matrices in device memory, as kernels/cuda/weights.cuh reads them."""

from dataclasses import dataclass

import numpy as np

from minillm.files.formats import WORDS, DeviceFormat
from minillm.ops.pages import BFLOAT16, FLOAT16

FLOATS = {"half": FLOAT16, "bf16": BFLOAT16}  # real16 -> its words on the host, and in pages


@dataclass
class CudaWeight:
    """A matrix (out, in). words (out, bytes of a row) uint8; scales (out, n) uint16, None for plain 16-bit words:
    device arrays."""

    format: DeviceFormat
    shape: tuple[int, int]
    words: object
    scales: object = None

    @classmethod
    def of(cls, device, weight, real16):
        """A Weight as this model's activations can meet it: blocks and 16-bit words stay what they are, anything else
        becomes 16-bit words of the type real16."""
        kept, scales = weight.format.device, None
        if kept is None or kept.real16 != real16:
            words, kept = FLOATS[real16].k.words(weight.rows(0, weight.shape[0])), WORDS[real16]
        elif kept.apart:
            words, scales = weight.format.apart(weight.data)
        else:
            words = weight.data
        if not device.owns(words):  # as random ones are
            words = device.upload(np.ascontiguousarray(words))
        words = words.view(np.uint8)
        return cls(kept, weight.shape, words, None if scales is None else device.upload(scales))

    @property
    def nbytes(self):
        return self.words.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def rows(self, lo, hi):
        """Rows lo : hi, a view."""
        return CudaWeight(
            self.format,
            (hi - lo, self.shape[1]),
            self.words[lo:hi],
            None if self.scales is None else self.scales[lo:hi],
        )


def stacked(device, weights):
    """Matrices of one format as one, each above the next: a single one itself, more in new memory."""
    if len(weights) == 1:
        return weights[0]
    words = _joined(device, [weight.words for weight in weights])
    scales = None if weights[0].scales is None else _joined(device, [weight.scales for weight in weights])
    return CudaWeight(weights[0].format, (len(words), weights[0].shape[1]), words, scales)


def _joined(device, parts):
    whole, row = device.empty((sum(len(part) for part in parts), parts[0].shape[1]), parts[0].dtype), 0
    for part in parts:
        whole[row : row + len(part)] = part
        row += len(part)
    return whole
