"""The tokenizer inside a .gguf file: `tokenizer.ggml.*` metadata -> Vocabulary, with the defaults of llama.cpp."""

from collections.abc import Sequence

from minillm.errors import MinillmError
from minillm.text.vocabulary import (
    NORMAL,
    TIKTOKEN_CUTS,
    Vocabulary,
    add_typed_tokens,
    byte_level_bpe,
    sentencepiece_bpe,
)

# A .gguf names one or two end tokens, and often not all that the model was trained to end with (the end of a document
# beside the end of a turn). llama.cpp stops at every control token of these names, whatever the metadata say.
_END_TEXTS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>", "</s>")


def read_gguf_vocabulary(metadata: dict) -> Vocabulary:
    """Raises MinillmError naming the key and its value."""
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}.get
    kind, pieces = get("model"), get("tokens")
    if not pieces or not all(isinstance(piece, str) for piece in pieces):
        raise MinillmError("the .gguf holds no vocabulary (tokenizer.ggml.tokens): get a complete file")
    types = [int(number) for number in _column(get("token_type"), "token_type", pieces, NORMAL)]
    if kind == "gpt2":
        if not get("merges"):
            raise MinillmError("the .gguf holds no tokenizer.ggml.merges: get a complete file")
        library = byte_level_bpe(pieces, get("merges"), get("pre"))
        ids, adds_bos, spaced = {}, get("pre") in TIKTOKEN_CUTS, False
    elif kind == "llama":
        ids, adds_bos, spaced = {"bos": 1, "eos": 2}, True, bool(get("add_space_prefix", True))
        scores = _column(get("scores"), "scores", pieces, 0.0)
        prefix = "always" if spaced else "never"
        library = sentencepiece_bpe(pieces, scores, types, prefix=prefix, merges=get("merges"))
    else:
        raise MinillmError(f"tokenizer.ggml.model = {kind!r} is not supported (supported: gpt2, llama)")
    names = ("bos", "eos", "eot", "eom")
    bos_id, *ends = (_in_range(get(f"{name}_token_id", ids.get(name)), len(pieces)) for name in names)
    structure = add_typed_tokens(library, pieces, types)
    stop_ids = {i for i in structure if pieces[i] in _END_TEXTS} | {i for i in ends if i is not None}
    return Vocabulary(
        library=library,
        byte_level=kind == "gpt2",
        strips_space=spaced,
        bos_id=bos_id,
        eos_id=ends[0],
        adds_bos=bool(get("add_bos_token", adds_bos)) and bos_id is not None,
        special_ids=structure | stop_ids | ({bos_id} - {None}),
        stop_ids=frozenset(stop_ids),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


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
