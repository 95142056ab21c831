"""Tiny models of every family as llama.cpp's converter writes them: names and keys by the gguf package."""

import math

import gguf
import numpy as np
from oracle import read_folder
from paths import DATA

NAMES = {"gemma3_text": "gemma3", "ministral3": "mistral3"}  # of families that are called something else there
PAIRS = ("llama", "smollm3", "granite", "mistral3")  # whose Q and K llama.cpp stores with neighbours as pairs


def read(name):
    """config without what a GGUF file of the family cannot say, weights float32 by name, ids."""
    folder = DATA / "tiny" / name
    config, weights = read_folder(folder)
    if config.get("use_sliding_window"):
        config |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 0}
    if "query_pre_attn_scalar" in config:
        config["query_pre_attn_scalar"] = config["head_dim"]
    with np.load(folder / "golden.npz") as golden:
        return config, weights, golden["ids"]


def write(path, config, weights, describe=lambda writer: None):
    """The model of a folder as a .gguf file of F32 at `path`. describe: adds metadata, a vocabulary say."""
    family, n_layers = NAMES.get(config["model_type"], config["model_type"]), config["num_hidden_layers"]
    writer = gguf.GGUFWriter(path, family)
    _keys(writer, config)
    describe(writer)
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, n_layers)
    d = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for name, array in weights.items():
        if family == "gemma3" and name.endswith("norm.weight"):
            array = array + 1
        if family in PAIRS and (".q_proj." in name or ".k_proj." in name):
            halves = array.reshape(-1, 2, d // 2, *array.shape[1:])
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _keys(writer, config):
    n_heads = config["num_attention_heads"]
    d = config.get("head_dim") or config["hidden_size"] // n_heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(d)
    writer.add_value_length(d)
    writer.add_rope_dimension_count(int(d * config.get("partial_rotary_factor", 1)))
    scaling = config.get("rope_parameters", {})
    writer.add_rope_freq_base(config.get("rope_theta") or scaling["rope_theta"])
    if scaling:  # yarn
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])
        writer.add_rope_scaling_yarn_log_mul(scaling["mscale_all_dim"])
        writer.add_attn_temperature_scale(scaling["llama_4_scaling_beta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if "rope_local_base_freq" in config:
        writer.add_float32("gemma3.rope.freq_base_swa", config["rope_local_base_freq"])
    if "residual_multiplier" in config:
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if "rope_scaling" in config:  # longrope
        original = config["original_max_position_embeddings"]
        factor = config["max_position_embeddings"] / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(factor) / math.log(original)))
        for kind in ("short", "long"):
            factors = np.array(config["rope_scaling"][f"{kind}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{kind}.weight", factors)
