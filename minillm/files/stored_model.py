"""StoredModel: a model's files, opened once. Its config, where each of its tensors lies, and a digest of them.

Two kinds of files, a folder of safetensors and a .gguf, are one thing from here on: tensors have their Hugging Face
names, and config and tensors were checked against one another.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from minillm.architectures import AFTER, BEFORE, BLOCK
from minillm.errors import MinillmError, UsageError
from minillm.files.config import ModelConfig
from minillm.files.config_gguf import FACTORS, config_from_gguf
from minillm.files.config_json import read_config
from minillm.files.formats import F32, FLOATS, FORMATS, QUANTIZED, WeightFormat
from minillm.files.gguf_file import GGUFFile, read_gguf
from minillm.files.hub import ModelFiles
from minillm.files.mapped_file import StoredTensor
from minillm.files.packed_tensor import PackedTensor, Tensors, gathered, idle
from minillm.files.safetensors_file import read_folder


@dataclass(frozen=True)
class StoredModel:
    """Of one model, mapped and not read yet."""

    path: Path  # of the folder or of the .gguf file
    config: ModelConfig
    tensors: Tensors  # all that the config asks for, by Hugging Face name, as they lie in the files
    metadata: dict | None  # of a .gguf, its vocabulary among them; None: a folder, where files beside hold it

    @property
    def name(self) -> str:
        return self.config.name

    @cached_property
    def digest(self) -> str:
        """Of the config and the weights as they are stored: "gguf F32 Q4_1 Q8_0 2f4c0e61b8a97d35", the types of the
        tensors before it (of packed ones the formats that they are read into). The names of model, folder and files do
        not count.

        Of each tensor 4 KiB are looked at (MappedFile.sample): milliseconds for any model. That tells another training,
        fine-tune, merge, quantisation or rounding. It does not tell an edit of a few rows or of single weights.
        """
        digest = hashlib.sha256(repr(_said(replace(self.config, name=""))).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(repr((name, tensor.kind, tensor.shape)).encode())
            for part in tensor.parts:
                digest.update(part.file.sample(part.offset, part.nbytes))
        kinds = " ".join(sorted({tensor.kind for tensor in self.tensors.values()}))
        return f"{'safetensors' if self.metadata is None else 'gguf'} {kinds} {digest.hexdigest()[:16]}"

    def order_of(self, name: str) -> np.ndarray | None:
        """(head_dim,) of the tensor `name`: which of a head's stored rows comes in which place (ModelConfig.order), or
        None: they stay as they are stored."""
        turned = any(name.endswith(part.json) for part in BLOCK if part.rotated)
        return self.config.order(self.metadata is not None and self.config.family.pairs) if turned else None

    @property
    def norm_offset(self) -> int:
        """What the stored weights of norms lack."""
        return self.config.family.norm_offset if self.metadata is None else 0

    def formats(self, dtype: str) -> dict[str, WeightFormat]:
        """Tensor name -> the format that its Weight is to have; for `dtype` see weights.load_weights.
        Raises MinillmError naming the tensor that cannot be loaded so."""
        if dtype not in ("float32", "stored", *QUANTIZED):
            raise UsageError(f"weights cannot be loaded as {dtype!r}; use float32, stored, {' or '.join(QUANTIZED)}")
        head = "model.embed_tokens.weight" if self.config.tied_head else "lm_head.weight"
        return {name: _format(tensor, dtype, name == head) for name, tensor in self.tensors.items()}

    def weight_bytes(self, dtype: str, backend) -> int:
        """Bytes of all Weights loaded as `dtype`, once a Backend has prepared them; from the headers alone."""
        formats, total = self.formats(dtype), 0
        for name, tensor in self.tensors.items():
            held = backend.held_bytes if len(tensor.shape) > 1 else lambda format, shape: format.nbytes(*shape)
            total += held(formats[name], tensor.shape)
        return total


def _said(config) -> list[tuple]:
    """What a dataclass says beyond its defaults: a field that is new tomorrow leaves the digests of today alone."""
    named = [(field, getattr(config, field.name)) for field in fields(config)]
    return [(f.name, _said(x) if is_dataclass(x) else x) for f, x in named if x != f.default]


def open_model(files: ModelFiles) -> StoredModel:
    """The model of these files. No tensor is read, but name, type, shape and place of every one are checked.
    Raises MinillmError naming file and key or tensor: missing, stray, misshapen, truncated, of a type that cannot be
    read."""
    gguf = read_gguf(files.path) if files.kind == "gguf" else None
    if gguf is None:
        config = read_config(files.path, files.name)
        return StoredModel(files.path, config, folder_tensors(files.path, config), None)
    config = gguf_config(gguf, files.name)
    return StoredModel(files.path, config, gguf_tensors(files.path, gguf, config), gguf.metadata)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model with its shape, in the order in which a token meets them."""

    def shapes(parts, prefix=""):
        there = (part for part in parts if not part.needs or getattr(config, part.needs))
        return {prefix + part.json: tuple(config.sizes[size] for size in part.sizes) for part in there}

    blocks = (shapes(BLOCK, f"model.layers.{layer}.") for layer in range(config.n_layers))
    return shapes(BEFORE) | {name: shape for block in blocks for name, shape in block.items()} | shapes(AFTER)


def n_parameters(config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


def gguf_config(gguf: GGUFFile, name: str) -> ModelConfig:
    """The config of a .gguf file; the factors of RoPE go into it. Raises MinillmError."""
    factors = {name: gguf.tensors[name] for name in FACTORS if name in gguf.tensors}
    for tensor in factors.values():
        if tensor.kind != F32.name:
            raise tensor.error(f"is of type {tensor.kind}; it must be {F32.name}")
    values = {name: tuple(t.file.bytes_at(t.offset, t.nbytes).view("<f4").tolist()) for name, t in factors.items()}
    return config_from_gguf(gguf.metadata, name, gguf.tensors, values)


def folder_tensors(path: Path, config: ModelConfig) -> Tensors:
    """The tensors that a config asks for, of the safetensors files of a folder."""
    found = {name: tensor for name, tensor in read_folder(path).items() if not name.startswith(_SEEING)}
    found = gathered(found, config.packing)
    found = {_text_name(name, config): tensor for name, tensor in found.items()}
    # buffers that old versions of transformers saved, and a head that the config says not to use
    unused = {name for name in found if name.endswith("rotary_emb.inv_freq")} | {"lm_head.weight"}
    tensors = _placed(path, dict(_apart(found, config)), config, unused | idle(found))
    for tensor in tensors.values():
        if not _is_float(tensor) and not isinstance(tensor, PackedTensor):
            raise _unreadable(tensor)
    return tensors


def gguf_tensors(path: Path, gguf: GGUFFile, config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors that a config asks for, of a .gguf file, under their Hugging Face names."""
    tensors = _placed(path, dict(_renamed(gguf, config)), config)
    for tensor in tensors.values():
        if not _is_float(tensor) and len(tensor.shape) == 1:
            raise _unreadable(tensor)
        if tensor.kind not in FORMATS:
            raise tensor.error(f"is of type {tensor.kind}, which minillm cannot read; take another quantisation")
    return tensors


_SEEING = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def _text_name(name: str, config: ModelConfig) -> str:
    """The name of a tensor as BLOCK has it, of a model that does not also see."""
    for before, after in (("language_model.", ""), ("model.language_model.", "model.")):
        if name.startswith(before):
            name = after + name.removeprefix(before)
            break
    match = re.fullmatch(r"(model\.layers\.\d+\.)(.+)", name)
    return match[1] + config.family.renamed.get(match[2], match[2]) if match else name


def _apart(found: Tensors, config: ModelConfig) -> Iterator[tuple[str, StoredTensor | PackedTensor]]:
    """With matrices that a family stores above one another taken apart, under their Hugging Face names."""
    parts = {part.field: part for part in BLOCK}
    for name, tensor in found.items():
        match = re.fullmatch(r"(model\.layers\.\d+\.)(.+)", name)
        fused = [parts[field] for field in config.family.fused.get(match[2], ())] if match else []
        if not fused:
            yield name, tensor
            continue
        rows = [config.sizes[part.rows] for part in fused]
        if tensor.shape != (sum(rows), config.dim):
            raise tensor.error(f"has shape {list(tensor.shape)}, but the config asks for {[sum(rows), config.dim]}")
        for part, n, end in zip(fused, rows, itertools.accumulate(rows), strict=True):
            yield match[1] + part.json, tensor.rows(end - n, end)


def _renamed(gguf: GGUFFile, config: ModelConfig) -> Iterator[tuple[str, StoredTensor]]:
    names = {part.gguf: part.json for part in BLOCK} | {name: name for name in config.family.fused}
    outside = {part.gguf: part.json for part in BEFORE + AFTER}
    found = {}
    for name, tensor in gguf.tensors.items():
        match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        if name in FACTORS or match and match[2] == "attn_rot_embd.weight":  # in the config; old converters' buffer
            continue
        here = names.get(match[2]) if match else outside.get(name)
        if here is None:
            raise tensor.error("has no place in this model; minillm will not run a model while ignoring a part of it")
        found[f"model.layers.{match[1]}.{here}" if match else here] = tensor
    return _apart(found, config)


def _placed(path: Path, found: Tensors, config: ModelConfig, unused=frozenset()) -> Tensors:
    """Of the tensors that were found those that the config asks for, each of the right shape, in the order in which
    they lie in the files. MinillmError where one is missing, or one is left over that is not `unused`."""
    shapes = tensor_shapes(config)
    if missing := [name for name in shapes if name not in found]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise MinillmError(
            f"{path} lacks tensor {', '.join(missing[:3])}{more}, which its config asks for; download the model again"
        )
    for name, tensor in found.items():
        if name not in shapes and name not in unused:
            needs = dict.fromkeys(part.needs for part in BLOCK if part.needs)
            flags = ", ".join(f"{flag} = {getattr(config, flag)}" for flag in needs)
            raise tensor.error(
                f"has no place in this model ({config.architecture}, {config.n_layers} layers, {flags}); "
                "minillm will not run a model while ignoring a part of it"
            )
        if name in shapes and tensor.shape != shapes[name]:
            raise tensor.error(f"has shape {list(tensor.shape)}, but the config asks for {list(shapes[name])}")
    ordered = sorted(found.items(), key=lambda item: (item[1].file.path, item[1].offset))
    return {name: tensor for name, tensor in ordered if name in shapes}


def _is_float(tensor: StoredTensor | PackedTensor) -> bool:
    return FORMATS.get(tensor.kind) in FLOATS


def _unreadable(tensor: StoredTensor) -> MinillmError:
    return tensor.error(f"is of type {tensor.kind}; minillm reads {', '.join(format.name for format in FLOATS)} here")


def _format(tensor: StoredTensor | PackedTensor, dtype: str, is_head: bool) -> WeightFormat:
    """The format that the Weight of a tensor is to have."""
    if dtype == "float32" or len(tensor.shape) == 1:
        return F32
    if dtype == "stored":
        format = FORMATS[tensor.kind]
        return format.held if format.kind is None else format
    if not _is_float(tensor):
        raise tensor.error(f"is quantised already ({tensor.kind}): quantize is for 16- and 32-bit models only")
    format = QUANTIZED[dtype][is_head]
    if tensor.shape[1] % format.block:
        raise tensor.error(
            f"has rows of {tensor.shape[1]}, which are no blocks of {format.block}: load it without quantize"
        )
    return format
