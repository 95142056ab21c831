"""From messages to the tokens of a prompt, and where in them a prefix may end that other requests share.

The template gets texts with marks in them, which are characters that stand for nothing, and what it makes of them is
tokenised in pieces that end at a mark. So the words of a message are never taken for a control token, and a prefix has
the same tokens whatever comes after it."""

import re
from dataclasses import dataclass, field

from minillm.errors import MinillmError
from minillm.server.errors import ApiError, bad
from minillm.server.likely import spelled

NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode has them for uses like this one


@dataclass
class Prompt:
    ids: list[int]
    ends: list[tuple[int, bool]] = field(default_factory=list)  # (tokens, whether a client said so) where a part ends
    prefix: object = None  # snapshots.Prefix: what it shares with other prompts
    continues: bool = False  # whether the answer goes on where a text ended
    text: str = ""  # of a completion, which it may have to repeat


class Marks:
    """Three characters that are in none of the texts: `cut` within a control token's name, `end` of a part, and
    `stop`, an end that the client asked for."""

    def __init__(self, texts):
        free = [mark for mark in NONCHARACTERS if not any(mark in text for text in texts)]
        if len(free) < 3:
            raise bad("the messages have characters that Unicode says are none (U+FDD0..U+FDEF): leave them out")
        self.cut, self.end, self.stop = free[:3]

    def without(self, text):
        return re.sub(f"[{self.cut}{self.end}{self.stop}]", "", text)

    def pieces(self, text):
        """Yields (piece, the mark after it)."""
        parts = re.split(f"([{self.cut}{self.end}{self.stop}])", text)
        yield from zip(parts[::2], [*parts[1::2], ""], strict=True)


def of_chat(llm, messages):
    """The Prompt of Messages. Where the last is the assistant's, the answer goes on with it. Raises ApiError."""
    marks = Marks([message.text for message in messages])
    talk, prefill = _talk(llm, messages)
    rendered = _rendered(llm, talk, marks) + _uncontrolled(llm, prefill, marks)
    prompt = Prompt([], continues=bool(prefill))
    for piece, mark in marks.pieces(rendered):
        if piece:
            prompt.ids += encoded(llm, piece, "messages", bos=not prompt.ids)
        if mark in (marks.end, marks.stop) and mark:
            prompt.ends.append((len(prompt.ids), mark == marks.stop))
    return checked(llm, prompt)


def _talk(llm, messages):
    """(Messages, the beginning of the answer to them). Raises ApiError where there is no chat template."""
    if not tokenizer(llm).has_chat_template:
        raise bad(f"{llm.config.name} has no chat template: ask /v1/completions, or start with --chat-template NAME")
    return (messages[:-1], messages[-1].text) if messages[-1].role == "assistant" else (messages, "")


def shown(llm, messages, begins):
    """The text that Messages become. begins: whether the beginning of an answer is a part of it."""
    talk, prefill = _talk(llm, messages)
    if not begins:
        return render(llm, [(message.role, message.text) for message in messages], add_generation_prompt=False)
    return render(llm, [(message.role, message.text) for message in talk]) + prefill


def tokenizer(llm):
    """The Tokenizer of a model that has one. Raises ApiError."""
    if llm.tokenizer is None:
        raise bad(f"{llm.config.name} has no tokenizer: give /v1/completions token ids")
    return llm.tokenizer


def plain_ids(llm, text, field, bos=True):
    """Token ids of a text in which control tokens are not recognised."""
    marks, ids = Marks([text]), []
    for piece, _ in marks.pieces(_uncontrolled(llm, text, marks)):
        ids += encoded(llm, piece, field, bos=bos and not ids)
    return ids


def of_text(llm, text):
    """The Prompt of a text or of token ids, as they stand: control tokens are recognised."""
    ids = encoded(llm, text, "prompt")
    return checked(llm, Prompt(ids, continues=True, text=text if isinstance(text, str) else spelled(llm, ids)))


def encoded(llm, text, field, bos=True):
    """Token ids. What has none is the client's fault. Raises ApiError."""
    try:
        return llm.encode(text, bos=bos)
    except MinillmError as error:
        raise bad(str(error), field) from None


def checked(llm, prompt):
    """Raise ApiError where it is empty, or longer than the context."""
    n, context = len(prompt.ids), llm.context
    if n == 0:
        raise bad("the prompt is empty: give some text")
    if n > context:
        message = f"the prompt has {n} tokens and the context {context}: shorten it"
        raise ApiError(400, message, type="exceed_context_size_error", n_prompt_tokens=n, n_ctx=context)
    return prompt


def _rendered(llm, messages, marks):
    """What the template makes of messages, with marks. A template that does something else to texts with marks in them
    gets them without those at the ends of parts."""
    plain = render(llm, [(message.role, message.text) for message in messages])
    for ends in (True, False):
        marked = [(message.role, _marked(llm, message, marks, ends)) for message in messages]
        text = render(llm, marked)
        if marks.without(text) == plain:
            return text
    raise bad("the chat template changes texts that hold control tokens: leave those out", "messages")


def render(llm, pairs, **settings):
    """The text of (role, text) pairs. What the template refuses is the client's fault. Raises ApiError."""
    try:
        return llm.tokenizer.render_chat([{"role": role, "content": text} for role, text in pairs], **settings)
    except MinillmError as error:
        raise bad(str(error), "messages") from None


def _marked(llm, message, marks, ends):
    """The text of a message: a mark in each control token, and, with `ends`, one after each part (before the spaces at
    its end, which templates trim)."""
    texts = []
    for part in message.parts:
        text = _uncontrolled(llm, part.text, marks)
        if ends:
            end = len(text.rstrip())
            text = text[:end] + (marks.stop if part.breaks else marks.end) + text[end:]
        texts.append(text)
    return "\n".join(texts)


def _uncontrolled(llm, text, marks):
    """A text with a mark after the first character of everything in it that is a control token's name."""
    names = sorted((name for name in llm.tokenizer.control_texts if len(name) > 1), key=len, reverse=True)
    if not names:
        return text
    return re.sub("|".join(map(re.escape, names)), lambda found: found[0][0] + marks.cut + found[0][1:], text)
