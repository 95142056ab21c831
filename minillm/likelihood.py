"""How likely a given text is: the log-probability of each of its tokens after those before it."""

import contextlib

import numpy as np

from minillm.errors import UsageError
from minillm.logprobs import MOST_LIKELY, Logprob
from minillm.model import MLP_ROWS

LOGIT_ROWS = 64  # rows of logits that exist at a time


def logits(llm, token_ids):
    """See LLM.logits."""
    ids = llm.encode(token_ids)
    with _reading(llm, ids, 4 * len(ids) * llm.config.vocab_size) as request:
        out = np.empty((len(ids), llm.config.vocab_size), np.float32)
        for lo in range(0, len(out), MLP_ROWS):
            with llm.engine.alone():
                out[lo : lo + MLP_ROWS] = request.model.logits(request.hidden[lo : lo + MLP_ROWS])
        return out


def of_prompt(llm, prompt, top):
    """See LLM.logprobs."""
    if not 0 <= top <= MOST_LIKELY:
        raise UsageError(f"top must be in 0..{MOST_LIKELY}, not {top!r}")
    ids = llm.encode(prompt)
    with _reading(llm, ids, workspace(llm)) as request:
        return [one for part in of_read(llm, request, ids, top) for one in part]


@contextlib.contextmanager
def _reading(llm, prompt, result):
    """A Request that has read a prompt with the full cache. result: bytes that are made of it."""
    session = llm.session()
    try:
        session.feed(prompt)
        request = session.request(whole=True, result=result)
        session.run(request)
        yield request
    finally:
        session.close()


def of_read(llm, request, ids, top):
    """Yields lists of Logprobs, in all one for each of the ids that a Request has read; None for the first token, which
    nothing is before. top: how many of the likeliest each has beside it."""
    yield [None]
    for lo in range(0, len(ids) - 1, LOGIT_ROWS):
        following = ids[lo + 1 : lo + 1 + LOGIT_ROWS]
        with llm.engine.alone():
            rows = request.model.logits(request.hidden[lo : lo + len(following)])
        yield [Logprob.of(row, token, top) for row, token in zip(rows, following, strict=True)]


def workspace(llm):
    """Bytes that `of_read` takes."""
    return 4 * LOGIT_ROWS * llm.config.vocab_size
