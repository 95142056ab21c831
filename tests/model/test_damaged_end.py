"""What lies behind the last layer, the final norm and the head, and ids that no row of the embedding answers to: an
error that names them, in every way through the model, on every backend."""

from dataclasses import replace

import emulator
import numpy as np
import pytest
from conftest import cuda_device_or_skip
from twins import SMALL, weights_of

from minillm.cache.kv_cache import KVCache
from minillm.cache.page_pool import PagePool
from minillm.compress.reading import extend
from minillm.errors import MinillmError
from minillm.model import Model
from minillm.ops import cpu_lib
from minillm.ops.cpu_ops import CpuOps
from minillm.ops.cuda_ops import CudaOps
from minillm.ops.numpy_ops import NUMPY as numpy_ops
from minillm.sampling import GREEDY, Draw, SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # as the programs do

PROMPT = [5, 6, 7]
NONE = np.zeros(0, np.int32)
DRAWN = Draw(SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1), NONE, 0.5)
ODD = replace(SMALL, vocab_size=71)  # rows of logits that are no whole number of vectors


@pytest.fixture(params=["numpy", "c", "emulator", "gpu"])
def ops(request):
    if request.param == "numpy":
        return numpy_ops
    if request.param == "c":
        if not cpu_lib.available_paths():
            pytest.skip("the kernels were not built")
        return CpuOps(cpu_lib.available_paths()[0])
    if request.param == "gpu":
        return CudaOps(cuda_device_or_skip())
    if reason := emulator.available():
        pytest.skip(reason)
    return CudaOps(emulator.EmulatedDevice())


def model_of(ops, config=ODD, **damage):
    weights = weights_of(config, "F16", {})
    for name, (place, value) in damage.items():
        weights[f"{name.replace('__', '.')}.weight"].data[place] = value
    return Model(config, weights, ops)


def cache_of(model):
    return KVCache(
        PagePool(model.ops, model.config.head_dim, slab_bytes=1 << 20), model.config.n_layers, model.config.n_kv_heads
    )


def ways(model):
    """name -> what goes through the norm and the head, of a model and one or two sequences."""
    caches = [cache_of(model) for _ in range(2)]
    hidden = [extend(model, PROMPT, cache) for cache in caches]
    return caches, {
        "logits": lambda: model.logits(hidden[0]),
        "draw": lambda: model.draw(hidden[0][-1:], [DRAWN]),
        "greedy": lambda: model.draw(hidden[0][-1:], [GREEDY]),
        "decode": lambda: model.decode([8], caches[:1]),
        "decode and draw": lambda: model.decode([8, 9], caches, [DRAWN, GREEDY]),
    }


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", [{"model__norm": 0}, {"lm_head": (-1, -1)}], ids=["norm", "head"])
def test_a_damaged_norm_or_head_is_named(ops, where, value):
    ((name, place),) = where.items()
    caches, tried = ways(model_of(ops, **{name: (place, value)}))
    before = [cache.lengths.copy() for cache in caches]
    for call in tried.values():
        for _ in range(3):  # on a GPU the third step of decoding is a graph
            with pytest.raises(MinillmError, match="logits.*model.norm or lm_head.*fetch the model again"):
                call()
    for cache, lengths in zip(caches, before, strict=True):
        np.testing.assert_array_equal(cache.lengths, lengths)


def test_with_a_tied_head_the_embedding_is_named(ops):
    """A row that no token of the text has read."""
    model = model_of(ops, replace(ODD, tied_head=True), model__embed_tokens=((-1, -1), np.nan))
    for call in ways(model)[1].values():
        with pytest.raises(MinillmError, match="logits.*model.norm or model.embed_tokens"):
            call()


def test_a_whole_model_says_nothing(ops):
    for call in ways(model_of(ops))[1].values():
        call()


@pytest.mark.parametrize("wrong", [71, -1, 2**31, 2**40])
def test_a_token_beyond_the_embedding_is_refused(ops, wrong):
    """The caches are left as they are."""
    model = model_of(ops)
    cache, other = cache_of(model), cache_of(model)
    for start in (cache, other):
        extend(model, PROMPT, start)
    expected, before = model.decode([8], [other.fork()]), other.lengths.copy()
    said = rf"token {wrong} is not in 0\.\.70"
    with pytest.raises(MinillmError, match=said):
        extend(model, [1, wrong, 2], cache)
    np.testing.assert_array_equal(cache.lengths, before)
    with pytest.raises(MinillmError, match=said):
        model.decode([wrong], [other])
    np.testing.assert_array_equal(other.lengths, before)
    np.testing.assert_array_equal(model.decode([8], [other]), expected)


@pytest.mark.parametrize("wrong", [71, -1])
def test_no_row_of_the_embedding_is_made_up(ops, wrong):
    with pytest.raises(IndexError, match=r"0\.\.70"):
        ops.embed(model_of(ops).embedding, [1, wrong])
