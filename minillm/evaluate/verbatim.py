"""Verbatim: a stretch of text is read, and then repeated from a place in it on. The answer begins with the words that
name the place; what follows them there is read teacher-forced."""

import random
import re

from minillm.errors import UsageError
from minillm.evaluate.prompt import Prompt, chat, encode, largest

CUE_WORDS = 16
QUESTION = "\n\nRepeat the text."


def samples(kinds, lengths, following, seeds, text):
    """kinds: names of haystacks. length: tokens of a prompt; following: tokens that are scored."""
    return [
        {"kind": kind, "length": length, "following": following, "seed": seed, "text": text.digest}
        for length in lengths
        for kind in kinds
        for seed in seeds
    ]


def prompt(llm, sample, text):
    """The Prompt of a sample: as much of the text as makes it at most `length` tokens long."""
    length, following = sample["length"], sample["following"]
    rng = random.Random(f"verbatim/{sample['kind']}/{length}/{sample['seed']}")
    start, depth = rng.randrange(len(text.parts)), rng.random()

    def texts(n):
        """-> (head, tail) of the chat, and what follows the cue; None where there is no room for that."""
        stretch = text.join(text.stretch(start, n))
        cue = find_cue(stretch, depth, following)
        if cue is None:
            return None
        return chat(llm.tokenizer, stretch, QUESTION, stretch[cue]), stretch[cue.stop :]

    def fits(n):
        found = texts(n)
        return found is None or sum(map(len, encode(llm, *found[0]))) <= length

    found = texts(largest(fits, 1, min(length, len(text.parts))))
    if found is None or not fits(1):
        raise UsageError(f"--length {length} is too short to repeat {following} tokens of it: give at least 512")
    context, question = encode(llm, *found[0])
    return Prompt(context, question, llm.encode(found[1], bos=False)[:following])


def find_cue(text, depth, following):
    """The slice of the CUE_WORDS words at a depth (0 to 1) that are nowhere else in the text, and that are followed by
    as many words as tokens are wanted at most; None where there are none."""
    words = list(re.finditer(r"\S+", text))
    room = len(words) - CUE_WORDS - following
    for i in range(room):
        place = (int(depth * room) + i) % room
        cue = slice(words[place].start(), words[place + CUE_WORDS - 1].end())
        if text.count(text[cue]) == 1:
            return cue
    return None
