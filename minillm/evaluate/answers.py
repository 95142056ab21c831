"""Answers: a text is read and compressed before anything is asked; then questions are, and the full cache's own greedy
answers are read. What stays the most likely token, and by how much the rest moves, says what a cache can still tell."""

from typing import NamedTuple

from minillm.errors import UsageError
from minillm.evaluate.prompt import Asked, Prompt, chat, encode, largest
from minillm.evaluate.text import read_haystack, read_text

GENERAL = (
    "Summarise this text in two sentences.",
    "Who or what is this text mainly about?",
    "What happens at the end of the text?",
    "Which mood or tone does the text have, and why?",
)
SPREAD = 0.6180339887  # of a text, from the beginning of one sample to that of the next: they overlap as late as can be


class Kind(NamedTuple):
    """text: its haystack's name, or the held-out text. questions: asked of it; in_turn: one after another in a talk,
    else each for itself."""

    text: str
    questions: tuple[str, ...]
    in_turn: bool = False


KINDS = {
    "prose": Kind("heldout", GENERAL),
    "dialogue": Kind("dialogue", (*GENERAL[:3], "What do the speakers disagree about?")),
    "code": Kind(
        "code",
        ("What does this code do?", "Which functions are defined here?", "Write the next lines.", "Find a bug in it."),
    ),
    "lists": Kind("lists", (GENERAL[0], "What do the entries have in common?", "Name three entries.", GENERAL[2])),
    "talk": Kind("heldout", ("What is this about?", "Give one more detail of that.", "And how does it end?"), True),
}
ANSWER = "\u0001answer\u0001"  # stands for an answer when a template is asked what comes after it


def text_of(kind, path=None):
    """The Text that a kind asks about. path: of the user's own in place of the held-out one."""
    name = KINDS[kind].text
    return read_text(path, "heldout.txt") if name == "heldout" else read_haystack(name)


def samples(kinds, lengths, following, seeds, texts):
    """kinds: of KINDS; texts: {kind: Text}. length: tokens of the text in its chat; following: of an answer at most."""
    return [
        {"kind": kind, "length": length, "following": following, "seed": seed, "text": texts[kind].digest}
        for length in lengths
        for kind in kinds
        for seed in seeds
    ]


def prompt(llm, sample, text):
    """The Prompt of a sample: as much of its stretch of the text as makes `length` tokens; the questions after it."""
    kind, length = KINDS[sample["kind"]], sample["length"]
    start = int(sample["seed"] * SPREAD % 1 * len(text.parts))

    def turn(n):
        return chat(llm.tokenizer, text.join(text.stretch(start, n)), f"\n\n{kind.questions[0]}")

    def fits(n):
        return len(llm.encode(turn(n)[0])) <= length

    if not fits(1):
        raise UsageError(f"--length {length} has no room for one sentence of the text: give at least 256")
    head, tail = turn(largest(fits, 1, min(length, len(text.parts))))
    context, first = encode(llm, head, tail)
    begins = _following_turn if kind.in_turn else _first_turn
    others = [llm.encode(begins(llm.tokenizer, question), bos=False) for question in kind.questions[1:]]
    asked = Asked([first, *others], sample["following"], kind.in_turn)
    return Prompt(context, [], asked=asked)


def _first_turn(tokenizer, question):
    return chat(tokenizer, "text", f"\n\n{question}")[1]


def _following_turn(tokenizer, question):
    """What stands between an answer and the next one. Without a chat template: the question."""
    if not tokenizer.has_chat_template:
        return f"\n\n{question}"
    messages = [("user", "text"), ("assistant", ANSWER), ("user", question)]
    rendered = tokenizer.render_chat([{"role": role, "content": content} for role, content in messages])
    return rendered.partition(ANSWER)[2]
