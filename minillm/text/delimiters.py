"""Delimiter classes: which tokens of a vocabulary end a clause, a sentence or a line.

SemantiCache (arXiv 2603.14303) cuts the cache at the tokens of {. , ? ! ; : space \\t \\n} and does not say what that
means for a BPE vocabulary. The readings here need single tokens only, so they are a table made once:

    "default"   the token, less one leading space, is one of the marks; or it is blanks (space, tab, newline) only
    "exact"     the token is exactly one of the nine strings
    other text  its characters are the delimiters, read as in "default"
"""

from collections.abc import Iterable, Sequence
from enum import IntEnum

import numpy as np

from minillm.errors import UsageError

_BLANKS = b" \t\n\r"
_SENTENCE_ENDERS = ".?!。！？"
_NINE = ".,?!;: \t\n"


class DelimiterClass(IntEnum):
    NONE = 0
    SENTENCE = 1  # . ? !
    CLAUSE = 2  # , ; :
    BLANK = 3  # runs of space, tab, newline
    SPECIAL = 4  # the model's own structure


def classify(tokens: Sequence[bytes], special_ids: Iterable[int], reading: str = "default") -> np.ndarray:
    """uint8 (len(tokens),) of DelimiterClass. Raises UsageError where `reading` has letters and is no name."""
    exact = reading == "exact"
    marks = _NINE if exact or reading == "default" else reading
    if any(mark.isalnum() for mark in marks):
        raise UsageError(f"delimiters {reading!r}: give default, exact, or the punctuation marks and blanks that count")
    kinds = {mark.encode(): _class_of(mark) for mark in marks}
    if not exact:
        kinds |= {b" " + mark: kind for mark, kind in kinds.items()}
    blank_runs = not exact and DelimiterClass.BLANK in kinds.values()
    classes = np.zeros(len(tokens), np.uint8)
    for i, token in enumerate(tokens):
        if token in kinds:
            classes[i] = kinds[token]
        elif blank_runs and token and not token.strip(_BLANKS):
            classes[i] = DelimiterClass.BLANK
    classes[list(special_ids)] = DelimiterClass.SPECIAL
    return classes


def _class_of(mark: str) -> DelimiterClass:
    if mark.isspace():
        return DelimiterClass.BLANK
    return DelimiterClass.SENTENCE if mark in _SENTENCE_ENDERS else DelimiterClass.CLAUSE
