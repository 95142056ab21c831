"""The GGUF header reader against gguf.GGUFReader, and against files that lie or are cut off."""

import struct

import gguf
import numpy as np
import pytest

from minillm.errors import MinillmError
from minillm.files.gguf_file import read_gguf

NUMBERS = {
    "uint8": 200,
    "int8": -100,
    "uint16": 60000,
    "int16": -30000,
    "uint32": 4_000_000_000,
    "int32": -2_000_000_000,
    "uint64": 2**63 + 1,
    "int64": -(2**62),
    "float32": 0.1,
    "float64": 0.1,
    "bool": True,
}


def write(path, alignment=None):
    """A file with every metadata type and tensors of many types."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for kind, value in NUMBERS.items():
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    writer.add_string("a.string", "naïve ✓")
    writer.add_string("a.empty", "")
    for name, values in (
        ("strings", ["Ġt", "", "日本"]),
        ("ints", [1, -2, 3]),
        ("floats", [0.5, 1.5]),
        ("bools", [True, False]),
    ):
        writer.add_array(f"a.{name}", values)
    writer.add_tensor("one", rng.standard_normal(5).astype(np.float32))
    writer.add_tensor("two", rng.standard_normal((3, 64)).astype(np.float16))
    writer.add_tensor("three", rng.standard_normal((2, 3, 4)).astype(np.float32))
    for kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_1", "BF16"):
        number = gguf.GGMLQuantizationType[kind]
        data = gguf.quantize(rng.standard_normal((3, 64)).astype(np.float32), number)
        writer.add_tensor(kind, data, raw_dtype=number)
    six = rng.integers(0, 255, (2, 210), dtype=np.uint8)
    writer.add_tensor("Q6_K", six, raw_dtype=gguf.GGMLQuantizationType.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 64])
@pytest.mark.parametrize("version", [2, 3])
def test_reads_what_the_library_reads(tmp_path, alignment, version):
    path = write(tmp_path / "a.gguf", alignment)
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", version)
    path.write_bytes(data)
    got, want = read_gguf(path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in want.fields.items() if not k.startswith("GGUF.")}
    assert got.metadata == fields
    assert {k: type(v) for k, v in got.metadata.items()} == {k: type(v) for k, v in fields.items()}
    assert list(got.tensors) == [t.name for t in want.tensors]
    for tensor in want.tensors:
        mine = got.tensors[tensor.name]
        assert (mine.kind, mine.nbytes, mine.offset) == (tensor.tensor_type.name, tensor.n_bytes, tensor.data_offset)
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert bytes(mine.file.bytes_at(mine.offset, mine.nbytes)) == tensor.data.tobytes()


def header(version=3, magic=b"GGUF", tensors=0, keys=(), infos=()):
    """Bytes of a file: keys as (name, type number, value bytes), infos as (name, dims, type number, offset)."""

    def string(text):
        return struct.pack("<Q", len(text)) + text

    data = magic + struct.pack("<IQQ", version, tensors or len(infos), len(keys))
    data += b"".join(string(name) + struct.pack("<I", kind) + value for name, kind, value in keys)
    for name, dims, kind, offset in infos:
        data += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return data + b"\0" * (-len(data) % 32)


def long(n):
    return struct.pack("<Q", n)


U32 = 4
HUGE = 2**62


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cannot be read"),
        (b"GGUF", "truncated"),
        (header(magic=b"GGML"), "no GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (header(version=1), "version 1.*convert"),
        (header(version=4), "version 4"),
        (b"GGUF" + struct.pack(">I", 3) + b"\0" * 40, "big-endian"),
        (header(tensors=HUGE), "truncated or damaged"),
        (header(keys=[(b"k", 99, b"")]), "k is of metadata type 99"),
        (header(keys=[(b"k", 8, long(HUGE))]), "string of k runs past"),
        (header(keys=[(b"k", 8, long(2) + b"\xff\xff")]), "string of k is not UTF-8"),
        (header(keys=[(b"k", 9, struct.pack("<I", 8) + long(HUGE))]), "k claims 4611686018427387904 strings"),
        (header(keys=[(b"k", 9, struct.pack("<I", U32) + long(HUGE))]), "k runs past the end"),
        (header(keys=[(b"k", 9, struct.pack("<IQ", 9, 1) * 2000)]), "k is of metadata type 9, nested"),
        (header(keys=[(b"k", U32, b"1234")] * 2), "metadata key k twice"),
        (header(keys=[(b"general.alignment", U32, struct.pack("<I", 24))]), "general.alignment = 24"),
        (header(keys=[(b"general.alignment", U32, struct.pack("<I", 0))]), "general.alignment = 0"),
        (header(keys=[(b"general.alignment", 8, long(1) + b"x")]), "general.alignment = x"),
        (header(keys=[(b"split.count", 2, struct.pack("<H", 3))]), "part 1 of 3 of a model"),
        (header(infos=[(b"t", [HUGE], 0, 0)]), "tensor t ends at byte.*truncated"),
        (header(infos=[(b"t", [HUGE] * 4, 0, 0)]), "tensor t ends at byte"),
        (
            header(infos=[(b"t", [1], 0, HUGE)]),
            f"tensor t has offset {HUGE}, but those before it end at 0",
        ),
        (header(infos=[(b"t", [], 0, 0)]), "tensor t has 0 dimensions"),
        (header(infos=[(b"t", [1] * 5, 0, 0)]), "tensor t has 5 dimensions"),
        (header(infos=[(b"t", [1], 77, 0)]), "tensor t has type number 77"),
        (header(infos=[(b"t", [31], 8, 0)]), r"tensor t has type number 8, dimensions \[31\]"),
        (header(infos=[(b"t", [1], 0, 3)]), "tensor t has .*offset 3"),
        (header(infos=[(b"t", [1], 0, 0), (b"t", [1], 0, 32)]) + b"\0" * 64, "tensor t twice"),
        (
            header(infos=[(b"t", [64], 0, 0), (b"u", [64], 0, 32)]) + b"\0" * 512,
            "tensor u has offset 32, but those",
        ),
    ],
)
def test_lies_are_refused(tmp_path, data, said):
    path = tmp_path / "lie.gguf"
    path.write_bytes(data)
    with pytest.raises(MinillmError, match=said) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)


def split(path):
    """(the file's parts up to its tensors' data: before the tensor count, after it, each tensor's info; the data)"""
    want, data = gguf.GGUFReader(path), path.read_bytes()
    offsets = [int(tensor.field.offset) for tensor in want.tensors]
    ends = [*offsets[1:], offsets[-1] + sum(part.nbytes for part in want.tensors[-1].field.parts)]
    infos = [data[begin:end] for begin, end in zip(offsets, ends, strict=True)]
    return data[:8], data[16 : offsets[0]], infos, data[want.data_offset :]


def join(head, keys, infos, data, count=None, alignment=32):
    start = head + struct.pack("<Q", len(infos) if count is None else count) + keys + b"".join(infos)
    return start + b"\0" * (-len(start) % alignment) + data


@pytest.mark.parametrize("alignment", [None, 64])
def test_a_count_or_an_offset_that_is_off_is_refused(tmp_path, alignment):
    """Every tensor would be read from a shifted place: no check of one tensor alone notices."""
    path = write(tmp_path / "a.gguf", alignment)
    head, keys, infos, data = split(path)
    n = alignment or 32
    assert join(head, keys, infos, data, alignment=n) == path.read_bytes()
    for count in (len(infos) - 1, 0):
        path.write_bytes(join(head, keys, infos, data, count, n))
        with pytest.raises(MinillmError, match="a.gguf has [0-9]+ bytes after its last tensor: its tensor count"):
            read_gguf(path)
    path.write_bytes(join(head, keys, infos, data, len(infos) + 1, n))
    with pytest.raises(MinillmError, match="damaged|truncated"):
        read_gguf(path)
    for dropped in range(len(infos) - 1):
        name = infos[dropped + 1][8 : 8 + infos[dropped + 1][0]].decode()
        path.write_bytes(join(head, keys, infos[:dropped] + infos[dropped + 1 :], data, alignment=n))
        with pytest.raises(MinillmError, match=f"tensor {name} has offset [0-9]+, but those before it end at"):
            read_gguf(path)
    path.write_bytes(join(head, keys, [*infos[:-1], infos[-1][:-8] + struct.pack("<Q", 0)], data, alignment=n))
    with pytest.raises(MinillmError, match="tensor Q6_K has offset 0, but those before it end at"):
        read_gguf(path)


@pytest.mark.parametrize("written, claimed", [(32, 64), (64, 32), (32, 16), (32, 8), (64, 128), (32, 1)])
def test_another_alignment_than_the_file_was_written_with_is_refused(tmp_path, written, claimed):
    path = write(tmp_path / "a.gguf", written)
    key = struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<I", U32)
    data = path.read_bytes()
    assert data.count(key) == 1
    path.write_bytes(data.replace(key + struct.pack("<I", written), key + struct.pack("<I", claimed)))
    with pytest.raises(MinillmError, match="has offset|ends at byte|after its last tensor"):
        read_gguf(path)


def test_missing_file(tmp_path):
    with pytest.raises(MinillmError, match="none.gguf cannot be read"):
        read_gguf(tmp_path / "none.gguf")


def test_nested_arrays_are_lists(tmp_path):
    inner = struct.pack("<IQ2I", U32, 2, 7, 8)
    path = tmp_path / "a.gguf"
    path.write_bytes(header(keys=[(b"k", 9, struct.pack("<IQ", 9, 2) + inner * 2)]))
    assert read_gguf(path).metadata == {"k": [[7, 8], [7, 8]]}


def test_every_cut_is_noticed(tmp_path):
    data = write(tmp_path / "a.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in range(1, len(data) - 32, 3):  # the file may end in up to 31 bytes of padding
        path.write_bytes(data[:size])
        with pytest.raises(MinillmError):
            read_gguf(path)


def test_random_damage_never_raises_anything_else(tmp_path):
    path = write(tmp_path / "a.gguf")
    end = min(t.offset for t in read_gguf(path).tensors.values())
    data = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(600):
        broken = data.copy()
        broken[rng.integers(8, end, 3)] = rng.choice([0, 1, 127, 255], 3)
        path.write_bytes(broken.tobytes())
        try:
            read_gguf(path)
        except MinillmError:
            refused += 1
    assert refused > 300
