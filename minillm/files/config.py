"""ModelConfig: the shape of a model. files.config_json and files.config_gguf read it."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from minillm.architectures import BY_ARCHITECTURE, Family
from minillm.errors import MinillmError
from minillm.files.packed_tensor import Packing

MAX_LAYERS = 10_000  # a config that asks for more is damaged; its table of tensors would fill the memory


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; rope.py says what each kind computes."""

    kind: str = "default"  # "none" | "default" | "linear" | "dynamic" | "llama3" | "yarn" | "longrope"
    theta: float = 10000.0
    factor: float = 1.0
    original_context: int = 0  # tokens the model was trained on before the scaling: dynamic, llama3, yarn, longrope
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # cos and sin are multiplied by it; None = from factor (yarn, longrope)
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    freq_factors: tuple[float, ...] | None = None  # a divisor for each pair; longrope: up to original_context tokens
    long_factors: tuple[float, ...] | None = None  # longrope: of longer sequences


UNROTATED = RopeConfig("none")

# (a, b) of an activation g / (1 + exp(-(a g + b g^3))): silu, and gelu by tanh (a = 2 sqrt(2 / pi), b = .044715 a)
ACTIVATIONS = {"silu": (1.0, 0.0), "gelu_tanh": (1.5957691216057308, 0.07135481627260025)}


@dataclass(frozen=True)
class Attention:
    """How a layer attends."""

    rope: RopeConfig
    window: int | None  # a token sees itself and the window - 1 tokens before it


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one model."""

    name: str
    architecture: str  # of a row of architectures.FAMILIES
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dim: int
    ffn_dim: int
    vocab_size: int
    context: int  # the longest sequence the model is meant for, in tokens
    rms_eps: float
    rope: RopeConfig
    rotated_dim: int | None = None  # the first elements of a head that RoPE turns; None: all of them
    unrotated: tuple[int, ...] = ()  # layers without RoPE
    sliding_window: int | None = None  # of all layers but `full`
    local_rope: RopeConfig | None = None  # of those that have the window, where it is not `rope`
    full: tuple[int, ...] = ()  # layers in which a token sees all that came before it
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    output_norms: bool = False  # what attention and MLP add to the residual stream has norms too
    activation: str = "silu"  # of the gate: a key of ACTIVATIONS
    qk_norm: bool = False  # queries and keys have a norm, head by head, before RoPE
    tied_head: bool = False  # the output head is the embedding
    packing: Packing | None = None  # of its matrices in a folder; None: each is one tensor
    temperature: float = 0.0  # beta: a query at position p is times 1 + beta log(1 + p // rope.original_context)
    attention_scale: float = 0.0  # of the logits of attention; 0: head_dim ** -0.5
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        name = self.name or "config"
        if self.n_heads % self.n_kv_heads:
            raise MinillmError(
                f"{name}: {self.n_heads} query heads cannot share {self.n_kv_heads} key-value heads; "
                "the first must be a multiple of the second"
            )
        if self.head_dim % 2:
            raise MinillmError(f"{name}: head_dim = {self.head_dim} is not supported; RoPE needs an even one")
        if self.rotated % 2 or not 0 < self.rotated <= self.head_dim:
            raise MinillmError(
                f"{name}: RoPE cannot turn {self.rotated} elements of a head of {self.head_dim}; "
                "an even number up to that is needed"
            )
        if self.rope.theta <= 1:
            raise MinillmError(f"{name}: rope_theta = {self.rope.theta} is not supported; it must be greater than 1")
        for factors in (self.rope.freq_factors, self.rope.long_factors):
            if factors is not None and (
                len(factors) != self.rotated // 2 or not all(0 < f < math.inf for f in factors)
            ):
                raise MinillmError(
                    f"{name}: the factors of RoPE's frequencies must be {self.rotated // 2} positive numbers, one for "
                    "each pair that is turned; the file is damaged, download it again"
                )

    @property
    def family(self) -> Family:
        return BY_ARCHITECTURE[self.architecture]

    @property
    def rotated(self) -> int:
        """How many elements of a head RoPE turns."""
        return self.head_dim if self.rotated_dim is None else self.rotated_dim

    @property
    def own_head(self) -> bool:
        return not self.tied_head

    @property
    def scale(self) -> float:
        """Of the logits of attention."""
        return self.attention_scale or self.head_dim**-0.5

    @property
    def sizes(self) -> dict[str, int]:
        """What the sizes of architectures.Part are."""
        heads = {"q": self.n_heads * self.head_dim, "kv": self.n_kv_heads * self.head_dim, "head": self.head_dim}
        return heads | {"dim": self.dim, "ffn": self.ffn_dim, "vocab": self.vocab_size}

    def attention(self, layer: int) -> Attention:
        window = None if layer in self.full else self.sliding_window
        rope = self.local_rope if window and self.local_rope else self.rope
        return Attention(UNROTATED if layer in self.unrotated else rope, window)

    @cached_property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rotations that layers have, each once."""
        return tuple(dict.fromkeys(self.attention(layer).rope for layer in range(self.n_layers)))

    @property
    def reach(self) -> int | None:
        """How many tokens back, itself among them, a token is seen by any layer; None: to the end."""
        return None if self.full else self.sliding_window

    def order(self, pairs: bool) -> np.ndarray | None:
        """(head_dim,) which stored row each row of a head of Q and K is, so that RoPE turns element i with i +
        head_dim / 2; None: as stored. Stored are first the elements that are turned: pairs of neighbours, or halves.
        """
        turned, half, size = np.arange(self.rotated), self.rotated // 2, self.head_dim
        low, high = (turned[::2], turned[1::2]) if pairs else (turned[:half], turned[half:])
        rest = np.arange(self.rotated, size)
        low_rest, high_rest = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        order = np.concatenate([low, low_rest, high, high_rest])
        return None if np.array_equal(order, np.arange(size)) else order
