"""General questions about a text, whatever it is, each with the beginning of an answer. What the model attends to as it
reads them says what answers need: a repetition of the text alone needs what copying does."""

from contextlib import suppress

from minillm.errors import MinillmError

ASKED = (
    ("Give a short summary of the text above.", "The text is about a number of things. First, it says that the"),
    ("List the most important facts in it.", "The most important facts are:\n\n1. The\n2. In\n3. It"),
    ("Who is mentioned in it, and what do they do?", "The people mentioned in the text are the"),
)
TEXT = "\u0001text\u0001"  # stands for the text when a template is asked what comes after it


def talk(tokenizer):
    """The questions and answers one after another, as text that comes after a text: turns of a chat or, where there is
    no template for that, on lines of their own."""
    said = [words for pair in ASKED for words in pair]
    if tokenizer.has_chat_template:
        turns = [f"{TEXT}\n\n{said[0]}", *said[1:]]
        roles = ("user", "assistant") * len(ASKED)
        with suppress(MinillmError):  # a template that cannot have it so
            chat = tokenizer.render_chat(
                [{"role": role, "content": words} for role, words in zip(roles, turns, strict=True)],
                add_generation_prompt=False,
            )
            if TEXT in chat:
                return chat.partition(TEXT)[2]
    return "".join(f"\n\n{words}" for words in said)
