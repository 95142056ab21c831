"""From a Prompt and cache configurations to scores: one prefill for all of them, a teacher-forced reading of the answer
where there is one right answer, greedy generation where there are many."""

import numpy as np

from minillm.compress.config import CacheConfig
from minillm.compress.reading import extend, finish, read
from minillm.engine.admission import cache_bytes
from minillm.engine.request import Request
from minillm.errors import MinillmError
from minillm.evaluate.continuation import local_errors
from minillm.logprobs import log_softmax
from minillm.sampling import SamplingParams

LOGIT_ROWS = 64  # rows of logits that exist at a time
FREE_SHARE = 0.5  # of the free memory that the caches of one prefill may take


def compressor_of(llm, config):
    return None if config.method == "full" else llm.compressor_for(config)


def score(llm, prompt, configs, protocol, processes=1):
    """-> for each CacheConfig {"kept", "memory", "lengths" (L, H), "scores": {name: number}}, and what the Prompt asks
    for: "prediction" (text generated), "layers" (L,) local errors. kept, memory, lengths: of the entries when the
    prompt's compression is over, as shares and a head. processes: that share this machine's memory."""
    if prompt.length > llm.context:
        raise MinillmError(
            f"a prompt of {prompt.length} tokens with its answer, and the context is {llm.context}: a smaller --length"
        )
    results = []
    for group in groups(llm, prompt, configs, processes):
        results += _score_group(llm, prompt, group, protocol)
    return results


def groups(llm, prompt, configs, processes):
    """Lists of configurations whose caches fit into memory together with the full one: those share a prefill."""

    def size(config):
        return cache_bytes(llm.config, config, llm.model.ops, prompt.length)

    room, free = float("inf"), llm.model.ops.available_memory()
    if free is not None:
        room = FREE_SHARE * free / processes - size(CacheConfig("full"))
    group, taken = [], 0
    for config in configs:
        if group and taken + size(config) > room:
            yield group
            group, taken = [], 0
        group.append(config)
        taken += size(config)
    if group:
        yield group


def _score_group(llm, prompt, configs, protocol):
    """The first cache is the full one, which the others are compared with."""
    compressors = [None, *(compressor_of(llm, config) for config in configs)]
    caches = [llm.new_cache(dtype=config.dtype) for config in (CacheConfig("full"), *configs)]
    try:
        for compressor in filter(None, compressors) if protocol == "document" else ():
            compressor.check_settles()
        first = prompt.context + (prompt.question if protocol == "aware" else [])
        hidden = finish(read(llm.model, first, caches, compressors))
        last = [hidden[-1:]] * len(caches)  # the state after which the answer begins
        del hidden
        results = [
            {"kept": cache.kept, "memory": cache.memory, "lengths": cache.lengths.copy(), "scores": {}}
            for cache in caches[1:]
        ]
        for cache in caches if protocol == "document" else ():
            cache.settle()
        if protocol != "aware" and prompt.question:
            asked = compressors if protocol == "document" else [None] * len(caches)
            last = [extend(llm.model, prompt.question, *with_)[-1:] for with_ in zip(caches, asked, strict=True)]
        if prompt.answer:
            full, *states = [read_answer(llm, *one, prompt.answer) for one in zip(caches, last, strict=True)]
            for result, scores in zip(results, forced_scores(llm, states, full, prompt.answer), strict=True):
                result["scores"] |= scores
        if prompt.asked:
            reading = compressors if protocol == "document" else [None] * len(caches)
            for result, scores in zip(results, agreement(llm, caches, reading, prompt.asked), strict=True):
                result["scores"] |= scores
        if prompt.fidelity:
            errors = local_errors(llm, caches[0], caches[1:], prompt.answer)
            for result, layers in zip(results, errors, strict=True):
                result["layers"] = layers
                result["scores"]["error"] = float(layers.mean())
        if prompt.max_tokens:
            texts = generate(llm, prompt, caches[1:], compressors[1:], last[1:])
            for result, text in zip(results, texts, strict=True):
                result["prediction"] = text
                result["scores"] |= prompt.grade(text)
        return results
    finally:
        for cache in caches:
            cache.clear()
        llm.trim()


def read_answer(llm, cache, last, answer):
    """The states (n, dim) that predict each of the n tokens of an answer. The cache is left as it is."""
    if len(answer) == 1:
        return last
    fork = cache.fork()
    try:
        return np.concatenate([last, extend(llm.model, answer[:-1], fork)])
    finally:
        fork.clear()


def forced_scores(llm, states, full, answer):
    """Scores of each of several caches. em: whether every answer token is the most likely one, so that greedy decoding
    would say it; accuracy: the share of those that are; first: the share before the first one that is not; nll: nats a
    token; kl: nats a token from the full cache's distribution to this one's.

    states, full (n, dim): what `read_answer` gives for the compressed caches and for the full one."""
    wanted, found = np.asarray(answer), [([], [], []) for _ in states]
    for lo in range(0, len(wanted), LOGIT_ROWS):
        rows = slice(lo, lo + LOGIT_ROWS)
        log_p, here = log_softmax(llm.model.logits(full[rows])), np.arange(len(wanted[rows]))
        for (right, nll, kl), x in zip(found, states, strict=True):
            log_q = log_softmax(llm.model.logits(x[rows]))
            right += (log_q.argmax(axis=1) == wanted[rows]).tolist()
            nll += (-log_q[here, wanted[rows]]).tolist()
            kl += (np.exp(log_p) * (log_p - log_q)).sum(axis=1).tolist()
    return [
        {
            "em": float(all(right)),
            "accuracy": float(np.mean(right)),
            "first": [*right, False].index(False) / len(right),
            "nll": float(np.mean(nll)),
            "kl": max(float(np.mean(kl)), 0.0),
        }
        for right, nll, kl in found
    ]


def agreement(llm, caches, compressors, asked):
    """{score: mean over the questions} of each cache but the first, the full one, whose greedy answers they read. Those
    with a Compressor compress question and answer as they do any text."""
    found, talks = [[] for _ in caches[1:]], [cache.fork() for cache in caches]
    try:
        for question in asked.questions:
            asking = [cache.fork() for cache in talks]
            try:
                last = [extend(llm.model, question, *one)[-1:] for one in zip(asking, compressors, strict=True)]
                answer, ends = greedy(llm, asking[0], last[0], asked.max_tokens)
                full, *states = [read_answer(llm, *one, answer + ends) for one in zip(asking, last, strict=True)]
                wanted = llm.model.logits(full).argmax(axis=1)
                for scores, one in zip(found, forced_scores(llm, states, full, wanted), strict=True):
                    scores.append(one)
                if asked.in_turn:
                    for one in zip(asking, compressors, strict=True):
                        extend(llm.model, answer, *one)
                    talks, asking = asking, talks
            finally:
                for cache in asking:
                    cache.clear()
    finally:
        for cache in talks:
            cache.clear()
    return [{name: float(np.mean([one[name] for one in scores])) for name in scores[0]} for scores in found]


def greedy(llm, cache, last, max_tokens):
    """The greedy answer of a cache after a state (1, dim): its tokens, and [one of those that end it] if it ends. The
    cache is left as it is."""
    fork = cache.fork()
    request = Request(llm.model, None, fork, [], SamplingParams(max_tokens=max_tokens), stop_ids=llm.stop_ids)
    request.hidden = last
    try:
        llm.engine.run([request])
    finally:
        fork.clear()
    if request.error is not None:
        raise request.error
    return request.token_ids, [min(llm.stop_ids)] if request.stop_reason == "eos" else []


def generate(llm, prompt, caches, compressors, last):
    """Greedy texts after the prompt, decoded together; what is generated is compressed as the configurations say."""
    params, requests = SamplingParams(max_tokens=prompt.max_tokens), []
    for cache, compressor, hidden in zip(caches, compressors, last, strict=True):
        request = Request(llm.model, compressor, cache, [], params, stop_ids=llm.stop_ids | prompt.stop_ids)
        request.hidden, request.min_tokens = hidden, prompt.min_tokens
        requests.append(request)
    llm.engine.run(requests)
    for request in requests:
        if request.error is not None:
            raise request.error
    return [llm.tokenizer.decode(request.token_ids) for request in requests]
