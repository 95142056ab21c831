"""What a method is made of: options and what they may be, the parts that take them, and a Recipe of three parts."""

from collections.abc import Callable
from dataclasses import dataclass, field

from minillm.text.delimiters import classify


@dataclass(frozen=True)
class Option:
    default: object
    check: Callable  # value -> value; raises ValueError with what is allowed
    meaning: str
    needed: bool = False  # it has no default


@dataclass(frozen=True)
class Part:
    """A function and the options it takes by name. What it gets beside them is said in its table."""

    run: Callable
    summary: str
    options: dict[str, Option] = field(default_factory=dict)

    def __call__(self, *arguments, options):
        """run(*arguments) with those of `options` (name -> value) that are its own."""
        return self.run(*arguments, **{name: options[name] for name in self.options})


class Recipe:
    """A CacheConfig bound to a model and its profile: carries the parts of the method out, one layer at a time.

    config: CacheConfig, its method named. options: those of the parts by name, the threshold of a quality included."""

    def __init__(self, config, options):
        self.config, self.options = config, options

    def scores(self, layer):
        """(R,) float32, or None where nothing is scored."""
        return self.config.score and self.config.score(layer, options=self.options)

    def targets(self, ledger, layer, scores):
        """The entries of the layers seen so far, this one the last."""
        return self.config.allocation.layers(ledger, layer, scores, options=self.options)

    def plan(self, layer, scores, target):
        """The Plan of a layer. target: entries to make; None: the method decides."""
        return self.merged(layer, scores, self.into(layer, scores, target))

    def into(self, rows, scores, target):
        """Which row each becomes part of: an Into. rows: a Layer, or Rows of several layers for one cut."""
        return self.config.allocation.heads(rows, scores, target, options=self.options)

    def merged(self, layer, scores, into):
        """The Plan of rows of which that is known."""
        plan = self.config.merge(layer, scores, into.rows, options=self.options)
        if plan.threshold is None:
            plan.threshold = into.threshold
        return plan


def one_of(*values):
    def check(value):
        if not any(value is allowed or (value == allowed and type(value) is type(allowed)) for allowed in values):
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


def text(value):
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is not a text")
    return value


def delimiters(value):
    classify([], [], text(value))
    return value


def newest(value):
    """A number of tokens, or a share of the budget."""
    if isinstance(value, float) and 0 < value < 1:
        return value
    try:
        return number(0, 1 << 30, int)(value)
    except ValueError:
        raise ValueError(f"{value!r} is neither a whole number of tokens nor a share of the budget below 1") from None
