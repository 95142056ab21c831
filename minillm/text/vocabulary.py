"""Vocabulary: what a model's files say about text and token ids; and the two kinds of BPE that models use.

Byte-level BPE (Llama 3, Qwen, SmolLM) spells every byte as a printable character and cuts the text with regular
expressions before it merges (pre_tokenizers). SentencePiece BPE (Llama 2, Gemma, Phi-3) writes a space as U+2581, does
not cut the text, and falls back to byte pieces such as <0x0A>.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from minillm.errors import MinillmError
from minillm.text.pre_tokenizers import PreTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # piece types, in SentencePiece and GGUF alike
SPACE = "\u2581"


@dataclass(frozen=True)
class Vocabulary:
    """All that a model's files say about text and tokens; tokenizer.Tokenizer makes it usable."""

    library: tokenizers.Tokenizer
    byte_level: bool  # else SentencePiece
    strips_space: bool  # decoding drops the one leading space that encoding put before the text
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    special_ids: frozenset[int]  # tokens that are structure, never part of an answer's text
    stop_ids: frozenset[int]  # as the files list them; the chat template may know one more
    chat_template: str | None


def byte_level_bpe(pieces: Sequence[str], merges: Iterable[str], kind: PreTokenizer) -> tokenizers.Tokenizer:
    """`merges`: "left right", best first, both in GPT-2's spelling of bytes. Raises MinillmError."""
    library = tokenizers.Tokenizer(_bpe(pieces, _pairs(merges), ignore_merges=kind.ignore_merges))
    if kind.nfc:
        library.normalizer = normalizers.NFC()
    library.pre_tokenizer = kind.build()
    library.decoder = decoders.ByteLevel()
    return library


def sentencepiece_bpe(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    prefix: str,
    merges: Iterable[str] | None = None,
) -> tokenizers.Tokenizer:
    """SentencePiece BPE: the adjacent pair whose joined piece has the highest score is merged first, leftmost on a tie.

    `prefix`: where a space is put before the text: "never"; "always" (of every stretch between special tokens, as
    SentencePiece and llama.cpp do); "first" (only at the very start, not before a space: transformers' legacy=False).
    `merges`, where a file has them beside the scores, are those of its tokenizer.json and go first: some files have
    scores that say nothing. Raises MinillmError.
    """
    pairs = _pairs(merges) if merges else list(_ranked_merges(pieces, scores, types))
    unknown = next((piece for piece, kind in zip(pieces, types, strict=True) if kind == UNKNOWN), None)
    library = tokenizers.Tokenizer(_bpe(pieces, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in types))
    if prefix == "first":
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Prepend(SPACE)] if prefix == "always" else []
        library.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    spell = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence(spell if prefix == "never" else [*spell, decoders.Strip(" ", 1, 0)])
    return library


def _pairs(merges: Iterable[str]) -> list[tuple[str, str]]:
    return [tuple(merge.split(" ", 1)) for merge in merges]


def _ranked_merges(pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Every way to join two pieces into a third, best score of the third first.

    The library breaks ties by this order and SentencePiece by place; the two differ only where two pieces have one
    score, which no trained vocabulary has.
    """
    score = {p: s for p, s, kind in zip(pieces, scores, types, strict=True) if kind in (NORMAL, UNUSED)}
    longer = [piece for piece in score if len(piece) > 1]
    if len(longer) > 1 and len({score[piece] for piece in longer}) == 1:
        raise MinillmError("the scores of the vocabulary are all the same: use a complete .gguf or the safetensors")
    for piece in sorted(longer, key=lambda piece: -score[piece]):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in score and right in score:
                yield left, right


def _bpe(pieces: Sequence[str], pairs: list[tuple[str, str]], **options) -> models.BPE:
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if len(vocab) < len(pieces):  # llama.cpp and SentencePiece refuse it too
        first, piece = next((i, piece) for i, piece in enumerate(pieces) if vocab[piece] != i)
        raise MinillmError(
            f"the vocabulary has the piece {piece!r} twice, as the ids {first} and {vocab[piece]}: get a file whose "
            "pieces are all different"
        )
    try:
        return models.BPE(vocab=vocab, merges=pairs, **options)
    except Exception as error:  # the library's own exception type is plain Exception
        raise MinillmError(f"the vocabulary contradicts itself ({error}): get a complete file") from error


def add_typed_tokens(
    library: tokenizers.Tokenizer, pieces: Sequence[str], types: Sequence[int], rstrip: Container[str] = ()
) -> frozenset[int]:
    """Makes control and user-defined pieces known in text; returns the ids that are structure (control, unknown).
    rstrip: those that take the blanks after them along."""

    def token(i: int, special: bool) -> AddedToken:
        # Gemma's runs of blanks are met where a space is U+2581 already, if nothing is put before a text there
        normal = library.normalizer is not None and SPACE in pieces[i]
        normal = normal and library.normalizer.normalize_str(pieces[i]) == pieces[i]
        return AddedToken(pieces[i], special=special, normalized=normal and not special, rstrip=pieces[i] in rstrip)

    structure = [i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)]
    user = [i for i, kind in enumerate(types) if kind == USER_DEFINED]
    library.add_special_tokens([token(i, True) for i in structure])
    library.add_tokens([token(i, False) for i in user])
    return frozenset(structure)
