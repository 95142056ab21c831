"""Each CUDA kernel against literal float64, on the emulator and, where there is one, on a GPU."""

import numpy as np
import pytest
from cuda_words import REAL16, from_words

from minillm.ops import launch

F32 = np.float32


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.mark.parametrize("real16", REAL16)
@pytest.mark.parametrize("n, dim", [(1, 4), (3, 36), (2, 576), (5, 1028), (1, 4096)])
def test_rms_norm(device, rng, real16, n, dim):
    x, weight = rng.normal(size=(n, dim)).astype(F32) * F32(5), rng.normal(size=dim).astype(F32)
    x[0] *= F32(1e-4)
    out = device.empty((n, dim), np.uint16)
    launch.rms_norm(device, device.upload(x), device.upload(weight), 1e-5, out, real16)
    wide = x.astype(np.float64)
    exact = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(from_words(out.get(), real16), exact, rtol=REAL16[real16], atol=1e-7)
