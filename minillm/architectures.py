"""Families of models. A block's tensors are described once, in BLOCK; a family is a row of FAMILIES.

From BLOCK come the names and shapes of tensors in both kinds of files (files.stored_model), the weights of a layer
(model.Block), the struct that C reads (ops.cpu_lib.Block) and what a GPU holds (ops.cuda_runner.Layer).
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """One tensor of a block, or of the whole model. Sizes are names of ModelConfig.sizes."""

    field: str  # its name in a Block
    json: str  # its name in safetensors, after "model.layers.N."
    gguf: str  # its name in GGUF, after "blk.N."
    rows: str
    columns: str | None = None  # None: a vector
    needs: str = ""  # the field of ModelConfig that is true where the tensor is there; "": it always is
    rotated: bool = False  # whether RoPE turns its rows

    @property
    def sizes(self) -> tuple[str, ...]:
        return (self.rows,) if self.columns is None else (self.rows, self.columns)


def _norm(name, json, gguf, **more):
    return Part(name, f"{json}.weight", f"{gguf}.weight", more.pop("rows", "dim"), **more)


def _linear(name, json, gguf, rows, columns, bias, **more):
    """A matrix and its bias: wq and bq."""
    weight = Part(f"w{name}", f"{json}.weight", f"{gguf}.weight", rows, columns, **more)
    return weight, Part(f"b{name}", f"{json}.bias", f"{gguf}.bias", rows, needs=bias, **more)


_LINEAR = (
    _linear("q", "self_attn.q_proj", "attn_q", "q", "dim", "qkv_bias", rotated=True),
    _linear("k", "self_attn.k_proj", "attn_k", "kv", "dim", "qkv_bias", rotated=True),
    _linear("v", "self_attn.v_proj", "attn_v", "kv", "dim", "qkv_bias"),
    _linear("o", "self_attn.o_proj", "attn_output", "dim", "q", "o_bias"),
    _linear("_gate", "mlp.gate_proj", "ffn_gate", "ffn", "dim", "mlp_bias"),
    _linear("_up", "mlp.up_proj", "ffn_up", "ffn", "dim", "mlp_bias"),
    _linear("_down", "mlp.down_proj", "ffn_down", "dim", "ffn", "mlp_bias"),
)

BLOCK = (
    _norm("attention_norm", "input_layernorm", "attn_norm"),
    _norm("q_norm", "self_attn.q_norm", "attn_q_norm", rows="head", needs="qk_norm", rotated=True),
    _norm("k_norm", "self_attn.k_norm", "attn_k_norm", rows="head", needs="qk_norm", rotated=True),
    _norm("attention_output_norm", "attention_output_norm", "post_attention_norm", needs="output_norms"),
    _norm("mlp_norm", "post_attention_layernorm", "ffn_norm"),
    _norm("mlp_output_norm", "mlp_output_norm", "post_ffw_norm", needs="output_norms"),
    *(weight for weight, _ in _LINEAR),
    *(bias for _, bias in _LINEAR),
)

BEFORE = (Part("embedding", "model.embed_tokens.weight", "token_embd.weight", "vocab", "dim"),)  # the blocks
AFTER = (
    Part("norm", "model.norm.weight", "output_norm.weight", "dim"),
    Part("head", "lm_head.weight", "output.weight", "vocab", "dim", needs="own_head"),
)


@dataclass(frozen=True)
class Family:
    """What tells a family from a Llama. `fixed`: fields of ModelConfig that no key of a config says."""

    architecture: str  # in "architectures" of config.json
    model_type: str  # there, where that is absent
    gguf: str  # general.architecture of a GGUF file
    fixed: dict = field(default_factory=dict)
    defaults: dict = field(default_factory=dict)  # of config.json's keys, where transformers has other ones here
    pairs: bool = False  # llama.cpp stores rows of Q and K so that neighbours are turned together, not halves
    window: str = ""  # the key of config.json that says whether there is a sliding window; "": there is none
    unrotated_every: int = 0  # this many layers one is not rotated, where no key says which
    full_every: int = 0  # this many layers one has no sliding window, where no key says which
    local_theta: float = 0.0  # of RoPE in the others, where no key says another
    scaled: bool = False  # embedding, residuals, attention and logits have factors
    wide: bool = False  # embeddings are multiplied by the square root of their width
    renamed: dict = field(default_factory=dict)  # names in safetensors that mean another Part in BLOCK
    norm_offset: int = 0  # what safetensors leave out of the weights of norms
    tempered: bool = False  # queries have a temperature
    partial: bool = False  # a part of a head may be rotated alone
    fused: dict = field(default_factory=dict)  # matrix of a file, in its names -> those of BLOCK above one another


_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
_QWEN = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
_FUSED = {
    "self_attn.qkv_proj.weight": ("wq", "wk", "wv"),
    "mlp.gate_up_proj.weight": ("w_gate", "w_up"),
    "attn_qkv.weight": ("wq", "wk", "wv"),
    "ffn_up.weight": ("w_gate", "w_up"),
}
_GEMMA = {"head_dim": 256, "max_position_embeddings": 131072, "sliding_window": 4096, "rope_theta": 1e6}
_GEMMA |= {"query_pre_attn_scalar": 256, "tie_word_embeddings": True, "vocab_size": 262208}
_GEMMA |= {"num_attention_heads": 8, "num_key_value_heads": 4, "bos_token_id": 2, "eos_token_id": 1}
_GEMMA_NORMS = {
    "post_attention_layernorm.weight": "attention_output_norm.weight",
    "pre_feedforward_layernorm.weight": "post_attention_layernorm.weight",
    "post_feedforward_layernorm.weight": "mlp_output_norm.weight",
}

FAMILIES = (
    Family("LlamaForCausalLM", "llama", "llama", pairs=True),
    Family("MistralForCausalLM", "mistral", "llama", defaults=_MISTRAL, pairs=True, window="sliding_window"),
    Family(
        *("Ministral3ForCausalLM", "ministral3", "mistral3"),
        defaults={"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144, "rms_norm_eps": 1e-5},
        pairs=True,
        window="sliding_window",
        tempered=True,
    ),
    Family(
        *("Qwen2ForCausalLM", "qwen2", "qwen2"),
        fixed={"qkv_bias": True},
        defaults=_QWEN,
        window="use_sliding_window",
    ),
    Family(
        *("Qwen3ForCausalLM", "qwen3", "qwen3"),
        fixed={"qk_norm": True},
        defaults=_QWEN | {"head_dim": 128},
        window="use_sliding_window",
    ),
    Family(
        *("SmolLM3ForCausalLM", "smollm3", "smollm3"),
        defaults={"num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2000000.0},
        pairs=True,
        unrotated_every=4,
    ),
    Family("GraniteForCausalLM", "granite", "granite", pairs=True, scaled=True),
    Family(
        *("Phi3ForCausalLM", "phi3", "phi3"),
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        window="sliding_window",
        partial=True,
        fused=_FUSED,
    ),
    Family(
        *("Gemma3ForCausalLM", "gemma3_text", "gemma3"),
        fixed={"qk_norm": True, "output_norms": True, "activation": "gelu_tanh"},
        defaults=_GEMMA,
        window="sliding_window",
        full_every=6,
        local_theta=10000.0,
        wide=True,
        renamed=_GEMMA_NORMS,
        norm_offset=1,
    ),
)
BY_ARCHITECTURE = {family.architecture: family for family in FAMILIES}
