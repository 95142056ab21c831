"""Needle in a haystack: a grid of prompt lengths and depths.

    noise   one number in five short sentences repeated        prose   one number in prose
    keys2, keys4   as many numbers in prose, one is asked for   sandwich   the classic sentence in prose, free answer
    code, lists, dialogue, languages, numbers   one number among the lines of such a text

Numbers are read teacher-forced after the beginning of the answer, which is exact for greedy decoding: the answer is
right where each of its tokens is the most likely one. The sandwich is generated, and scored by containment and by the
share of the answer's words that appear: not by the judge (a GPT) that the original uses."""

import random
import re
from typing import NamedTuple

from minillm.errors import UsageError
from minillm.evaluate.prompt import Prompt, chat, encode, largest
from minillm.evaluate.text import HAYSTACKS, Text

NOISE = ["The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."]


class Wording(NamedTuple):
    keys: list[str]
    intro: str
    needle: str  # of a key and its value
    question: str
    prefix: str  # of the answer


ONE = Wording(
    "Lisbon Oslo Quito Nairobi Hanoi Lima Dublin Cairo Prague Accra Havana Riga Kyoto Turin Bergen Cusco".split(),
    "",
    "One of the special magic numbers for {} is: {}.",
    "\n\nWhat is the special magic number for {} mentioned in the provided text?",
    "The special magic number for {} mentioned in the provided text is:",
)
# A small model tells keys apart if little stands between a key and its number, if it knows what to look for while it
# reads, and if the keys are less alike than cities.
SEVERAL = Wording(
    "elephant violin pyramid volcano umbrella bicycle telescope penguin cathedral hammock lighthouse tractor".split(),
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n",
    "The {} has number {}.",
    "\n\nWhich number has the {}?",
    "The {} has number",
)
SANDWICH = Wording(
    ["San Francisco"],
    "",
    "The best thing to do in {} is {}.",
    "\n\nWhat is the best thing to do in {}?",
    "The best thing to do in {} is",
)
EAT = "eat a sandwich and sit in Dolores Park on a sunny day"
SANDWICH_TOKENS = 32

KINDS = {"noise": 1, "prose": 1, "keys2": 2, "keys4": 4, "sandwich": 1}  # and how many needles each hides
KINDS |= dict.fromkeys((name for name in HAYSTACKS if name != "prose"), 1)


def haystack_of(kind):
    return kind if kind in HAYSTACKS else "prose"


def samples(kinds, lengths, depths, seeds, text):
    """What decides each sample. depths: 0 (the beginning) to 1, or [None]: drawn by lot."""
    return [
        {"kind": kind, "length": length, "depth": depth, "seed": seed}
        | ({} if kind == "noise" else {"text": text.digest})
        for length in lengths
        for kind in kinds
        for seed in seeds
        for depth in depths
    ]


def prompt(llm, sample, text):
    """The Prompt of a sample: as much of the haystack as makes it at most `length` tokens long."""
    kind, length = sample["kind"], sample["length"]
    rng = random.Random(f"{kind}/{length}/{sample['seed']}")
    n = KINDS[kind]
    wording = SANDWICH if kind == "sandwich" else SEVERAL if n > 1 else ONE
    keys = rng.sample(wording.keys, n)
    values = [EAT] if kind == "sandwich" else [str(rng.randrange(1_000_000, 10_000_000)) for _ in keys]
    needles = [wording.needle.format(key, value) for key, value in zip(keys, values, strict=True)]
    question, prefix = wording.question.format(keys[0]), wording.prefix.format(keys[0])
    depths = [rng.random() for _ in needles]
    if sample["depth"] is not None:
        depths[0] = sample["depth"]
    wanted = llm.encode(" " + values[0], bos=False)
    # A blank that is a token of its own is no part of the answer: a model may as well begin a line.
    n_blank = next(i for i, token in enumerate(wanted) if llm.tokenizer.token_bytes(token).strip())
    blank, wanted = wanted[:n_blank], wanted[n_blank:]
    hay = Text(" ".join(NOISE), "") if kind == "noise" else text
    start = 0 if kind == "noise" else rng.randrange(len(hay.parts))

    def texts(n):
        hidden = hide(hay.stretch(start, n), needles, depths)
        return chat(llm.tokenizer, wording.intro + hay.join(hidden), question, prefix)

    def fits(n):
        return sum(map(len, encode(llm, *texts(n)))) + len(blank) <= length

    if not fits(1):
        raise UsageError(f"--length {length} is too short for a needle and its question: give at least 256")
    context, tail = encode(llm, *texts(largest(fits, 1, length)))
    if kind == "sandwich":
        return Prompt(context, tail + blank, wanted, SANDWICH_TOKENS, grade=grade)
    return Prompt(context, tail + blank, wanted)


def hide(hay, needles, depths):
    """The parts of a text with each needle at its depth (a share of the characters), moved back to the end of a
    part."""
    total, begun, ends = sum(map(len, hay)), 0, []
    for part in hay:
        ends.append(begun)
        begun += len(part)
    places = [sum(end <= depth * total for end in ends) - 1 if depth < 1 else len(hay) for depth in depths]
    hay = list(hay)
    for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
        hay.insert(place, needle)
    return hay


def grade(prediction):
    """Scores of what was said after "The best thing to do in San Francisco is"."""
    said = set(re.findall(r"\w+", prediction.lower()))
    words = set(re.findall(r"\w+", EAT.lower()))
    return {"contained": float(EAT.lower() in prediction.lower()), "words": len(words & said) / len(words)}
