"""The next token on the device against minillm.sampling, its specification: for the same uniform number the same token,
and so for one seed the same answer."""

from dataclasses import replace

import emulator
import numpy as np
import pytest
from emulator import Kernel, cases
from twins import SMALL, Twins

from minillm.compress.reading import extend
from minillm.ops import launch
from minillm.sampling import PENALTY_WINDOW, Draw, Sampler, SamplingParams, sample, weights

F32 = np.float32
NONE = np.zeros(0, np.int32)
INF = np.inf


def tokens_of(device, logits, draws):
    """What the kernels make of logits (B, vocab)."""
    logits, tokens = device.upload(np.ascontiguousarray(logits, F32)), device.empty((len(draws),), np.int32)
    tables = (device.upload(table) for table in launch.draw_tables(draws))
    launch.sample(device, logits, *tables, launch.sample_space(device, *logits.shape), tokens)
    return tokens.get().tolist()


def uniforms_of(logits, params, rng, n=4):
    """Random ones, and those beside each end of what a token is drawn for: in the middle of 1e-9 of it."""
    sums = np.cumsum(weights(logits, params))
    shares = sums[np.flatnonzero(np.diff(sums, prepend=0.0))] / sums[-1]
    edges = rng.choice(shares, min(len(shares), 3), replace=False)
    out = [0.0, 1 - 2**-53, *rng.random(n), *(edges - 1e-9), *(edges + 1e-9)]
    return [u for u in out if 0 <= u < 1]


def check(device, logits, params, rng, recent=NONE):
    """One row for each uniform number."""
    logits = np.asarray(logits, F32)
    draws = [Draw(params, recent, u) for u in uniforms_of(logits, params, rng)]
    expected = [sample(logits, draw) for draw in draws]
    assert tokens_of(device, np.tile(logits, (len(draws), 1)), draws) == expected


PARAMS = [
    {},
    {"temperature": 0.05},
    {"temperature": 50.0},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 10**12},
    {"top_p": 1e-9},
    {"top_p": 0.5},
    {"top_p": 0.999999},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"temperature": 0.6, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 3.0, "top_k": 7, "top_p": 0.8},
]


@pytest.mark.parametrize("params", cases(PARAMS, races=PARAMS[-2:]), ids=str)
@pytest.mark.parametrize("vocab", cases([1, 37, 513, 2050], races=[2050]))
def test_every_parameter(device, params, vocab):
    rng = np.random.default_rng(vocab)
    check(device, rng.normal(0, 3, vocab), SamplingParams(**{"temperature": 1.0} | params), rng)


TIES = [{}, {"top_k": 3}, {"top_p": 0.3}, {"min_p": 1.0}, {"top_k": 5, "top_p": 0.5}, {"temperature": 0.3, "top_k": 11}]


@pytest.mark.parametrize("params", cases(TIES, races=TIES[4:5]), ids=str)
def test_ties_are_cut_by_id(device, params):
    rng, params = np.random.default_rng(0), SamplingParams(**{"temperature": 1.0} | params)
    check(device, np.zeros(700), params, rng)
    check(device, np.where(np.arange(700) % 2, 0.0, -0.0), params, rng)
    check(device, rng.integers(-2, 3, 1500), params, rng)


EXTREME = {
    "one of them possible": np.where(np.arange(600) == 533, 2.0, -INF),
    "none but the last two": np.where(np.arange(600) >= 598, 1.0, -INF),
    "the largest floats": [3e38, -3e38, 0, 3e38, -1e-45, 1e-45],
    "far apart": [1e4, 1e4 - 1, -1e4],
    "all below zero": [-5.0, -7, -5, -100, -6],
}


@pytest.mark.parametrize("logits", EXTREME.values(), ids=EXTREME)
@pytest.mark.parametrize("temperature", cases([1e-30, 0.01, 1.0, 1e6], races=[]))
def test_extreme_logits(device, logits, temperature):
    rng = np.random.default_rng(1)
    for params in ({}, {"top_k": 2}, {"top_p": 0.4}, {"top_k": 4, "top_p": 0.99, "min_p": 0.1}):
        check(device, logits, SamplingParams(temperature=temperature, **params), rng)


@pytest.mark.parametrize("vocab", cases([1, 37, 513, 2050], races=[2050]))
def test_greedy(device, vocab):
    rng, params = np.random.default_rng(2), SamplingParams()
    rows = rng.normal(size=(3, vocab)).astype(F32)
    rows[1] = rng.integers(-1, 2, vocab)  # ties
    rows[2] = -INF
    rows[2, vocab // 2] = -3e38
    assert tokens_of(device, rows, [Draw(params, NONE, 0.0)] * 3) == rows.argmax(axis=1).tolist()


def test_each_sequence_has_its_own_parameters(device):
    rng = np.random.default_rng(3)
    rows = rng.normal(0, 2, (4, 1300)).astype(F32)
    chosen = ({}, {"temperature": 0.7, "top_k": 9}, {"temperature": 1.2, "top_p": 0.6}, {"repeat_penalty": 1.5})
    recent = np.sort(rows.argsort(axis=1)[:, -40:], axis=1).astype(np.int32)
    draws = [Draw(SamplingParams(**p), ids, rng.random()) for p, ids in zip(chosen, recent, strict=True)]
    assert tokens_of(device, rows, draws) == [sample(row, draw) for row, draw in zip(rows, draws, strict=True)]


@pytest.mark.parametrize("penalty", cases([1.3, 5.0, 0.5], races=[1.3]))
@pytest.mark.parametrize("n", cases([1, 63, 64, 300], races=[64]))
def test_repeat_penalty(device, penalty, n):
    """Of ids in every part of the vocabulary, its ends among them."""
    rng, vocab = np.random.default_rng(n), 2100
    logits, recent = rng.normal(0, 3, vocab).astype(F32), [0, vocab - 1, *rng.integers(0, vocab, n)]
    for params in ({}, {"temperature": 1.5, "top_k": 30}):
        sampler = Sampler(SamplingParams(repeat_penalty=penalty, seed=0, **params))
        draws = [sampler.draw(recent) for _ in range(4)]
        assert len(draws[0].recent) <= PENALTY_WINDOW
        assert tokens_of(device, np.tile(logits, (4, 1)), draws) == [sample(logits, draw) for draw in draws]


def test_logits_that_are_no_numbers_do_no_harm(device):
    """What comes of them is an id, and the step ends; that they are not finite, others say."""
    rows = np.full((3, 80), np.nan, F32)
    rows[1, ::2], rows[2, 5] = 1, INF
    for params in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1}):
        for token in tokens_of(device, rows, [Draw(SamplingParams(**params), NONE, 0.5)] * 3):
            assert 0 <= token < 80


def test_the_order_of_threads_does_not_matter(monkeypatch):
    if emulator.available():
        pytest.skip(emulator.available())
    rng, device, results = np.random.default_rng(4), emulator.EmulatedDevice(), []
    rows = rng.normal(0, 2, (2, 1100)).astype(F32)
    params = SamplingParams(temperature=1.1, top_k=300, top_p=0.9, min_p=0.01, repeat_penalty=1.2)
    draws = [Draw(params, np.arange(20, 60, dtype=np.int32), u) for u in (0.3, 0.9)]
    for order in (0, 1, 2):
        monkeypatch.setattr(Kernel, "order", order)
        results.append(tokens_of(device, rows, draws))
    assert results[0] == results[1] == results[2] == [sample(row, draw) for row, draw in zip(rows, draws, strict=True)]


# in the decode step


@pytest.mark.parametrize(
    "params",
    cases([{}, {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "repeat_penalty": 1.2}], races=[]),
    ids=str,
)
def test_tokens_of_a_decode_step(device, params):
    """Two sequences, launched, captured and replayed: the tokens are those of the step's own logits."""
    twins = Twins(device, replace(SMALL, vocab_size=1030))
    model, pairs = twins.models[0], [twins.caches() for _ in "ab"]
    samplers = [Sampler(SamplingParams(seed=seed, **params)) for seed in (1, 2)]
    ids = np.random.default_rng(5).integers(0, 1030, 60).tolist()
    for sampler, pair in zip(samplers, pairs, strict=True):
        hidden, draw = extend(model, ids[:30], pair[0])[-1:], sampler.draw(ids)
        assert model.draw(hidden, [draw]) == [sample(model.logits(hidden)[0], draw)]
    caches = [pair[0] for pair in pairs]
    for token in ids[30:35]:
        forks = [cache.fork() for cache in caches]
        draws = [sampler.draw([*ids[:30], token]) for sampler in samplers]
        tokens, logits = model.decode([token] * 2, caches, draws), model.decode([token] * 2, forks)
        assert tokens == [sample(row, draw) for row, draw in zip(logits, draws, strict=True)]
    assert model.runner.step.graph is not None
