"""Small vocabularies for tests: as the metadata of a .gguf, and as a folder with a tokenizer.json."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from minillm.text.sentencepiece_file import read_sentencepiece

DATA = Path(__file__).parent / "data" / "tokenizer"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def gpt2_spelling() -> dict[int, str]:
    """byte -> character, as in GPT-2's bytes_to_unicode."""
    table, beyond = {}, 0x100
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE:
            table[byte] = chr(byte)
        else:
            table[byte] = chr(beyond)
            beyond += 1
    return table


SPELL = gpt2_spelling()


def spell(text: str) -> str:
    return "".join(SPELL[byte] for byte in text.encode())


def byte_level_metadata(words=("he", "hel", "hello"), control=("<s>", "</s>", "<|im_end|>"), pre="gpt-2", **extra):
    """A byte-level vocabulary in which each word grows by one character a merge."""
    pieces = [*control, *SPELL.values(), *words]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [CONTROL] * len(control) + [NORMAL] * (len(pieces) - len(control)),
        "tokenizer.ggml.merges": [f"{word[:-1]} {word[-1]}" for word in words if word[:-1] in pieces] or ["h e"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    } | {f"tokenizer.ggml.{key}": value for key, value in extra.items()}


def sentencepiece_metadata(**extra):
    """The vocabulary of tests/data/tokenizer/tokenizer.model as a .gguf holds it."""
    model = read_sentencepiece(DATA / "tokenizer.model")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",  # as llama.cpp's converter writes for such models
        "tokenizer.ggml.tokens": model.pieces,
        "tokenizer.ggml.scores": np.array(model.scores, np.float32),
        "tokenizer.ggml.token_type": np.array(model.types, np.int32),
    } | {f"tokenizer.ggml.{key}": value for key, value in extra.items()}


def train_library(special=("<|begin|>", "<|end|>", "<|turn|>")) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    text = "the quick brown fox jumps over the lazy dog. " * 20
    library.train_from_iterator([text], trainer)
    return library


def write_folder(folder: Path, library: tokenizers.Tokenizer | None, **files) -> Path:
    """`files`: tokenizer_config={...} becomes tokenizer_config.json."""
    if library:
        library.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def prefixed(library: tokenizers.Tokenizer, token: str) -> tokenizers.Tokenizer:
    library.post_processor = processors.TemplateProcessing(
        single=[token, "$A"], special_tokens=[(token, library.token_to_id(token))]
    )
    return library
