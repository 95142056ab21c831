"""Safetensors files that lie, are cut off or miss a shard: refused by file and tensor."""

import json
import struct

import numpy as np
import pytest
from model_files import CONFIG, MODEL, UP, raw_model, stored, write_raw, write_safetensors, write_shards

from minillm.errors import MinillmError
from minillm.files.safetensors_file import read_safetensors
from minillm.files.weights import load_weights


def load(path):
    return load_weights(stored(path, CONFIG), dtype="stored")


def shift(header, name, begin, end):
    header[name]["data_offsets"][0] += begin
    header[name]["data_offsets"][1] += end


LAST = list(MODEL)[-1]
LIES = {
    "cut": (lambda h, d: (h, d[:-1]), rf"tensor {LAST} ends at byte .* truncated"),
    "trailing bytes": (lambda h, d: (h, d + b"\0"), "has 1 bytes after its last tensor"),
    "beyond the end": (lambda h, d: shift(h, LAST, 4, 4), rf"tensor {LAST} ends at byte"),
    "overlap": (lambda h, d: shift(h, UP, -4, -4), rf"tensor {UP} overlaps"),
    "hole": (lambda h, d: [shift(h, LAST, 4, 4), (h, d + b"1234")][1], rf"tensor {LAST} leaves a hole of 4 bytes"),
    "length": (lambda h, d: shift(h, UP, 0, 4), rf"tensor {UP} of F32 \[96, 64\] cannot take 24580 bytes"),
    "negative": (lambda h, d: h[UP].update(shape=[-96, -64]), rf"shape \[-96, -64\] .* of tensor {UP}"),
    "huge": (lambda h, d: h[UP].update(shape=[2**62, 2**62]), rf"tensor {UP} of F32 .* cannot take"),
    "not a number": (lambda h, d: h[UP].update(shape=["96", 64]), rf"of tensor {UP}"),
    "no offsets": (
        lambda h, d: h[UP].pop("data_offsets") and None,
        rf"tensor {UP} needs dtype, shape and data_offsets",
    ),
    "no entry": (lambda h, d: h.update({UP: 3}), rf"tensor {UP} needs dtype"),
    "unknown dtype": (lambda h, d: h[UP].update(dtype="F7"), rf"tensor {UP} of dtype F7"),
    "integer dtype": (lambda h, d: h[UP].update(dtype="I32"), rf"tensor {UP} is of type I32; minillm reads F32"),
    "not JSON": (lambda h, d: (b"{nonsense", d), "damaged header"),
    "not an object": (lambda h, d: (b"[]", d), "damaged header"),
    "deep": (lambda h, d: (b"[" * 100_000, d), "damaged header"),
    "twice": (lambda h, d: (b'{"a": 1, "a": 2}', d), "damaged header .a is there twice"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_safetensors(tmp_path, lie):
    change, said = LIES[lie]
    header, data = raw_model(MODEL)
    write_raw(tmp_path / "model.safetensors", *(change(header, data) or (header, data)))
    with pytest.raises(MinillmError, match=said) as caught:
        load(tmp_path)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cannot be read"),
        (b"1234", "truncated"),
        (struct.pack("<Q", 2**62) + b"{}", "header would take 4611686018427387904"),
        (struct.pack("<Q", 100) + b"{}", "header would take 100"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (struct.pack("<Q", 2) + b"{}", "lacks tensor model.embed_tokens.weight"),
    ],
)
def test_no_safetensors(tmp_path, data, said):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(MinillmError, match=said):
        load(tmp_path)


def test_every_cut_of_a_safetensors_file_is_noticed(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", MODEL)
    data = (tmp_path / "model.safetensors").read_bytes()
    for size in [*range(1, 3000, 7), *range(3000, len(data), 4999), len(data) - 1]:
        (tmp_path / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(MinillmError):
            load(tmp_path)


def test_damaged_shards(tmp_path):
    weight_map = write_shards(tmp_path, MODEL)
    index = tmp_path / "model.safetensors.index.json"

    def refused(said):
        with pytest.raises(MinillmError, match=said):
            load(tmp_path)

    def write_map(changed):
        index.write_text(json.dumps({"weight_map": changed}))

    write_map(weight_map | {UP: "model-3.safetensors"})
    refused("lacks model-3.safetensors, which model.safetensors.index.json names")
    write_map(weight_map | {"ghost": "model-1.safetensors"})
    refused("model-1.safetensors lacks tensor ghost")
    other = {"model-1.safetensors": "model-2.safetensors", "model-2.safetensors": "model-1.safetensors"}
    write_map(weight_map | {UP: other[weight_map[UP]]})
    refused(rf"{other[weight_map[UP]]} lacks tensor {UP}")
    write_map(weight_map | {UP: "../model-1.safetensors"})
    refused("weight_map must name .safetensors files beside it")
    for text in ("{", "{}", "[]", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        refused("index.json is damaged")
    write_map(weight_map)
    write_safetensors(tmp_path / "model-2.safetensors", {n: MODEL[n] for n in list(MODEL)[1::2] + list(MODEL)[:1]})
    refused("tensor model.embed_tokens.weight is in model-1.safetensors too")
    (tmp_path / "model-2.safetensors").unlink()
    refused("lacks model-2.safetensors")


def test_folder_without_safetensors(tmp_path):
    with pytest.raises(MinillmError, match="neither model.safetensors nor model.safetensors.index.json: minillm reads"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(MinillmError, match="but pytorch_model.bin: minillm reads safetensors"):
        load(tmp_path)


def test_random_damage_never_raises_anything_else(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, MODEL)
    data = np.frombuffer(path.read_bytes(), np.uint8)
    end = 8 + int.from_bytes(data[:8].tobytes(), "little")
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(500):
        broken = data.copy()
        broken[rng.integers(0, end, 2)] = rng.integers(0, 256, 2)
        path.write_bytes(broken.tobytes())
        try:
            read_safetensors(path)
        except MinillmError:
            refused += 1
    assert refused > 250
