"""Delimiter classes: every token of a real vocabulary by a regular expression, every reading by hand."""

import re

import numpy as np
import pytest
from vocabularies import BYTE, CONTROL, NORMAL, UNKNOWN, byte_level_metadata

from minillm.errors import UsageError
from minillm.files.gguf_file import read_gguf
from minillm.text.delimiters import DelimiterClass
from minillm.text.tokenizer import Tokenizer


def test_every_token_of_the_default_model(default_model_path):
    tokenizer = Tokenizer.from_gguf(read_gguf(default_model_path).metadata)
    classes = tokenizer.delimiter_classes()
    assert classes.dtype == np.uint8 and classes.shape == (49152,)
    for i, found in enumerate(classes):
        text = tokenizer.token_bytes(i).decode(errors="replace")
        if i in tokenizer.special_ids:
            expected = DelimiterClass.SPECIAL
        elif re.fullmatch(r" ?[.?!]", text):
            expected = DelimiterClass.SENTENCE
        elif re.fullmatch(r" ?[,;:]", text):
            expected = DelimiterClass.CLAUSE
        else:
            expected = DelimiterClass.BLANK if re.fullmatch(r"[ \t\n\r]+", text) else DelimiterClass.NONE
        assert found == expected, text


PIECES = ["<unk>", "<s>", "</s>", "<0x0A>", "<0x41>", "\u2581", "\u2581\u2581", ".", "\u2581.", "\u2581\u2581.", ".."]
PIECES += [",", "\u3002", "\u2581,", "a", "\u2581a", "\t\n", "\u2014"]


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        (
            "default",
            {"<0x0A>": 3, "\u2581": 3, "\u2581\u2581": 3, ".": 1, "\u2581.": 1, ",": 2, "\u2581,": 2, "\t\n": 3},
        ),
        ("exact", {"<0x0A>": 3, "\u2581": 3, ".": 1, ",": 2}),
        (".\u3002", {".": 1, "\u2581.": 1, "\u3002": 1}),
        ("\u2014\n", {"\u2014": 2, "<0x0A>": 3, "\u2581": 3, "\u2581\u2581": 3, "\t\n": 3}),
        ("", {}),
    ],
)
def test_readings_of_delimiter(reading, expected):
    types = [UNKNOWN, CONTROL, CONTROL, BYTE, BYTE] + [NORMAL] * (len(PIECES) - 5)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(PIECES))],
        "tokenizer.ggml.token_type": types,
    }
    classes = Tokenizer.from_gguf(metadata).delimiter_classes(reading)
    special = dict.fromkeys(PIECES[:3], 4)
    assert {piece: int(kind) for piece, kind in zip(PIECES, classes, strict=True) if kind} == special | expected


def test_a_misspelt_reading_is_refused():
    with pytest.raises(UsageError, match="defualt"):
        Tokenizer.from_gguf(byte_level_metadata()).delimiter_classes("defualt")
