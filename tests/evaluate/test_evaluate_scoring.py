"""Scores of a prompt: one prefill shared by all configurations, answers read teacher-forced, greedy generation. The
oracle is a session of each configuration alone."""

import numpy as np
import pytest
import tiny_chat
from goldens import stepped

from minillm import LLM, CacheConfig, SamplingParams
from minillm.compress import reading
from minillm.errors import MinillmError
from minillm.evaluate import scoring
from minillm.evaluate.continuation import local_errors
from minillm.evaluate.prompt import Asked, Prompt
from minillm.evaluate.scoring import compressor_of, forced_scores, groups, log_softmax, score

CONFIGS = [
    CacheConfig("full"),
    CacheConfig("streaming", 0.3, recompress=16),
    CacheConfig("semanticache", 0.4),
    CacheConfig("random", 64),
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    with LLM.load(tiny_chat.make(tmp_path_factory.mktemp("model") / "model"), cache=CacheConfig("full")) as llm:
        yield llm


def tokens(seed, n):
    return np.random.default_rng(seed).integers(32, 127, n).tolist()


def read(llm, config, prompt, protocol):
    """A session that has read the prompt, and its logits (vocab,). What comes after the compression is read in full."""
    llm.set_cache(config)
    session = llm.session()
    session.feed(prompt.context + (prompt.question if protocol == "aware" else []))
    logits = session.read()
    if protocol == "agnostic":
        hidden = reading.extend(llm.model, prompt.question, session.cache)
        logits = llm.model.logits(hidden[-1:])[0]
    return session, logits


@pytest.mark.parametrize("protocol", ["aware", "agnostic"])
def test_forced_scores_are_those_of_reading_token_by_token(llm, protocol):
    prompt = Prompt(tokens(0, 300), tokens(1, 20), tokens(2, 12))
    results = score(llm, prompt, CONFIGS, protocol)
    wanted, full = np.array(prompt.answer), None
    for config, result in zip(CONFIGS, results, strict=True):
        session, last = read(llm, config, prompt, protocol)
        rows = [last]
        for token in prompt.answer[:-1]:
            hidden = reading.extend(llm.model, [token], session.cache)
            rows.append(llm.model.logits(hidden)[0])
        session.close()
        log_q = log_softmax(np.array(rows))
        full = log_q if full is None else full
        scores = result["scores"]
        assert scores["accuracy"] == np.mean(log_q.argmax(axis=1) == wanted)
        assert scores["em"] == float((log_q.argmax(axis=1) == wanted).all())
        assert scores["nll"] == pytest.approx(-log_q[np.arange(12), wanted].mean(), abs=1e-4)
        assert scores["kl"] == pytest.approx((np.exp(full) * (full - log_q)).sum(axis=1).mean(), abs=1e-4)
    assert results[0]["scores"]["kl"] == 0 and results[0]["kept"] == 1
    assert all(result["scores"]["kl"] > 1e-3 for result in results[1:])


def test_an_answer_that_the_model_gives_is_exact(llm):
    """em is what greedy decoding says: with its own greedy answer as the right one, all tokens are right."""
    context = tokens(3, 250)
    for config in CONFIGS[:1] + CONFIGS[2:]:
        llm.set_cache(config)
        session = llm.session()
        session.feed(context)
        list(session.stream(SamplingParams(max_tokens=10, ignore_eos=True)))
        answer = session.answer.token_ids
        session.close()
        assert score(llm, Prompt(context, [], answer), [config], "aware")[0]["scores"]["em"] == 1.0
        answer[5] = (answer[5] + 1) % 250
        assert score(llm, Prompt(context, [], answer), [config], "aware")[0]["scores"]["em"] == 0.0


@pytest.mark.parametrize("protocol", ["aware", "agnostic"])
def test_generation_is_that_of_a_session(llm, protocol):
    """Greedy, all configurations decoded together, compressed again as it grows."""
    prompt = Prompt(tokens(4, 280), tokens(5, 30), max_tokens=60, grade=lambda text: {"length": len(text)})
    for config, result in zip(CONFIGS, score(llm, prompt, CONFIGS, protocol), strict=True):
        session, logits = read(llm, config, prompt, protocol)
        llm.set_cache(config)
        ids = []
        while len(ids) < 60 and (token := int(logits.argmax())) not in llm.stop_ids:
            ids.append(token)
            logits = stepped(llm, session, [token])[0]
        session.close()
        assert result["prediction"] == llm.tokenizer.decode(ids)
        assert result["scores"] == {"length": len(result["prediction"])}


def test_stop_ids_and_the_fewest_tokens(llm):
    context = tokens(6, 200)
    free = score(llm, Prompt(context, [], max_tokens=8, grade=lambda text: {}), CONFIGS[:1], "aware")[0]["prediction"]
    first = llm.encode(free)[0]
    stopped = Prompt(context, [], max_tokens=8, stop_ids=frozenset([first]), grade=lambda text: {})
    assert score(llm, stopped, CONFIGS[:1], "aware")[0]["prediction"] == ""
    stopped.min_tokens = 1
    text = score(llm, stopped, CONFIGS[:1], "aware")[0]["prediction"]
    assert text and text[0] != free[0]


def test_log_softmax_and_scores_of_known_distributions(llm):
    probabilities = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    np.testing.assert_allclose(log_softmax(np.log(probabilities) + 7), np.log(probabilities))

    class Fake:
        class model:  # noqa: N801
            @staticmethod
            def logits(x):
                return np.log(x)

    other = np.array([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]])
    scores, same = forced_scores(Fake, [other, probabilities], probabilities, [0, 2])
    assert scores["accuracy"] == 0.5 and scores["em"] == 0 and scores["first"] == 0
    assert same["kl"] == 0 and same["accuracy"] == same["em"] == same["first"] == 1
    assert forced_scores(Fake, [other], probabilities, [1, 1])[0]["first"] == 0.5
    assert scores["nll"] == pytest.approx(-(np.log(0.25) + np.log(0.7)) / 2)
    assert scores["kl"] == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2)


def told(llm, caches, compressors, question, max_tokens):
    """What the first of two caches answers token by token, and for each token whether the other agrees, and the KL."""
    both = zip(caches, compressors, strict=True)
    last, said, found = [reading.extend(llm.model, question, *one)[-1:] for one in both], [], []
    while len(found) < max_tokens:
        log_p, log_q = (log_softmax(llm.model.logits(x))[0] for x in last)
        token = int(log_p.argmax())
        found.append((token == log_q.argmax(), (np.exp(log_p) * (log_p - log_q)).sum()))
        if token in llm.stop_ids:
            break
        said.append(token)
        last = [reading.extend(llm.model, [token], cache) for cache in caches]
    return said, np.mean(found, axis=0)


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("protocol", ["agnostic", "document"])
def test_the_full_caches_own_answers_are_what_is_agreed_on(llm, protocol, in_turn):
    """The full cache says what comes, and the other reads that: each question after the context, or after the question
    and the answer before it."""
    context, asked = Prompt(tokens(8, 300), []), Asked([tokens(9, 20), tokens(10, 30)], 12, in_turn)
    results = score(llm, Prompt(context.context, [], asked=asked), CONFIGS[1:], protocol)
    for config, result in zip(CONFIGS[1:], results, strict=True):
        sessions = [read(llm, one, context, "aware")[0] for one in (CONFIGS[0], config)]
        caches = [session.cache for session in sessions]
        compressors = [None, compressor_of(llm, config) if protocol == "document" else None]
        for cache in caches if protocol == "document" else ():
            cache.settle()
        means = []
        for question in asked.questions:
            before = [cache.fork() for cache in caches]
            said, mean = told(llm, [cache.fork() for cache in caches], compressors, question, asked.max_tokens)
            means.append(mean)
            if in_turn:
                for cache, compressor in zip(before, compressors, strict=True):
                    reading.extend(llm.model, question, cache, compressor)
                    reading.extend(llm.model, said, cache, compressor)
                caches = before
        accuracy, kl = np.mean(means, axis=0)
        assert result["scores"]["accuracy"] == pytest.approx(accuracy)
        assert result["scores"]["kl"] == pytest.approx(kl, abs=1e-4) and kl > 1e-3
        for session in sessions:
            session.close()


def test_configurations_share_a_prefill_as_far_as_memory_goes(llm, monkeypatch):
    prompt = Prompt(tokens(7, 2000), [])
    assert [len(g) for g in groups(llm, prompt, CONFIGS, 1)] == [4]
    full = scoring.cache_bytes(llm.config, CacheConfig("full"), llm.model.ops, 2000)
    monkeypatch.setattr(llm.model.ops, "available_memory", lambda: 2 * 2.45 * full)
    assert [len(g) for g in groups(llm, prompt, CONFIGS, 1)] == [2, 2]  # 1 + .3, .4 + .03 beside the full one
    assert [len(g) for g in groups(llm, prompt, CONFIGS, 8)] == [1, 1, 1, 1]

    prompt = Prompt(tokens(7, 300), [], tokens(8, 4))
    monkeypatch.setattr(llm.model.ops, "available_memory", lambda: 0)
    apart = score(llm, prompt, CONFIGS, "aware")
    monkeypatch.undo()
    together = score(llm, prompt, CONFIGS, "aware")
    assert [r["scores"] for r in apart] == [r["scores"] for r in together]
    assert llm.pool.bytes_in_use == 0


def test_a_prompt_beyond_the_context_is_refused(llm):
    with pytest.raises(MinillmError, match="4097 tokens .* context is 4096"):
        score(llm, Prompt(tokens(9, 4090), [], tokens(9, 7)), CONFIGS, "aware")


def test_local_errors_against_a_literal_softmax(llm):
    """float64, entry by entry, over what the pages hold; every layer sees the hidden states of the full cache."""
    from minillm.cache.kv_cache import KVCache

    context, following = tokens(10, 260), tokens(11, 6)
    compressors = [None, *(compressor_of(llm, config) for config in CONFIGS[1:])]
    caches = [KVCache(llm.pool, llm.config.n_layers, llm.config.n_kv_heads) for _ in compressors]
    reading.finish(reading.read(llm.model, context, caches, compressors))
    errors = local_errors(llm, caches[0], caches, following)
    assert errors.shape == (4, 2)
    assert (errors[0] == 0).all() and (errors[1:] > 0.01).all()

    # Layer 0, whose input is the embedding alone.
    c, model = llm.config, llm.model
    block = model.blocks[0]
    x = model.embedding.data[following].astype(np.float64)
    x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + c.rms_eps) * block.attention_norm
    q, k, v = ((x @ w.data.T.astype(np.float64)).reshape(6, -1, c.head_dim) for w in (block.wq, block.wk, block.wv))

    def rotate(y, pos):
        half = c.head_dim // 2
        angle = pos * 10000.0 ** (-np.arange(half) / half)
        a, b = y[:half], y[half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])

    def outputs(cache):
        rows = []
        for i in range(6):
            for head in range(c.n_heads):
                kv = head // (c.n_heads // c.n_kv_heads)
                keys, values, log_size, _ = cache.layer(0).read(kv)
                new = [rotate(k[j, kv], 260 + j) for j in range(i + 1)]
                scores = np.concatenate([keys, new]) @ rotate(q[i, head], 260 + i) / np.sqrt(c.head_dim)
                weights = np.exp(scores + np.concatenate([log_size, np.zeros(i + 1)]))
                rows.append(weights / weights.sum() @ np.concatenate([values, v[: i + 1, kv]]))
        return np.array(rows)

    full = outputs(caches[0])
    for cache, error in zip(caches[1:], errors[1:, 0], strict=True):
        assert error == pytest.approx(np.linalg.norm(outputs(cache) - full) / np.linalg.norm(full), rel=1e-4)
        cache.clear()


def test_fidelity_is_part_of_the_scores(llm):
    prompt = Prompt(tokens(12, 300), [], tokens(13, 16), fidelity=True)
    full, *others = score(llm, prompt, CONFIGS, "agnostic")
    assert full["scores"]["error"] == 0
    for result in others:
        assert result["scores"]["error"] == pytest.approx(result["layers"].mean()) and result["scores"]["error"] > 0
        assert result["lengths"].sum() == pytest.approx(result["kept"] * 300 * result["lengths"].size)
