"""The synthetic tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654), after the rules of its published data generator.

Every sample is made as long as the tested tokenizer lets it be: prompt (with chat template) and room for the answer
together are at most `length` tokens. A prediction scores the share of its references that it contains, whatever the
case. Prose, where the rules want essays, is the haystack text, cut into sentences by a rule of our own (they use NLTK).
"""

import functools
import math
import random
import string
import uuid
from importlib import resources

from minillm.errors import MinillmError, UsageError
from minillm.evaluate.needles import NOISE
from minillm.evaluate.prompt import Prompt, chat, encode, largest
from minillm.evaluate.text import split_sentences

DEPTHS = [round(100 * i / 39) for i in range(40)]
NEEDLE = "One of the special magic {kind} for {key} is: {value}."

NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n",
    "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)
VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
    "\nQuestion: Find all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {n} variables are assigned the value "
    "{query}, they are: ",
)
CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n",
    "\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. ",
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)

# haystack, kind of key, kind of value, keys, values a key, keys asked for
NEEDLE_TASKS = {
    "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("prose", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("prose", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("prose", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needles", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needles", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("prose", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("prose", "words", "numbers", 4, 1, 4),
}
ANSWER_TOKENS = dict.fromkeys(NEEDLE_TASKS, 128) | {"vt": 30, "cwe": 120, "fwe": 50}
TASKS = tuple(ANSWER_TOKENS)

HOPS = 4  # of vt
VT_EXAMPLE = 500  # tokens of the solved example before a vt question
COMMON = 10  # words to be found in cwe
LONG = 4096  # from this length on, cwe repeats its words more often
WORD_LENGTH = 6  # letters of a coded word of fwe
ALPHA = 2.0  # of the zeta distribution of fwe
ZETA = math.pi**2 / 6  # zeta(ALPHA)


def samples(tasks, lengths, seeds, text):
    return [
        {"kind": task, "length": length, "seed": seed}
        | ({"text": text.digest} if task in NEEDLE_TASKS and NEEDLE_TASKS[task][0] == "prose" else {})
        for length in lengths
        for task in tasks
        for seed in seeds
    ]


def prompt(llm, sample, text):
    """The Prompt of a sample. Raises MinillmError where `length` is too short for the task."""
    kind, length = sample["kind"], sample["length"]
    room = length - ANSWER_TOKENS[kind]
    maker = {"vt": _vt, "cwe": _cwe, "fwe": _fwe}.get(kind, _niah)
    head, tail, references = maker(llm, sample, room, text)
    context, question = encode(llm, head, tail)
    if len(context) + len(question) > room:
        raise UsageError(f"{kind} does not fit into --length {length}: give a greater one, or leave it out of --task")
    return Prompt(
        context,
        question,
        max_tokens=ANSWER_TOKENS[kind],
        grade=lambda prediction: {"score": string_match_all(prediction, references)},
    )


def string_match_all(prediction, references):
    """The share of the references that the prediction contains, whatever the case."""
    cleaned = "".join("\n" if character < " " else character for character in prediction.strip()).strip().lower()
    return sum(reference.lower() in cleaned for reference in references) / len(references)


@functools.cache
def words(*kinds):
    """The word lists of PyPI wonderwords, sorted."""
    try:
        folder = resources.files("wonderwords") / "assets"
    except ModuleNotFoundError:
        raise UsageError("RULER takes its words from wonderwords: pip install 'minillm-engine[eval]'") from None
    lists = [(folder / f"{kind}list.txt").read_text(encoding="utf-8").split("\n") for kind in kinds]
    return [sorted({word.strip() for word in found if word.strip()}) for found in lists]


def _longest(llm, render, room, low, high):
    """render(n) -> (head, tail, ...) for the largest n whose tokens fit into `room`."""

    def fits(n):
        return sum(map(len, encode(llm, *render(n)[:2]))) <= room

    return render(largest(fits, low, high))


# Needles


def _niah(llm, sample, room, text):
    haystack, key_kind, value_kind, n_keys, n_values, n_queries = NEEDLE_TASKS[sample["kind"]]
    hay = text.text.split(" ") if haystack == "prose" else None

    def render(n):
        rng = random.Random(f"{sample['kind']}/{sample['length']}/{sample['seed']}")
        keys = [_draw(rng, key_kind) for _ in range(n_keys)]
        values = [[_draw(rng, value_kind) for _ in range(n_values)] for _ in keys]
        pairs = [(key, value) for key, found in zip(keys, values, strict=True) for value in found]
        needles = [NEEDLE.format(kind=value_kind, key=key, value=value) for key, value in pairs]
        rng.shuffle(needles)
        asked = rng.sample(range(n_keys), n_queries)
        depths = sorted(rng.sample(DEPTHS, len(needles)))
        if haystack == "prose":
            repeated = (hay * -(-n // len(hay)))[:n]
            context = in_sentences(split_sentences(" ".join(repeated)), needles, depths)
        else:
            context = in_lines(_lines(rng, haystack, key_kind, value_kind, n), needles, rng)
        names = [keys[i] for i in asked]
        query = names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
        before, after, prefix, kind = *NIAH, value_kind
        if n_queries * n_values == 1:
            before, after, prefix = (_singular(part) for part in NIAH)
            kind = value_kind[:-1]
        before, after, prefix = (part.format(kind=kind, query=query) for part in (before, after, prefix))
        return *chat(llm.tokenizer, before + context, after, prefix), [v for i in asked for v in values[i]]

    return _longest(llm, render, room, n_keys * n_values, max(room, 2 * n_keys * n_values))


def _singular(template):
    for many, one in (("Some", "A"), ("are all", "is"), ("are", "is")):
        template = template.replace(many, one)
    return template


def _draw(rng, kind):
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return "-".join(rng.choice(found) for found in words("adjective", "noun"))


def _lines(rng, haystack, key_kind, value_kind, n):
    if haystack == "noise":
        return [" ".join(NOISE)] * n
    return [NEEDLE.format(kind=value_kind, key=_draw(rng, key_kind), value=_draw(rng, value_kind)) for _ in range(n)]


def in_lines(lines, needles, rng):
    """The needles as lines of their own, at places drawn by lot."""
    lines = list(lines)
    for place, needle in zip(sorted(rng.sample(range(len(lines)), len(needles)), reverse=True), needles, strict=True):
        lines.insert(place, needle)
    return "\n".join(lines)


def in_sentences(sentences, needles, depths):
    """The needles at `depths` (percent of the sentences, rising)."""
    places = [0, *(int(len(sentences) * depth / 100) for depth in depths), len(sentences)]
    parts = []
    for i, needle in enumerate(needles):
        parts += [" ".join(sentences[places[i] : places[i + 1]]), needle]
    return " ".join([*parts, " ".join(sentences[places[-2] :])])


# Variable tracking


def _vt(llm, sample, room, text):
    def rng():
        return random.Random(f"vt/{sample['length']}/{sample['seed']}")

    def render_example(n):
        before, after, prefix, names = _vt_parts(rng(), n, 3, "12345")
        return before + after, prefix, names

    low = HOPS + 1
    head, tail, names = _longest(llm, render_example, VT_EXAMPLE, low, VT_EXAMPLE)
    example = _new_names(f"{head}{tail} {' '.join(names)}\n", rng()) + "\n"

    def render(n):
        before, after, prefix, names = _vt_parts(rng(), n, 5, None)
        return *chat(llm.tokenizer, example + before, after, prefix), names

    return _longest(llm, render, room, low, room)


def _vt_parts(rng, n, letters, value):
    """One chain of variables among n lines of noise. -> context, question, prefix, names of the variables."""
    names = []
    while len(names) <= HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        names += [name] if name not in names else []
    value = value or str(rng.randrange(10_000, 99_999))
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in zip(names[:-1], names[1:], strict=True))]
    lines = [" ".join(NOISE)] * n
    for i, (place, step) in enumerate(zip(sorted(rng.sample(range(n), len(chain))), chain, strict=True)):
        lines.insert(place + i, step)
    before, after, prefix = VT
    context = before + "\n".join(lines)
    return context, after.format(query=value), prefix.format(n=len(names), query=value), names


def _new_names(example, rng):
    """The solved example with other variables and another value."""
    for name in example.split()[-HOPS - 1 :]:
        example = example.replace(name, "".join(rng.choices(string.ascii_uppercase, k=len(name))))
    return example.replace("12345", str(rng.randrange(10_000, 99_999)))


# Common words


def _cwe(llm, sample, room, text):
    nouns, adjectives, verbs = words("noun", "adjective", "verb")
    every = sorted({*nouns, *adjectives, *verbs})
    long = sample["length"] >= LONG
    repeats, example_words, example_repeats = ((30, 3), 40, (10, 3)) if long else ((6, 1), 20, (3, 1))

    def draw(rng, n, common_repeats, other_repeats):
        chosen = rng.sample(every, n)
        common, others = chosen[:COMMON], chosen[COMMON:]
        listed = common * common_repeats + others * other_repeats
        random.Random(sample["seed"]).shuffle(listed)
        return _numbered(listed), common

    def render(n):
        rng = random.Random(f"cwe/{sample['length']}/{sample['seed']}")
        before, after, prefix = CWE
        listed, common = draw(rng, example_words, *example_repeats)
        example = "".join(chat(llm.tokenizer, before + listed, after, prefix)) + " " + _numbered(common) + "\n"
        listed, common = draw(rng, n, *repeats)
        head, tail = chat(llm.tokenizer, before + listed, after, prefix)
        return example + head, tail, common

    made = _longest(llm, render, room, COMMON + 1, min(room, len(every)))
    if room > len(every) and sum(map(len, encode(llm, *render(len(every))[:2]))) < room - 64:
        raise MinillmError(f"cwe has {len(every)} words, too few for --length {sample['length']}: give a smaller one")
    return made


def _numbered(listed):
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))


# Frequent coded words


def _fwe(llm, sample, room, text):
    rng, letters = random.Random(f"fwe/{sample['length']}/{sample['seed']}"), string.ascii_lowercase
    vocabulary = set()
    while len(vocabulary) < max(room // 50, 4):
        vocabulary.add("".join(rng.choices(letters, k=WORD_LENGTH)))
    vocabulary = sorted(vocabulary)
    rng.shuffle(vocabulary)
    vocabulary[0] = "..."  # the most frequent one is noise
    before, after, prefix = FWE

    def render(n):
        counts = (int(n * rank**-ALPHA / ZETA) for rank in range(1, len(vocabulary) + 1))
        listed = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        random.Random(sample["seed"]).shuffle(listed)
        return *chat(llm.tokenizer, before + " ".join(listed), after, prefix), vocabulary[1:4]

    return _longest(llm, render, room, 16, 2 * room)
