"""Every name of a pre-tokenizer cuts odd texts as llama.cpp does, or as the model's own pattern where that differs.

Golden: tools/make_pre_tokenizer_golden.py, from llama.cpp and the `regex` module."""

import json
from itertools import accumulate, pairwise

import pytest
from vocabularies import DATA, spell

from minillm.text.pre_tokenizers import PRE_TOKENIZERS

GOLDEN = json.loads((DATA / "pre_tokenizers.json").read_text())
CUTS = {name: cuts for names, cuts in GOLDEN["cuts"] for name in names.split()}


def test_every_name_has_its_golden():
    assert CUTS.keys() == PRE_TOKENIZERS.keys() and len(CUTS) == 89


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_texts_are_cut_as_the_golden_says(name):
    kind = PRE_TOKENIZERS[name]
    cut = kind.build()
    for text, sizes in zip(GOLDEN["texts"], CUTS[name], strict=True):
        text = text if kind.byte_level else text.replace(" ", "\u2581")
        pieces = [text[a:b] for a, b in pairwise(accumulate(sizes, initial=0))]
        assert "".join(pieces) == text
        wanted = list(map(spell, pieces)) if kind.byte_level else pieces
        assert [piece for piece, _ in cut.pre_tokenize_str(text)] == wanted
