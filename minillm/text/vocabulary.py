"""Vocabulary: what a model's files say about text and token ids; and the two kinds of BPE that Llama and Mistral use.

Byte-level BPE (Llama 3, SmolLM, Mistral Nemo) spells every byte as a printable character and cuts the text with a
regular expression before it merges. SentencePiece BPE (Llama 2, Mistral 7B) writes a space as U+2581, does not cut the
text, and falls back to byte pieces such as <0x0A>.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from minillm.errors import MinillmError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # piece types, in SentencePiece and GGUF alike
SPACE = "\u2581"

# Values of `tokenizer.ggml.pre` for vocabularies made with tiktoken (the first three mean the same): a word that is
# itself a token is that token whatever the merges say, and a prompt begins with BOS.
LLAMA3_CUTS = ("llama-bpe", "llama3", "llama-v3")
TIKTOKEN_CUTS = (*LLAMA3_CUTS, "tekken")

# The regular expressions of the models' own tokenizer.json. Llama 3 and Qwen 2 differ only in their numbers.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = _WORDS + r"|\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"|\p{N}" + _REST
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


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


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _pre_tokenizer(name: str | None) -> pre_tokenizers.PreTokenizer:
    """The cut of a GGUF file's `tokenizer.ggml.pre`, as in the tokenizer.json of the models that use it."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if name == "gpt-2":
        return gpt2
    if name in LLAMA3_CUTS:
        return _split(_LLAMA3)
    if name == "tekken":
        return _split(_TEKKEN)
    if name == "qwen2":
        return _split(_QWEN2)
    supported = "supported: smollm, llama-bpe, tekken, gpt-2, qwen2"
    if name in (None, "", "default"):
        # llama.cpp goes on with a guess and a warning that quality will be degraded: other ids than in training.
        raise MinillmError(
            f"the .gguf does not say how to cut text (tokenizer.ggml.pre = {name!r}; {supported}): it was converted by "
            "an old converter, get a newer file or the safetensors"
        )
    raise MinillmError(f"tokenizer.ggml.pre = {name!r} is not supported ({supported}): use the model's safetensors")


def byte_level_bpe(pieces: Sequence[str], merges: Iterable[str], pre: str | None) -> tokenizers.Tokenizer:
    """`merges`: "left right", best first, both in GPT-2's spelling of bytes. Raises MinillmError."""
    cut = _pre_tokenizer(pre)
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    library = tokenizers.Tokenizer(_bpe(pieces, pairs, ignore_merges=pre in TIKTOKEN_CUTS))
    if pre == "qwen2":
        library.normalizer = normalizers.NFC()
    library.pre_tokenizer = cut
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
    pairs = [tuple(merge.split(" ", 1)) for merge in merges] if merges else list(_ranked_merges(pieces, scores, types))
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


def add_typed_tokens(library: tokenizers.Tokenizer, pieces: Sequence[str], types: Sequence[int]) -> frozenset[int]:
    """Makes control and user-defined pieces known in text; returns the ids that are structure (control, unknown)."""
    structure = [i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)]
    user = [i for i, kind in enumerate(types) if kind == USER_DEFINED]
    library.add_special_tokens([AddedToken(pieces[i], special=True, normalized=False) for i in structure])
    library.add_tokens([AddedToken(pieces[i], normalized=False) for i in user])
    return frozenset(structure)
