"""The tokenizer inside a .gguf file: `tokenizer.ggml.*` metadata -> Vocabulary, with the defaults of llama.cpp."""

from collections.abc import Collection, Sequence

import tokenizers

from minillm.errors import MinillmError
from minillm.text.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from minillm.text.vocabulary import (
    NORMAL,
    Vocabulary,
    add_typed_tokens,
    byte_level_bpe,
    sentencepiece_bpe,
)

# A .gguf names one or two end tokens, and often not all that the model was trained to end with (the end of a document
# beside the end of a turn). llama.cpp stops at every control token of these names, whatever the metadata say.
_END_TEXTS = frozenset(
    "<|eot_id|> <|eom_id|> <|im_end|> <|end|> <|end_of_text|> <|endoftext|> </s> <eos> <end_of_turn> <turn|> <EOT> "
    "[EOT] _<EOT> [EOS] [e~[ <|return|> <|call|> <|flush|> <|calls|> <|tool_response> <end_of_utterance> "
    "<｜end▁of▁sentence｜>".split()
)
# Models that have the first end an answer with it, and only a part of one with the second.
_NO_END = (("<|return|>", "<|end|>"), ("<|flush|>", "<|end|>"), ("<|tool_response>", "</s>"))
# Kinds of vocabularies that are no BPE
_OTHER = {
    "bert": "WordPiece, of models that embed texts",
    "t5": "Unigram, of encoder-decoder models",
    "rwkv": "RWKV's own",
    "plamo2": "PLaMo 2's own",
    "hybriddna": "one of DNA sequences",
    "whitespace": "one of models that embed texts",
    "none": "none at all",
    "no_vocab": "none at all",
}


def read_gguf_vocabulary(metadata: dict) -> Vocabulary:
    """Raises MinillmError naming the key and its value."""
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}.get
    model, pieces = get("model"), get("tokens")
    if model not in ("gpt2", "llama", "gemma4"):
        what = f": its vocabulary is {_OTHER[model]}" if model in _OTHER else ""
        raise MinillmError(
            f"tokenizer.ggml.model = {model!r} is not supported{what}; take a model with BPE (gpt2, llama, gemma4)"
        )
    if not pieces or not all(isinstance(piece, str) for piece in pieces):
        raise MinillmError("the .gguf holds no vocabulary (tokenizer.ggml.tokens): get a complete file")
    types = [int(number) for number in _column(get("token_type"), "token_type", pieces, NORMAL)]
    if model == "llama":
        ids, adds_bos, byte_level = {"bos": 1, "eos": 2}, True, False
        spaced = bool(get("add_space_prefix", True))
        scores = _column(get("scores"), "scores", pieces, 0.0)
        prefix = "always" if spaced else "never"
        library = sentencepiece_bpe(pieces, scores, types, prefix=prefix, merges=get("merges"))
    else:
        kind = _pre_tokenizer("gemma4" if model == "gemma4" else get("pre"))
        ids, adds_bos, byte_level, spaced = {}, kind.adds_bos, kind.byte_level, False
        library = _bpe(kind, pieces, get("merges"), types)
    names = ("bos", "eos", "eot", "eom")
    bos_id, *ends = (_in_range(get(f"{name}_token_id", ids.get(name)), len(pieces)) for name in names)
    structure = add_typed_tokens(library, pieces, types, _rstrip(metadata, pieces))
    stop_ids = _ends(pieces, structure) | {i for i in ends if i is not None}
    return Vocabulary(
        library=library,
        byte_level=byte_level,
        strips_space=spaced,
        bos_id=bos_id,
        eos_id=ends[0],
        adds_bos=bool(get("add_bos_token", adds_bos)) and bos_id is not None,
        special_ids=structure | stop_ids | ({bos_id} - {None}),
        stop_ids=frozenset(stop_ids),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _pre_tokenizer(name: str | None) -> PreTokenizer:
    if name in (None, "", "default"):
        # llama.cpp goes on with a guess and a warning that quality will be degraded: other ids than in training.
        raise MinillmError(
            f"the .gguf does not say how to cut text (tokenizer.ggml.pre = {name!r}): it was converted by an old "
            "converter, get a newer file or the safetensors"
        )
    if name not in PRE_TOKENIZERS:
        raise MinillmError(
            f"tokenizer.ggml.pre = {name!r} is not supported, as it is none that llama.cpp names: use the model's "
            "safetensors"
        )
    return PRE_TOKENIZERS[name]


def _bpe(kind: PreTokenizer, pieces: Sequence[str], merges: Sequence[str] | None, types) -> tokenizers.Tokenizer:
    if not merges:
        raise MinillmError("the .gguf holds no tokenizer.ggml.merges: get a complete file")
    if kind.byte_level:
        return byte_level_bpe(pieces, merges, kind)
    library = sentencepiece_bpe(pieces, [], types, prefix="never", merges=merges)
    library.pre_tokenizer = kind.build()
    return library


def _rstrip(metadata: dict, pieces: Sequence[str]) -> Collection[str]:
    """Phi-3's tokens take the blanks after them along, but for these three. No key says so; llama.cpp, too, goes by the
    name of the model."""
    name = str(metadata.get("general.name", "")).lower()
    return set(pieces) - {"<unk>", "<s>", "<|endoftext|>"} if "phi-3" in name or "phi3" in name else ()


def _ends(pieces: Sequence[str], structure: Collection[int]) -> set[int]:
    """Ids of the control tokens that end an answer by their names."""
    ends = {pieces[i]: i for i in structure if pieces[i] in _END_TEXTS}
    not_ends = {text for mark, text in _NO_END if mark in ends}
    return {i for text, i in ends.items() if text not in not_ends}


def _column(values: Sequence | None, key: str, pieces: Sequence[str], default) -> Sequence:
    """One value a token. Raises MinillmError where the counts differ."""
    if values is None:
        return [default] * len(pieces)
    if len(values) != len(pieces):
        raise MinillmError(
            f"the .gguf has {len(pieces)} tokens and {len(values)} tokenizer.ggml.{key}: it is damaged, get it again"
        )
    return values


def _in_range(token_id, n_tokens: int) -> int | None:
    """llama.cpp ignores an id outside the vocabulary, and files with such ids are about."""
    return int(token_id) if token_id is not None and 0 <= token_id < n_tokens else None
