"""StoredModel: a model's files, opened once. Its config, where each of its tensors lies, and a digest of them.

Two kinds of files, a folder of safetensors and a .gguf, are one thing from here on: tensors have their Hugging Face
names, and config and tensors were checked against one another.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from minillm.errors import MinillmError, UsageError
from minillm.files.config import ModelConfig, read_config
from minillm.files.gguf_file import GGUFFile, read_gguf
from minillm.files.hub import ModelFiles
from minillm.files.mapped_file import StoredTensor
from minillm.files.quants import BLOCK_WEIGHTS, FLOATS, KINDS, kind_bytes
from minillm.files.safetensors_file import read_folder

QUANTIZED = ("q8_0", "q4_0")  # what floats can be turned into at load

_GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class StoredModel:
    """Of one model, mapped and not read yet."""

    path: Path  # of the folder or of the .gguf file
    config: ModelConfig
    tensors: dict[str, StoredTensor]  # all that the config asks for, by Hugging Face name, as they lie in the files
    metadata: dict | None  # of a .gguf, its vocabulary among them; None: a folder, where files beside hold it

    @property
    def name(self) -> str:
        return self.config.name

    @cached_property
    def digest(self) -> str:
        """Of the config and the weights as they are stored: "gguf F32 Q4_1 Q8_0 2f4c0e61b8a97d35", the types of the
        tensors before it. The names of model, folder and files do not count.

        Of each tensor 4 KiB are looked at (MappedFile.sample): milliseconds for any model. That tells another training,
        fine-tune, merge, quantisation or rounding. It does not tell an edit of a few rows or of single weights.
        """
        digest = hashlib.sha256(repr(asdict(self.config) | {"name": ""}).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(repr((name, tensor.kind, tensor.shape)).encode())
            digest.update(tensor.file.sample(tensor.offset, tensor.nbytes))
        kinds = " ".join(sorted({tensor.kind for tensor in self.tensors.values()}))
        return f"{'safetensors' if self.metadata is None else 'gguf'} {kinds} {digest.hexdigest()[:16]}"

    def kinds(self, dtype: str) -> dict[str, str]:
        """Tensor name -> the kind (quants.KINDS) that its Weight is to have; for `dtype` see weights.load_weights.
        Raises MinillmError naming the tensor that cannot be loaded so."""
        if dtype not in ("float32", "stored", *QUANTIZED):
            raise UsageError(f"weights cannot be loaded as {dtype!r}; use float32, stored, {' or '.join(QUANTIZED)}")
        head = "model.embed_tokens.weight" if self.config.tied_head else "lm_head.weight"
        return {name: _kind(tensor, dtype, name == head) for name, tensor in self.tensors.items()}

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of all Weights loaded as `dtype`, from the headers alone."""
        kinds = self.kinds(dtype)
        return sum(kind_bytes(kinds[name], math.prod(tensor.shape)) for name, tensor in self.tensors.items())


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
    """Every tensor of the model with its shape."""
    dim, ffn = config.dim, config.ffn_dim
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention = {"q_proj": (q, dim), "k_proj": (kv, dim), "v_proj": (kv, dim), "o_proj": (dim, q)}
    mlp = {"gate_proj": (ffn, dim), "up_proj": (ffn, dim), "down_proj": (dim, ffn)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, dim)}
    for i in range(config.n_layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (dim,)
        for room, sizes, bias in (("self_attn", attention, config.attention_bias), ("mlp", mlp, config.mlp_bias)):
            for name, shape in sizes.items():
                shapes[f"{layer}.{room}.{name}.weight"] = shape
                if bias:
                    shapes[f"{layer}.{room}.{name}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (dim,)
    if not config.tied_head:
        shapes["lm_head.weight"] = (config.vocab_size, dim)
    return shapes


def n_parameters(config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


def gguf_config(gguf: GGUFFile, name: str) -> ModelConfig:
    """The config of a .gguf file; rope_freqs.weight goes into it. Raises MinillmError."""
    factors = gguf.tensors.get("rope_freqs.weight")
    if factors is not None and factors.kind != "F32":
        raise factors.error(f"is of type {factors.kind}; it must be F32")
    if factors is not None:
        factors = tuple(factors.file.bytes_at(factors.offset, factors.nbytes).view("<f4").tolist())
    return ModelConfig.from_gguf(gguf.metadata, name, gguf.tensors, factors)


def folder_tensors(path: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors that a config asks for, of the safetensors files of a folder."""
    found = read_folder(path)
    # buffers that old versions of transformers saved, and a head that the config says not to use
    unused = {name for name in found if name.endswith("rotary_emb.inv_freq")} | {"lm_head.weight"}
    tensors = _placed(path, found, config, unused)
    for tensor in tensors.values():
        if tensor.kind not in FLOATS:
            raise _unreadable(tensor)
    return tensors


def gguf_tensors(path: Path, gguf: GGUFFile, config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors that a config asks for, of a .gguf file, under their Hugging Face names."""
    tensors = _placed(path, dict(_renamed(gguf)), config)
    for tensor in tensors.values():
        if tensor.kind not in FLOATS and len(tensor.shape) == 1:
            raise _unreadable(tensor)
    return tensors


def _renamed(gguf: GGUFFile) -> Iterator[tuple[str, StoredTensor]]:
    for name, tensor in gguf.tensors.items():
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if match and match[2] in ("rope_freqs", "attn_rot_embd"):  # in the config; a buffer that old converters kept
            continue
        if match is None or match[2] not in _GGUF_NAMES:
            raise tensor.error("has no place in this model; minillm will not run a model while ignoring a part of it")
        layer = "" if match[1] is None else f"model.layers.{match[1]}."
        yield f"{layer}{_GGUF_NAMES[match[2]]}.{match[3]}", tensor


def _placed(path: Path, found: dict, config: ModelConfig, unused=frozenset()) -> dict[str, StoredTensor]:
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
            raise tensor.error(
                f"has no place in this model (attention_bias = {config.attention_bias}, mlp_bias = {config.mlp_bias}, "
                f"{config.n_layers} layers); minillm will not run a model while ignoring a part of it"
            )
        if name in shapes and tensor.shape != shapes[name]:
            raise tensor.error(f"has shape {list(tensor.shape)}, but the config asks for {list(shapes[name])}")
    ordered = sorted(found.items(), key=lambda item: (item[1].file.path, item[1].offset))
    return {name: tensor for name, tensor in ordered if name in shapes}


def _unreadable(tensor: StoredTensor) -> MinillmError:
    return tensor.error(f"is of type {tensor.kind}; minillm reads {', '.join(FLOATS)} here")


def _kind(tensor: StoredTensor, dtype: str, is_head: bool) -> str:
    """The kind that the Weight of a tensor is to have."""
    if dtype == "float32" or len(tensor.shape) == 1:
        return "F32"
    if dtype == "stored":
        return tensor.kind if tensor.kind in KINDS else "F32"
    if tensor.kind not in FLOATS:
        raise tensor.error(f"is quantised already ({tensor.kind}): quantize is for 16- and 32-bit models only")
    if tensor.shape[1] % BLOCK_WEIGHTS:
        raise tensor.error(
            f"has rows of {tensor.shape[1]}, which are no blocks of {BLOCK_WEIGHTS}: load it without quantize"
        )
    return "Q8_0" if is_head else dtype.upper()
