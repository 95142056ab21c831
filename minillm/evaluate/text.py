"""Prose: what needles are hidden in and what perplexity is measured on."""

import functools
import hashlib
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from minillm.errors import UsageError

# A full stop after a title or an initial ends no sentence; quotes and brackets may close one.
SENTENCE_END = re.compile(r"""(?:(?<=[.!?])(?<!\b(?:Mr|Ms|Dr|St)\.)(?<!\bMrs\.)(?<!\b[A-Z]\.)|(?<=[.!?]["')]))\s+""")


@dataclass(frozen=True)
class Text:
    text: str  # blanks are single spaces
    digest: str  # of the text: a part of what decides a sample

    @functools.cached_property
    def sentences(self):
        return split_sentences(self.text)


def split_sentences(text):
    return SENTENCE_END.split(text)


@functools.cache
def read_text(path=None, bundled="haystack.txt"):
    """The Text of a file, of all .txt files of a folder, or (None) of one that comes with minillm. Raises
    UsageError."""
    if path is None:
        text = resources.files("minillm.evaluate").joinpath("data", bundled).read_text(encoding="utf-8")
    else:
        text = _read(Path(path).expanduser())
    text = " ".join(text.split())
    return Text(text, hashlib.sha256(text.encode()).hexdigest()[:12])


def _read(path):
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    try:
        text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): give a text file (UTF-8) or a folder of them") from error
    if not text.strip():
        raise UsageError(f"{path} holds no text: give a file, or a folder of .txt files, that does")
    return text
