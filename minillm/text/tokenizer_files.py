"""The tokenizer of a Hugging Face folder -> Vocabulary: tokenizer.json, or a lone SentencePiece tokenizer.model."""

import json
from pathlib import Path

import tokenizers
from tokenizers import processors

from minillm.errors import MinillmError
from minillm.text.added_tokens import add_tokens, read, read_json
from minillm.text.sentencepiece_file import read_sentencepiece
from minillm.text.vocabulary import Vocabulary, add_typed_tokens, sentencepiece_bpe


def read_folder_vocabulary(folder: Path) -> Vocabulary | None:
    """None where the folder has no tokenizer. Raises MinillmError naming the file at fault."""
    config = read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").exists():
        library, structure, named, flags = _load(folder / "tokenizer.json"), frozenset(), {}, {}
    elif (folder / "tokenizer.model").exists():
        library, structure, named = _from_sentencepiece(folder / "tokenizer.model", config)
        flags = {"normalized": False}  # its normalizer puts a space before a text: no token would be met in it
    elif (folder / "tekken.json").exists():
        raise MinillmError(f"{folder} has only Mistral's tekken.json: add the model's tokenizer.json to the folder")
    else:
        return None
    named |= read_json(folder / "special_tokens_map.json") | config  # the map: repositories older than 2023
    add_tokens(library, folder, config, **flags)
    bos_id, eos_id = (_id(library, named.get(name)) for name in ("bos_token", "eos_token"))
    adds_bos, bos_id = _bos(library, bos_id, config.get("add_bos_token"))
    n_tokens = library.get_vocab_size()
    stop_ids = {eos_id} - {None}
    for name in ("config.json", "generation_config.json"):
        ids = read_json(folder / name).get("eos_token_id")
        stop_ids |= {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int) and 0 <= i < n_tokens}
    added = {i for i, token in library.get_added_tokens_decoder().items() if token.special}
    byte_level, strips_space = _decoding(library, folder)
    return Vocabulary(
        library=library,
        byte_level=byte_level,
        strips_space=strips_space,
        bos_id=bos_id,
        eos_id=eos_id,
        adds_bos=adds_bos,
        special_ids=frozenset(structure | added | stop_ids | ({bos_id} - {None})),
        stop_ids=frozenset(stop_ids),
        chat_template=_chat_template(folder, config),
    )


def _load(path: Path) -> tokenizers.Tokenizer:
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library's own exception type is plain Exception
        raise MinillmError(f"cannot read {path}: {error}; get it again, or `pip install -U tokenizers`") from error
    library.no_truncation()  # a tokenizer.json may hold the settings of somebody's training run
    library.no_padding()
    return library


def _from_sentencepiece(path: Path, config: dict) -> tuple[tokenizers.Tokenizer, frozenset[int], dict]:
    """The library's tokenizer; the ids that the model file says are structure; its names of BOS and EOS."""
    model = read_sentencepiece(path)
    prefix = "never" if not model.adds_space else "first" if config.get("legacy") is False else "always"
    library = sentencepiece_bpe(model.pieces, model.scores, model.types, prefix=prefix)
    structure = add_typed_tokens(library, model.pieces, model.types)
    if model.bos:  # every Llama and Mistral of this kind begins with BOS; `add_bos_token` can say otherwise
        pair = (model.bos, library.token_to_id(model.bos))
        library.post_processor = processors.TemplateProcessing(single=[model.bos, "$A"], special_tokens=[pair])
    return library, structure, {"bos_token": model.bos, "eos_token": model.eos}


def _bos(library: tokenizers.Tokenizer, bos_id: int | None, wanted: bool | None) -> tuple[bool, int | None]:
    """(whether a prompt begins with BOS, its id): `add_bos_token` if there is one, else the file's post-processor."""
    bare, full = (library.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    first = full[0] if full and full[:1] != bare[:1] else None
    bos_id = first if bos_id is None else bos_id
    adds = first is not None if wanted is None else bool(wanted)
    return adds and bos_id is not None, bos_id


def _decoding(library: tokenizers.Tokenizer, folder: Path) -> tuple[bool, bool]:
    """(byte_level, strips_space) from the decoder of a tokenizer.json."""
    steps = [json.loads(library.decoder.__getstate__())] if library.decoder else []
    if steps and steps[0]["type"] == "Sequence":
        steps = steps[0]["decoders"]
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return True, False
    if not kinds & {"ByteFallback", "Metaspace"}:
        raise MinillmError(
            f"{folder / 'tokenizer.json'} decodes with {sorted(kinds) or 'nothing'}; minillm knows byte-level and "
            "SentencePiece BPE, those of Llama and Mistral"
        )
    strips = any(step["type"] == "Strip" and step["start"] for step in steps)
    return False, strips or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps
    )


def _chat_template(folder: Path, config: dict) -> str | None:
    """A template file goes before tokenizer_config.json, where it may be one of several by name."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return read(path)
    template = read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):
        by_name = {entry["name"]: entry["template"] for entry in template}
        if "default" not in by_name and len(by_name) != 1:
            names = ", ".join(sorted(by_name))
            raise MinillmError(
                f"{folder} has several chat templates ({names}) and none called default: write the one to use into "
                "chat_template.jinja in that folder"
            )
        return by_name.get("default") or next(iter(by_name.values()))
    return template


def _id(library: tokenizers.Tokenizer, token: str | dict | None) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return library.token_to_id(text) if text else None
