"""Sampling: each parameter against its definition, a token at a time."""

import math

import numpy as np
import pytest

from minillm.errors import MinillmError, UsageError
from minillm.logprobs import Logprob
from minillm.sampling import Draw, Sampler, SamplingParams, drawn, sample, weights

F32 = np.float32


def literal(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities of all tokens as a dict: every rule is applied to what the one before left, the most likely first
    and of equal ones the lower id."""
    ranked = sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))
    best = float(logits[ranked[0]])
    weight = {token: math.exp((float(logits[token]) - best) / temperature) for token in ranked}
    kept = ranked[:top_k] if top_k else ranked
    total, reached, nucleus = sum(weight[token] for token in kept), 0.0, []
    for token in kept:
        if top_p < 1 and nucleus and reached >= top_p - 1e-12:
            break
        nucleus.append(token)
        reached += weight[token] / total
    kept = [token for token in nucleus if weight[token] >= min_p * weight[nucleus[0]]]
    total = sum(weight[token] for token in kept)
    return {token: weight[token] / total for token in kept}


def token_of(sampler, logits, recent=()):
    return sample(logits, sampler.draw(recent))


def distribution(logits, **params):
    """Probabilities (vocab,)"""
    weight = weights(logits, SamplingParams(**{"temperature": 1.0} | params))
    assert weight.max() == 1
    return weight / weight.sum()


def check(logits, **params):
    probabilities = distribution(logits, **params)
    expected = np.zeros(len(logits))
    for token, p in literal(logits, **params).items():
        expected[token] = p
    assert probabilities.dtype == np.float64 and abs(probabilities.sum() - 1) < 1e-12
    np.testing.assert_array_equal(probabilities > 0, expected > 0)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-9, atol=1e-15)


LOGITS = np.random.default_rng(0).normal(0, 3, 200).astype(F32)


@pytest.mark.parametrize(
    "params",
    [
        {},
        *({"temperature": t} for t in (0.05, 0.7, 1.3, 50.0)),
        *({"top_k": k} for k in (1, 2, 17, 200, 1000)),
        *({"top_p": p} for p in (1e-6, 0.1, 0.5, 0.95, 0.999999)),
        *({"min_p": p} for p in (0.01, 0.1, 0.9, 1.0)),
        {"temperature": 0.6, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 2.0, "top_k": 10, "top_p": 0.7},
        {"temperature": 1.5, "top_k": 30, "min_p": 0.2},
        {"temperature": 3.0, "top_p": 0.8, "min_p": 0.3},
    ],
    ids=str,
)
def test_probabilities(params):
    check(LOGITS, **params)


def test_top_p_takes_the_fewest_tokens_that_reach_it():
    logits = np.log(np.array([0.125, 0.5, 0.125, 0.25], F32))
    for top_p, tokens in (
        (0.4, [1]),
        (0.5, [1]),
        (0.51, [1, 3]),
        (0.75, [1, 3]),
        (0.8, [0, 1, 3]),
        (1.0, [0, 1, 2, 3]),
    ):
        p = distribution(np.float32(logits), top_p=top_p)
        assert np.flatnonzero(p).tolist() == tokens


def test_top_p_counts_what_top_k_left():
    """Of 0.5, 0.25 and less the first two are left as 2/3 and 1/3."""
    logits = np.log(np.array([0.125, 0.5, 0.125, 0.25], F32))
    p = distribution(logits, top_k=2, top_p=0.6)
    assert np.flatnonzero(p).tolist() == [1]


def test_ties_are_cut_by_id():
    logits = np.zeros(10, F32)
    for params in ({"top_k": 3}, {"top_p": 0.25}):
        p = distribution(logits, **params)
        np.testing.assert_allclose(p, [1 / 3] * 3 + [0] * 7)
    check(logits, min_p=1.0)


@pytest.mark.parametrize("vocab", [65, 5000])
def test_long_vocabularies(vocab):
    """Where the tokens that reach top-p are some of the first, or nearly all."""
    rng = np.random.default_rng(vocab)
    for logits in (rng.normal(0, 3, vocab), rng.integers(0, 3, vocab), np.zeros(vocab)):
        for params in ({"top_p": 0.02}, {"top_p": 0.5}, {"top_p": 0.9999}, {"top_k": 3000, "top_p": 0.97}):
            check(logits.astype(F32), **params)


def test_extreme_logits():
    check(np.array([3e38, -3e38, 0, 3e38], F32))
    check(np.array([-np.inf, 1, -np.inf, 2], F32), top_p=0.99)
    check(np.array([1e4, 1e4 - 1, -1e4], F32), temperature=0.001)
    check(np.array([5.0], F32), top_k=3, top_p=0.3, min_p=0.4)


def test_greedy_is_the_default():
    sampler = Sampler(SamplingParams())
    logits = np.array([1, 7, -3, 7], F32)
    assert [token_of(sampler, logits) for _ in range(20)] == [1] * 20  # of equal ones the first
    token = token_of(sampler, logits)
    assert type(token) is int


def test_a_low_temperature_is_nearly_greedy():
    sampler = Sampler(SamplingParams(temperature=1e-30, seed=0))
    assert {token_of(sampler, LOGITS) for _ in range(20)} == {int(LOGITS.argmax())}


def draws(params, n=40, logits=LOGITS):
    sampler = Sampler(params)
    return [token_of(sampler, logits) for _ in range(n)]


def test_a_seed_makes_an_answer_repeat():
    params = SamplingParams(temperature=1.5, seed=7)
    assert draws(params) == draws(params)
    assert draws(params) != draws(SamplingParams(temperature=1.5, seed=8))
    assert draws(SamplingParams(temperature=1.5, seed=0)) == draws(SamplingParams(temperature=1.5, seed=0))
    assert draws(SamplingParams(temperature=1.5)) != draws(SamplingParams(temperature=1.5))
    assert len(set(draws(params))) > 5


def test_a_sampler_draws_apart_from_the_global_generator():
    np.random.seed(0)
    one = draws(SamplingParams(temperature=1.5, seed=3))
    np.random.seed(1)
    assert draws(SamplingParams(temperature=1.5, seed=3)) == one


def test_tokens_are_drawn_as_often_as_their_probability():
    logits = np.array([2.0, 1.0, 0.0, -1.0, -9.0], F32)
    params = SamplingParams(temperature=1.4, top_k=4, seed=1)
    n = 4000
    counts = np.bincount(draws(params, n, logits), minlength=5)
    expected = literal(logits, temperature=1.4, top_k=4)
    assert counts[4] == 0
    for token, p in expected.items():
        assert abs(counts[token] - n * p) < 5 * math.sqrt(n * p * (1 - p))


def test_a_uniform_number_picks_by_the_sum_over_ids():
    """Of 1/8, 1/2, 0 (not in top-k) and 3/8 of their sum: the share of [0, 1) of each begins where the last ended."""
    logits = np.array([np.log(1), np.log(4), -50, np.log(3)], F32)
    params = SamplingParams(temperature=1, top_k=3)
    for uniform, token in ((0, 0), (0.124, 0), (0.126, 1), (0.624, 1), (0.626, 3), (1 - 2**-53, 3)):
        assert sample(logits, Draw(params, np.zeros(0, np.int32), uniform)) == token


# the penalty on repetition


def penalised(logits, recent, penalty):
    out = [float(x) for x in logits]
    for token in set(list(recent)[-64:]):
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
    return np.array(out)


@pytest.mark.parametrize("penalty", [1.3, 5.0, 0.5])
def test_repeat_penalty(penalty):
    rng = np.random.default_rng(0)
    for n in (0, 1, 10, 64, 65, 300):
        logits, recent = rng.normal(0, 3, 30).astype(F32), rng.integers(0, 30, n).tolist()
        before = logits.copy()
        token = token_of(Sampler(SamplingParams(repeat_penalty=penalty)), logits, recent)
        assert token == int(penalised(before, recent, penalty).argmax())
        np.testing.assert_array_equal(logits, before)  # they are the caller's


def test_repeat_penalty_looks_back_on_64_tokens_and_counts_each_once():
    logits = np.array([3.0, 2.0, -1.0], F32)
    sampler = Sampler(SamplingParams(repeat_penalty=2.0))
    assert token_of(sampler, logits, [0]) == 1
    assert token_of(sampler, logits, [0] + [2] * 63) == 1
    assert token_of(sampler, logits, [0] + [2] * 64) == 0
    once = Sampler(SamplingParams(repeat_penalty=1.4))  # 3 / 1.4 is more than 2; once, not 50 times
    assert token_of(once, logits, [0] * 50) == 0
    negative = Sampler(SamplingParams(repeat_penalty=3.0))
    assert token_of(negative, np.array([-1.0, -2.0], F32), [0, 0, 0]) == 1


def test_repeat_penalty_comes_before_temperature():
    logits = np.array([2.0, 1.0, -1.0], F32)
    params = SamplingParams(repeat_penalty=4.0, temperature=0.7, seed=0)
    sampler, n = Sampler(params), 3000
    counts = np.bincount([token_of(sampler, logits, [0, 2]) for _ in range(n)], minlength=3)
    for token, p in literal(penalised(logits, [0, 2], 4.0), temperature=0.7).items():
        assert abs(counts[token] - n * p) < 5 * math.sqrt(n * p * (1 - p)) + 1


# presence and frequency penalties, biases


def literal_answer(rows, bias, presence, frequency, repeat=1.0, prompt=()):
    """Greedy tokens of logits (n, vocab) in float64, by OpenAI's formula: mu[j] - c[j] * frequency - (c[j] > 0) *
    presence, where c[j] counts the tokens of the answer so far."""
    answer = []
    for row in rows:
        best = None
        for token, mu in enumerate(penalised(row, [*prompt, *answer], repeat)):
            c = answer.count(token)
            mu = mu + bias.get(token, 0.0) - c * frequency - (presence if c > 0 else 0.0)
            if best is None or mu > best[0]:
                best = mu, token
        answer.append(best[1])
    return answer


def answer_of(rows, params, prompt=()):
    sampler, answer = Sampler(params), []
    for row in rows:
        answer.append(token_of(sampler, row, [*prompt, *answer]))
        sampler.take(answer[-1])
    return answer


@pytest.mark.parametrize(
    "presence, frequency, repeat, bias",
    [
        (0.5, 0, 1, {}),
        (0, 0.4, 1, {}),
        (0.3, 0.2, 1, {3: 2.0, 7: -100, 0: 0.25}),
        (-2, -0.1, 1, {5: 1.5}),
        (0, 0, 1, {9: 100}),
        (0.2, 0.6, 1.3, {2: 1.0, 4: -np.inf}),
    ],
)
def test_presence_and_frequency_penalties_and_biases(presence, frequency, repeat, bias):
    rows = np.random.default_rng(4).normal(0, 1, (60, 12)).astype(F32) + F32(2) * (np.arange(12) == 1)
    before = rows.copy()
    params = SamplingParams(
        presence_penalty=presence, frequency_penalty=frequency, repeat_penalty=repeat, logit_bias=bias
    )
    found = answer_of(rows, params, prompt=[1, 1, 6])
    assert found == literal_answer(rows, bias, presence, frequency, repeat, prompt=[1, 1, 6])
    assert found != rows.argmax(axis=1).tolist()
    np.testing.assert_array_equal(rows, before)  # they are the caller's


def test_penalties_count_the_answer_and_not_the_prompt():
    logits = np.array([3.0, 2.5, 0.0], F32)
    for params in (SamplingParams(presence_penalty=1), SamplingParams(frequency_penalty=1)):
        assert answer_of([logits] * 4, params, prompt=[0] * 9) == (
            [0, 1, 0, 1] if params.frequency_penalty else [0, 1, 0, 0]
        )


def test_penalties_come_before_temperature():
    logits = np.array([2.0, 1.0, -1.0], F32)
    sampler, n = Sampler(SamplingParams(temperature=0.7, presence_penalty=1.5, seed=0)), 3000
    sampler.take(0)
    counts = np.bincount([token_of(sampler, logits) for _ in range(n)], minlength=3)
    for token, p in literal(np.array([0.5, 1.0, -1.0]), temperature=0.7).items():
        assert abs(counts[token] - n * p) < 5 * math.sqrt(n * p * (1 - p)) + 1


def test_biases_that_leave_no_token():
    sampler = Sampler(SamplingParams(logit_bias=[(0, -np.inf), (1, -np.inf)]))
    with pytest.raises(MinillmError, match="^no token is left"):
        token_of(sampler, np.zeros(2, F32))
    assert token_of(sampler, np.zeros(3, F32)) == 2


def test_a_bias_is_a_mapping_or_pairs():
    assert SamplingParams(logit_bias={5: 1, 2: -3}).logit_bias == ((2, -3.0), (5, 1.0))
    assert SamplingParams(logit_bias={5: 1}) == SamplingParams(logit_bias=[[np.int64(5), 1.0]])
    for wrong in ({"a": 1}, {1: "x"}, 5, [1], [[1, 2, 3]], [[1, 2], [1, 3]]):
        with pytest.raises(UsageError, match="^logit_bias must"):
            SamplingParams(logit_bias=wrong)


# log-probabilities


def literal_logprobs(logits):
    """log(exp(x) / sum of exp), in float64, token by token."""
    values = [float(x) for x in logits]
    best = max(values)
    total = math.fsum(math.exp(x - best) for x in values)
    return [x - best - math.log(total) for x in values]


@pytest.mark.parametrize("most", [0, 1, 5, 20])
def test_logprobs_are_of_the_logits_as_they_are(most):
    """Whatever changes the draw."""
    params = SamplingParams(temperature=1.7, top_k=9, repeat_penalty=2, logit_bias={3: 5}, logprobs=most, seed=1)
    sampler, expected = Sampler(params), literal_logprobs(LOGITS)
    first = sorted(range(200), key=lambda token: (-expected[token], token))[:most]
    for _ in range(5):
        found = drawn(LOGITS, sampler.draw([1, 2, 3]))
        assert found.token_id == found.logprob.token_id and type(found.token_id) is int
        assert abs(found.logprob.logprob - expected[found.token_id]) < 1e-12
        assert [token for token, _ in found.logprob.top] == first
        assert all(abs(p - expected[token]) < 1e-12 for token, p in found.logprob.top)


def test_equally_likely_tokens_are_told_by_id():
    found = Logprob.of(np.array([0, 1, 0, 1, 0, 0], F32), 5, 4)
    assert [token for token, _ in found.top] == [1, 3, 0, 2]
    assert len(Logprob.of(np.zeros(3, F32), 0, 20).top) == 3


# what is refused


@pytest.mark.parametrize(
    "name, value",
    [
        *(("temperature", x) for x in (-0.1, math.nan)),
        *(("top_k", x) for x in (-1,)),
        *(("top_p", x) for x in (0, -1, 1.01, math.nan)),
        *(("min_p", x) for x in (-0.1, 1.1, math.nan)),
        *(("repeat_penalty", x) for x in (0, -1, math.nan, math.inf, 1e-300, 1e39)),
        *(("max_tokens", x) for x in (0, -5)),
        *((name, x) for name in ("presence_penalty", "frequency_penalty") for x in (-101, 101, math.nan, math.inf)),
        *(("logit_bias", {1: x}) for x in (-101, 101, math.nan, math.inf)),
        *(("logprobs", x) for x in (-1, 21)),
        ("seed", -1),
        *(("stop", x) for x in ("", ["a", ""])),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(UsageError, match=f"^{name} must be"):
        SamplingParams(**{name: value})


def test_an_unknown_parameter_is_refused():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)


def test_stop_may_be_one_text():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams().stop == ()
