"""What a method is made of: options and what they may be, and the parts that take them."""

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
