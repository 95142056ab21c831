"""What a long prompt takes: bytes of the pool and of the process, on a wide random model whose full cache would be
large."""

import json
import os
import subprocess
import sys

import pytest
from conftest import NO_COMPILER

from minillm.ops import cpu_lib

PROMPT = """
import json, sys
import numpy as np
from minillm import CacheConfig
from minillm.cache.kv_cache import KVCache
from minillm.cache.page_pool import PagePool
from minillm.compress.compressor import Compressor
from minillm.compress.reading import extend
from minillm.files.config import ModelConfig, RopeConfig
from minillm.memory import peak_memory, resident_memory
from minillm.model import Model
from minillm.ops import backend
from minillm.engine.admission import workspace_bytes
from minillm.files.stored_model import tensor_shapes
from minillm.files.weights import Weight

ops = backend("cpu")
config = ModelConfig("wide", "LlamaForCausalLM", 12, 8, 8, 64, 64, 64, 64, 8192, 1e-5, RopeConfig(), tied_head=True)
rng = np.random.default_rng(0)
weights = {
    name: Weight.floats((0.2 * rng.standard_normal(shape)).astype(np.float32))
    for name, shape in tensor_shapes(config).items()
}
model, pool = Model(config, weights, ops), PagePool(ops, 64)
classes = (rng.random(64) < 0.1).astype(np.uint8)
n = 2000


def read(cache_config):
    cache = KVCache(pool, config.n_layers, config.n_kv_heads)
    extend(model, rng.integers(0, 64, n), cache, Compressor(cache_config.resolve(), model, classes))
    return cache


extend(model, [1] * 300, KVCache(pool, 12, 8))  # what libraries take for themselves is there afterwards
pool.trim()
start = resident_memory()
cache = read(CacheConfig(sys.argv[1], float(sys.argv[2])))
result = {"in_use": pool.bytes_in_use, "full": cache.full_bytes, "kept": cache.kept, "held": resident_memory() - start}
cache.clear()
pool.trim()
result["peak"] = peak_memory() - start
result["workspace"] = workspace_bytes(config, n)
result |= {"page": pool.page_bytes, "layer": 2 * 8 * n * 64 * 4}
print(json.dumps(result | {"after": resident_memory() - start, "pool": pool.bytes_held}))
"""


def run(path, program, *arguments):
    command, environment = [sys.executable, "-c", program, *arguments], os.environ | {"MINILLM_CPU": path}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


@pytest.mark.parametrize("share, compiled", [(0.2, False), (0.5, True)])
def test_a_compressed_prompt_takes_its_share_and_gives_it_back(share, compiled):
    """Pages in use are the share of the full cache's to within a page a head. While the prompt was read there was
    never more than those, one layer's full keys and values in float32 (three times: as computed, rotated, and as the
    rows a Plan sums) and the activations of one layer; and after clear and trim the memory is the operating system's
    again."""
    if compiled and not cpu_lib.available_paths():
        pytest.skip(NO_COMPILER)
    found = run(cpu_lib.available_paths()[0] if compiled else "numpy", PROMPT, "semanticache", str(share))
    assert found["kept"] == pytest.approx(share, abs=1e-3)
    assert abs(found["in_use"] - share * found["full"]) <= 12 * 8 * found["page"]
    assert found["peak"] < found["in_use"] + 3 * found["layer"] + found["workspace"] + (12 << 20)
    assert found["pool"] == 0
    assert found["after"] < 6 << 20
