"""How likely a given text is: the log-probability of each of its tokens after those before it."""

from minillm.errors import UsageError
from minillm.logprobs import MOST_LIKELY, Logprob

LOGIT_ROWS = 64  # rows of logits that exist at a time


def of_prompt(llm, prompt, top):
    """See LLM.logprobs."""
    if not 0 <= top <= MOST_LIKELY:
        raise UsageError(f"top must be in 0..{MOST_LIKELY}, not {top!r}")
    ids, session = llm.encode(prompt), llm.session()
    try:
        session.feed(ids)
        request = session.request(whole=True, result=workspace(llm))
        session.run(request)
        return [one for part in of_read(llm, request, ids, top) for one in part]
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
