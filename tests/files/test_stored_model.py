"""A model's files as one object: opened once, the same to whoever asks, and a digest that tells weights apart."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tiny_chat
from model_files import (
    BIASED,
    CONFIG,
    MODEL,
    NORM,
    UP,
    random_model,
    raw_model,
    stored,
    write_gguf,
    write_raw,
    write_safetensors,
    write_shards,
)

from minillm import LLM
from minillm.files import hub
from minillm.files.mapped_file import MappedFile
from minillm.files.stored_model import open_model, tensor_shapes
from minillm.ops.numpy_ops import NUMPY


def test_a_folder_as_one_object(tmp_path):
    folder = tiny_chat.make(tmp_path / "tiny")
    model = open_model(hub.resolve(str(folder)))
    assert (model.name, model.path, model.metadata) == ("tiny", folder, None)
    assert {name: tensor.shape for name, tensor in model.tensors.items()} == tensor_shapes(model.config)
    assert model.weight_bytes("float32", NUMPY) == 4 * sum(int(np.prod(t.shape)) for t in model.tensors.values())


def test_a_gguf_file_as_one_object(default_model_path):
    model = open_model(hub.ModelFiles("gguf", default_model_path, "default"))
    assert (model.name, model.path) == ("default", default_model_path)
    assert model.metadata["general.architecture"] == "llama"
    assert model.digest.startswith("gguf F32 Q4_1 Q8_0 ") and len(model.digest.split()[-1]) == 16


@pytest.mark.parametrize("kind", ["folder", "shards", "gguf"])
def test_a_model_that_is_loaded_opens_each_file_once(kind, tmp_path, monkeypatch, default_model_path):
    path, opened = default_model_path, Counter()
    if kind != "gguf":
        path = tiny_chat.make(tmp_path / "tiny")
    if kind == "shards":
        tensors = tiny_chat.weights(tiny_chat.CONFIG, seed=7)
        write_shards(path, tensors)
        (path / "model.safetensors").unlink()
    once = MappedFile.__init__

    def count(self, path):
        opened[path.name] += 1
        once(self, path)

    monkeypatch.setattr(MappedFile, "__init__", count)
    with LLM.load(path) as llm:
        assert llm.weights_digest.startswith("gguf" if kind == "gguf" else "safetensors F32 ")
    names = {"folder": ["model.safetensors"], "shards": ["model-1.safetensors", "model-2.safetensors"]}
    assert opened == Counter(names.get(kind, [path.name]))


# The digest


WRITERS = {
    "safetensors": lambda path, model, kind="F32": write_safetensors(path / "model.safetensors", model, kind),
    "gguf": lambda path, model, kind="F32": write_gguf(path / "model.gguf", model, CONFIG, kind),
}


def digest(path, model=None, *, file="safetensors", kind="F32", config=CONFIG):
    """Of a model that is written to a new folder."""
    path.mkdir()
    WRITERS[file](path, model or MODEL, kind)
    return stored(path if file == "safetensors" else path / "model.gguf", config).digest


@pytest.mark.parametrize("file", WRITERS)
def test_the_digest_is_of_weights_and_config_and_of_no_name(tmp_path, file):
    first = digest(tmp_path / "a", file=file)
    assert digest(tmp_path / "b", file=file) == first
    assert digest(tmp_path / "c", file=file, config=replace(CONFIG, name="another")) == first
    (tmp_path / "a").rename(tmp_path / "renamed")
    assert stored(tmp_path / "renamed" / ("" if file == "safetensors" else "model.gguf"), CONFIG).digest == first
    others = [
        digest(tmp_path / "d", random_model(CONFIG, seed=1), file=file),
        digest(tmp_path / "e", file=file, config=replace(CONFIG, rms_eps=1e-6)),
        digest(tmp_path / "f", file=file, config=replace(CONFIG, rope=replace(CONFIG.rope, theta=5e5))),
        digest(tmp_path / "g", file=file, kind="F16"),
        digest(tmp_path / "h", file=file, kind="BF16"),
    ]
    assert len({first, *others}) == 6


@pytest.mark.parametrize("file", WRITERS)
@pytest.mark.parametrize("name", MODEL)
def test_the_digest_tells_a_change_of_each_tensor(tmp_path, file, name):
    """As a fine-tune changes it: a little everywhere, the norms or anything else left alone."""
    changed = MODEL | {name: MODEL[name] * np.float32(1.001)}
    assert digest(tmp_path / "a", file=file) != digest(tmp_path / "b", changed, file=file)


def test_the_digest_tells_which_tensor_has_which_weights(tmp_path):
    up, gate = UP, UP.replace("up_proj", "gate_proj")
    assert digest(tmp_path / "a") != digest(tmp_path / "b", MODEL | {up: MODEL[gate], gate: MODEL[up]})


def test_shards_and_one_file_of_the_same_tensors_are_the_same_weights(tmp_path):
    first = digest(tmp_path / "a")
    (tmp_path / "b").mkdir()
    write_shards(tmp_path / "b", MODEL)
    (tmp_path / "c").mkdir()
    write_raw(tmp_path / "c" / "model.safetensors", *raw_model(dict(reversed(MODEL.items()))), pad=1)
    assert stored(tmp_path / "b", CONFIG).digest == stored(tmp_path / "c", CONFIG).digest == first


def test_the_digest_looks_at_both_ends_of_a_large_tensor(tmp_path):
    config = replace(CONFIG, vocab_size=4000)
    model = random_model(config)
    table = "model.embed_tokens.weight"
    first = digest(tmp_path / "a", model, config=config)
    for number, row in enumerate((0, -1)):
        changed = model[table].copy()
        changed[row] += 1
        assert digest(tmp_path / f"b{number}", model | {table: changed}, config=config) != first


def test_vectors_of_a_few_bytes_are_looked_at_whole(tmp_path):
    model = random_model(BIASED)
    (tmp_path / "a").mkdir()
    write_safetensors(tmp_path / "a" / "model.safetensors", model)
    first, seen = stored(tmp_path / "a", BIASED).digest, set()
    for i in range(CONFIG.dim):
        changed = model[NORM].copy()
        changed[i] += 1
        write_safetensors(tmp_path / "a" / "model.safetensors", model | {NORM: changed})
        seen.add(stored(tmp_path / "a", BIASED).digest)
    assert len(seen) == CONFIG.dim and first not in seen


def test_a_digest_of_a_folder_with_generation_settings(tmp_path):
    folder = tiny_chat.make(tmp_path / "tiny")
    first = open_model(hub.resolve(str(folder))).digest
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.7}))
    assert open_model(hub.resolve(str(folder))).digest == first
