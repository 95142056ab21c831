"""The table of methods: each is a score, an allocation and a merge, with its defaults and its paper. And CacheConfig,
which names a method, a budget and options, and refuses what makes no sense."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from minillm.compress import allocate, merge, score
from minillm.compress.cluster import parse_chunking
from minillm.compress.plan import Budget, Layer, Ledger, Plan
from minillm.delimiters import classify
from minillm.errors import UsageError


def one_of(*values):
    def check(value):
        if value not in values:
            raise ValueError(f"{value!r} is not one of {', '.join(map(str, values))}")
        return value

    return check


def number(low, high, kind=float):
    def check(value):
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
            or kind(value) != value
        ):
            raise ValueError(f"{value!r} is not {'a whole' if kind is int else 'a'} number from {low} to {high}")
        return kind(value)

    return check


def chunking(value):
    text(value)
    parse_chunking(value)
    return value


def text(value):
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is not a text")
    return value


def delimiters(value):
    classify([], [], text(value))
    return value


@dataclass(frozen=True)
class Option:
    default: object
    check: Callable  # value -> value; raises ValueError with what is allowed
    meaning: str


@dataclass(frozen=True)
class Method:
    """score(layer, rng) -> (R,), allocate(layer, scores, target) -> kept (R,) bool, merge(layer, kept) -> Plan. A
    method without a score has `plan(layer, ledger, **options)` instead, which does all three at once."""

    summary: str
    paper: str
    score: Callable | None = None
    allocate: Callable = allocate.per_head
    merge: Callable = merge.drop
    plan: Callable | None = None
    options: dict[str, Option] = field(default_factory=dict)


METHODS = {
    "full": Method("every token is kept", ""),
    "semanticache": Method(
        "similar keys between two delimiters become one core that counts for all of them",
        "Wu et al. 2026, arXiv 2603.14303",
        plan=merge.cores,
        options={
            "tau": Option(None, number(-1, 1), "fixed similarity threshold; the kept share is then the outcome"),
            "rope": Option(
                "unrotated", one_of("unrotated", "cached"), "compare and average keys without or with rotation"
            ),
            "delimiters": Option("default", delimiters, "default, exact, or a text of the characters that end a chunk"),
            "chunking": Option("delimiter", chunking, "delimiter, fixed:N or none"),
            "log_size": Option(True, one_of(True, False), "count a core as often as it has tokens"),
        },
    ),
    "streaming": Method(
        "the first and the newest tokens (StreamingLLM)", "Xiao et al. 2024, arXiv 2309.17453", score.recency
    ),
    "random": Method("tokens by lot: the control", "", score.chance),
}


class CacheConfig:
    """A method, how much it keeps, and its options.

    budget: a share of the tokens seen (float in (0, 1]), a number of entries a head (int), or "full"; default 0.5.
    window, sinks: the newest and the first tokens, kept as they are and counted in the budget. recompress: during
    generation, closed chunks are compressed every so many tokens (0: never). Options are those of the method
    (`METHODS`); unknown or contradictory ones raise UsageError."""

    def __init__(self, method="semanticache", budget=None, *, window=32, sinks=4, recompress=256, **options):
        if method not in METHODS:
            raise UsageError(f"cache method {method!r} is unknown; methods: {', '.join(METHODS)}")
        table = METHODS[method].options
        for name in options:
            if name not in table:
                valid = ", ".join(table) or "none"
                raise UsageError(f"cache method {method!r} has no option {name!r}; its options: {valid}")
        self.method = method if budget != "full" else "full"
        self.options = {name: option.default for name, option in table.items()}
        self.window = self._checked("window", window, number(0, 1 << 30, int))
        self.sinks = self._checked("sinks", sinks, number(0, 1 << 30, int))
        self.recompress = self._checked("recompress", recompress, number(0, 1 << 30, int))
        for name, value in options.items():
            if value != table[name].default:
                self.options[name] = self._checked(name, value, table[name].check)
        tau = self.options.get("tau")
        if tau is not None and budget is not None:
            raise UsageError("a cache budget and tau exclude each other: with tau the kept share is the outcome")
        if method == "full" and budget not in (None, "full", 1, 1.0):
            raise UsageError("cache method 'full' keeps everything: leave the budget out, or name another method")
        self.budget = (
            None if tau is not None or self.method == "full" else self._budget(0.5 if budget is None else budget)
        )

    @staticmethod
    def _checked(name, value, check):
        try:
            return check(value)
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from None

    @staticmethod
    def _budget(value):
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return Budget(entries=value)
        if isinstance(value, float) and 0 < value <= 1:
            return Budget(share=value)
        raise UsageError(f"budget {value!r} is neither a share in (0, 1] nor a whole number of entries a head")

    def plan(self, layer: Layer, ledger: Ledger | None) -> Plan:
        """What becomes of the rows of a layer. ledger: the entries that may be made; None where the method decides."""
        method, options = METHODS[self.method], dict(self.options)
        options.pop("delimiters", None)  # already in the classes of the rows
        if method.plan:
            return method.plan(layer, ledger, **options)
        scores = method.score(layer, np.random.default_rng(layer.index))
        return method.merge(layer, method.allocate(layer, scores, ledger.even()), **options)

    def as_dict(self):
        """Plain values that say all of it: for session files and reports."""
        budget = None if self.budget is None else self.budget.entries or self.budget.share
        common = {"method": self.method, "budget": budget, "window": self.window, "sinks": self.sinks}
        return common | {"recompress": self.recompress} | self.options

    def __repr__(self):
        shown = ", ".join(f"{name}={value!r}" for name, value in self.as_dict().items() if name != "method")
        return f"CacheConfig({self.method!r}, {shown})"


def methods_table():
    """The methods as aligned text, a line each: name, what it keeps, paper; options below."""
    width = max(map(len, METHODS))
    lines = []
    for name, method in METHODS.items():
        lines.append(f"{name:<{width}}  {method.summary}" + (f"  [{method.paper}]" if method.paper else ""))
        for option, spec in method.options.items():
            lines.append(f"{'':<{width}}    {option} = {spec.default}: {spec.meaning}")
    return "\n".join(lines)
