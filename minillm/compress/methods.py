"""The table of methods: each is a score, an allocation and a merge, with its defaults and its paper."""

import runpy
from dataclasses import dataclass, field
from functools import cache

from minillm.compress.allocate import ALLOCATIONS, Allocation
from minillm.compress.merge import MERGES, Merge
from minillm.compress.options import Option, number
from minillm.compress.score import SCORES, Score
from minillm.errors import UsageError

ENTRY_POINTS = "minillm.methods"  # group in which other packages name Methods of theirs


@dataclass(frozen=True)
class Method:
    """score, allocate and merge: names in SCORES, ALLOCATIONS and MERGES, or such parts (score None: the allocation
    needs none).
    defaults: of common options (budget, window, sinks) and of its parts', where they are not the tables'.
    generates: whether what is generated is compressed as well; settles: whether entries that a compression made are
    left alone by the next one."""

    summary: str
    paper: str = ""
    score: str | Score | None = None
    allocate: str | Allocation = "even"
    merge: str | Merge = "drop"
    defaults: dict = field(default_factory=dict)
    generates: bool = False
    settles: bool = False


LOSSLESS = {"budget": 0.3, "window": 8}  # nearly, see README.md; what is near is scored as well as what is far

MATCH = Option(
    0,
    number(0, 1 << 20, int),
    "tokens read after the text (it again, questions) whose attention sizes and values are fitted to; 0: they are not",
)

METHODS = {
    "full": Method("every token is kept"),
    "semanticache": Method(
        "similar keys between two delimiters become one core that counts for all of them",
        "Wu et al. 2026, arXiv 2603.14303",
        None,
        "clusters",
        "cores",
        generates=True,
        settles=True,
    ),
    "hindsight": Method(
        "what a second reading of a text and questions about it attend to, cut once; the rest joins neighbours",
        "minillm",
        "reread",
        "global",
        "fold",
        defaults=LOSSLESS | {"worth": True, "asked": True, "match": 256},
    ),
    "foresight": Method(
        "the same, predicted from each token's hidden state as it is read; questions are read (needs a profile)",
        "minillm",
        "predicted",
        "global",
        "fold",
        defaults=LOSSLESS | {"asked": True, "match": 256},
        generates=True,
    ),
    "streaming": Method(
        "the first and the newest tokens (StreamingLLM)",
        "Xiao et al. 2024, arXiv 2309.17453",
        "recency",
        generates=True,
    ),
    "snapkv": Method(
        "what the newest queries attend to",
        "Li et al. 2024, arXiv 2404.14469",
        "window",
        defaults={"sinks": 0},
    ),
    "h2o": Method(
        "heavy hitters: what all queries together attended to, and as many newest tokens",
        "Zhang et al. 2023, arXiv 2306.14048",
        "columns",
        defaults={"sinks": 0, "window": 0.5},
        generates=True,
    ),
    "kvzip": Method(
        "what a second reading of the text attends to, one cut through all layers and heads",
        "Kim et al. 2025, arXiv 2505.23416",
        "reread",
        "global",
        defaults={"group": "max"},
    ),
    "pyramidkv": Method(
        "what the newest queries attend to, more in the first layers",
        "Cai et al. 2024, arXiv 2406.02069",
        "window",
        "pyramid",
        defaults={"sinks": 0, "window": 8, "queries": 8},
    ),
    "adakv": Method(
        "what the newest queries attend to, more in heads that attend to more",
        "Feng et al. 2024, arXiv 2407.11550",
        "window",
        "adaptive",
        defaults={"sinks": 0},
    ),
    "criticalkv": Method(
        "what the newest queries attend to, and whose value changes the output",
        "Feng et al. 2025, arXiv 2502.03805",
        "window",
        "critical",
        defaults={"alpha": 1.0},
    ),
    "cake": Method(
        "what the newest queries attend to, now or in turn; more in layers where that is spread and changes",
        "Qin et al. 2025, arXiv 2503.12491",
        "mean_variance",
        "preference",
        defaults={"sinks": 0, "pool": 5},
        generates=True,
    ),
    "lava": Method(
        "what the newest queries attend to, by the head's largest value; layers by the entropy of that",
        "Shen et al. 2025, arXiv 2509.09754",
        "value_scaled",
        "entropy",
        defaults={"sinks": 0},
    ),
    "tova": Method(
        "what the newest query attends to, the same tokens in every head of a layer",
        "Oren et al. 2024, arXiv 2401.06104",
        "window",
        "shared",
        defaults={"sinks": 0, "window": 0, "queries": 1, "pool": 1},
        generates=True,
    ),
    "laprox": Method(
        "what changes the output most: attention times what the value adds; one cut through all layers and heads",
        "Mai and Kim 2026, arXiv 2605.07234",
        "column_row",
        "global",
        defaults={"pooling": "avg"},
    ),
    "random": Method("tokens by lot: the control", score="random", generates=True),
    "kvcompose": Method(
        "what a second reading attends to; the heads of a layer keep as many, layers compete for their composites",
        "2025, arXiv 2509.05165",
        "composite",
        "composites",
        defaults={"sinks": 0, "window": 0},
    ),
    "longflow": Method(
        "what adds most to the newest query's output, the same tokens in every head",
        "2026, arXiv 2603.11504",
        "contribution",
        defaults={"sinks": 0, "window": 0, "pool": 5, "pooling": "avg"},
        generates=True,
    ),
    "d2o": Method(
        "heavy hitters and the newest; evicted tokens alike enough join the nearest; layer budgets by variance",
        "Wan et al. 2024, arXiv 2406.13035",
        "columns",
        "unlike",
        "nearest",
        defaults={"window": 0.5, "log_size": False},
        generates=True,
    ),
    "cam": Method(
        "StreamingLLM; the values of evicted tokens are passed on to those after them",
        "Zhang et al. 2024, CaM, ICML",
        "recency",
        merge="pass_on",
        defaults={"window": 0},
        generates=True,
    ),
    "razor": Method(
        "retrieval heads keep everything, others sinks, the newest and one entry for the rest (RazorAttention)",
        "Tang et al. 2024, arXiv 2407.15891",
        "recency",
        "retrieval",
        "cores",
        defaults={"rope": "cached"},
        generates=True,
    ),
}


def parts(method, **chosen):
    """(score Part or None, Allocation, merge Part) of a Method, some of them `chosen` by name instead. KeyError for a
    name that no table has."""
    named = {"score": method.score, "allocate": method.allocate, "merge": method.merge} | chosen
    tables = {"score": SCORES | {None: None}, "allocate": ALLOCATIONS, "merge": MERGES}
    return [table[part] if isinstance(part := named[kind], str | None) else part for kind, table in tables.items()]


def entry_points():
    """Those of other packages that name methods of theirs."""
    from importlib import metadata  # a ninth of the time that minillm takes to start: only names we do not know need it

    return metadata.entry_points(group=ENTRY_POINTS)


def find_method(name):
    """The Method of a name in METHODS, of "FILE.py:NAME" or of an entry point of other packages. Raises UsageError."""
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    path, _, attribute = str(name).rpartition(":")
    if path.endswith(".py"):
        method = _from_file(path, attribute)
    else:
        others = entry_points()
        if name not in others.names:
            known = ", ".join([*METHODS, *sorted(others.names)])
            raise UsageError(f"cache method {name!r} is unknown; methods: {known}, and your own: FILE.py:NAME")
        method = others[name].load()
    if not isinstance(method, Method):
        raise UsageError(f"cache method {name}: {type(method).__name__} found, not a minillm.compress.methods.Method")
    return method


@cache
def _from_file(path, attribute):
    try:
        found = runpy.run_path(path)
    except Exception as error:
        raise UsageError(f"cache method {path}:{attribute}: {type(error).__name__}: {error}") from error
    if attribute not in found:
        raise UsageError(f"cache method {path}:{attribute}: the file has no {attribute!r}")
    return found[attribute]


def methods_table():
    """The methods as aligned text, a line each: name, what it keeps, paper; below it its three parts and options."""
    methods = METHODS | {point.name: point.load() for point in entry_points()}
    width = max(map(len, methods))
    lines = []
    for name, method in methods.items():
        lines.append(f"{name:<{width}}  {method.summary}" + (f"  [{method.paper}]" if method.paper else ""))
        if name == "full":
            continue
        score, allocation, merge = parts(method)
        named = {"score": method.score, "allocate": method.allocate, "merge": method.merge}
        named = {kind: part if isinstance(part, str) else part.summary for kind, part in named.items() if part}
        lines.append(f"{'':<{width}}    " + ", ".join(f"{kind} {part}" for kind, part in named.items()))
        for option, spec in options_of(method, score, allocation, merge).items():
            lines.append(f"{'':<{width}}    {option} = {method.defaults.get(option, spec.default)}: {spec.meaning}")
    return "\n".join(lines)


def methods_markdown():
    """The table of README.md: name, what it keeps, its three parts, paper."""
    lines = ["| method | what it keeps | score, allocation, merge | paper |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        named = [part for part in (method.score, method.allocate, method.merge) if part] if name != "full" else []
        year = method.paper.replace("arXiv ", "")
        lines.append(f"| `{name}` | {method.summary} | {', '.join(named)} | {year} |")
    return "\n".join(lines)


def options_of(method, score, allocation, merge):
    """name -> Option of the parts, and of what is done where something is read after a text."""
    options = (score.options if score else {}) | allocation.options | merge.options
    return options | {"match": MATCH} if score and score.reads in ("again", "predicted") else options
