"""Profiles: predicted scores against literal sums, the fit against a direct solution, block by block against at once,
threshold against budget, files and where they are found, and the default that hangs on them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_chat
from oracle import rms_norm
from paths import ROOT
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small_models import compressor_of, config_of, ids_of, model_of, new_cache

from minillm import LLM, CacheConfig, SamplingParams
from minillm.cache import state as cache_state
from minillm.compress import compressor as compressor_module
from minillm.compress.reading import extend, recompress
from minillm.errors import MinillmError, UsageError
from minillm.files import own_file
from minillm.files.profile_file import CURVE, Profile, fingerprint, load, places
from minillm.ops.numpy_ops import NUMPY as numpy_ops
from minillm.profile import fit, make, worth
from minillm.programs import cli, run

F32 = np.float32


def profile_of(llm, seed=0, **about):
    """Of random projections."""
    rng, c = np.random.default_rng(seed), llm.config
    weight = rng.normal(0, 0.2, (c.n_layers, c.n_kv_heads, c.dim)).astype(np.float16).astype(F32)
    curve = {"threshold": [0.01, 0.1, 0.3, 0.8], "kept": [0.9, 0.6, 0.3, 0.1], "quality": [1.0, 0.99, 0.9, 0.95]}
    repeated = {"texts": 8, "tokens": 2048, "foretold_full": 1000}
    about = {"model": c.name, "fingerprint": fingerprint(llm.config, llm.model.norms), "repeated": repeated} | about
    bias, worth = (rng.normal(mean, spread, weight.shape[:2]).astype(F32) for mean, spread in ((-2, 1), (0, 0.5)))
    return Profile(weight, bias, worth, {name: np.array(values, F32) for name, values in curve.items()}, about)


def blind_model(n_layers=3):
    """A model whose hidden states do not depend on what is cached: W_O is zero."""
    model = model_of(config_of(n_layers=n_layers))
    for block in model.blocks:
        block.wo.data[:] = 0
    return model


def stored(cache):
    return [[cache.layer(layer).read(head) for head in range(2)] for layer in range(len(cache.lengths))]


# prediction


def test_scores_are_the_projection_of_normalised_hidden_states():
    """Of a prompt and of generated tokens, in a model whose hidden states can be written down: W_O and W_down are
    zero, so that they are the embeddings in every layer."""
    model = blind_model()
    for block in model.blocks:
        block.w_down.data[:] = 0
    cache, compressor, ids = new_cache(model), compressor_of(model, "foresight", 1.0), ids_of(100)
    extend(model, ids, cache, compressor)  # up to 128 tokens are left whole: what is predicted is noted all the same
    for token in (7, 8):
        model.decode([token], [cache])
    x = model.embedding.data.astype(np.float64)[[*ids, 7, 8]]
    for layer, block in enumerate(model.blocks):
        expected = (
            block.w_score.data.astype(np.float64) @ rms_norm(x, block.attention_norm, 1e-5).T + block.b_score[:, None]
        )
        np.testing.assert_allclose(np.concatenate(cache.left.predicted[layer], axis=1), expected, atol=1e-4)


def test_the_rows_of_a_compression_are_those_that_were_predicted_best():
    """Prompt, generation and a second prompt: every kept entry of the free ones scores no less than any dropped one."""
    model = blind_model(2)
    cache, compressor = new_cache(model), compressor_of(model, "foresight", 60, merge="drop", recompress=20, window=8)
    extend(model, ids_of(300), cache, compressor)
    for token in ids_of(70, 1):
        model.decode([token], [cache])
        if compressor.due(cache):
            recompress(model, cache, compressor)
    extend(model, ids_of(200, 2), cache, compressor)
    assert cache.entries == 60 * cache.lengths.size
    x = model.ops.embed(model.embedding, cache.token_ids)
    kept, dropped = [], []
    for layer, block in enumerate(model.blocks):
        scores = model._scores(block, model.ops.rms_norm(x, block.attention_norm, 1e-5))
        x += model._mlp(block, x)
        for head in range(2):
            pos = cache.layer(layer).read(head)[3]
            stays = np.isin(np.arange(cache.seen), pos)
            kept.append(scores[head][stays][(pos >= 4) & (pos < cache.seen - 8)])
            dropped.append(scores[head][~stays])
    assert np.concatenate(kept).min() >= np.concatenate(dropped).max()


@pytest.mark.parametrize("budget, threshold", [(0.2, None), (None, 0.3)])
@pytest.mark.parametrize("merge", ["fold", "drop"])
@pytest.mark.parametrize("blocks", [64, 150, 333])
def test_block_by_block_is_the_same_as_at_once(budget, threshold, merge, blocks, monkeypatch):
    """With hidden states that do not depend on the cache: what is dropped after a block would be dropped at the end.
    (What is folded may have been folded into a row that goes later, so of that keys and positions are the same.)
    The same token has the same score wherever it stands but for rounding: of these ids none is cut among its like."""
    model, ids, caches = blind_model(), ids_of(700, seed=1), []
    for size in (10_000, blocks):
        monkeypatch.setattr(compressor_module, "BLOCK_TOKENS", size)
        caches.append(new_cache(model))
        options = {"merge": merge, "threshold": threshold, "window": 16}
        extend(model, ids, caches[-1], compressor_of(model, "foresight", budget, **options))
    assert caches[0].lengths.sum() == caches[1].lengths.sum() < 700 * caches[0].lengths.size
    for a, b in zip(*map(stored, caches), strict=True):
        for head, other in zip(a, b, strict=True):
            for part, (array, same) in enumerate(zip(head, other, strict=True)):
                if merge == "drop" or part in (0, 3):  # k, v, log s, pos
                    np.testing.assert_allclose(array, same, atol=1e-5)


def test_a_prompt_in_blocks_never_holds_more_than_its_budget_and_a_block(monkeypatch):
    monkeypatch.setattr(compressor_module, "BLOCK_TOKENS", 100)
    model, most = blind_model(), []
    cache = new_cache(model)
    compressor = compressor_of(model, "foresight", 0.1)
    extend(model, ids_of(2000), cache, compressor, lambda done, layers: most.append(cache.entries))
    n, pool = cache.lengths.size, cache.pool
    assert len(most) == 20 * 3 and max(most) <= n * 200 + 2 * 100 * 2  # the budget, and a layer's block or two
    assert cache.entries == n * 200
    a_layer = 2 * (200 + 100)  # what it keeps, and a block
    pages = (n * 200 + a_layer) / pool.page_size + n  # a page of each head is not full
    assert pool.bytes_held <= (pages + 2 * pool.slab_pages) * pool.page_bytes  # slabs come and go whole


@pytest.mark.parametrize("merge", ["fold", "drop"])
def test_a_threshold_at_the_cut_of_a_budget_keeps_the_same(merge):
    model, ids = model_of(config_of(n_layers=3)), ids_of(500)
    cache = new_cache(model)
    extend(model, ids, cache, compressor_of(model, "foresight", 0.3, merge=merge))
    pos = [[entries[3] for entries in layer] for layer in stored(cache)]
    free = [
        scores[(p >= 4) & (p < 500 - 32)]
        for scores, p in zip(cache.left.scores, (np.concatenate(heads) for heads in pos), strict=True)
    ]
    other = new_cache(model)
    threshold = float(np.concatenate(free).min())
    extend(model, ids, other, compressor_of(model, "foresight", threshold=threshold, merge=merge))
    assert [[entries[3].tolist() for entries in layer] for layer in stored(other)] == [
        [p.tolist() for p in h] for h in pos
    ]


def test_what_was_read_without_predictions_cannot_go_on_with_them():
    model = model_of(config_of())
    cache = new_cache(model)
    extend(model, ids_of(200), cache)
    with pytest.raises(MinillmError, match="start a new session"):
        extend(model, ids_of(200), cache, compressor_of(model, "foresight", 0.5))


# fit


def test_equations_added_up_are_a_direct_solution():
    rng = np.random.default_rng(0)
    h, y = rng.normal(size=(500, 12)).astype(F32), rng.normal(size=(500, 3)).astype(F32)
    equations = fit.Equations(12, 3)
    for part in np.split(np.arange(500), [7, 8, 200]):
        equations.add(h[part], y[part])
    w, b = equations.solve(ridge=5.0)
    x = np.block([[h, np.ones((500, 1))], [np.sqrt(5.0) * np.eye(12), np.zeros((12, 1))]])
    expected = np.linalg.lstsq(x, np.vstack([y, np.zeros((12, 3))]), rcond=None)[0]
    np.testing.assert_allclose(np.column_stack([w, b]), expected.T, atol=1e-5)


def test_a_second_reading_gives_what_the_text_is_asked_for():
    """Literal loops: the largest probability that any token of the repeated text gives to each token of the first
    reading, the mean of a group of query heads, in the first layer, where hidden states are the embeddings."""
    llm = tiny(model_of(config_of(n_layers=1)))
    ids, d = ids_of(40), 8
    ((h, y),) = fit.second_reading(llm, ids)
    model, block = llm.model, llm.model.blocks[0]
    x = model.embedding.data.astype(np.float64)[ids]
    normed = rms_norm(x, block.attention_norm, 1e-5)
    np.testing.assert_allclose(h, normed, atol=1e-5)
    cos, sin = model.ropes[0].tables(np.arange(80), 80)
    turned = [
        numpy_ops.rope(
            (np.vstack([normed, normed]) @ w.data.T.astype(np.float64))
            .reshape(80, -1, d)
            .transpose(1, 0, 2)
            .astype(F32),
            cos,
            sin,
        )
        for w in (block.wq, block.wk)
    ]
    q, k = (part.astype(np.float64) for part in turned)
    found = np.zeros((6, 40))
    for head in range(6):
        for i in range(40, 80):
            logits = np.array([q[head, i] @ k[head // 3, j] for j in range(i + 1)]) * d**-0.5
            p = np.exp(logits - logits.max())
            found[head] = np.maximum(found[head], p[:40] / p.sum())
    expected = [(found[3 * g] + found[3 * g + 1] + found[3 * g + 2]) / 3 for g in range(2)]
    np.testing.assert_allclose(np.exp(y) - fit.FLOOR, expected, atol=1e-5)


def tiny(model):
    return LLM(model.config, model, None, CacheConfig("full"), model.config.context, "float32", frozenset())


def test_a_profile_foretells_texts_it_was_not_fitted_on():
    """Tokens of a tiny random model differ in how much they are attended to, and that shows in their embeddings."""
    llm = tiny(model_of(config_of()))
    texts = [make.Reading(ids_of(300, seed)) for seed in range(10)]
    calls = []
    profile = make.make(llm, texts[:8], texts[8:], lambda: calls.append(1))
    assert len(calls) == 8 + 4 + 2 * 2
    assert llm.model.blocks[0].b_score == pytest.approx(profile.bias[0] + profile.worth[0])
    assert profile.about["correlation"] > 0.5
    assert (np.diff(profile.curve["threshold"]) > 0).all() and (np.diff(profile.curve["kept"]) < 0).all()
    assert profile.curve["quality"].shape == profile.curve["kept"].shape
    assert llm.profile is profile and "correlation" in make.report(profile)


# what an entry is worth


def cost(llm, config, ids, passages):
    """Nats a token of passages, read one by one after ids that were compressed as any prompt is."""
    cache, losses = llm.new_cache(), []
    extend(llm.model, ids, cache, llm.compressor_for(config))
    for passage, scored in passages:
        following = passage[1:][-(scored or len(passage)) :]
        logits = llm.model.logits(extend(llm.model, passage[:-1], cache.fork())[-len(following) :]).astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        losses.append(-np.mean([row[token] for row, token in zip(log_p, following, strict=True)]))
    return np.mean(losses), cache.lengths.copy()


def test_a_trial_says_what_a_compressed_prompt_would(monkeypatch):
    """Of each head, with its scores raised and lowered in the profile, and the text read anew."""
    monkeypatch.setattr(worth, "TOKENS", 300)
    llm, ids = tiny(model_of(config_of())), ids_of(320)
    profile = profile_of(llm)
    llm.set_profile(profile)
    trial = worth.Trial(llm, ids, asks=[5, 6])
    assert len(trial.passages) == 2 + 3 + 1 and all(list(passage[:2]) == [5, 6] for passage, _ in trial.passages[:5])
    base, lengths = cost(llm, trial.recipe.config, ids[:300], trial.passages)
    assert 0 <= lengths.sum() - worth.BUDGET * 300 * lengths.size < 10  # tokens that are alike score alike
    assert trial.base == pytest.approx(base, rel=1e-5)
    for index, head in ((1, 1), (0, 0), (1, 0)):
        expected = {}
        for sign in (1, -1):
            profile.bias[index, head] += sign * worth.SHIFT
            llm.set_profile(profile)
            expected[sign] = cost(llm, trial.recipe.config, ids[:300], trial.passages)
            profile.bias[index, head] -= sign * worth.SHIFT
        llm.set_profile(profile)
        lost, entries = trial.tried(index, head)
        assert entries == (expected[1][1] - expected[-1][1]).sum() > 0
        assert lost == pytest.approx(expected[-1][0] - expected[1][0], abs=1e-5)


def test_a_head_that_is_not_listened_to_is_worth_the_least():
    model = model_of(config_of())
    model.blocks[1].wo.data[:, : model.config.n_heads // 2 * model.config.head_dim] = 0
    llm = tiny(model)
    llm.set_profile(profile_of(llm))
    lost, entries = worth.try_heads(llm, [(ids_of(300, seed), []) for seed in range(3)])
    assert (lost[:, 1, 0] == 0).all() and (entries[:, 1, 0] > 0).all() and (lost[:, 0] != 0).any()


def test_what_is_little_known_of_a_head_counts_little():
    """Heads of known worth, tried with noise of one size: what is found is close where entries were many, and the mean
    where they were few."""
    rng, true = np.random.default_rng(0), np.array([[0.5, 2.0, 0.5, 2.0, 1.0, 1.0]])
    entries = np.tile(np.array([[400, 400, 1, 1, 400, 400]]), (24, 1, 1))
    lost = 1e-4 * true * entries + rng.normal(0, 0.004, entries.shape)
    found = worth.log_worth(lost, entries)
    np.testing.assert_allclose(np.exp(found / worth.STEP)[0, [0, 1, 4, 5]], true[0, [0, 1, 4, 5]] / 1.125, rtol=0.15)
    assert np.abs(found[0, 2:4]).max() < 0.2
    assert not worth.log_worth(-lost, entries).any()  # a budget at which nothing is lost says nothing


def test_a_second_reading_counts_for_what_entries_are_worth():
    """hindsight's scores with a profile are those without one, times what an entry of the head is worth."""
    llm, ids = tiny(model_of(config_of())), ids_of(300)
    llm.profile = profile_of(llm)
    scores = {}
    for name, options in {"hindsight": {}, "without": {"worth": False}}.items():
        cache = llm.new_cache()
        extend(llm.model, ids, cache, llm.compressor_for(CacheConfig("hindsight", 1.0, **options)))
        scores[name] = np.reshape(cache.left.scores, (*cache.lengths.shape, 300))
    expected = scores["without"] * np.exp(llm.profile.worth)[:, :, None]
    np.testing.assert_allclose(scores["hindsight"], expected, rtol=1e-6)


# files


@pytest.fixture
def folder(tmp_path):
    return tiny_chat.make(tmp_path / "model")


def test_a_file_gives_back_what_was_saved(folder, tmp_path):
    with LLM.load(folder) as llm:
        profile = profile_of(llm, texts=["a", "b"])
    profile.weight = np.asfortranarray(profile.weight)  # as solved equations come
    profile.save(tmp_path / "deep" / "a.profile")
    again = load(tmp_path / "deep" / "a.profile")
    np.testing.assert_array_equal(again.weight, profile.weight)
    np.testing.assert_array_equal(again.bias, profile.bias)
    np.testing.assert_array_equal(again.worth, profile.worth)
    assert again.about == profile.about
    assert all((again.curve[name] == values).all() for name, values in profile.curve.items())


def test_profiles_are_found_beside_the_model_and_in_the_users_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with LLM.load(folder) as llm:
        assert llm.profile is None and llm.cache_config.method == "hindsight"
        profile, mark = profile_of(llm), fingerprint(llm.config, llm.model.norms)
    beside, user, package = places(mark, folder)
    assert package.parent.name == "data"
    for place, seed in ((user, 1), (beside, 2)):  # the later one comes first
        profile.about["seed"] = seed
        profile.save(place)
        with LLM.load(folder) as llm:
            assert llm.profile.about["seed"] == seed and llm.cache_config.method == "foresight"


def test_a_profile_of_another_model_or_none_at_all_is_refused(folder, tmp_path):
    with LLM.load(folder) as llm:
        profile_of(llm, model="another one", fingerprint="0" * 16).save(tmp_path / "other.profile")
    with pytest.raises(MinillmError, match=r"other.profile is the profile of another one, not of model: make one"):
        LLM.load(folder, profile=tmp_path / "other.profile")
    (tmp_path / "bad.profile").write_bytes(b"nothing")
    for name in ("bad.profile", "absent.profile"):
        with pytest.raises(MinillmError, match=f"{name} is not a minillm profile .*python -m minillm.profile"):
            LLM.load(folder, profile=tmp_path / name)


def tuned(folder):
    """The weights in a folder as a fine-tune leaves them that has the norms frozen."""
    weights = load_file(folder / "model.safetensors")
    made = {name: weight * F32(1.001) if weight.ndim > 1 else weight for name, weight in weights.items()}
    save_file(made, folder / "model.safetensors")


def test_a_profile_of_other_weights_under_the_same_name_is_refused(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    beside = folder / "minillm.profile"
    with LLM.load(folder) as llm:
        profile_of(llm, weights=llm.weights_digest).save(beside)
    renamed = folder.rename(tmp_path / "renamed")
    with LLM.load(renamed) as llm:
        assert llm.profile is not None
    renamed.rename(folder)
    tuned(folder)
    said = f"{beside} was made from other weights than these of model, which have the same norms: make one with"
    with pytest.raises(MinillmError, match=said):
        LLM.load(folder, profile=beside)
    assert capfd.readouterr().err == ""
    with LLM.load(folder) as llm:
        assert llm.profile is None
    err = capfd.readouterr().err
    assert err.startswith(f"minillm: passed over: {said}") and err.count("\n") == 1


@pytest.mark.parametrize("made_from", ["safetensors BF16 0123456789abcdef", "gguf F32 Q8_0 0123456789abcdef", None])
def test_a_profile_fits_the_same_model_in_another_format(made_from, folder, capfd):
    with LLM.load(folder) as llm:
        profile_of(llm, weights=made_from).save(folder / "minillm.profile")
    with LLM.load(folder) as llm:
        assert llm.profile.about["weights"] == made_from
    assert capfd.readouterr().err == ""


def test_a_profile_of_other_blocks_is_used_and_a_line_says_so(default_model_path, tmp_path, capfd):
    """Blocks can be made of the same weights in many ways."""
    path, curve = tmp_path / "a.profile", {name: np.array([0.1], F32) for name in CURVE}
    with LLM.load(default_model_path, cache=CacheConfig("full")) as llm:
        c, here, mark = llm.config, llm.weights_digest, fingerprint(llm.config, llm.model.norms)
    for digest in (here, here[:-16] + "0123456789abcdef"):
        weight, bias = np.zeros((c.n_layers, c.n_kv_heads, c.dim), F32), np.zeros((c.n_layers, c.n_kv_heads), F32)
        about = {"model": "a", "fingerprint": mark, "repeated": {"foretold_full": 1}, "weights": digest}
        Profile(weight, bias, bias, curve, about).save(path)
        with LLM.load(default_model_path, profile=path) as llm:
            assert llm.profile.about["weights"] == digest
        err = capfd.readouterr().err
        assert (err == "") == (digest == here)
    assert err.startswith(f"minillm: {path} was made from other weights than these of ") and err.count("\n") == 1


def test_a_change_of_a_profile_is_noticed(folder, tmp_path):
    with LLM.load(folder) as llm:
        profile_of(llm).save(tmp_path / "a.profile")
    with safe_open(tmp_path / "a.profile", framework="numpy") as file:
        arrays, texts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    for name, array in arrays.items():
        changed = array.copy()
        changed.view(np.uint8).reshape(-1)[0] ^= 1
        save_file(arrays | {name: changed}, tmp_path / "a.profile", texts)
        with pytest.raises(MinillmError, match="a.profile is damaged .it does not hold what was written.: make one"):
            load(tmp_path / "a.profile")


def test_a_profile_that_cannot_be_used_stops_nobody_who_did_not_ask_for_it(folder, tmp_path, monkeypatch, capfd):
    """One of an older version beside the model: the line says so, and the next place is looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with LLM.load(folder) as llm:
        profile, mark = profile_of(llm), fingerprint(llm.config, llm.model.norms)
    beside, user, _ = places(mark, folder)
    profile.save(beside)
    old = {"minillm_profile": json.dumps({"format": 1} | profile.about)}
    own_file.write(beside, load_file(beside), old)
    flags = ["-m", str(folder), "-qn", "1", "x"]
    assert run.main([*flags, "--kv-method", "full"]) == 0
    said = capfd.readouterr().err
    assert said == (
        f"minillm: passed over: {beside} is not a minillm profile (another version of minillm wrote it): "
        "make one with python -m minillm.profile, or take that file away\n"
    )
    profile.save(user)
    with LLM.load(folder) as llm:
        assert llm.profile.digest == load(user).digest
    user.write_bytes(b"half of it")
    assert run.main(flags) == 0 and f"passed over: {user} is not" in capfd.readouterr().err
    assert run.main([*flags, "--profile", str(beside)]) == 1
    said = capfd.readouterr().err
    assert said.startswith(f"minillm: error: {beside} is not a minillm profile") and said.count("\n") == 1


def test_a_profile_is_saved_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    with LLM.load(folder) as llm:
        profile = profile_of(llm)
    place = tmp_path / "a" / "a.profile"
    profile.save(place)
    before = place.read_bytes()

    def fill_the_disk(arrays, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", fill_the_disk)
    with pytest.raises(MinillmError, match="cannot write .*a.profile .*No space left.*: free some space there or"):
        profile.save(place)
    assert place.read_bytes() == before and list(place.parent.iterdir()) == [place]


DAMAGE = {
    "too few layers": ({"weight": lambda a: a[:1], "bias": lambda a: a[:1], "worth": lambda a: a[:1]}, "is damaged"),
    "another dim": ({"weight": lambda a: a[:, :, :-1]}, r"its weight is \(2, 2, 31\), not \(2, 2, 32\)"),
    "biases of other heads": ({"bias": lambda a: a[:, :1]}, r"bias \(2, 1\) and worth \(2, 2\) do not fit"),
    "an empty curve": ({name: lambda a: a[:0] for name in CURVE}, "its curve is not threshold, kept, quality of"),
    "fewer qualities": ({"quality": lambda a: a[:-1]}, "of as many thresholds each"),
    "a table for a curve": ({name: lambda a: a.reshape(2, 2) for name in CURVE}, "of as many thresholds each"),
    "thresholds that descend": ({"threshold": lambda a: a[::-1]}, "the thresholds of its curve do not ascend"),
    "one threshold twice": ({"threshold": lambda a: a[[0, 1, 1, 2]]}, "the thresholds of its curve do not ascend"),
    "no numbers": ({"worth": lambda a: a * np.nan}, "it holds NaN"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_profile_whose_parts_do_not_fit_is_refused(damage, folder, tmp_path):
    with LLM.load(folder) as llm:
        profile_of(llm).save(tmp_path / "a.profile")
    changes, message = DAMAGE[damage]
    arrays, texts = own_file.read(tmp_path / "a.profile", "profile", "")
    for name, change in changes.items():
        arrays[name] = np.array(change(arrays[name]), order="C")
    own_file.write(tmp_path / "a.profile", arrays, texts)
    with pytest.raises(MinillmError, match=f"a.profile .*{message}.*: make one with python -m minillm.profile"):
        LLM.load(folder, profile=tmp_path / "a.profile")


NAMED = '{"format": 2, "model": "a", "fingerprint": "b", "repeated": '


@pytest.mark.parametrize("about", ["[]", "null", '"a"', '{"format": 2}', NAMED + "3}", NAMED + '{"tokens": 9}}'])
def test_a_profile_that_does_not_say_what_it_is_of_is_refused(about, folder, tmp_path):
    with LLM.load(folder) as llm:
        profile_of(llm).save(tmp_path / "a.profile")
    own_file.write(tmp_path / "a.profile", load_file(tmp_path / "a.profile"), {"minillm_profile": about})
    with pytest.raises(MinillmError, match="is not a minillm profile .it does not say "):
        load(tmp_path / "a.profile")


def test_the_command_makes_a_profile_that_is_found(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = tmp_path / "texts"
    texts.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        (texts / f"{i}.txt").write_text(" ".join("".join(rng.choice(list("abcdef"), 4)) for _ in range(80)))
    assert make.main(["-m", str(folder), "--texts", str(texts), "--length", "300"]) == 0
    said = capsys.readouterr().out
    assert "held-out rank correlation" in said and said.count("| ") > 12
    with LLM.load(folder) as llm:
        assert llm.profile.about["texts"] == [str(i) for i in range(5)]
        assert llm.profile.about["weights"] == llm.weights_digest
        mark = llm.profile.about["fingerprint"]
        assert llm.cache_config.method == "foresight"
    made = places(mark, folder)[1]
    made.write_bytes(b"of another version")  # does not stand in the way of a new one
    with LLM.load(folder) as llm:
        assert llm.profile is None
    capsys.readouterr()
    assert make.main(["-m", str(folder), "--texts", str(texts), "--length", "300"]) == 0 and load(made)
    (texts / "0.txt").unlink()
    assert make.main(["-m", str(folder), "--texts", str(texts)]) == 2
    assert "4 .txt files, and 5 at least are needed" in capsys.readouterr().err


def test_help_and_readme_say_the_same_of_the_time_it_takes(capsys):
    with pytest.raises(SystemExit):
        make.main(["--help"])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for text in (capsys.readouterr().out, readme):
        text = " ".join(text.split())
        assert "takes forty minutes of CPU time" in text and "once in minutes" not in text


def write_texts(folder, **lengths):
    """Random words, so many characters of each text: as many tokens of the tiny model, which adds 49 in a chat."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for name, n in lengths.items():
        (folder / f"{name}.txt").write_text("".join(rng.choice(list("abcdef "), n)))
    return str(folder)


def test_texts_that_are_too_short_are_left_out_and_that_is_said(folder, tmp_path, monkeypatch, capsys):
    """And the profile says what it was made from."""
    monkeypatch.setenv("HOME", str(tmp_path))
    texts = write_texts(tmp_path / "texts", a=300, b=40, c=256, d=400, e=255, f=300, g=700, h=10)
    flags = ["-m", str(folder), "--texts", texts]
    assert make.main([*flags, "--length", "500", "--out", "~/a.profile"]) == 0
    assert "minillm: left out, as shorter than 256 tokens: b, e, h\n" in capsys.readouterr().err
    about = load(tmp_path / "a.profile").about
    assert (about["texts"], about["length"]) == (["a", "c", "d", "f", "g"], 500)
    for name in "beh":
        (tmp_path / "texts" / f"{name}.txt").unlink()
    assert make.main([*flags, "--length", "256", "--out", str(tmp_path / "b.profile")]) == 0
    again = load(tmp_path / "b.profile").about
    assert (again["texts"], again["digest"]) == (about["texts"], about["digest"])


@pytest.mark.parametrize("context, status", [(280, 0), (200, 2)])
def test_texts_are_no_longer_than_the_context(context, status, tmp_path, capsys):
    model = tiny_chat.make(tmp_path / "narrow", max_position_embeddings=context)
    texts = write_texts(tmp_path / "texts", a=300, b=300, c=300, d=300, e=300)
    assert make.main(["-m", str(model), "--texts", texts, "--out", str(tmp_path / "a.profile")]) == status
    if status:
        assert "narrow has a context of 200 tokens, and a profile takes 256 at least" in capsys.readouterr().err
    else:
        assert load(tmp_path / "a.profile").about["length"] == 280


@pytest.mark.parametrize(
    "lengths, said",
    [
        (dict.fromkeys("abcdef", 30), "0 of 6 texts are long enough, and 5 at least are needed"),
        (dict.fromkeys("abcd", 300) | {"e": 30}, r"4 of 5 texts .* longer ones \(shorter than 256 tokens: e\)"),
    ],
)
def test_too_few_texts_that_are_long_enough_are_one_sentence(lengths, said, folder, tmp_path, capsys):
    assert make.main(["-m", str(folder), "--texts", write_texts(tmp_path / "texts", **lengths)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("minillm: error: ") and err.count("\n") == 1
    assert re.search(said, err)


@pytest.mark.parametrize("length, said", [("20", "must be at least 256, not 20"), ("x", "invalid whole number value")])
def test_a_length_at_which_nothing_is_compressed_is_refused(length, said, folder, monkeypatch, capsys):
    monkeypatch.setattr(LLM, "load", None)
    assert make.main(["-m", str(folder), "--length", length]) == 2
    err = capsys.readouterr().err
    assert f"--length: {said}" in err and err.count("\n") == 1


# the default


@pytest.fixture
def known(folder):
    """A model with a profile beside it."""
    with LLM.load(folder) as llm:
        profile_of(llm).save(places(fingerprint(llm.config, llm.model.norms), folder)[0])
    return folder


def test_without_a_method_the_profile_decides(known):
    with LLM.load(known, cache=CacheConfig(budget=0.3)) as llm:
        assert (llm.cache_config.method, llm.cache_config.budget.share) == ("foresight", 0.3)
        session = llm.session()
        session.feed("a" * 300)
        assert list(session.stream(SamplingParams(5))) and session.stats["cache"]["method"] == "foresight"


def test_a_quality_is_a_threshold_of_the_profile(known):
    for asked, threshold in ((0.99, 0.1), (0.9, 0.8), (1.0, 0.01)):
        with LLM.load(known, cache=CacheConfig(quality=asked)) as llm:
            assert llm.compressor.recipe.options["threshold"] == pytest.approx(threshold)
            assert llm.cache_config.as_dict()["quality"] == asked and llm.cache_config.budget is None
    with LLM.load(known, cache=CacheConfig(budget="auto")) as llm:
        assert llm.compressor.recipe.options["threshold"] == pytest.approx(0.1)
        session = llm.session()
        session.feed("some words to read " * 20)
        session.read()
        assert 0 < session.cache.kept < 1


def test_a_quality_of_which_little_was_measured_is_refused_and_a_budget_is_not(known):
    with LLM.load(known, cache=CacheConfig(budget=0.3)) as llm:
        llm.profile.about["repeated"]["foretold_full"] = 999
        with pytest.raises(MinillmError, match="was measured on 999 tokens, .* 1000 at least: name a budget, or make"):
            llm.set_cache(CacheConfig(budget="auto"))
        llm.set_cache(CacheConfig(budget=0.2))
        llm.profile.about["repeated"]["foretold_full"] = 1000
        llm.set_cache(CacheConfig(quality=0.5))


def test_a_model_that_repeats_nothing_leaves_a_curve_that_is_not_asked(folder, tmp_path, monkeypatch, capsys):
    def nothing(llm, ids, thresholds):
        return np.linspace(1, 0, len(thresholds)), np.zeros(len(thresholds) + 1, int)

    monkeypatch.setattr(make, "repeat", nothing)
    texts = write_texts(tmp_path / "texts", **dict.fromkeys("abcde", 300))
    place = tmp_path / "a.profile"
    assert make.main(["-m", str(folder), "--texts", texts, "--out", str(place)]) == 0
    assert "Fewer than 1000: with this profile name a budget" in capsys.readouterr().out
    profile = load(place)
    assert not profile.curve["quality"].any()
    assert profile.about["repeated"] == {"texts": 1, "tokens": 256, "foretold_full": 0}
    with pytest.raises(MinillmError, match="was measured on 0 tokens"):
        profile.threshold(0.9)


def test_another_profile_decides_anew(known):
    """The threshold of a quality, what entries are worth, and the method where none was named."""
    with LLM.load(known, cache=CacheConfig(quality=0.99)) as llm:
        other = profile_of(llm, seed=5)
        other.curve["threshold"] *= 2
        llm.set_profile(other)
        assert llm.compressor.recipe.options["threshold"] == pytest.approx(0.2)
        np.testing.assert_array_equal(llm.compressor.worth, np.exp(other.worth))
        worse = profile_of(llm, seed=6)
        worse.curve["quality"][:] = 0.5
        with pytest.raises(MinillmError, match="knows no threshold that leaves 0.99 of the quality"):
            llm.set_profile(worse)
        assert llm.profile is other and llm.compressor.recipe.options["threshold"] == pytest.approx(0.2)
        np.testing.assert_array_equal(llm.model.blocks[0].b_score, other.projection[1][0])
    with LLM.load(known, profile=False) as llm:
        assert llm.cache_config.method == "hindsight" and llm.compressor.worth is None
        llm.set_profile(other)
        assert llm.cache_config.method == "foresight" and llm.compressor.worth is not None


def test_a_quality_that_was_never_reached_is_refused(known):
    llm = LLM.load(known)
    llm.profile.curve["quality"][:] = 0.5
    with pytest.raises(MinillmError, match="knows no threshold that leaves 0.9 of the quality .the best leaves 0.500"):
        llm.set_cache(CacheConfig(quality=0.9))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"quality": 1.5}, "quality: 1.5 is not a number from 0.01 to 1"),
        ({"quality": 0.9, "budget": 0.2}, "budget and quality exclude each other"),
        ({"quality": 0.9, "threshold": 0.2}, "threshold and quality exclude each other"),
        ({"quality": 0.9, "budget": "auto"}, "budget auto is quality 0.99"),
        ({"quality": 0.9, "method": "kvzip"}, "a quality is kept by method foresight alone"),
    ],
)
def test_a_quality_that_means_nothing_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        CacheConfig(**options)


def test_without_a_profile_foresight_is_refused_and_the_fix_is_said(folder, capsys):
    with pytest.raises(UsageError, match="needs a profile, and model has none: make one with python -m"):
        LLM.load(folder, cache=CacheConfig("foresight"))
    assert run.main(["-m", str(folder), "-n", "2", "a word"]) == 0
    assert "has no profile, so prompts are read twice: python -m minillm.profile makes one" in capsys.readouterr().err


def test_sessions_with_predictions_are_saved_and_taken_up(known, tmp_path):
    with LLM.load(known, cache=CacheConfig(budget=0.3)) as llm:
        session = llm.session()
        session.feed("the quick brown fox " * 20)
        session.read()
        session.save(tmp_path / "s.kv")
        other = llm.session()
        other.restore(tmp_path / "s.kv")
        for one in (session, other):
            one.feed("and the lazy dog " * 20)
            one.read()
        assert (session.cache.lengths == other.cache.lengths).all()
        for name, array in cache_state.state(session.cache).items():
            np.testing.assert_array_equal(cache_state.state(other.cache)[name], array)


@pytest.mark.parametrize("method, options", [("foresight", {}), ("hindsight", {}), ("kvzip", {"worth": True})])
def test_a_session_of_another_profile_is_refused_where_the_method_uses_it(method, options, known, tmp_path):
    """Scores of two scales would share one cut: with hindsight's worth as well, and where one has no profile."""
    with LLM.load(known, cache=CacheConfig(method, 0.3, **options)) as llm:
        session = llm.session()
        session.feed("the quick brown fox " * 20)
        session.read()
        session.save(tmp_path / "s.kv")
        first, other = llm.profile.digest, profile_of(llm, seed=5)
        llm.session().restore(tmp_path / "s.kv")
        llm.set_profile(other)
        with pytest.raises(MinillmError, match=f"was saved with profile '{first}' and this is '{other.digest}': name"):
            llm.session().restore(tmp_path / "s.kv")
    if method != "foresight":
        with LLM.load(known, cache=CacheConfig(method, 0.3, **options), profile=False) as llm:
            with pytest.raises(MinillmError, match=f"was saved with profile '{first}' and this is None"):
                llm.session().restore(tmp_path / "s.kv")


UNAWARE = [("full", {}), ("hindsight", {"budget": "full"}), ("kvzip", {}), ("hindsight", {"worth": False})]


@pytest.mark.parametrize("method, options", UNAWARE)
def test_a_session_is_taken_up_with_any_profile_where_the_method_uses_none(method, options, known, tmp_path):
    with LLM.load(known, cache=CacheConfig(method, **options)) as llm:
        session = llm.session()
        session.feed("the quick brown fox " * 20)
        session.read()
        session.save(tmp_path / "s.kv")
        llm.set_profile(profile_of(llm, seed=5))
        llm.session().restore(tmp_path / "s.kv")


def test_flags_of_the_command_line():
    args = cli.parse(["--kv-budget", "auto", "-p", "x"])
    assert args.cache.method is None and args.cache.quality == 0.99
    assert cli.parse(["--quality", "0.95", "-p", "x"]).cache.quality == 0.95
    assert json.loads(json.dumps(args.cache.as_dict()))["quality"] == 0.99
    assert args.cache.predicts


def test_no_eight_words_of_the_profiles_texts_are_in_the_evaluations():
    def runs(file):
        words = re.findall(r"\w+", file.read_text(encoding="utf-8").lower())
        return set(zip(*(words[i:] for i in range(8)), strict=False))

    package = Path(make.__file__).parents[1]
    ours, theirs = (sorted(package.glob(f"{folder}/*.txt")) for folder in ("profile/texts", "evaluate/data"))
    assert len(ours) > 50 and len(theirs) > 5
    of_evaluation = set().union(*map(runs, theirs))
    assert len(of_evaluation) > 50_000
    assert not [file.name for file in ours if runs(file) & of_evaluation]
