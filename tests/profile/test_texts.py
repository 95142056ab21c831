"""The texts that come with minillm: what profiles are made from has nothing in common with what is measured on."""

import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from paths import ROOT

PROFILE = Path(str(resources.files("minillm") / "profile/texts"))
EVALUATION = Path(str(resources.files("minillm.evaluate") / "data"))
MAKE = ROOT / "tools" / "make_texts.py"


def texts(folder):
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}


def shingles(text, n=8):
    """Every n words in a row."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_profiles_and_evaluation_share_no_eight_words_in_a_row():
    measured = {name: shingles(text) for name, text in texts(EVALUATION).items()}
    assert len(measured) >= 7 and all(len(found) > 100 for found in measured.values())
    for name, text in texts(PROFILE).items():
        for other, found in measured.items():
            assert not shingles(text) & found, (name, other)


def test_profile_texts_are_many_and_small():
    found = texts(PROFILE)
    assert 40 <= len(found) <= 60 and sum(len(text.encode()) for text in found.values()) <= 800_000
    for name, text in found.items():
        assert 2000 < len(text.encode()) < 40_000, name


@pytest.mark.parametrize("folder", [PROFILE, EVALUATION])
def test_every_text_has_its_source(folder):
    source = (folder / "SOURCE.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`([\w-]+\.txt)`", source)) == set(texts(folder))


def test_generated_texts_are_those_that_their_program_writes(tmp_path):
    """Run on a copy without them: the same words to the last letter."""
    copy = tmp_path / "tools" / MAKE.name
    copy.parent.mkdir()
    copy.write_text(MAKE.read_text(encoding="utf-8"), encoding="utf-8")
    profile, evaluation = tmp_path / "minillm" / "profile/texts", tmp_path / "minillm" / "evaluate" / "data"
    profile.mkdir(parents=True)
    evaluation.mkdir(parents=True)
    for name in ("novel-northanger", "speech-1876", "law-declaration"):  # between whose sentences facts are put
        (profile / f"{name}.txt").write_text((PROFILE / f"{name}.txt").read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run([sys.executable, copy], check=True)
    made = texts(profile) | texts(evaluation)
    assert len(made) == 18
    for name, text in made.items():
        assert text == (texts(PROFILE) | texts(EVALUATION))[name], name
