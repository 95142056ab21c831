"""Every family from a GGUF file, a text model inside one that also sees, and what methods look at in each family."""

import json

import gguf_families
import numpy as np
import pytest
from model_files import write_safetensors
from oracle import forward, read_folder
from paths import DATA

from minillm.cache.kv_cache import KVCache
from minillm.cache.page_pool import PagePool
from minillm.errors import MinillmError
from minillm.files.hub import ModelFiles, resolve
from minillm.files.stored_model import open_model
from minillm.files.weights import load_weights
from minillm.model import Model
from minillm.ops.numpy_ops import NUMPY
from minillm.profile import fit

FAMILIES = ["tied-head", "qwen2", "qwen3", "smollm3", "granite", "phi3", "phi4-mini", "gemma3", "ministral3"]


def model_of(files, ops=NUMPY):
    stored = open_model(files)
    return Model(stored.config, load_weights(stored, dtype="float32"), ops)


def logits_of(model, ids):
    x, c = model.embed(ids), model.config
    cache = KVCache(PagePool(model.ops, c.head_dim), c.n_layers, c.n_kv_heads)
    for _ in model.layers([(x, 0)], cache.layer):
        pass
    return model.logits(x)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gguf_file_gives_the_same(name, tmp_path):
    config, weights, ids = gguf_families.read(name)
    path = gguf_families.write(tmp_path / "model.gguf", config, weights)
    model = model_of(ModelFiles("gguf", path, name))
    rope = {}
    if "rope_scaling" in config or "rope_parameters" in config:
        with np.load(DATA / "tiny" / name / "golden.npz") as golden:
            rope = {"inv_freq": golden["inv_freq"], "attention_factor": float(golden["attention_factor"])}
    np.testing.assert_allclose(logits_of(model, ids), forward(config, weights, ids, **rope), atol=1e-4)


@pytest.mark.parametrize("before, head", [("language_model.model.", "language_model."), ("model.language_model.", "")])
def test_a_text_model_in_one_that_sees(before, head, tmp_path):
    """As Mistral 3 is stored, by transformers 4 and by 5."""
    config, weights = read_folder(DATA / "tiny" / "head-dim")
    text = {key: value for key, value in config.items() if key != "architectures"}
    outer = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(outer | {"vision_config": {"hidden_size": 8}}))
    named = {
        before + name.removeprefix("model.") if name.startswith("model.") else head + name: array
        for name, array in weights.items()
    }
    seeing = {"vision_tower.patch_conv.weight": np.ones((2, 2), np.float32)}
    write_safetensors(tmp_path / "model.safetensors", named | seeing)
    plain = model_of(resolve(str(DATA / "tiny" / "head-dim")))
    ids = np.arange(3, 20)
    np.testing.assert_array_equal(logits_of(model_of(resolve(str(tmp_path))), ids), logits_of(plain, ids))
    (tmp_path / "config.json").write_text(json.dumps(outer | {"text_config": text | {"model_type": "mamba"}}))
    with pytest.raises(MinillmError, match="model_type = 'mamba'"):
        resolve_and_open(tmp_path)


def resolve_and_open(path):
    return open_model(resolve(str(path)))


def test_matrices_above_one_another_of_the_wrong_height(tmp_path):
    config, weights = read_folder(DATA / "tiny" / "phi3")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "model.safetensors", weights | {name: weights[name][:-1]})
    with pytest.raises(MinillmError, match=r"qkv_proj.weight has shape \[63, 32\], but the config asks for \[64, 32\]"):
        resolve_and_open(tmp_path)


@pytest.mark.parametrize("name", ["qwen3", "smollm3", "phi4-mini", "gemma3", "ministral3"])
def test_methods_see_keys_without_rotation(name):
    """Normed keys before RoPE; in a layer without RoPE the keys themselves; of a head that is turned in part, both."""
    model = model_of(resolve(str(DATA / "tiny" / name)))
    with np.load(DATA / "tiny" / name / "golden.npz") as golden:
        ids = golden["ids"]
    x, c = model.embed(ids), model.config
    cache = KVCache(PagePool(model.ops, c.head_dim), c.n_layers, c.n_kv_heads)
    for step in model.layers([(x, 0)], cache.layer, {"hidden"}):
        block = model.blocks[step.index]
        expected = (step.hidden @ block.wk.data.T + (0 if block.bk is None else block.bk)).reshape(
            len(ids), -1, c.head_dim
        )
        if block.k_norm is not None:
            expected = expected / np.sqrt((expected**2).mean(-1, keepdims=True) + c.rms_eps) * block.k_norm
        layer = fit.layer_of(model, step, np.zeros(len(ids), bool))
        found = layer.k_unrotated.reshape(c.n_kv_heads, len(ids), -1).transpose(1, 0, 2)
        np.testing.assert_allclose(found, expected, atol=2e-5)
        if step.index in c.unrotated:
            np.testing.assert_array_equal(layer.k_unrotated, layer.k)
