"""What bench, evaluate and profile do with a model, on the emulated device: as on NumPy."""

import json
from functools import partial, partialmethod

import emulator
import numpy as np
import pytest
import tiny_chat
from safetensors.numpy import save_file

from minillm import LLM, CacheConfig
from minillm.errors import MinillmError
from minillm.evaluate import scoring
from minillm.evaluate.evaluator import Evaluator, Setup
from minillm.evaluate.prompt import Prompt
from minillm.ops import cuda_device
from minillm.ops.cuda_ops import CudaOps
from minillm.profile import fit
from minillm.programs import bench_row, terminal

SHARE = 2e-2  # of the root mean square: activations of 16 bits, and what is made of them
TEXT = "the cat sat, the dog ran. a bird sang; nobody heard it. " * 6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """With heads that a GPU has kernels for."""
    folder = tiny_chat.make(tmp_path_factory.mktemp("models") / "tiny", head_dim=64)
    save_file(tiny_chat.weights(tiny_chat.CONFIG | {"head_dim": 64}, 7), folder / "model.safetensors")
    return str(folder)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    if emulator.available():
        pytest.skip(emulator.available())
    device = emulator.EmulatedDevice()
    monkeypatch.setattr(cuda_device, "open_device", lambda index: device)
    return device


def both(tiny, function):
    """Of a function of an LLM, the results on the device and on NumPy."""
    results = []
    for device in ("cuda", "cpu"):
        with LLM.load(tiny, device=device, cache=CacheConfig("full"), profile=False, offline=True) as llm:
            results.append(function(llm))
    return results


def close(found, expected, share=SHARE):
    assert found.shape == expected.shape
    assert np.sqrt(((found - expected) ** 2).mean()) <= share * np.sqrt((expected**2).mean())


@pytest.mark.parametrize("kind, n, depth", [("pp", 30, 0), ("tg", 3, 150)])
def test_a_row_of_bench(tiny, capsys, monkeypatch, emulated, kind, n, depth):
    monkeypatch.setattr(CudaOps, "bandwidth", partialmethod(CudaOps.bandwidth, 1 << 20))  # 256 MiB take minutes here
    rows = []
    for device in ("cuda", "cpu"):
        load = {"device": device, "dtype": "auto", "threads": None, "offline": True}
        asked = {"model": tiny, "load": load, "cache": {"method": "h2o", "budget": 0.5}, "repetitions": 2}
        bench_row.answer(asked | {"kind": kind, "depth": depth, "ids": list(TEXT.encode()[: depth + n])})
        rows.append(list(map(json.loads, capsys.readouterr().out.splitlines())))
    for first, *samples, rest in rows:
        assert first == {"first_token": True} and [list(sample) for sample in samples] == [["seconds"]] * 2
        assert rest["bandwidth"] > 0
    mine, other = (row[-1] for row in rows)
    assert (mine["backend"], other["backend"]) == ("cuda", "numpy")
    assert mine["kept"] == other["kept"] and mine["cache_bytes"] < other["cache_bytes"]  # K and V of 16 bits
    assert mine.keys() == other.keys()


def test_the_scores_of_an_evaluation(tiny):
    """A forced answer and a generated one, of the full cache and of compressed ones."""
    ids = np.random.default_rng(0).integers(97, 123, 200).tolist()
    configs = [CacheConfig("full"), CacheConfig("snapkv", 0.5), CacheConfig("h2o", 0.5, dtype="int8")]
    forced = both(tiny, lambda llm: scoring.score(llm, Prompt(ids[:180], ids[180:190], ids[190:]), configs, "aware"))
    for mine, other in zip(*forced, strict=True):
        assert mine["kept"] == other["kept"]
        np.testing.assert_array_equal(mine["lengths"], other["lengths"])
    for name in ("nll", "accuracy"):  # of the full cache: of others a row of the same score may be another one
        assert abs(forced[0][0]["scores"][name] - forced[1][0]["scores"][name]) <= SHARE
    free = Prompt(ids[:180], [], max_tokens=4, grade=lambda text: {})
    texts = both(tiny, lambda llm: scoring.score(llm, free, configs[:1], "aware")[0]["prediction"])
    assert texts[0] == texts[1] != ""


def test_memory_is_that_of_the_device(tiny, emulated):
    """Which configurations share a prefill."""
    prompt = Prompt([97] * 2000, [])
    with LLM.load(tiny, device="cuda", cache=CacheConfig("full"), profile=False, offline=True) as llm:
        groups = lambda: [len(group) for group in scoring.groups(llm, prompt, [CacheConfig("full")] * 2, 1)]  # noqa: E731
        assert groups() == [2]
        emulated.total = emulated.used + 1000
        assert groups() == [1, 1]


def test_the_versions_of_an_evaluation(tiny):
    evaluator = Evaluator(Setup(tiny, device="cuda", offline=True))
    assert evaluator.versions["backend"] == "cuda" and evaluator.versions["cache_dtype"] == "float16"


def test_what_a_profile_is_fitted_to(tiny):
    """Hidden states, and what a second reading attends to."""
    ids = list(TEXT.encode()[:150])
    layers = both(tiny, lambda llm: list(fit.second_reading(llm, ids)))
    for (h, scores), (other, expected) in zip(*layers, strict=True):
        close(h, other)
        close(scores, expected)


def test_the_fit_of_a_profile(tiny):
    """Equations of two texts, solved: both models foretell the same scores of a third."""
    letters = np.random.default_rng(1).integers(97, 123, (3, 140)).tolist()

    def foretold(llm):
        readings = [list(fit.second_reading(llm, ids)) for ids in letters]
        layers = [fit.Equations(llm.config.dim, llm.config.n_kv_heads) for _ in range(llm.config.n_layers)]
        for reading in readings[:2]:
            for layer, (h, y) in zip(layers, reading, strict=True):
                layer.add(h, y.T)
        solved = [layer.solve() for layer in layers]
        return np.stack([h @ w.T + b for (h, _), (w, b) in zip(readings[2], solved, strict=True)])

    close(*both(tiny, foretold))


def test_the_header_names_the_device(tiny, capsys):
    with LLM.load(tiny, device="cuda", cache=CacheConfig("full"), profile=False, offline=True) as llm:
        terminal.Terminal().header(llm)
    assert ", emulator; memory" in capsys.readouterr().err


def test_a_device_needs_room_for_what_it_will_hold(tiny, emulated):
    """Of a file of float32 half: that is asked for before anything is read, and at no time is more there than that and
    what one layer's q, k, v, gate and up are put together from."""
    config = tiny_chat.CONFIG | {"head_dim": 64}
    sizes = [array.size * (4 if array.ndim == 1 else 2) for array in tiny_chat.weights(config, 7).values()]
    load = partial(LLM.load, tiny, device="cuda", cache=CacheConfig("full"), profile=False, offline=True)
    emulated.total = emulated.used + sum(sizes) - 1
    with pytest.raises(MinillmError, match=r"tiny needs .* \(weights"):
        load()
    before = emulated.peak = emulated.used
    emulated.total = 8 << 30
    with load() as llm:
        layer = llm.model.runner.layers[0]
        parts = sum(weight.nbytes for _, weight in [*layer.wqkv, *layer.w_gate_up])
        small = 64 * len(sizes)
        assert sum(sizes) <= emulated.used - before <= sum(sizes) + small
        assert emulated.peak - before <= sum(sizes) + parts + small
        assert len(llm.model.blocks) * parts > parts + small
