"""A model in several .gguf files, written by the gguf package, is the model in one file."""

import functools
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from model_files import CONFIG, MODEL, random_model, stored, write_gguf

from minillm.errors import MinillmError
from minillm.files.gguf_file import read_gguf
from minillm.files.mapped_file import MappedFile
from minillm.files.weights import load_weights
from minillm.ops.numpy_ops import NUMPY


@pytest.fixture
def split(monkeypatch):
    """split(path, most, first_is_small=False, tensors=MODEL): the parts of a model, of `most` tensors at most."""

    def write(path, most, first_is_small=False, tensors=MODEL):
        path.parent.mkdir(exist_ok=True)
        writer = functools.partial(gguf.GGUFWriter, split_max_tensors=most, small_first_shard=first_is_small)
        with monkeypatch.context() as patch:
            patch.setattr("model_files.gguf.GGUFWriter", writer)
            write_gguf(path, tensors, CONFIG, "Q8_0", describe=lambda writer: writer.add_string("a.key", "value"))
        return sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))

    return write


@pytest.mark.parametrize(("most", "first_is_small", "count"), [(8, False, 3), (20, False, 2), (8, True, 4)])
def test_parts_are_one_model_whichever_is_named(tmp_path, split, most, first_is_small, count):
    parts = split(tmp_path / "parts" / "m.gguf", most, first_is_small)
    describe = lambda writer: writer.add_string("a.key", "value")  # noqa: E731
    whole = stored(write_gguf(tmp_path / "whole.gguf", MODEL, CONFIG, "Q8_0", describe=describe), CONFIG)
    weights = load_weights(whole, dtype="stored")
    assert len(parts) == count
    for part in parts:
        model = stored(part, CONFIG)
        assert {key: value for key, value in model.metadata.items() if not key.startswith("split.")} == whole.metadata
        assert model.digest == whole.digest
        for dtype in ("stored", "float32"):
            assert model.weight_bytes(dtype, NUMPY) == whole.weight_bytes(dtype, NUMPY)
        files = {tensor.file.path for tensor in model.tensors.values()}
        assert files == set(parts[1:] if first_is_small else parts)
        loaded = load_weights(model, dtype="stored")
        assert loaded.keys() == weights.keys()
        for name, weight in loaded.items():
            assert weight.format is weights[name].format
            np.testing.assert_array_equal(weight.data, weights[name].data)


def test_each_part_is_opened_once_and_given_back(tmp_path, split, monkeypatch):
    parts = split(tmp_path / "m.gguf", 8)
    opened, released = [], {}
    once, release = MappedFile.__init__, MappedFile.release
    monkeypatch.setattr(MappedFile, "__init__", lambda self, path: (opened.append(path), once(self, path))[1])
    monkeypatch.setattr(
        MappedFile,
        "release",
        lambda self, offset, n: (released.setdefault(self.path, []).append(n), release(self, offset, n))[1],
    )
    model = stored(parts[1], CONFIG)
    load_weights(model, dtype="float32")
    assert opened == parts
    for path in parts:
        own = [tensor.nbytes for tensor in model.tensors.values() if tensor.file.path == path and len(tensor.shape) > 1]
        assert set(own) <= set(released[path])


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_part_is_named(tmp_path, split, lost):
    parts = split(tmp_path / "m.gguf", 8)
    parts[lost].unlink()
    for named in parts:
        with pytest.raises(
            MinillmError, match=rf"/m-0000{lost + 1}-of-00003.gguf is missing, part {lost + 1} of the 3"
        ):
            read_gguf(named)


def exchange(one: Path, other: Path) -> None:
    one.rename(one.with_suffix(".tmp"))
    other.rename(one)
    one.with_suffix(".tmp").rename(other)


def fewer(tensors: int) -> dict:
    return dict(list(MODEL.items())[:tensors])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda a, b, c, d: exchange(a, b),
            "m-00001-of-00003.gguf says that it is part 2 of 3 .* its name .* part 1 of 3",
        ),
        (
            lambda a, b, c, d: shutil.copy(d["count"][0], a),
            "m-00001-of-00003.gguf says that it is part 1 of 2 of a model",
        ),
        (lambda a, b, c, d: shutil.copy(d["whole"], b), "m-00002-of-00003.gguf says that it is part 1 of 1 of a model"),
        (lambda a, b, c, d: shutil.copy(d["tensors"][1], b), "m-00002-of-00003.gguf is part of another model"),
        (
            lambda a, b, c, d: shutil.copy(d["names"][1], b),
            "tensor .* is in m-00001-of-00003.gguf too: get all parts of one",
        ),
    ],
)
def test_parts_of_different_models_are_refused(tmp_path, split, spoil, message):
    parts = split(tmp_path / "m" / "m.gguf", 8)
    others = {
        "count": split(tmp_path / "count" / "m.gguf", 20),
        "whole": write_gguf(tmp_path / "whole.gguf", MODEL, CONFIG),
        "tensors": split(tmp_path / "tensors" / "m.gguf", 7, tensors=fewer(20)),
        "names": split(tmp_path / "names" / "m.gguf", 8, tensors=dict(reversed(MODEL.items()))),
    }
    assert [len(others[name]) for name in ("count", "tensors", "names")] == [2, 3, 3]
    spoil(*parts, others)
    with pytest.raises(MinillmError, match=message):
        read_gguf(parts[2])


def test_fewer_tensors_than_the_parts_say_are_refused(tmp_path, split):
    parts = split(tmp_path / "m.gguf", 8)
    writer = gguf.GGUFWriter(parts[2], "llama")
    for key, value in {"split.no": 2, "split.count": 3, "split.tensors.count": len(MODEL)}.items():
        writer.add_uint16(key, value)
    writer.add_tensor("output.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(MinillmError, match=f"of a model of {len(MODEL)} tensors, and its parts hold 17: get all parts"):
        read_gguf(parts[0])


def test_a_renamed_part_says_what_it_is(tmp_path, split):
    part = split(tmp_path / "m.gguf", 8)[1]
    for name in ("model.gguf", "m-00004-of-00003.gguf", "m-00000-of-00000.gguf"):
        renamed = shutil.copy(part, tmp_path / name)
        with pytest.raises(MinillmError, match="says that it is part 2 of 3 of a model .* MODEL-00001-of-0000N.gguf"):
            read_gguf(renamed)


def test_a_part_that_is_damaged_is_named(tmp_path, split):
    parts = split(tmp_path / "m.gguf", 8)
    parts[2].write_bytes(parts[2].read_bytes()[:-64])
    with pytest.raises(MinillmError, match="m-00003-of-00003.gguf: tensor .* truncated"):
        read_gguf(parts[0])


# GGUF files that are no models


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        (
            "llama",
            {"general.type": "adapter"},
            "is a LoRA adapter: merge it into its base model with llama-export-lora",
        ),
        ("clip", {}, "sees pictures with .mmproj.*: give the model's own .gguf"),
        ("clip", {"general.type": "mmproj"}, "mmproj"),
        ("llama", {"general.type": "imatrix"}, "an importance matrix"),
        ("nomic-bert", {}, "a model that embeds texts .nomic-bert.: minillm runs language models"),
        ("qwen3", {"qwen3.pooling_type": 3}, "a model that embeds texts .qwen3."),
    ],
)
def test_gguf_files_beside_models_say_what_they_are(tmp_path, architecture, keys, message):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", architecture)
    for key, value in keys.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(MinillmError, match=message):
        read_gguf(tmp_path / "x.gguf")


def test_two_models_of_the_same_shapes_differ_in_their_digest(tmp_path, split):
    mine, other = (
        split(tmp_path / "a" / "m.gguf", 8),
        split(tmp_path / "b" / "m.gguf", 8, tensors=random_model(CONFIG, 1)),
    )
    assert stored(mine[0], CONFIG).digest != stored(other[0], CONFIG).digest
