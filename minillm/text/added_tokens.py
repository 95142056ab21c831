"""Tokens that files of a folder name beside its tokenizer.json or tokenizer.model, added as transformers adds them.

`added_tokens_decoder` of tokenizer_config.json says their ids, or in older folders added_tokens.json. The special
tokens that tokenizer_config.json names ("eos_token"), in older folders special_tokens_map.json too, follow where they
are not known yet.
"""

import json
import reprlib
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from minillm.errors import MinillmError

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")  # lists of them, or objects
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_tokens(library: tokenizers.Tokenizer, folder: Path, config: dict, **flags: bool) -> None:
    """Has the library know the tokens. config: contents of tokenizer_config.json; flags: of every token, in place of
    the files'. Raises MinillmError naming a token whose id is another's."""
    older = {} if "added_tokens_decoder" in config else read_json(folder / "special_tokens_map.json")
    special = _special(folder, older | config)
    placed = _placed(folder, config, special)
    known = {token.content for token in library.get_added_tokens_decoder().values()}
    tokens = {token["content"]: token for _, token in sorted(placed.items())}  # their flags go before the library's
    tokens |= {content: token for content, token in special.items() if content not in known | tokens.keys()}
    library.add_tokens([AddedToken(**token | flags) for token in tokens.values()])
    for token_id, token in placed.items():
        if (given := library.token_to_id(token["content"])) != token_id:
            raise MinillmError(
                f"{folder} gives the token {token['content']!r} the id {token_id}, and by its vocabulary it has "
                f"{given}: get all files of the tokenizer again, from one model"
            )


def _special(folder: Path, named: dict) -> dict[str, dict]:
    """content -> settings of the special tokens that have a name."""
    found = [named.get(name) for name in _SPECIAL]
    for name in _MORE_SPECIAL:
        more = named.get(name) or []
        if not isinstance(more, list | dict):
            raise _malformed(folder, name, more)
        found += more.values() if isinstance(more, dict) else more
    tokens = [_settings(folder, entry) | {"special": True} for entry in found if entry]
    return {token["content"]: {"normalized": False} | token for token in tokens}


def _placed(folder: Path, config: dict, special: dict) -> dict[int, dict]:
    """id -> settings of the tokens that have an id."""
    if (entries := config.get("added_tokens_decoder")) is None:
        entries = {i: content for content, i in read_json(folder / "added_tokens.json").items()}
    try:
        placed = {int(i): _settings(folder, entry) for i, entry in entries.items()}
    except (AttributeError, TypeError, ValueError):
        raise _malformed(folder, "added tokens", entries) from None
    return {
        i: token | {"special": token.get("special", False) or token["content"] in special}
        for i, token in placed.items()
    }


def _settings(folder: Path, entry) -> dict:
    """{"content": ..., flags that are given} of a token, which is a text or an object."""
    entry = {"content": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not entry["content"]:
        raise _malformed(folder, "token", entry)
    return {"content": entry["content"]} | {flag: bool(entry[flag]) for flag in _FLAGS if flag in entry}


def _malformed(folder: Path, what: str, value) -> MinillmError:
    return MinillmError(f"{folder}: the tokenizer's files have {what} {reprlib.repr(value)}: get them again")


def read(path: Path) -> str:
    """A text file. Raises MinillmError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise MinillmError(f"cannot read {path} ({error}): get it again") from error


def read_json(path: Path) -> dict:
    """A file of one JSON object; {} where it is missing. Raises MinillmError."""
    if not path.exists():
        return {}
    try:
        content = json.loads(read(path))
    except (ValueError, RecursionError) as error:
        raise MinillmError(f"{path} is not JSON ({error}): get it again") from error
    if not isinstance(content, dict):
        raise MinillmError(f"{path} is not a JSON object: get it again")
    return content
