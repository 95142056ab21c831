"""The schemes of packed checkpoints: what config.json says of each, and how codes and scales lie. A section a scheme.

Scales of activations are left out: here activations are not rounded to 8 bits.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from minillm.files.config_keys import Keys
from minillm.files.packed_tensor import WAY_OUT, Codes, Packing, unpack

_CONFIGS = ("quantization_config", "compression_config", "quantization")  # keys of config.json
_ACTIVATIONS = ("input_scale", "output_scale", "activation_scale", "q_scale", "k_scale", "v_scale")


def packing_of(keys: Keys) -> Packing | None:
    """How the checkpoint of this config.json is packed; None: it is not. Raises MinillmError naming key, value and the
    way out."""
    said = [key for key in _CONFIGS if keys.get(key)]
    if not said:
        return None
    value = keys.get(said[0])
    if not isinstance(value, dict):
        raise keys.error(said[0], value, f"it must be an object: {WAY_OUT}")
    method = value.get("quant_method") or ("mlx" if {"bits", "group_size"} <= set(value) else None)
    if not isinstance(method, str) or method not in _SCHEMES:
        known = ", ".join(_SCHEMES)
        raise keys.error(f"{said[0]}: quant_method", method, f"minillm reads {known}: {WAY_OUT}")
    for key in said[1:]:
        if keys.get(key) != value:
            raise keys.error(key, keys.get(key), f"it contradicts {said[0]}: {WAY_OUT}")
    return _SCHEMES[method](Keys(value, f"{keys.name}: {said[0]} ({method})"))


def _only(said: Keys, key: str, *allowed) -> None:
    if said.get(key) not in allowed:
        named = " or ".join(str(value) for value in allowed if value is not None)
        raise said.error(key, said.get(key), f"minillm reads {named or 'checkpoints without it'}: {WAY_OUT}")


def _bits(said: Keys, *allowed, key="bits") -> int:
    _only(said, key, *allowed)
    return said.integer(key)


def _group(said: Keys) -> int:
    """group_size, 0 for whole rows."""
    group = said.integer("group_size", least=-1)
    if group == 0:
        raise said.error("group_size", group, "it must be -1 or greater than 0")
    return max(group, 0)


def _columns(words: np.ndarray, bits: int, lo: int, hi: int, order=np.s_[:]) -> np.ndarray:
    """Columns lo : hi of codes in (n, k) words -> (hi - lo, n) uint8. order: which code of a word each column is."""
    each = 32 // bits
    codes = unpack(words[:, lo // each : -(-hi // each)], bits)
    codes = codes.reshape(len(words), -1, each)[..., order].reshape(len(words), -1)
    return codes[:, lo % each : lo % each + hi - lo].T


@dataclass(frozen=True)
class _Grouped(Packing):
    bits: int
    group: int

    @property
    def groups(self):
        return self.group

    def count(self, n_in: int) -> int:
        """Groups of a row."""
        return -(-n_in // self.group) if self.group else 1


# AWQ: qweight (in, out / 8), qzeros (groups, out / 8), scales (groups, out). w = (q - zero) * scale


@dataclass(frozen=True)
class _AWQ(_Grouped):
    needs = ("qweight", "qzeros", "scales")
    integers = ("qzeros",)
    held = "Q4_1"
    order: ClassVar = np.array([0, 4, 1, 5, 2, 6, 3, 7])

    def size(self, shape):
        return shape[1] * 8, shape[0]

    def shapes(self, n_out, n_in):
        count = self.count(n_in)
        return {"qzeros": ((count, n_out // 8),), "scales": ((count, n_out),)}

    def codes(self, tensor, lo, hi):
        q, zeros = (_columns(tensor.words(part), 4, lo, hi, self.order) for part in self.needs[:2])
        scale = tensor.floats("scales", np.s_[:, lo:hi]).T
        return Codes(q, scale, -(zeros * scale), self.group or tensor.shape[1])


def _awq(said: Keys) -> Packing:
    _only(said, "version", "gemm", "GEMM", None)
    _only(said, "zero_point", True)
    return _AWQ(_bits(said, 4), _group(said))


# GPTQ: qweight (in / n, out) and qzeros (groups, out / n) with n codes a word, scales (groups, out), g_idx (in,).
# w = (q - zero) * scale[g_idx]; the first version of the format stores zero - 1


@dataclass(frozen=True)
class _GPTQ(_Grouped):
    symmetric: bool
    scattered: bool  # columns were quantised in another order (act-order)
    less_one: bool  # what is stored of zero points

    needs = ("qweight", "qzeros", "scales", "g_idx")
    integers = ("qzeros", "g_idx")

    @property
    def held(self):
        if self.bits == 8 or self.scattered:
            return "Q8_0"
        return "Q4_0" if self.symmetric else "Q4_1"

    def size(self, shape):
        return shape[1], shape[0] * 32 // self.bits

    def shapes(self, n_out, n_in):
        count = self.count(n_in)
        return {
            "qzeros": ((count, n_out * self.bits // 32),),
            "scales": ((count, n_out),),
            "g_idx": ((n_in,),),
        }

    def codes(self, tensor, lo, hi):
        q = unpack(tensor.words("qweight")[:, lo:hi].T, self.bits)
        zeros = _columns(tensor.words("qzeros"), self.bits, lo, hi).astype(np.float32)
        if self.less_one:
            if (zeros == 2**self.bits - 1).any():
                raise tensor.stored["qzeros"].error(
                    f"has a zero point of {2**self.bits - 1} + 1, of which nobody can say whether 0 was meant and what "
                    f"it did to its neighbours; {WAY_OUT}"
                )
            zeros += 1
        scale = tensor.floats("scales", np.s_[:, lo:hi]).T
        group, columns = self.group or tensor.shape[1], tensor.words("g_idx")
        if np.array_equal(columns, np.arange(tensor.shape[1]) // group):
            columns = None
        elif columns.max() >= scale.shape[1]:
            raise tensor.stored["g_idx"].error(f"has a group beyond the {scale.shape[1]} there are; download it again")
        return Codes(q, scale, -(zeros * scale), group, columns)


def _gptq(said: Keys) -> Packing:
    _only(said, "checkpoint_format", "gptq", "gptq_v2", None)
    _only(said, "is_marlin_format", False, None)
    bits, group = _bits(said, 4, 8), _group(said)
    scattered = said.flag("desc_act") and not said.flag("static_groups") and group > 0
    less_one = said.get("checkpoint_format") != "gptq_v2"
    return _GPTQ(bits, group, said.flag("sym", True), scattered, less_one)


# FP8: weight (out, in), weight_scale of the matrix, of each row, or of each block. w = weight * scale


def _e4m3() -> np.ndarray:
    """(256,) float32, what each byte means: a sign, 4 bits of exponent, 3 of fraction. The largest is NaN."""
    byte = np.arange(256)
    exponent, fraction = byte >> 3 & 15, byte & 7
    value = np.where(exponent, (8 + fraction) * 2.0 ** (exponent - 10), fraction * 2.0**-9)
    value[byte & 127 == 127] = np.nan
    return np.where(byte & 128, -value, value).astype(np.float32)


@dataclass(frozen=True)
class _FP8(Packing):
    block: tuple[int, int] | None  # (rows, columns)

    needs = ("weight", "weight_scale")
    kinds = ("F8_E4M3",)
    aliases = {"weight_scale_inv": "weight_scale"}  # which is not inverse
    unread = _ACTIVATIONS
    held, groups = "F16", 0
    table: ClassVar = _e4m3()

    def size(self, shape):
        return shape

    def shapes(self, n_out, n_in):
        if self.block:
            rows, columns = self.block
            return {"weight_scale": ((-(-n_out // rows), -(-n_in // columns)),)}
        return {"weight_scale": ((), (1,), (n_out, 1))}

    def codes(self, tensor, lo, hi):
        q, scale = self.table[tensor.words("weight")[lo:hi]], tensor.floats("weight_scale")
        if self.block:
            return Codes(q, scale[np.arange(lo, hi) // self.block[0]], None, self.block[1])
        scale = scale[lo:hi] if scale.ndim == 2 else np.full((hi - lo, 1), scale)
        return Codes(q, scale, None, tensor.shape[1])


def _block(said: Keys, key: str) -> tuple[int, int] | None:
    block = said.get(key)
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    ):
        raise said.error(key, block, "it must be [rows, columns]")
    return block and tuple(block)


def _fp8(said: Keys) -> Packing:
    _only(said, "fmt", "e4m3", None)
    return _FP8(_block(said, "weight_block_size"))


# compressed-tensors: FP8 as above; integers of 8 bits, or of 4 and 8 in words (out, in / n), with weight_scale
# (out, groups) and, not symmetric, weight_zero_point in words (out / n, groups). Codes in words are shifted by half


@dataclass(frozen=True)
class _Words(_Grouped):
    symmetric: bool

    integers = ("weight_zero_point",)
    unread = (*_ACTIVATIONS, "weight_shape")

    @property
    def needs(self):
        return ("weight_packed", "weight_scale", *(() if self.symmetric else self.integers))

    @property
    def held(self):
        return "Q8_0" if self.bits == 8 else "Q4_0" if self.symmetric else "Q4_1"

    def size(self, shape):
        return shape[0], shape[1] * 32 // self.bits

    def shapes(self, n_out, n_in):
        count = self.count(n_in)
        zeros = {} if self.symmetric else {"weight_zero_point": ((-(-n_out * self.bits // 32), count),)}
        return {"weight_scale": ((n_out, count),)} | zeros

    def codes(self, tensor, lo, hi):
        scale, zeros = tensor.floats("weight_scale", np.s_[lo:hi]), np.float32(2 ** (self.bits - 1))
        if not self.symmetric:
            zeros = _columns(tensor.words("weight_zero_point").T, self.bits, lo, hi)
        q = unpack(tensor.words("weight_packed")[lo:hi], self.bits)
        return Codes(q, scale, -(zeros * scale), self.group or tensor.shape[1])


@dataclass(frozen=True)
class _Bytes(Packing):
    needs = ("weight", "weight_scale")
    kinds = ("I8",)
    unread = _ACTIVATIONS
    held, groups = "Q8_0", 0

    def size(self, shape):
        return shape

    def shapes(self, n_out, n_in):
        return {"weight_scale": ((n_out, 1), (1,))}

    def codes(self, tensor, lo, hi):
        scale = np.broadcast_to(tensor.floats("weight_scale").reshape(-1, 1), (tensor.whole, 1))[lo:hi]
        return Codes(tensor.words("weight")[lo:hi] ^ 128, scale, -(128 * scale), tensor.shape[1])


def _compressed(said: Keys) -> Packing:
    _only(said, "format", "float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
    for key in ("sparsity_config", "transform_config"):
        if (value := said.get(key)) and not (isinstance(value, dict) and value.get("format") == "dense"):
            _only(said, key, None)
    groups = said.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    kinds = [group.get("weights") if isinstance(group, dict) else None for group in groups]
    if not kinds or not isinstance(kinds[0], dict) or any(kind != kinds[0] for kind in kinds):
        raise said.error("config_groups", said.get("config_groups"), f"minillm reads one kind of weights: {WAY_OUT}")
    weights = Keys(kinds[0], f"{said.name}: weights")
    if said.get("format") == "pack-quantized":
        _only(weights, "type", "int")
        bits = _bits(weights, 4, 8, key="num_bits")
        _only(weights, "strategy", "group", "channel")
        _only(weights, "actorder", "static", "weight", False, None)
        group = _group(weights) if weights.get("strategy") == "group" else 0
        return _Words(bits, group, weights.flag("symmetric", True))
    _only(weights, "num_bits", 8)
    _only(weights, "symmetric", True, None)
    _only(weights, "type", "float", "int")
    if weights.get("type") == "int":
        _only(weights, "strategy", "tensor", "channel")
        return _Bytes()
    _only(weights, "strategy", "tensor", "channel", "block")
    return _FP8(_block(weights, "block_structure") if weights.get("strategy") == "block" else None)


# MLX: weight (out, in * bits / 32), scales and biases (out, groups). w = q * scale + bias; modules have their own bits


@dataclass(frozen=True)
class _MLX(_Grouped):
    others: tuple[tuple[str, "_MLX | None"], ...] = ()  # modules, and how they are packed instead

    needs = ("weight", "scales", "biases")

    @property
    def held(self):
        return {5: "Q5_1", 6: "Q8_0", 8: "Q8_0"}.get(self.bits, "Q4_1")

    def of(self, module):
        return dict(self.others).get(module, self)

    def size(self, shape):
        return shape[0], shape[1] * 32 // self.bits

    def shapes(self, n_out, n_in):
        return {part: ((n_out, self.count(n_in)),) for part in self.needs[1:]}

    def codes(self, tensor, lo, hi):
        scale, minimum = (tensor.floats(part, np.s_[lo:hi]) for part in self.needs[1:])
        return Codes(unpack(tensor.words("weight")[lo:hi], self.bits), scale, minimum, self.group)


def _mlx(said: Keys) -> Packing:
    def settings(of: Keys) -> tuple[int, int]:
        _only(of, "mode", "affine", None)
        return _bits(of, 2, 3, 4, 5, 6, 8), of.integer("group_size")

    others = {}
    for key, value in said.values.items():
        if isinstance(value, dict):
            others[key] = _MLX(*settings(Keys(value, f"{said.name}: {key}")))
        elif value is False:
            others[key] = None
        elif value is not True and key not in ("bits", "group_size", "mode", "quant_method"):
            raise said.error(key, value, f"minillm reads bits, group_size, mode and what modules have: {WAY_OUT}")
    return _MLX(*settings(said), tuple(others.items()))


_SCHEMES = {"awq": _awq, "gptq": _gptq, "fp8": _fp8, "compressed-tensors": _compressed, "mlx": _mlx}
