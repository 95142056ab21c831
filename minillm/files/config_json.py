"""ModelConfig from a Hugging Face config.json. Where a key is absent, the default is that of transformers.

What minillm cannot run stops here, by the name of the key and its value."""

import json
from pathlib import Path

from minillm.architectures import FAMILIES, Family
from minillm.errors import MinillmError
from minillm.files.checkpoints import packing_of
from minillm.files.config import MAX_LAYERS, ModelConfig, RopeConfig
from minillm.files.config_keys import Keys, scales

# Keys that would change the computation, with the values that do not. Any other value is refused.
_ONLY = {
    "num_local_experts": (None, 0, 1),
    "is_causal": (None, True),
    "use_bidirectional_attention": (None, False),
    "clip_qkv": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
}
_ACTIVATIONS = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh",)}  # the names of each
_WHOLE = {"partial_rotary_factor": (None, 1)}  # what a family must have that is not `partial`
_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
_ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"),
    *("low_freq_factor", "high_freq_factor"),
    *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate", "finetuned"),
}
_TEMPERATURE = "llama_4_scaling_beta"
_LONGROPE_KEYS = {"short_factor", "long_factor", "short_mscale", "long_mscale"}


def config_from_json(values: dict, name: str = "") -> ModelConfig:
    """From the contents of a config.json. Raises MinillmError naming the key, its value and what is supported."""
    if isinstance(values.get("text_config"), dict):  # of a model that also sees: its own keys stand beside
        values = {key: value for key, value in values.items() if key not in ("architectures", "model_type")}
        values |= values["text_config"]
    family = _family(Keys(values, name))
    keys = Keys(family.defaults | values, name)
    keys.refuse_unless(_ONLY if family.partial else _ONLY | _WHOLE)
    act = "hidden_activation" if keys.get("hidden_activation") else "hidden_act"
    keys.refuse_unless({act: (None, *_ACTIVATIONS[family.fixed.get("activation", "silu")])})
    n_layers = keys.integer("num_hidden_layers", most=MAX_LAYERS)
    n_heads, dim = keys.integer("num_attention_heads"), keys.integer("hidden_size")
    head_dim = keys.integer("head_dim", None) or keys.divided("hidden_size", dim, "num_attention_heads", n_heads)
    positions = keys.integer("max_position_embeddings", 2048)
    window, full = _windows(keys, family, n_layers)
    rope, local_rope = _ropes(keys, family, positions)
    bias = keys.flag("attention_bias")
    said = {"qkv_bias": bias, "o_bias": bias, "mlp_bias": keys.flag("mlp_bias")}
    return ModelConfig(
        name=name,
        architecture=family.architecture,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=keys.integer("num_key_value_heads", n_heads, null=n_heads),
        head_dim=head_dim,
        dim=dim,
        ffn_dim=keys.integer("intermediate_size"),
        vocab_size=keys.integer("vocab_size"),
        context=rope.context,
        rope=rope.config(head_dim),
        rotated_dim=rope.rotated_dim(head_dim),
        temperature=rope.temperature,
        unrotated=_unrotated(keys, family, n_layers),
        sliding_window=window,
        full=full,
        local_rope=local_rope,
        **said | family.fixed,
        tied_head=keys.flag("tie_word_embeddings"),
        packing=packing_of(keys),
        bos_id=keys.integer("bos_token_id", 1, least=-1, null=None),
        eos_ids=_eos_ids(keys),
        **_scales(keys, family, dim),
    )


def read_config(folder: Path, name: str) -> ModelConfig:
    """The config of a model folder: config.json, end tokens of generation_config.json added. name: for people."""
    config = _read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.exists():  # Llama 3 lists its second end token only here
        ids = [config.get("eos_token_id", 2), _read_json(generation).get("eos_token_id")]
        ids = [i for some in ids for i in (some if isinstance(some, list) else [some]) if i is not None]
        config = config | {"eos_token_id": [i for n, i in enumerate(ids) if i not in ids[:n]]}
    return config_from_json(config, name)


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


def _family(keys: Keys) -> Family:
    supported = "minillm runs " + ", ".join(family.architecture for family in FAMILIES)
    named = keys.get("architectures")
    if named:
        found = [f for f in FAMILIES if isinstance(named, list) and named == [f.architecture]]
        if not found:
            raise keys.error("architectures", named, supported)
        return found[0]
    model_type = keys.get("model_type")
    found = [family for family in FAMILIES if model_type == family.model_type]
    if not found:
        raise keys.error("model_type", model_type, supported)
    return found[0]


def _eos_ids(keys: Keys) -> tuple[int, ...]:
    value = keys.values.get("eos_token_id", 2)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise keys.error("eos_token_id", value, "it must be a token id, or a list of them")
    return tuple(ids)


def _windows(keys: Keys, family: Family, n_layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The sliding window, and the layers that have none."""
    window, types = None, keys.get("layer_types")
    if family.window == "use_sliding_window":
        window = keys.integer("sliding_window", null=None) if keys.flag("use_sliding_window") else None
        slides = [i >= keys.integer("max_window_layers", least=0) for i in range(n_layers)]
    else:
        keys.refuse_unless({"use_sliding_window": (None, False)})
        window = keys.integer("sliding_window", None, null=None) if family.window else None
        every = keys.integer("sliding_window_pattern", family.full_every) if family.full_every else n_layers + 1
        slides = [(i + 1) % every != 0 for i in range(n_layers)]
    if types is not None:
        known = ("sliding_attention", "full_attention") if window else ("full_attention",)
        if not isinstance(types, list) or len(types) != n_layers or any(t not in known for t in types):
            raise keys.error("layer_types", types, f"minillm runs {n_layers} layers of {' or '.join(known)} here")
        slides = [t == "sliding_attention" for t in types]
    if not window or not any(slides):
        return None, ()
    return window, tuple(i for i, slides_here in enumerate(slides) if not slides_here)


def _unrotated(keys: Keys, family: Family, n_layers: int) -> tuple[int, ...]:
    """Layers without RoPE: 0 marks them in no_rope_layers."""
    marks = keys.get("no_rope_layers")
    if not family.unrotated_every:
        if marks and (not isinstance(marks, list) or not all(marks)):
            raise keys.error("no_rope_layers", marks, f"minillm runs {family.architecture} with RoPE in all layers")
        return ()
    if marks is None:
        every = keys.integer("no_rope_layer_interval", family.unrotated_every)
        return tuple(range(every - 1, n_layers, every))
    if not isinstance(marks, list) or len(marks) != n_layers or any(mark not in (0, 1) for mark in marks):
        raise keys.error("no_rope_layers", marks, f"it must be a list of {n_layers} ones and zeros")
    return tuple(i for i, mark in enumerate(marks) if not mark)


def _scales(keys: Keys, family: Family, dim: int) -> dict[str, float]:
    eps = keys.number("rms_norm_eps", 1e-6)
    if family.wide:
        attention = keys.number("query_pre_attn_scalar") ** -0.5
        return {"rms_eps": eps, "embedding_scale": dim**0.5, "attention_scale": attention}
    if not family.scaled:
        return {"rms_eps": eps}
    names = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
    return scales(eps, *(keys.number(name, 1.0) for name in names))


def _ropes(keys: Keys, family: Family, positions: int) -> tuple["_Rope", RopeConfig | None]:
    """The rotation of the layers, and the other one of those with a sliding window, where there is one."""
    where = "rope_scaling" if keys.get("rope_scaling") else "rope_parameters"
    values = keys.get(where) or {}
    if not isinstance(values, dict):
        raise keys.error(where, values, "it must be an object with rope_type")
    if not family.local_theta:
        return _Rope(keys, family, where, values, positions), None
    local = values.get("sliding_attention") or {"rope_theta": keys.number("rope_local_base_freq", family.local_theta)}
    values = values.get("full_attention", {} if "sliding_attention" in values else values)
    of_windows = _Rope(keys, family, where, local, positions)
    return _Rope(keys, family, where, values, positions), of_windows.config(head_dim=0)


class _Rope:
    """`rope_scaling` (transformers 4) or `rope_parameters` (transformers 5); the type under `rope_type` or `type`."""

    def __init__(self, keys: Keys, family: Family, where: str, values: dict, positions: int):
        self.keys, self.family, self.positions = keys, family, positions
        self.rope = rope = Keys(values, f"{keys.name}: {where}")
        if not family.partial:
            rope.refuse_unless(_WHOLE)
        kind = rope.get("rope_type") or rope.get("type") or ("default" if "factor" not in values else None)
        kinds = (*_ROPE_KINDS, "longrope") if family.partial else _ROPE_KINDS
        if kind not in kinds:
            raise rope.error("rope_type", kind, f"minillm runs {', '.join(kinds)}")
        if (rope.get("type") or kind) != kind:
            raise rope.error("type", rope.get("type"), f"it contradicts rope_type = {kind!r}")
        known = _ROPE_KEYS | _LONGROPE_KEYS if kind == "longrope" else _ROPE_KEYS
        known = known | {_TEMPERATURE, "max_position_embeddings"} if family.tempered else known
        if unknown := sorted(set(values) - known):
            raise rope.error(unknown[0], values[unknown[0]], f"minillm knows {', '.join(sorted(known))}")
        self.kind, self.theta = kind, rope.number("rope_theta", keys.number("rope_theta", 10000.0))

    @property
    def temperature(self) -> float:
        return self.rope.number(_TEMPERATURE, 0.0, positive=False)

    def rotated_dim(self, head_dim: int) -> int | None:
        share = self.rope.number("partial_rotary_factor", self.keys.number("partial_rotary_factor", 1.0))
        return None if share == 1 else int(head_dim * share)

    @property
    def context(self) -> int:
        """Dynamic scaling is told the length before scaling; it serves `factor` times as many tokens."""
        return int(self.positions * self.rope.number("factor")) if self.kind == "dynamic" else self.positions

    def config(self, head_dim: int) -> RopeConfig:
        theta, rope = self.theta, self.rope
        if self.kind == "default":
            return RopeConfig(theta=theta)
        if self.kind == "linear":
            return RopeConfig("linear", theta, rope.number("factor"))
        if self.kind == "dynamic":
            if head_dim <= 2:
                raise self.keys.error("head_dim", head_dim, "rope type dynamic needs more than 2")
            return RopeConfig("dynamic", theta, rope.number("factor"), self.positions)
        # as in transformers, the key beside the rope dict goes before the key inside it
        key = "original_max_position_embeddings"
        original = self.keys.integer(key, rope.integer(key, self.positions))
        return {"llama3": self._llama3, "yarn": self._yarn, "longrope": self._longrope}[self.kind](original)

    def _llama3(self, original: int) -> RopeConfig:
        low, high = self.rope.number("low_freq_factor"), self.rope.number("high_freq_factor")
        if high <= low:
            raise self.rope.error("high_freq_factor", high, f"it must be greater than low_freq_factor = {low}")
        return RopeConfig("llama3", self.theta, self.rope.number("factor"), original, low, high)

    def _yarn(self, original: int) -> RopeConfig:
        rope = self.rope
        return RopeConfig(
            kind="yarn",
            theta=self.theta,
            factor=rope.number("factor", self.positions / original),
            original_context=original,
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            attention_factor=rope.number("attention_factor", None),
            mscale=rope.number("mscale", None, positive=False),
            mscale_all_dim=rope.number("mscale_all_dim", None, positive=False),
            truncate=rope.flag("truncate", True),
        )

    def _longrope(self, original: int) -> RopeConfig:
        return RopeConfig(
            kind="longrope",
            theta=self.theta,
            factor=self.rope.number("factor", self.positions / original),
            original_context=original,
            attention_factor=self.rope.number("attention_factor", None),
            freq_factors=self.rope.numbers("short_factor"),
            long_factors=self.rope.numbers("long_factor"),
        )
