"""ModelConfig: the shape of a model, read from a Hugging Face config.json or from GGUF metadata.

What minillm cannot run stops here, by the name of the key and its value. Where a key is absent, the default is that
of transformers.
"""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from minillm.errors import MinillmError
from minillm.files.config_keys import Keys

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}  # model_type -> architecture

# Keys that would change the computation, with the values that do not. Any other value is refused.
_HF_ONLY = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "quantization_config": (None,),
    "compression_config": (None,),
    "partial_rotary_factor": (None, 1),
    "num_local_experts": (None, 0, 1),
    "is_causal": (None, True),
    "use_bidirectional_attention": (None, False),
    "clip_qkv": (None,),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
}
_GGUF_ONLY = {
    "expert_count": (None, 0),
    "use_parallel_residual": (None, False),
    "logit_scale": (None, 0, 1),
    "residual_scale": (None, 0, 1),
    "embedding_scale": (None, 0, 1),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "attention.causal": (None, True),
    "attention.scale": (None, 0),
    "attention.clamp_kqv": (None, 0),
    "attention.max_alibi_bias": (None, 0),
    "attention.temperature_scale": (None, 0),
    "rope.scaling.alpha": (None, 0),
    "rope.scaling.yarn_log_multiplier": (None, 0),
    "rope.scaling.yarn_ext_factor": (None, -1, 1),
    "rope.scaling.yarn_attn_factor": (None, 1),
}
_MAX_LAYERS = 10_000  # a config that asks for more is damaged; its table of tensors would fill the memory
_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
_ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"),
    *("low_freq_factor", "high_freq_factor"),
    *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate", "finetuned"),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; rope.py says what each kind computes."""

    kind: str = "default"  # "default" | "linear" | "dynamic" | "llama3" | "yarn"
    theta: float = 10000.0
    factor: float = 1.0
    original_context: int = 0  # tokens the model was trained on before the scaling: dynamic, llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # cos and sin are multiplied by it; None = yarn's own from factor and mscale
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    freq_factors: tuple[float, ...] | None = None  # (head_dim // 2) divisors: rope_freqs.weight of a GGUF file


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one Llama-like model."""

    name: str
    architecture: str  # "LlamaForCausalLM" | "MistralForCausalLM"
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
    sliding_window: int | None = None  # a token sees itself and the sliding_window - 1 tokens before it
    attention_bias: bool = False  # on q, k, v and o
    mlp_bias: bool = False  # on gate, up and down
    tied_head: bool = False  # the output head is the embedding
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        name, factors = self.name or "config", self.rope.freq_factors
        if self.n_heads % self.n_kv_heads:
            raise MinillmError(
                f"{name}: {self.n_heads} query heads cannot share {self.n_kv_heads} key-value heads; "
                "the first must be a multiple of the second"
            )
        if self.head_dim % 2:
            raise MinillmError(f"{name}: head_dim = {self.head_dim} is not supported; RoPE needs an even one")
        if self.rope.theta <= 1:
            raise MinillmError(f"{name}: rope_theta = {self.rope.theta} is not supported; it must be greater than 1")
        if factors is not None and (len(factors) != self.head_dim // 2 or not all(0 < f < math.inf for f in factors)):
            raise MinillmError(
                f"{name}: rope_freqs.weight must hold {self.head_dim // 2} positive numbers (half of head_dim); "
                "the file is damaged, download it again"
            )

    @classmethod
    def from_dict(cls, config_json: dict, name: str = "") -> "ModelConfig":
        """From the contents of a config.json. Raises MinillmError naming the key, its value and what is supported."""
        keys = Keys(config_json, name)
        architecture = _architecture(keys)
        mistral = architecture == "MistralForCausalLM"
        keys.refuse_unless(_HF_ONLY, absent={"hidden_act": "silu"})
        n_heads, dim = keys.integer("num_attention_heads"), keys.integer("hidden_size")
        head_dim = keys.integer("head_dim", None) or keys.divided("hidden_size", dim, "num_attention_heads", n_heads)
        positions = keys.integer("max_position_embeddings", 131072 if mistral else 2048)
        sliding_window = keys.integer("sliding_window", 4096, null=None) if mistral else None  # Llama ignores the key
        _refuse_mixed_layers(keys, sliding_window)
        rope = _rope_from_dict(keys, head_dim, positions)
        return cls(
            name=name,
            architecture=architecture,
            n_layers=keys.integer("num_hidden_layers", most=_MAX_LAYERS),
            n_heads=n_heads,
            n_kv_heads=keys.integer("num_key_value_heads", 8 if mistral else n_heads, null=n_heads),
            head_dim=head_dim,
            dim=dim,
            ffn_dim=keys.integer("intermediate_size"),
            vocab_size=keys.integer("vocab_size"),
            # dynamic scaling is told the length before scaling; it serves `factor` times as many tokens
            context=int(positions * rope.factor) if rope.kind == "dynamic" else positions,
            rms_eps=keys.number("rms_norm_eps", 1e-6),
            rope=rope,
            sliding_window=sliding_window,
            attention_bias=keys.flag("attention_bias"),
            mlp_bias=keys.flag("mlp_bias"),
            tied_head=keys.flag("tie_word_embeddings"),
            bos_id=keys.integer("bos_token_id", 1, least=-1, null=None),
            eos_ids=_eos_ids(keys),
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: dict,
        name: str = "",
        tensors: Collection[str] = (),
        freq_factors: tuple[float, ...] | None = None,
    ) -> "ModelConfig":
        """From GGUF metadata and what only the tensors tell: which there are (no output.weight = tied head; biases),
        and the contents of rope_freqs.weight. Raises MinillmError naming the key, its value and what is supported."""
        keys = Keys(metadata, name)
        keys.refuse_unless({"general.architecture": ("llama",), "general.type": (None, "model")})
        keys = Keys(metadata, name, prefix="llama.")
        keys.refuse_unless(_GGUF_ONLY)
        n_heads, dim = keys.integer("attention.head_count"), keys.integer("embedding_length")
        head_dim = keys.integer("attention.key_length", None)
        head_dim = head_dim or keys.divided("embedding_length", dim, "attention.head_count", n_heads)
        same = (None, 0, head_dim)
        keys.refuse_unless({"attention.value_length": same, "rope.dimension_count": same})
        context = keys.integer("context_length")
        tokens = metadata.get("tokenizer.ggml.tokens")
        ids = Keys(metadata, name, prefix="tokenizer.ggml.")
        eos_ids = [ids.integer(key, None, least=0) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
        return cls(
            name=name,
            architecture="LlamaForCausalLM",
            n_layers=keys.integer("block_count", most=_MAX_LAYERS),
            n_heads=n_heads,
            n_kv_heads=keys.integer("attention.head_count_kv", n_heads),
            head_dim=head_dim,
            dim=dim,
            ffn_dim=keys.integer("feed_forward_length"),
            vocab_size=len(tokens) if isinstance(tokens, list) and tokens else keys.integer("vocab_size"),
            context=context,
            rms_eps=keys.number("attention.layer_norm_rms_epsilon"),
            rope=_rope_from_gguf(keys, context, freq_factors),
            sliding_window=keys.integer("attention.sliding_window", None, least=0) or None,
            attention_bias="blk.0.attn_q.bias" in tensors,
            mlp_bias="blk.0.ffn_gate.bias" in tensors,
            tied_head="output.weight" not in tensors,
            bos_id=ids.integer("bos_token_id", None, least=0),
            eos_ids=tuple(dict.fromkeys(i for i in eos_ids if i is not None)),
        )


def read_config(folder: Path, name: str) -> ModelConfig:
    """The config of a model folder: config.json, end tokens of generation_config.json added. name: for people."""
    config = _read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.exists():  # Llama 3 lists its second end token only here
        ids = [config.get("eos_token_id", 2), _read_json(generation).get("eos_token_id")]
        ids = [i for some in ids for i in (some if isinstance(some, list) else [some]) if i is not None]
        config = config | {"eos_token_id": [i for n, i in enumerate(ids) if i not in ids[:n]]}
    return ModelConfig.from_dict(config, name)


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MinillmError(f"{path} is missing; a model folder needs it beside its safetensors files") from None
    except (OSError, ValueError, RecursionError) as error:
        raise MinillmError(f"{path} cannot be read as JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise MinillmError(f"{path} must hold one JSON object; download it again")
    return values


def _architecture(keys: Keys) -> str:
    supported = "minillm runs " + " and ".join(ARCHITECTURES.values())
    named = keys.get("architectures")
    if named:
        if not isinstance(named, list) or len(named) != 1 or named[0] not in ARCHITECTURES.values():
            raise keys.error("architectures", named, supported)
        return named[0]
    model_type = keys.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise keys.error("model_type", model_type, supported)
    return ARCHITECTURES[model_type]


def _eos_ids(keys: Keys) -> tuple[int, ...]:
    value = keys.values.get("eos_token_id", 2)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise keys.error("eos_token_id", value, "it must be a token id, or a list of them")
    return tuple(ids)


def _refuse_mixed_layers(keys: Keys, sliding_window: int | None) -> None:
    """Every layer must attend and rotate alike: no sliding beside full attention, no layer without RoPE."""
    layer_types = keys.get("layer_types")
    uniform = "sliding_attention" if sliding_window else "full_attention"
    if layer_types is not None and (not isinstance(layer_types, list) or any(t != uniform for t in layer_types)):
        raise keys.error("layer_types", layer_types, f"minillm runs models whose layers are all alike ({uniform} here)")
    no_rope = keys.get("no_rope_layers")  # 0 marks a layer without RoPE
    if no_rope and (not isinstance(no_rope, list) or not all(no_rope)):
        raise keys.error("no_rope_layers", no_rope, "minillm runs models whose layers all have RoPE")


def _rope_from_dict(keys: Keys, head_dim: int, positions: int) -> RopeConfig:
    """`rope_scaling` (transformers 4) or `rope_parameters` (transformers 5); the type under `rope_type` or `type`."""
    where = "rope_scaling" if keys.get("rope_scaling") else "rope_parameters"
    values = keys.get(where) or {}
    if not isinstance(values, dict):
        raise keys.error(where, values, "it must be an object with rope_type")
    rope = Keys(values, f"{keys.name}: {where}")
    rope.refuse_unless({"partial_rotary_factor": (None, 1)})
    kind = rope.get("rope_type") or rope.get("type") or ("default" if "factor" not in values else None)
    if kind not in _ROPE_KINDS:
        raise rope.error("rope_type", kind, f"minillm runs {', '.join(_ROPE_KINDS)}")
    if (rope.get("type") or kind) != kind:
        raise rope.error("type", rope.get("type"), f"it contradicts rope_type = {kind!r}")
    if unknown := sorted(set(values) - _ROPE_KEYS):
        raise rope.error(unknown[0], values[unknown[0]], f"minillm knows {', '.join(sorted(_ROPE_KEYS))}")
    theta = rope.number("rope_theta", keys.number("rope_theta", 10000.0))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig("linear", theta, rope.number("factor"))
    if kind == "dynamic":
        if head_dim <= 2:
            raise keys.error("head_dim", head_dim, "rope type dynamic needs more than 2")
        return RopeConfig("dynamic", theta, rope.number("factor"), positions)
    # as in transformers, the key beside the rope dict goes before the key inside it
    original = keys.integer(
        "original_max_position_embeddings", rope.integer("original_max_position_embeddings", positions)
    )
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise rope.error("high_freq_factor", high, f"it must be greater than low_freq_factor = {low}")
        return RopeConfig("llama3", theta, rope.number("factor"), original, low, high)
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=rope.number("factor", positions / original),
        original_context=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.number("attention_factor", None),
        mscale=rope.number("mscale", None, positive=False),
        mscale_all_dim=rope.number("mscale_all_dim", None, positive=False),
        truncate=rope.flag("truncate", True),
    )


def _rope_from_gguf(keys: Keys, context: int, freq_factors: tuple[float, ...] | None) -> RopeConfig:
    """llama.cpp's reading: a factor without a type is linear, and attn_factor multiplies yarn's own magnitude."""
    keys.refuse_unless({"rope.scaling.type": (None, "none", "linear", "yarn")})
    kind = keys.get("rope.scaling.type") or "linear"
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0, positive=False), positive=False)
    factor = factor or 1.0
    if factor < 0:
        raise keys.error("rope.scaling.factor", factor, "it must be greater than 0")
    attention_factor = keys.number("rope.scaling.attn_factor", 1.0)
    if kind == "yarn" and factor > 1:
        attention_factor *= 0.1 * math.log(factor) + 1.0
    if kind == "none" or (kind == "linear" and factor == 1.0):
        kind, factor = "default", 1.0
    return RopeConfig(
        kind=kind,
        theta=keys.number("rope.freq_base", 10000.0),
        factor=factor,
        original_context=keys.integer("rope.scaling.original_context_length", context, least=0) or context,
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=attention_factor,
        freq_factors=freq_factors,
    )
