"""A prompt as the tasks make it: what is compressed, what is asked, and how the answer is judged."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from minillm.errors import MinillmError

PROTOCOLS = {
    "aware": "context and question are compressed together, the setting of most papers",
    "agnostic": "the context is compressed before the question is known",
    "document": "so, too, and settled; the question is then read and compressed by itself, as a Document is asked",
}


class Asked(NamedTuple):
    """Questions about a context: token ids of each, with the beginning of an answer of at most so many tokens. in_turn:
    each after the answer to the one before, else each by itself."""

    questions: list[list[int]]
    max_tokens: int
    in_turn: bool = False

    @property
    def length(self):
        """Tokens with their answers, at most."""
        lengths = [len(question) + self.max_tokens for question in self.questions]
        return sum(lengths) if self.in_turn else max(lengths)


@dataclass
class Prompt:
    """Token ids, and what is wanted of a model that has read them.

    answer: read teacher-forced after the prompt, where there is one right answer. max_tokens: generated (greedy) and
    then graded, where there are many. asked: questions whose answers are the full cache's own."""

    context: list[int]
    question: list[int]
    answer: list[int] = field(default_factory=list)
    max_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()  # beside those of the model
    min_tokens: int = 0  # tokens before which no stop id is generated
    grade: Callable | None = None  # text generated -> {name of a score: number}
    asked: Asked | None = None
    fidelity: bool = False  # measure the local error of every layer for the tokens of `answer`

    @property
    def length(self):
        """Tokens, with all that may be generated."""
        asked = self.asked.length if self.asked else 0
        return len(self.context) + len(self.question) + max(len(self.answer), self.max_tokens, asked)


def chat(tokenizer, context, question, prefix=""):
    """Texts (head, tail) of a turn of a chat: head ends with the context, tail has the question, the template's
    beginning of an answer, and `prefix`. Without a chat template: the texts as they stand."""
    if not tokenizer.has_chat_template:
        return context, question + prefix
    rendered = tokenizer.render_chat([{"role": "user", "content": context + question}])
    at = rendered.rfind(question.strip())  # templates trim what they are given
    if at < 0:
        raise MinillmError("the chat template changes the text of a message: context and question cannot be told apart")
    return rendered[:at], rendered[at:] + prefix


def encode(llm, head, tail):
    """Token ids of the two, encoded apart, so that both protocols read the same tokens."""
    return llm.encode(head), llm.encode(tail, bos=False)


def largest(fits, low, high):
    """The largest n of low..high with fits(n); low where none does. fits: n -> bool, falling.

    n is doubled until it does not fit, and then halved in: nothing is tried that is twice too long."""
    step = 1
    while low + step <= high and fits(low + step):
        low, step = low + step, 2 * step
    high = min(high, low + step - 1)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
