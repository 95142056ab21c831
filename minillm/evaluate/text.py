"""Texts: what needles are hidden in, what is repeated, and what perplexity is measured on."""

import functools
import hashlib
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from minillm.errors import UsageError

# A full stop after a title or an initial ends no sentence; quotes and brackets may close one.
SENTENCE_END = re.compile(r"""(?:(?<=[.!?])(?<!\b(?:Mr|Ms|Dr|St)\.)(?<!\bMrs\.)(?<!\b[A-Z]\.)|(?<=[.!?]["')]))\s+""")


HAYSTACKS = {  # texts that come along
    "prose": "haystack.txt",
    "code": "code.txt",
    "lists": "lists.txt",
    "dialogue": "dialogue.txt",
    "languages": "languages.txt",
    "numbers": "numbers.txt",
}


@dataclass(frozen=True)
class Text:
    text: str
    digest: str  # of the text: a part of what decides a sample
    by_line: bool = False  # its parts are lines; else sentences, and its blanks are single spaces

    @functools.cached_property
    def parts(self):
        return self.text.split("\n") if self.by_line else split_sentences(self.text)

    def join(self, parts):
        return ("\n" if self.by_line else " ").join(parts)

    def stretch(self, start, n):
        """n parts from the start-th on; after the last comes the first."""
        return [self.parts[(start + i) % len(self.parts)] for i in range(n)]


def split_sentences(text):
    return SENTENCE_END.split(text)


def read_haystack(name, path=None):
    """The Text of HAYSTACKS, or prose of your own."""
    if name == "prose":
        return read_text(path)
    return read_text(bundled=HAYSTACKS[name], by_line=True)


@functools.cache
def read_text(path=None, bundled="haystack.txt", by_line=False):
    """The Text of a file, of all .txt files of a folder, or (None) of one that comes with minillm. Raises
    UsageError."""
    if path is None:
        text = resources.files("minillm.evaluate").joinpath("data", bundled).read_text(encoding="utf-8")
    else:
        text = _read(Path(path).expanduser())
    text = "\n".join(filter(str.strip, text.split("\n"))) if by_line else " ".join(text.split())
    return Text(text, hashlib.sha256(text.encode()).hexdigest()[:12], by_line)


def _read(path):
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    try:
        text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): give a text file (UTF-8) or a folder of them") from error
    if not text.strip():
        raise UsageError(f"{path} holds no text: give a file, or a folder of .txt files, that does")
    return text
