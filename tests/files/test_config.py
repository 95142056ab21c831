"""ModelConfig from the configs of well-known models, in every spelling, and what it refuses."""

import dataclasses
import json

import gguf
import numpy as np
import pytest

from minillm.errors import MinillmError
from minillm.files.config import ModelConfig, RopeConfig
from minillm.files.config_gguf import config_from_gguf
from minillm.files.config_json import config_from_json, read_config
from minillm.files.gguf_file import read_gguf
from minillm.files.stored_model import gguf_config

LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MISTRAL_7B_V01 = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
GGUF_SMOLLM2 = {
    "general.architecture": "llama",
    "general.type": "model",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.vocab_size": 49152,
    "llama.rope.dimension_count": 64,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def test_llama_3_2():
    assert config_from_json(LLAMA_3_2_1B, "llama") == ModelConfig(
        name="llama",
        architecture="LlamaForCausalLM",
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        head_dim=64,
        dim=2048,
        ffn_dim=8192,
        vocab_size=128256,
        context=131072,
        rms_eps=1e-5,
        rope=RopeConfig("llama3", 500000.0, 32.0, 8192, 1.0, 4.0),
        tied_head=True,
        bos_id=128000,
        eos_ids=(128001, 128008, 128009),
    )


def test_llama_2_and_old_files_without_kv_heads():
    config = config_from_json(LLAMA_2_7B)
    assert (config.n_kv_heads, config.head_dim, config.rope, config.tied_head) == (32, 128, RopeConfig(), False)
    old = {k: v for k, v in LLAMA_2_7B.items() if k not in ("num_key_value_heads", "rms_norm_eps")}
    assert config_from_json(old).n_kv_heads == 32
    assert config_from_json(old).rms_eps == 1e-6
    assert config_from_json(LLAMA_2_7B | {"num_key_value_heads": 1}).n_kv_heads == 1


def test_mistral_window_and_head_dim():
    assert config_from_json(MISTRAL_7B_V01).sliding_window == 4096
    without = {k: v for k, v in MISTRAL_7B_V01.items() if k != "sliding_window"}
    assert config_from_json(without).sliding_window == 4096  # the default of transformers
    assert config_from_json(MISTRAL_7B_V01 | {"sliding_window": None}).sliding_window is None
    assert config_from_json(LLAMA_2_7B | {"sliding_window": 4096}).sliding_window is None  # Llama ignores it
    nemo = MISTRAL_7B_V01 | {"hidden_size": 5120, "head_dim": 128, "sliding_window": None}
    assert config_from_json(nemo).head_dim == 128
    assert config_from_json(nemo | {"head_dim": None}).head_dim == 160


def test_uniform_layer_types_pass():
    config_from_json(LLAMA_2_7B | {"layer_types": ["full_attention"] * 32})
    config_from_json(MISTRAL_7B_V01 | {"layer_types": ["sliding_attention"] * 32})


def test_model_type_stands_in_for_architectures():
    config = {k: v for k, v in MISTRAL_7B_V01.items() if k != "architectures"}
    assert config_from_json(config).architecture == "MistralForCausalLM"


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_rope_spellings(where, key):
    base = LLAMA_2_7B | {"rope_theta": 7.0}
    linear = config_from_json(base | {where: {key: "linear", "factor": 2}}).rope
    assert linear == RopeConfig("linear", 7.0, 2.0)
    inside = config_from_json(base | {where: {key: "default", "rope_theta": 9.0}}).rope
    assert inside == RopeConfig("default", 9.0)


def test_rope_kinds():
    def rope(**scaling):
        return config_from_json(LLAMA_2_7B | {"rope_scaling": scaling})

    dynamic = rope(rope_type="dynamic", factor=4.0)
    assert dynamic.rope == RopeConfig("dynamic", factor=4.0, original_context=4096)
    assert dynamic.context == 16384
    yarn = rope(
        type="yarn", factor=16.0, original_max_position_embeddings=2048, beta_fast=20, mscale=0.7, truncate=False
    )
    assert yarn.rope == RopeConfig(
        "yarn", factor=16.0, original_context=2048, beta_fast=20.0, mscale=0.7, truncate=False
    )
    assert yarn.context == 4096
    assert rope(rope_type="yarn", original_max_position_embeddings=1024).rope.factor == 4.0  # 4096 / 1024
    assert rope(rope_type="default").rope == RopeConfig()
    assert config_from_json(LLAMA_2_7B | {"rope_scaling": {}}).rope == RopeConfig()


def test_token_ids():
    config = {k: v for k, v in LLAMA_2_7B.items() if k not in ("bos_token_id", "eos_token_id")}
    assert config_from_json(config).eos_ids == (2,)  # the default of transformers
    config = config_from_json(config | {"bos_token_id": None, "eos_token_id": None})
    assert (config.bos_id, config.eos_ids) == (None, ())


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"architectures = \['GPT2LMHeadModel'\].*LlamaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": None, "model_type": "mixtral"}, "model_type = 'mixtral'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'.*silu"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1]}}, "rope_type = 'longrope'.*yarn"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type = 'su'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_type = None"),
        ({"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}}, "type = 'linear'.*contradicts"),
        ({"rope_scaling": YARN | {"llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta = 0.1"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor = 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor = '2'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor = nan"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "high_freq_factor = 4",
        ),
        ({"rope_scaling": YARN | {"beta_fast": -1}}, "beta_fast = -1"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "original_max_position_embeddings = 0"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_theta": 1.0}, "rope_theta = 1.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"quantization_config \(gptq\): group_size is missing",
        ),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method = 'bitsandbytes'"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"layer_types": ["sliding_attention", "full_attention"] * 16}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types"),
        ({"no_rope_layers": [1, 1, 1, 0] * 8}, "no_rope_layers"),
        ({"num_key_value_heads": 5}, "32 query heads cannot share 5"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"num_attention_heads": 33}, "hidden_size = 4096.*num_attention_heads = 33"),
        ({"num_hidden_layers": 2_000_000_000}, "num_hidden_layers = 2000000000"),
        ({"hidden_size": "4096"}, "hidden_size = '4096'"),
        ({"hidden_size": True}, "hidden_size = True"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"head_dim": 63}, "head_dim = 63"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps = -1e-05"),
        ({"attention_bias": "no"}, "attention_bias = 'no'"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
    ],
)
def test_refused_by_key_and_value(change, said):
    with pytest.raises(MinillmError, match=said) as caught:
        config_from_json(LLAMA_2_7B | change, "my-model")
    assert str(caught.value).startswith("my-model: ")
    assert "\n" not in str(caught.value)


ODD = [None, True, False, 0, -1, 1.5, 1e9, float("inf"), 10**400, "", "x", [], [None], ["x"], [[1]], [{}], {}, {"x": 1}]


def test_odd_values_are_read_or_refused():
    """No value of the wrong kind comes out as anything but a MinillmError."""
    scalings = [LLAMA_3_2_1B["rope_scaling"], YARN | {"original_max_position_embeddings": 64, "mscale": 1.0}]
    bases = [
        MISTRAL_7B_V01,
        LLAMA_2_7B | {"architectures": None},
        *(LLAMA_2_7B | {"rope_scaling": scaling} for scaling in scalings),
    ]
    changed = [base | {key: odd} for base in bases for key in [*base, "layer_types", "no_rope_layers"] for odd in ODD]
    changed += [LLAMA_2_7B | {"rope_scaling": s | {key: odd}} for s in scalings for key in s for odd in ODD]
    refused = 0
    for config in changed:
        try:
            config_from_json(config)
        except MinillmError:
            refused += 1
    for key in [*GGUF_SMOLLM2, "llama.rope.scaling.factor", "llama.rope.scaling.type", "tokenizer.ggml.tokens"]:
        for odd in ODD:
            try:
                config_from_gguf(GGUF_SMOLLM2 | {key: odd})
            except MinillmError:
                refused += 1
    assert refused > 500


def test_read_config_of_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    assert read_config(tmp_path, "llama") == config_from_json(LLAMA_2_7B, "llama")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert read_config(tmp_path, "llama").eos_ids == (2, 7)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B | {"eos_token_id": None}))
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_config(tmp_path, "llama").eos_ids == ()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [[2]]}))
    with pytest.raises(MinillmError, match="eos_token_id"):
        read_config(tmp_path, "llama")


@pytest.mark.parametrize("text", ["{", "[1]", '"llama"', b"\xff\xfe", "[" * 100_000], ids=range(5))
def test_damaged_config_json(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(MinillmError, match="config.json.*download it again"):
        read_config(tmp_path, "llama")


def test_missing_config_json(tmp_path):
    with pytest.raises(MinillmError, match="config.json is missing"):
        read_config(tmp_path, "llama")


def test_gguf():
    config = config_from_gguf(GGUF_SMOLLM2, "smol")
    assert dataclasses.replace(config, rope=RopeConfig()) == ModelConfig(
        name="smol",
        architecture="LlamaForCausalLM",
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        dim=576,
        ffn_dim=1536,
        vocab_size=49152,
        context=8192,
        rms_eps=9.999999747378752e-06,
        rope=RopeConfig(),
        tied_head=True,
        bos_id=1,
        eos_ids=(2,),
    )
    assert (config.rope.kind, config.rope.theta, config.rope.attention_factor) == ("default", 100000.0, 1.0)


def test_gguf_what_the_tensors_tell():
    tensors = ["output.weight", "blk.0.attn_q.bias", "blk.0.attn_output.bias", "blk.0.ffn_gate.bias"]
    config = config_from_gguf(GGUF_SMOLLM2, "", tensors, factors={"rope_freqs.weight": (2.0,) * 32})
    assert not config.tied_head and config.qkv_bias and config.o_bias and config.mlp_bias
    assert config.rope.freq_factors == (2.0,) * 32
    for wrong in ((2.0,) * 31, (0.0,) * 32):
        with pytest.raises(MinillmError, match="must be 32 positive numbers"):
            config_from_gguf(GGUF_SMOLLM2, "", tensors, factors={"rope_freqs.weight": wrong})


def test_gguf_keys():
    change = {
        "llama.attention.head_count_kv": [3] * 30,  # a size per layer, all equal
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.attention.sliding_window": 4096,
        "tokenizer.ggml.tokens": ["a"] * 10,
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.eom_token_id": 2,
        "llama.expert_count": 0,
    }
    config = config_from_gguf(GGUF_SMOLLM2 | change)
    assert (config.n_kv_heads, config.head_dim, config.sliding_window) == (3, 32, 4096)
    assert (config.vocab_size, config.eos_ids) == (10, (2, 5))


def test_gguf_rope():
    def rope(**keys):
        scaling = {f"llama.rope.{k.replace('__', '.')}": v for k, v in keys.items()}
        return config_from_gguf(GGUF_SMOLLM2 | scaling).rope

    assert rope(scaling__type="none", scaling__factor=4.0).kind == "default"
    for keys in (
        {"scaling__type": "linear", "scaling__factor": 4.0},
        {"scaling__factor": 4.0},  # linear is what llama.cpp takes a factor without a type for
        {"scale_linear": 4.0},  # the key of old files
    ):
        assert (rope(**keys).kind, rope(**keys).factor) == ("linear", 4.0)
    yarn = {"scaling__type": "yarn", "scaling__factor": 4.0, "scaling__original_context_length": 2048}
    assert (rope(**yarn).kind, rope(**yarn).original_context) == ("yarn", 2048)
    assert rope(**yarn).attention_factor == pytest.approx(0.1 * np.log(4.0) + 1)
    assert rope(**yarn, scaling__attn_factor=0.5).attention_factor == pytest.approx(0.5 * (0.1 * np.log(4.0) + 1))
    assert rope(**yarn, scaling__yarn_beta_fast=16.0).beta_fast == 16.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"general.architecture": "mamba"}, "general.architecture = 'mamba'.*llama"),
        ({"general.type": "adapter"}, "general.type = 'adapter'"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type = 'longrope'.*rope_factors"),
        ({"llama.rope.scaling.factor": -2.0}, "llama.rope.scaling.factor = -2.0"),
        ({"llama.rope.dimension_count": 32}, "llama.rope.dimension_count = 32"),
        ({"llama.attention.value_length": 32}, "llama.attention.value_length = 32"),
        ({"llama.attention.head_count_kv": [3, 9] * 15}, r"llama.attention.head_count_kv = \[3, 9"),
        ({"llama.attention.causal": False}, "llama.attention.causal = False"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale = 0.5"),
        ({"llama.context_length": None}, "llama.context_length is missing"),
        ({"llama.vocab_size": None}, "llama.vocab_size is missing"),
        ({"llama.embedding_length": 575}, "llama.embedding_length = 575"),
        ({"llama.block_count": 2**32 - 1}, "llama.block_count = 4294967295"),
        ({"tokenizer.ggml.eos_token_id": "2"}, "tokenizer.ggml.eos_token_id = '2'"),
    ],
)
def test_gguf_refused_by_key_and_value(change, said):
    with pytest.raises(MinillmError, match=said):
        config_from_gguf(GGUF_SMOLLM2 | change, "my-model")


def test_read_config_of_a_gguf_file(tmp_path):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(10)
    writer.add_tensor("output.weight", np.zeros((10, 16), np.float32))
    writer.add_tensor("rope_freqs.weight", np.array([1, 2, 4, 8], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = gguf_config(read_gguf(path), "tiny.gguf")
    assert (config.name, config.n_heads, config.n_kv_heads, config.head_dim) == ("tiny.gguf", 2, 2, 8)
    assert not config.tied_head
    assert config.rope.freq_factors == (1.0, 2.0, 4.0, 8.0)
