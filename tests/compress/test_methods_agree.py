"""Where two ways must come to the same: groups of identical query heads and none, a backend and another."""

from dataclasses import replace

import numpy as np
import pytest
from cuda_words import from_words, to_words
from layers import GROUPS, kept_positions, layer_of, options_of
from literal import NEEDS
from sequences import F32
from small_models import compressor_of, config_of, ids_of, model_of, new_cache

from minillm.compress.config import CacheConfig
from minillm.compress.merge import MERGES
from minillm.compress.methods import METHODS
from minillm.compress.plan import Queries
from minillm.compress.reading import extend, recompress
from minillm.compress.score import SCORES
from minillm.files.weights import Weight
from minillm.model import Model
from minillm.ops import cpu_lib
from minillm.ops.cpu_ops import CpuOps
from minillm.ops.cuda_ops import CudaOps
from minillm.ops.numpy_ops import NUMPY as numpy_ops
from minillm.output_projection import OutputProjection

# groups


def grouped(model, group):
    """A Model of `group` identical query heads for each of another's, a Model without groups, that share the work of
    the one among them: it says the same."""
    c, weights = model.config, {}
    for name, weight in weights_of(model).items():
        values = weight.data
        if "q_proj" in name:
            values = np.repeat(values.reshape(c.n_heads, c.head_dim, -1), group, axis=0).reshape(-1, c.dim)
        if "o_proj" in name:
            values = np.repeat(values.reshape(c.dim, c.n_heads, c.head_dim), group, axis=1).reshape(c.dim, -1) / group
        values = np.ascontiguousarray(values, F32)
        weights[name] = Weight.floats(values)
    return Model(replace(c, n_heads=group * c.n_heads), weights, numpy_ops)


def weights_of(model):
    """name -> Weight, as a Model takes them."""
    parts = {"wq": "q", "wk": "k", "wv": "v", "wo": "o"}
    named = {"model.embed_tokens.weight": model.embedding, "lm_head.weight": model.head}
    named["model.norm.weight"] = Weight.floats(model.norm)
    for i, block in enumerate(model.blocks):
        at = f"model.layers.{i}."
        named |= {f"{at}self_attn.{part}_proj.weight": getattr(block, field) for field, part in parts.items()}
        named |= {f"{at}mlp.{part}_proj.weight": getattr(block, f"w_{part}") for part in ("gate", "up", "down")}
        for name, norm in (("input", block.attention_norm), ("post_attention", block.mlp_norm)):
            named[f"{at}{name}_layernorm.weight"] = Weight.floats(norm)
    return named


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.score != "predicted"])
def test_identical_query_heads_are_the_model_without_groups(method):
    """Oracle 12, on a model: a prompt, a turn and a generation, the same entries in every head."""
    alone = model_of(config_of(n_heads=2, n_kv_heads=2))
    budget = None if method == "full" else 0.4
    runs = []
    for group in (1, *GROUPS[1:]):
        model = grouped(alone, group)
        cache, compressor = (
            new_cache(model),
            compressor_of(model, method, budget, recompress=20, **NEEDS.get(method, {})),
        )
        logits = [model.logits(extend(model, ids_of(n, n), cache, compressor)[-1:]) for n in (100, 20)]
        for token in ids_of(30, 1):
            logits.append(model.decode([token], [cache]))
            if compressor.due(cache):
                recompress(model, cache, compressor)
        runs.append((np.concatenate(logits), kept_positions(cache), cache.read(1)))
    atol = 1e-4 if compressor.config.options.get("match") else 2e-5  # least squares add up more
    for logits, kept, entries in runs[1:]:
        assert kept == runs[0][1]
        np.testing.assert_allclose(logits, runs[0][0], atol=2e-4)
        for name in ("k", "v", "log_size"):
            np.testing.assert_allclose(getattr(entries, name), getattr(runs[0][2], name), rtol=1e-4, atol=atol)


# backends


READING = [name for name, score in SCORES.items() if score.reads in ("new", "again")]
ERROR = {"portable": 3e-5, "avx2": 3e-5, "avx512": 5e-2, "amx": 5e-2, "cuda": 5e-2}  # of the largest score


def check_kept(name, layer, other, error):
    """The rows of a layer that two backends keep are the same, but for rows that score alike."""
    score = SCORES[name]
    n_kept = 0
    for allocate in ("even", "layer"):
        config = CacheConfig("h2o", score=name, allocate=allocate, sinks=0, window=0).resolve()
        made = [config.scores(one) for one in (layer, other)]
        scores = [one.ops.host(s) for one, s in zip((layer, other), made, strict=True)]
        assert abs(scores[0] - scores[1]).max() <= error * abs(scores[0]).max()
        for target in (len(layer.pos) // 5, len(layer.pos) // 2):
            target = max(target, np.count_nonzero(layer.protected))
            kept = [one.ops.host(config.plan(one, s, target).rows) for one, s in zip((layer, other), made, strict=True)]
            assert len(kept[0]) == len(kept[1])
            for rows in (layer.heads == head for head in range(len(layer.lengths))) if allocate == "even" else [...]:
                mine, others = (set(np.arange(len(layer.pos))[rows]) & set(k) for k in kept)
                n_kept += len(mine & others)
                if mine != others:
                    lost, won = sorted(mine - others), sorted(others - mine)
                    band = 2 * abs(scores[0] - scores[1])[[*lost, *won]].max() + 1e-7 * abs(scores[0]).max()
                    assert scores[0][lost].max() - scores[0][won].min() <= band
    assert score.reads and n_kept > 0


def reading_layer(rng, name, lengths, group, d):
    layer, _ = layer_of(rng, lengths, group=group, again=SCORES[name].reads == "again", d=d, n_queries=40)
    wo = rng.normal(size=(15, group * len(lengths) * d)).astype(F32)
    layer.output = OutputProjection(Weight.floats(wo), len(lengths), d, numpy_ops)
    return layer


@pytest.mark.parametrize("path", cpu_lib.available_paths())
@pytest.mark.parametrize("name", READING)
def test_compiled_kernels_keep_the_rows_that_numpy_keeps(name, path):
    """Oracle 10, between processors: outside of a band of ties."""
    rng, cpu_ops = np.random.default_rng(0), CpuOps(path)
    for group in GROUPS:
        for lengths in ([60, 60], [1, 45, 45], [90]):
            layer = reading_layer(rng, name, lengths, group, 6)
            check_kept(name, layer, replace(layer, ops=cpu_ops, computed={}), ERROR[path])


@pytest.mark.parametrize("path", cpu_lib.available_paths())
@pytest.mark.parametrize("name", [name for name, merge in MERGES.items() if not (merge.reads or merge.joined)])
def test_compiled_kernels_merge_as_numpy_does(name, path):
    rng, cpu_ops, part = np.random.default_rng(1), CpuOps(path), MERGES[name]
    for case in range(8):
        layer, _ = layer_of(rng, [40, 1, 33], merged=case % 2 == 0)
        stays = layer.protected | (rng.random(len(layer.pos)) < rng.random())
        into, scores = np.where(stays, np.arange(len(stays)), -1), rng.random(len(stays)).astype(F32)
        both = [part.run(one, scores, into, **options_of(part)) for one in (layer, replace(layer, ops=cpu_ops))]
        np.testing.assert_array_equal(both[0].dest, both[1].dest)
        both = [plan.apply(one) for plan, one in zip(both, (layer, replace(layer, ops=cpu_ops)), strict=True)]
        for field in ("k", "v", "log_size", "pos"):
            np.testing.assert_allclose(getattr(both[0], field), getattr(both[1], field), atol=1e-5)


@pytest.mark.parametrize("name", READING)
def test_a_gpu_keeps_the_rows_that_numpy_keeps(device, name):
    """Oracle 10: the same 16-bit rows and queries on both, outside of a band of ties."""
    ops, rng = CudaOps(device), np.random.default_rng(0)
    ops.real16 = "bf16"
    layer = reading_layer(rng, name, [70, 1, 65], 3, 64)
    rounded = (from_words(to_words(rows, "bf16"), "bf16") for rows in (layer.k_rows, layer.v_rows))
    layer.k_rows, layer.v_rows = rounded
    layer.queries = [Queries(from_words(to_words(q.q, "bf16"), "bf16"), q.pos) for q in layer.queries]
    k, v = (device.upload(to_words(rows, "bf16")) for rows in (layer.k, layer.v))
    labels = {label: device.upload(getattr(layer, label)) for label in ("size", "pos", "protected")}
    labels |= {"output": OutputProjection(ops.prepare(layer.output.wo), len(layer.lengths), 64, ops)}
    labels |= {"history": None if layer.history is None else device.upload(layer.history)}
    check_kept(
        name, layer, replace(layer, ops=ops, k_rows=k, v_rows=v, computed={}, shared={}, **labels), ERROR["cuda"]
    )
