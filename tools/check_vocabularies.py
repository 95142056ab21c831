"""Encodes the texts that come with llama.cpp's vocabulary files and compares the ids with those that come with them.

    python tools/check_vocabularies.py FOLDER    (models/ of llama.cpp's source: ggml-vocab-*.gguf, their .inp and .out)

One line a vocabulary: texts that are the same, or why minillm refuses it. Exit status 1 where an id differs.
"""

import reprlib
import sys
from pathlib import Path

from minillm.errors import MinillmError
from minillm.files.gguf_file import read_gguf
from minillm.text.tokenizer import Tokenizer

_BETWEEN = "\n__ggml_vocab_test__\n"  # texts


def main(folder: str) -> int:
    paths = sorted(Path(folder).glob("ggml-vocab-*.gguf"))
    if not paths:
        sys.exit(f"{folder} holds no ggml-vocab-*.gguf")
    return max([check(path) for path in paths])


def check(path: Path) -> int:
    """Prints the line of one vocabulary; 1 where an id differs."""
    texts = Path(f"{path}.inp")
    try:
        tokenizer = Tokenizer.from_gguf(read_gguf(path).metadata)
    except MinillmError as error:
        print(f"{path.name}: refused: {error}")
        return 0
    if not texts.exists():
        print(f"{path.name}: read; no texts beside it")
        return 0
    wanted = [[int(i) for i in line.split()] for line in Path(f"{path}.out").read_text().splitlines()]
    given = texts.read_bytes().decode().split(_BETWEEN)[: len(wanted)]
    got = [tokenizer.encode(text) for text in given]
    if tokenizer.adds_bos:  # the ids beside the texts are without
        got = [ids[1:] for ids in got]
    wrong = [i for i, (ids, right) in enumerate(zip(got, wanted, strict=True)) if ids != right]
    for i in wrong[:5]:
        print(f"{path.name}: {reprlib.repr(given[i])}\n  is    {got[i][:50]}\n  wants {wanted[i][:50]}")
    print(f"{path.name}: {len(given) - len(wrong)} of {len(given)} texts the same")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) if len(sys.argv) == 2 else __doc__)
