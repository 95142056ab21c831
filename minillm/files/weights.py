"""The weights of a model by their Hugging Face names, from a folder of safetensors or a .gguf file.

Files are mapped. "stored" keeps F32, F16, BF16, Q8_0, Q4_0 and Q4_1 as they lie in the file, as views of the map; every
other ggml type is dequantised to F32 at load. "float32" widens tensor after tensor and gives the mapped pages back;
"q8_0" and "q4_0" make blocks of matrices of floats in the same way.
"""

import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minillm.errors import MinillmError, UsageError
from minillm.files.config import ModelConfig
from minillm.files.gguf_file import dequantize_other, read_gguf
from minillm.files.mapped_file import StoredTensor
from minillm.files.quants import BLOCK_BYTES, BLOCK_WEIGHTS, quantize, widen
from minillm.files.safetensors_file import read_folder

_FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
KINDS = (*_FLOATS, *BLOCK_BYTES)  # what a Weight may be
QUANTIZED = ("q8_0", "q4_0")  # what floats can be turned into at load
_PART = 2**18  # weights converted at a time: a millisecond or some of work, and temporaries of a few MB
_THREADS = min(8, os.cpu_count() or 1)  # for widening; more than that wait for memory

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
class Weight:
    """One tensor of shape (out, in), or (n,) and then always F32."""

    kind: str  # one of KINDS
    data: np.ndarray  # F32 float32, F16 float16, BF16 uint16 words, all of `shape`; blocks: uint8 (out, bytes of a row)
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def rows(self, lo: int, hi: int) -> np.ndarray:
        """(hi - lo, in) float32: a view if kind is F32, else a fresh array."""
        part = self.data[lo:hi]
        if self.kind == "F32":
            return part
        out = np.empty((len(part), *self.shape[1:]), np.float32)
        widen(self.kind, part, out)
        return out

    def widened(self, run=map) -> "Weight":
        """The same weight as F32; itself if it is. `run`: the map of a thread pool, for parts of the rows."""
        if self.kind == "F32":
            return self
        out = np.empty(self.shape, np.float32)

        def widen_rows(part):
            widen(self.kind, self.data[part], out[part])

        for _ in run(widen_rows, _parts(self.shape)):
            pass
        return Weight("F32", out, self.shape)

    def quantized(self, kind: str, run=map) -> "Weight":
        """The same matrix of floats in blocks of `kind`, Q8_0 or Q4_0. `run` as in `widened`."""
        n_out, n_in = self.shape
        out = np.empty((n_out, n_in // BLOCK_WEIGHTS * BLOCK_BYTES[kind]), np.uint8)

        def quantize_rows(part):
            out[part] = quantize(kind, self.rows(part.start, part.stop))

        for _ in run(quantize_rows, _parts(self.shape)):
            pass
        return Weight(kind, out, self.shape)


def _parts(shape):
    """Slices of the rows of a tensor, about _PART elements each."""
    step = max(1, _PART // math.prod(shape[1:]))
    return [slice(lo, lo + step) for lo in range(0, shape[0], step)]


def load_weights(
    path: Path, config: ModelConfig, *, dtype: str, progress: bool = False, only=lambda name: True
) -> dict[str, Weight]:
    """Every weight that `config` asks for; no lm_head.weight if the head is tied. Nothing is loaded before the name,
    shape and place of every tensor is found right.

    dtype: "float32"; "stored" (16-bit and quantised matrices stay what they are); "q8_0" or "q4_0" (matrices of
    floats become such blocks; under q4_0 the head, also where the embedding is the head, becomes Q8_0: llama.cpp too
    keeps it finer than the rest). Norms and biases become F32.
    progress: show a bar on stderr, if that is a terminal. only: name -> whether to load it.
    Raises MinillmError naming file and tensor: missing, stray, misshapen, truncated, of a type that cannot be read or
    turned into blocks.
    """
    weights = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, tensor in _shown(_find(path, config, dtype), progress):
            if not only(name):
                continue
            weight, held = _load(tensor, config, pool.map), _held(name, tensor, config, dtype)
            if weight.kind != held:
                weight = weight.widened(pool.map) if held == "F32" else weight.quantized(held, pool.map)
            if not np.may_share_memory(weight.data, tensor.file.bytes_at(tensor.offset, tensor.nbytes)):
                tensor.file.release(tensor.offset, tensor.nbytes)
            weights[name] = weight
    return weights


def _shown(tensors: dict[str, StoredTensor], progress: bool) -> Iterator[tuple[str, StoredTensor]]:
    """The items of `tensors`, with a progress bar of their bytes while they are used."""
    if not progress:
        yield from tensors.items()
        return
    from tqdm import tqdm

    total = sum(tensor.nbytes for tensor in tensors.values())
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for name, tensor in tensors.items():
            yield name, tensor
            bar.update(tensor.nbytes)


def weight_bytes(path: Path, config: ModelConfig, dtype: str) -> int:
    """Bytes that load_weights would return, from the headers alone."""
    total = 0
    for name, tensor in _find(path, config, dtype).items():
        kind, size = _held(name, tensor, config, dtype), math.prod(tensor.shape)
        is_blocks = kind in BLOCK_BYTES
        total += size // BLOCK_WEIGHTS * BLOCK_BYTES[kind] if is_blocks else size * np.dtype(_FLOATS[kind]).itemsize
    return total


def _held(name: str, tensor: StoredTensor, config: ModelConfig, dtype: str) -> str:
    """The kind that the Weight of a tensor is to have."""
    if dtype == "float32" or len(tensor.shape) == 1:
        return "F32"
    if dtype == "stored":
        return tensor.kind if tensor.kind in KINDS else "F32"
    is_head = name == ("model.embed_tokens.weight" if config.tied_head else "lm_head.weight")
    return "Q8_0" if is_head else dtype.upper()


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


def _find(path: Path, config: ModelConfig, dtype: str) -> dict[str, StoredTensor]:
    """The model's tensors by Hugging Face name, in the order they lie in the files; all checked against the config."""
    if dtype not in ("float32", "stored", *QUANTIZED):
        raise UsageError(f"weights cannot be loaded as {dtype!r}; use float32, stored, {' or '.join(QUANTIZED)}")
    path = Path(path)
    found = read_folder(path) if path.is_dir() else _find_gguf(path, config)
    shapes = tensor_shapes(config)
    if missing := [name for name in shapes if name not in found]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise MinillmError(
            f"{path} lacks tensor {', '.join(missing[:3])}{more}, which its config asks for; download the model again"
        )
    for name, tensor in found.items():
        # buffers that old versions of transformers saved, and a head that the config says not to use
        unused = name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and path.is_dir())
        if name not in shapes and not unused:
            raise tensor.error(
                f"has no place in this model (attention_bias = {config.attention_bias}, mlp_bias = {config.mlp_bias}, "
                f"{config.n_layers} layers); minillm will not run a model while ignoring a part of it"
            )
        if name in shapes and tensor.shape != shapes[name]:
            raise tensor.error(f"has shape {list(tensor.shape)}, but the config asks for {list(shapes[name])}")
        if name in shapes and tensor.kind not in _FLOATS and (path.is_dir() or len(tensor.shape) == 1):
            raise tensor.error(f"is of type {tensor.kind}; minillm reads {', '.join(_FLOATS)} here")
        if name in shapes and dtype in QUANTIZED and len(tensor.shape) > 1:
            if tensor.kind not in _FLOATS:
                raise tensor.error(f"is quantised already ({tensor.kind}): quantize is for 16- and 32-bit models only")
            if tensor.shape[1] % BLOCK_WEIGHTS:
                raise tensor.error(
                    f"has rows of {tensor.shape[1]}, which are no blocks of {BLOCK_WEIGHTS}: load it without quantize"
                )
    ordered = sorted(found.items(), key=lambda item: (item[1].file.path, item[1].offset))
    return {name: tensor for name, tensor in ordered if name in shapes}


def _find_gguf(path: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    found = {}
    for name, tensor in read_gguf(path).tensors.items():
        if name == "rope_freqs.weight":  # used: read_config puts it into the config
            if config.rope.freq_factors is None:
                raise tensor.error("is not in the config: make the config with minillm.files.config.read_config")
            continue
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if match and match[2] == "attn_rot_embd":  # the inverse frequencies, a buffer that old converters kept
            continue
        if match is None or match[2] not in _GGUF_NAMES:
            raise tensor.error("has no place in this model; minillm will not run a model while ignoring a part of it")
        layer = "" if match[1] is None else f"model.layers.{match[1]}."
        found[f"{layer}{_GGUF_NAMES[match[2]]}.{match[3]}"] = tensor
    return found


def _load(tensor: StoredTensor, config: ModelConfig, run) -> Weight:
    """The tensor as it is stored, with the rows of a GGUF file's Q and K back in the half-split order."""
    kind, raw = tensor.kind, tensor.file.bytes_at(tensor.offset, tensor.nbytes)
    if kind in BLOCK_BYTES:
        data = raw.reshape(*tensor.shape[:-1], -1)
    elif kind in _FLOATS:
        data = raw.view(_FLOATS[kind]).reshape(tensor.shape)
        data = data if data.flags.aligned else data.copy()  # BLAS would copy it at every product
    else:
        kind, data = "F32", dequantize_other(tensor, run)
    if re.fullmatch(r"blk\.\d+\.attn_[qk]\.\w+", tensor.name):  # a GGUF file's name
        pairs = data.reshape(-1, config.head_dim // 2, 2, *data.shape[1:])  # (heads, pair, which of the two, ...)
        data = pairs.swapaxes(1, 2).reshape(data.shape)
    return Weight(kind, data, tensor.shape)
