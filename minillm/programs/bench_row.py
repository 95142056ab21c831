"""One row of minillm.bench, measured in a process of its own: so that its memory is its own, and the time from the
start of a process to its first token can be taken.

    python -m minillm.programs.bench_row < request.json

The request: model, load (keywords of LLM.load), cache (keywords of CacheConfig), ids (depth + n token ids), depth,
kind ("pp": n tokens are read at once; "tg": one by one), repetitions. The answers are lines of JSON: {"first_token":
true} when the logits after the prompt are there, {"seconds": s} for each repetition, then all the rest.
"""

import json
import sys
import time

from minillm import LLM, CacheConfig, MinillmError, SamplingParams
from minillm.engine.request import Request
from minillm.memory import peak_memory
from minillm.sampling import Drawn


def main():
    request = json.load(sys.stdin)
    try:
        answer(request)
    except (MinillmError, MemoryError) as error:
        say(error=str(error) or "out of memory")


def say(**words):
    print(json.dumps(words), flush=True)


def answer(request):
    ids, depth, kind = request["ids"], request["depth"], request["kind"]
    with LLM.load(request["model"], cache=CacheConfig(**request["cache"]), **request["load"]) as llm:
        prompt = ids if kind == "pp" else ids[: max(depth, 1)]
        past = read(llm, prompt)
        say(first_token=True)  # all of this was the warm-up, too
        if len(prompt) != depth:
            past.clear()
            past = read(llm, ids[:depth])
        for _ in range(request["repetitions"]):
            cache, seconds = measure(llm, past.fork(), ids[depth:], kind)
            say(seconds=seconds)
            state = {"cache_bytes": cache.bytes_in_use, "kept": cache.kept}
            cache.clear()
        peak, ops = peak_memory(), llm.model.ops  # before the bandwidth is measured, which takes memory
        say(
            backend=ops.name,
            dtype=llm.dtype,
            load_seconds=llm.load_seconds,
            weight_bytes=llm.model.nbytes,
            peak_bytes=peak,
            bandwidth=ops.bandwidth(),
            **state,
        )


def read(llm, ids):
    """A cache that holds these tokens."""
    session = llm.session()
    if ids:
        session.feed(ids)
        session.read()
    return session.cache


def measure(llm, cache, ids, kind):
    """The tokens read over the cache, all at once (pp) or one by one (tg). -> (the cache, seconds)"""
    if kind == "pp":
        request = Request(llm.model, llm.compressor, cache, list(ids))
    else:
        request = Given(llm.model, llm.compressor, cache, list(ids[:1]), SamplingParams(max_tokens=len(ids)))
        request.resumes, request.given = True, [*ids[1:], ids[0]]
    start = time.perf_counter()
    llm.engine.run([request])
    seconds = time.perf_counter() - start
    if request.error is not None:
        raise request.error
    return cache, seconds


class Given(Request):
    """Decodes given tokens, whatever the model says."""

    def take(self, following):
        super().take(Drawn(self.given[len(self.token_ids)]))


if __name__ == "__main__":
    main()
