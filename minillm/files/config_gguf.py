"""ModelConfig from the metadata of a GGUF file: llama.cpp's keys, read as it reads them."""

import math
from collections.abc import Collection, Mapping

from minillm.architectures import FAMILIES, Family
from minillm.files.config import MAX_LAYERS, ModelConfig, RopeConfig
from minillm.files.config_keys import Keys, scales

# Keys that would change the computation, with the values that do not. Any other value is refused.
_ONLY = {
    "expert_count": (None, 0),
    "use_parallel_residual": (None, False),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "attention.causal": (None, True),
    "attention.clamp_kqv": (None, 0),
    "attention.max_alibi_bias": (None, 0),
    "rope.scaling.alpha": (None, 0),
    "rope.scaling.yarn_ext_factor": (None, -1, 1),
    "rope.scaling.yarn_attn_factor": (None, 1),
}
_SCALES = {  # what a family that is `scaled` has
    "embedding_scale": (None, 0, 1),
    "attention.scale": (None, 0),
    "residual_scale": (None, 0, 1),
    "logit_scale": (None, 0, 1),
}
_TEMPERED = {"attention.temperature_scale": (None, 0), "rope.scaling.yarn_log_multiplier": (None, 0)}
FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")  # tensors that are config


def config_from_gguf(
    metadata: dict,
    name: str = "",
    tensors: Collection[str] = (),
    factors: Mapping[str, tuple[float, ...]] | None = None,
) -> ModelConfig:
    """From GGUF metadata and what only the tensors tell: which there are (no output.weight = tied head; biases), and
    the contents of FACTORS by name. Raises MinillmError naming the key, its value and what is supported."""
    keys = Keys(metadata, name)
    rows = {family.gguf: family for family in reversed(FAMILIES)}
    keys.refuse_unless({"general.architecture": tuple(rows), "general.type": (None, "model")})
    family = rows[keys.get("general.architecture")]
    keys = Keys(metadata, name, prefix=family.gguf + ".")
    keys.refuse_unless(_ONLY | ({} if family.scaled else _SCALES) | ({} if family.tempered else _TEMPERED))
    n_layers, n_heads = keys.integer("block_count", most=MAX_LAYERS), keys.integer("attention.head_count")
    dim = keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", None)
    head_dim = head_dim or keys.divided("embedding_length", dim, "attention.head_count", n_heads)
    keys.refuse_unless({"attention.value_length": (None, 0, head_dim)})
    rotated = keys.integer("rope.dimension_count", 0, least=0) or head_dim
    if not family.partial:
        keys.refuse_unless({"rope.dimension_count": (None, 0, head_dim)})
    context = keys.integer("context_length")
    tokens = metadata.get("tokenizer.ggml.tokens")
    ids = Keys(metadata, name, prefix="tokenizer.ggml.")
    eos_ids = [ids.integer(key, None, least=0) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    every, full = family.unrotated_every, family.full_every
    window = keys.integer("attention.sliding_window", None, least=0) or None
    return ModelConfig(
        name=name,
        architecture=family.architecture,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=keys.integer("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        dim=dim,
        ffn_dim=keys.integer("feed_forward_length"),
        vocab_size=len(tokens) if isinstance(tokens, list) and tokens else keys.integer("vocab_size"),
        context=context,
        rope=_rope(keys, context, factors or {}),
        rotated_dim=None if rotated == head_dim else rotated,
        temperature=keys.number("attention.temperature_scale", 0.0, positive=False),
        unrotated=tuple(range(every - 1, n_layers, every)) if every else (),
        sliding_window=window,
        **_biases(family, tensors),
        tied_head="output.weight" not in tensors,
        bos_id=ids.integer("bos_token_id", None, least=0),
        eos_ids=tuple(dict.fromkeys(i for i in eos_ids if i is not None)),
        full=tuple(range(full - 1, n_layers, full)) if full and window else (),
        local_rope=RopeConfig(theta=keys.number("rope.freq_base_swa", family.local_theta)) if full and window else None,
        **_scales(keys, family, n_layers, n_heads, dim),
    )


def _biases(family: Family, tensors: Collection[str]) -> dict[str, bool]:
    said = {"qkv_bias": "blk.0.attn_q.bias", "o_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_gate.bias"}
    return {name: tensor in tensors for name, tensor in said.items()} | family.fixed


def _scales(keys: Keys, family: Family, n_layers: int, n_heads: int, dim: int) -> dict[str, float]:
    eps = keys.number("attention.layer_norm_rms_epsilon")
    if family.wide:  # no key tells the one size of Gemma 3 whose logits are scaled otherwise, the one of 62 layers
        attention = (dim / n_heads) ** -0.5 if n_layers == 62 else 0.0
        return {"rms_eps": eps, "embedding_scale": dim**0.5, "attention_scale": attention}
    if not family.scaled:
        return {"rms_eps": eps}
    embedding, attention, residual, logits = (keys.number(key, 0.0, positive=False) for key in _SCALES)
    return scales(eps, embedding or 1.0, attention, residual or 1.0, logits or 1.0)


def _rope(keys: Keys, context: int, factors: Mapping[str, tuple[float, ...]]) -> RopeConfig:
    """llama.cpp's reading: a factor without a type is linear, and attn_factor multiplies yarn's own magnitude."""
    keys.refuse_unless({"rope.scaling.type": (None, "none", "linear", "yarn", "longrope")})
    freqs, short, long = (factors.get(name) for name in FACTORS)
    kind = "longrope" if short and long else keys.get("rope.scaling.type") or "linear"
    if kind == "longrope" and not (short and long):
        raise keys.error("rope.scaling.type", kind, f"it needs the tensors {FACTORS[1]} and {FACTORS[2]}")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0, positive=False), positive=False)
    factor = factor or 1.0
    if factor < 0:
        raise keys.error("rope.scaling.factor", factor, "it must be greater than 0")
    attention_factor, multiplier = (
        keys.number("rope.scaling.attn_factor", 1.0),
        keys.number("rope.scaling.yarn_log_multiplier", 0.0, positive=False),
    )
    if kind == "yarn" and factor > 1:
        attention_factor *= (0.1 * math.log(factor) + 1.0) / (0.1 * multiplier * math.log(factor) + 1.0)
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
        freq_factors=short if kind == "longrope" else freqs,
        long_factors=long if kind == "longrope" else None,
    )
