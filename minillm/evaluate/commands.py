"""The commands of the evaluation: what each is about, which tasks it has, and the cells that it computes, each a task,
a sample and a protocol."""

import itertools

from minillm.evaluate import answers, continuation, efficiency, longbench, needles, ruler, verbatim
from minillm.evaluate.prompt import PROTOCOLS
from minillm.evaluate.text import HAYSTACKS, read_haystack, read_text

SUITE_SAMPLES, SUITE_LENGTH, SUITE_TEXT, SUITE_FOLLOWING = 24, 512, 256, 32


def _seeds(args):
    return range(args.seed, args.seed + args.samples)


def _protocols(args, task, samples):
    protocols = args.protocol or PROTOCOLS_OF[task][:1]
    return [(task, sample, protocol) for sample in samples for protocol in protocols]


def _answers(args):
    kinds = args.task or list(answers.KINDS)
    texts = {kind: answers.text_of(kind, args.text) for kind in kinds}
    found = answers.samples(kinds, args.length or [1024], args.following, _seeds(args), texts)
    return _protocols(args, "answers", found)


def _needle(args):
    lengths, depths, kinds = args.length or [1024], args.depth or [None], args.task or TASKS["needle"][1]
    found = []
    for kind in kinds:
        text = read_haystack(needles.haystack_of(kind), args.haystack)
        found += needles.samples([kind], lengths, depths, _seeds(args), text)
    return _protocols(args, "needle", found)


def _verbatim(args):
    lengths, kinds, found = args.length or [1024], args.task or TASKS["verbatim"][1], []
    for kind in kinds:
        text = read_haystack(kind, args.haystack)
        found += verbatim.samples([kind], lengths, args.following, _seeds(args), text)
    return _protocols(args, "verbatim", found)


def _ruler(args):
    ruler.words("noun")  # says at once where they are not there
    kinds, text = args.task or ruler.TASKS, read_text(args.haystack)
    return _protocols(args, "ruler", ruler.samples(kinds, args.length or [4096], _seeds(args), text))


def _longbench(args):
    lengths = args.length or [None]
    kinds = args.task or list(longbench.SETS)
    found = [longbench.samples(kinds, args.samples, length, args.data, args.offline) for length in lengths]
    return _protocols(args, "longbench", itertools.chain(*found))


def _perplexity(args):
    text = read_text(args.text, "heldout.txt")
    return [
        ("perplexity", sample, "agnostic")
        for sample in continuation.samples(args.length or [1024], args.following, _seeds(args), text)
    ]


def _fidelity(args):
    text, n = read_text(args.text, "heldout.txt"), continuation.FIDELITY_TOKENS
    return [
        ("fidelity", sample, "agnostic")
        for sample in continuation.samples(args.length or [1024], n, _seeds(args), text)
    ]


def _efficiency(args):
    return [
        ("efficiency", sample, "agnostic")
        for sample in efficiency.samples(args.length or [1024, 4096], args.repetitions)
    ]


def _suite(args):
    """Small enough for ten minutes on two cores with the default model, and tasks it can do with the full cache."""
    seeds = _seeds(args)
    hay, text = read_text(args.haystack), read_text(args.text, "heldout.txt")
    found = _protocols(args, "needle", needles.samples(["prose"], [SUITE_LENGTH], [None], seeds, hay))
    stretches = continuation.samples([SUITE_TEXT], SUITE_FOLLOWING, seeds, text)
    return found + [("fidelity", sample, "agnostic") for sample in stretches]


CELLS = {
    "answers": _answers,
    "needle": _needle,
    "verbatim": _verbatim,
    "ruler": _ruler,
    "longbench": _longbench,
    "perplexity": _perplexity,
    "fidelity": _fidelity,
    "efficiency": _efficiency,
    "suite": _suite,
}
SUMMARIES = {
    "answers": "plain questions about a compressed text: how far the full cache's own answers stay the likeliest",
    "needle": "find numbers hidden in a text, at every length and depth",
    "verbatim": "repeat a text from any place in it",
    "ruler": "the synthetic tasks of RULER",
    "longbench": "the 21 sets of LongBench",
    "perplexity": "held-out text, continued over a compressed context",
    "fidelity": "how far the attention output of each layer moves, and the distribution of the next tokens",
    "efficiency": "time to the first token, time a token, memory (minillm.bench)",
    "suite": "small tasks, all methods: under ten minutes on two cores with the default model",
}
TASKS = {  # all, and those that are the default
    "answers": (tuple(answers.KINDS), tuple(answers.KINDS)),
    "needle": (tuple(needles.KINDS), ("noise", "prose", "keys4")),
    "verbatim": (tuple(HAYSTACKS), ("prose",)),
    "ruler": (ruler.TASKS, ruler.TASKS),
    "longbench": (tuple(longbench.SETS), tuple(longbench.SETS)),
}
PROTOCOLS_OF = {  # the first is the default
    "answers": ("agnostic", "document"),
    **dict.fromkeys(("needle", "verbatim", "ruler", "longbench", "suite"), tuple(PROTOCOLS)),
}
FOLLOWING = {"answers": 48, "perplexity": 256, "verbatim": 64}
LENGTHS = {
    "answers": "tokens of a text (default 1024)",
    "needle": "tokens of a prompt (default 1024)",
    "verbatim": "tokens of a prompt (default 1024)",
    "ruler": "tokens of a prompt with its answer (default 4096)",
    "longbench": "tokens that longer prompts are cut to (default: the model's context less 500 and what is over 1000s)",
    "perplexity": "tokens that are compressed (default 1024)",
    "fidelity": "tokens that are compressed (default 1024)",
    "efficiency": "tokens of a prompt (default 1024,4096)",
}
