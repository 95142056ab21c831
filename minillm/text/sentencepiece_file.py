"""tokenizer.model: a SentencePiece model, which is a protobuf message; the few fields of it that BPE needs.

Source of the field numbers: sentencepiece_model.proto. Message fields not listed here are skipped.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minillm.errors import MinillmError

_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class SentencePieceModel:
    pieces: list[str]
    scores: list[float]
    types: list[int]  # vocabulary.NORMAL ...
    adds_space: bool  # before the text
    bos: str | None
    eos: str | None


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Raises MinillmError if the file is no SentencePiece BPE model, or normalises text before it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MinillmError(f"cannot read {path}: {error.strerror or error}") from error
    pieces, scores, types = [], [], []
    trainer, normalizer, reason = {}, {}, None
    try:
        for number, value in _fields(data):
            if number == 1:
                piece = dict(_fields(value))
                pieces.append(piece[1].decode("utf-8"))
                scores.append(struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0])
                types.append(piece.get(3, 1))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as error:
        reason = error
    if reason or not pieces:
        raise MinillmError(
            f"{path} is not a SentencePiece model (perhaps one of tiktoken's, or half a download): add the model's "
            "tokenizer.json to the folder"
        ) from reason
    kind = _MODEL_TYPES.get(trainer.get(3, 1), "unknown")
    if kind != "bpe" or normalizer.get(2) or normalizer.get(4, 1):
        how = "" if kind != "bpe" else " that rewrites text first"
        raise MinillmError(
            f"{path} is a SentencePiece model of kind {kind}{how}; only plain bpe is supported: add the model's "
            "tokenizer.json to the folder"
        )
    bos, eos = (trainer.get(*field) for field in ((41, 1), (42, 2)))  # -1, a huge varint, where there is none
    return SentencePieceModel(
        pieces=pieces,
        scores=scores,
        types=types,
        adds_space=bool(normalizer.get(3, 1)),
        bos=pieces[bos] if bos < len(pieces) else None,
        eos=pieces[eos] if eos < len(pieces) else None,
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message: int for varints, bytes for everything else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire}")
        length = varint() if wire == 2 else 8 if wire == 1 else 4
        if at + length > len(data):
            raise ValueError("the file ends inside a field")
        yield number, data[at : at + length]
        at += length
