"""Tokenizer: text <-> token ids, the chat template, which ids end an answer, which tokens are delimiters.

StreamDecoder: token ids, one by one -> text that is safe to show."""

import codecs
import dataclasses
import re
import string
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from minillm.errors import MinillmError, UsageError
from minillm.files.stored_model import StoredModel
from minillm.text.chat_template import ChatTemplate, find_template
from minillm.text.delimiters import classify
from minillm.text.gguf_vocab import read_gguf_vocabulary
from minillm.text.tokenizer_files import read_folder_vocabulary
from minillm.text.vocabulary import SPACE, Vocabulary

# GPT-2's spelling of bytes: a printable character of Latin-1 is itself, the other 68 bytes are U+0100 and up in turn.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {0x100 + i: byte for i, byte in enumerate(b for b in range(256) if b not in _PRINTABLE)}

_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
_WORDLIKE = frozenset(string.ascii_letters + string.digits)
_PROBE = "minillm-probe"
_MOST = 1 << 22  # ids: sixteen times those of the largest vocabularies; there are tables of all of them


class Tokenizer:
    """Special tokens written in text are recognised everywhere; what they are in an answer is never shown."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.bos_id = vocabulary.bos_id
        self.adds_bos = vocabulary.adds_bos
        self.strips_space = vocabulary.strips_space  # `decode` drops one leading space
        self._library = vocabulary.library
        self._classes = {}  # reading -> what delimiter_classes made of it
        self._added = {i: token.content for i, token in self._library.get_added_tokens_decoder().items()}
        self.vocab_size = max([self._library.get_vocab_size() - 1, *self._added]) + 1
        if self.vocab_size > _MOST:
            last = self.vocab_size - 1
            raise MinillmError(
                f"the vocabulary gives the token {self._added[last]!r} the id {last}, and no model has so many: get "
                "the tokenizer's files again"
            )

    @classmethod
    def of(cls, stored: StoredModel, chat_template: str | None = None) -> "Tokenizer | None":
        """Of a model's files, with another chat template where one is named; None where they hold none. Raises
        MinillmError."""
        found = cls.from_folder(stored.path) if stored.metadata is None else cls.from_gguf(stored.metadata)
        return found.with_chat_template(chat_template) if found and chat_template is not None else found

    @classmethod
    def from_folder(cls, path: Path) -> "Tokenizer | None":
        """From tokenizer.json or tokenizer.model and their companions; None if the folder has neither."""
        vocabulary = read_folder_vocabulary(Path(path))
        return cls(vocabulary) if vocabulary else None

    @classmethod
    def from_gguf(cls, metadata: dict) -> "Tokenizer":
        """From the metadata of a .gguf file. Raises MinillmError naming the key and value at fault."""
        return cls(read_gguf_vocabulary(metadata))

    def with_chat_template(self, name_or_text: str) -> "Tokenizer":
        """The same tokenizer with another template: a built-in name, a file, or the text. Raises UsageError."""
        return Tokenizer(dataclasses.replace(self.vocabulary, chat_template=find_template(name_or_text)))

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Token ids. bos: the text begins a sequence, and a model that uses BOS gets exactly one (none is added to text
        that begins with it); without, it goes on where another text ended, and the space that SentencePiece puts before
        a text is left out."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MinillmError(f"the text is not valid Unicode at character {error.start}: save it as UTF-8") from error
        ids = self._library.encode(text, add_special_tokens=False).ids
        if not bos and self.strips_space:
            before = self._library.encode("\n", add_special_tokens=False).ids  # the space, and something to come after
            after = self._library.encode("\n" + text, add_special_tokens=False).ids
            ids = after[len(before) :] if after[: len(before)] == before else ids
        if bos and self.adds_bos and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text without special tokens. Bytes that are no UTF-8 become U+FFFD."""
        data = b"".join(self.token_bytes(i) for i in ids if i not in self.special_ids)
        return self.without_leading_space(data.decode("utf-8", errors="replace"))

    def without_leading_space(self, text: str) -> str:
        """SentencePiece puts a space before a text to encode it; the decoded text is given without."""
        return text[1:] if self.strips_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; of a special token its name; none for an id beyond the vocabulary."""
        token_id = int(token_id)
        if not 0 <= token_id < 1 << 32:  # what the library takes
            return b""
        piece = self._added.get(token_id) or self._library.id_to_token(token_id)
        return self._spell(piece, token_id in self._added) if piece else b""

    def _spell(self, piece: str, added: bool) -> bytes:
        if not self.vocabulary.byte_level:
            if _BYTE_PIECE.fullmatch(piece):
                return bytes.fromhex(piece[3:5])
            return piece.replace(SPACE, " ").encode()
        if not added:
            try:
                return piece.translate(_BYTE_OF).encode("latin-1")
            except UnicodeEncodeError:
                pass  # not GPT-2's spelling: a token somebody put into the vocabulary as it is
        return piece.encode()

    @property
    def has_chat_template(self) -> bool:
        return self.vocabulary.chat_template is not None

    def render_chat(self, messages: list[dict], *, add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation [{"role": "user", "content": "..."}, ...]. Raises MinillmError."""
        special = {"bos_token": self.vocabulary.bos_id, "eos_token": self.vocabulary.eos_id}
        names = {name: "" if i is None else self.token_bytes(i).decode(errors="replace") for name, i in special.items()}
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, **names)

    @cached_property
    def _template(self) -> ChatTemplate:
        if not self.has_chat_template:
            raise MinillmError("the model has no chat template: complete text with --raw, or give --chat-template NAME")
        return ChatTemplate(self.vocabulary.chat_template)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: those the model's files list, and the one its chat template ends an answer with."""
        return self.vocabulary.stop_ids | self._end_of_turn()

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that are structure, never part of an answer's text."""
        return self.vocabulary.special_ids | self.stop_ids

    @cached_property
    def control_texts(self) -> frozenset[str]:
        """Texts that are structure wherever they are recognised: those of special tokens, and of other added tokens
        that the chat template has."""
        template = self.vocabulary.chat_template or ""
        special = {self._added[i] for i in self.special_ids if i in self._added}
        return frozenset(special | {text for text in self._added.values() if text.strip() and text in template})

    def _end_of_turn(self) -> frozenset[int]:
        """The added token that the chat template writes right after an assistant's words, if it writes one.

        Some fine-tuned models have it as a token of the ordinary kind, not a special one.
        """
        if not self.has_chat_template:
            return frozenset()
        talk = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
        try:
            text = self.render_chat(talk, add_generation_prompt=False)
        except MinillmError:
            return frozenset()  # whoever chats will be told; plain completion goes on
        after = text.rpartition(_PROBE)[2].lstrip()
        first = self._library.encode(after, add_special_tokens=False).ids[:1]
        return frozenset(first) & (self._added.keys() - {self.bos_id})

    def delimiter_classes(self, reading: str = "default") -> np.ndarray:
        """uint8 (vocab_size,) of delimiters.DelimiterClass; for `reading` see there."""
        if reading not in self._classes:
            self._classes[reading] = self._classify(reading)
        return self._classes[reading]

    def _classify(self, reading):
        pieces = map(self._library.id_to_token, range(self.vocab_size))
        # What ends in an ASCII letter or digit is no delimiter in any spelling: nine tokens of ten need no look.
        tokens = [
            b"" if not piece or piece[-1] in _WORDLIKE else self._spell(piece, i in self._added)
            for i, piece in enumerate(pieces)
        ]
        return classify(tokens, self.special_ids, reading)


class StreamDecoder:
    """What `push` and `finish` return adds up to `tokenizer.decode` of all ids, cut before the first stop text.

    A token may end inside a UTF-8 character, and text may be the beginning of a stop text: both are held back until the
    next token decides. The first stop text is the one that is complete first. `stop` may also name a special token
    (which is never shown). With `continues`, the answer goes on where a text ended, and keeps a leading space that
    `decode` would drop.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, continues: bool = False):
        """Raises UsageError for an empty stop text."""
        self.stopped = False  # a stop text was met: nothing more will come
        self._tokenizer = tokenizer
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise UsageError("an empty stop text would end every answer before it begins: leave it out")
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # decoded, but perhaps the beginning of a stop text
        self._begun = continues  # whether the text's beginning is behind us

    def push(self, token_id: int) -> str:
        """Text that became safe to show with this token; often "" or more than the token's own text."""
        token = self._tokenizer.token_bytes(token_id)
        if token_id not in self._tokenizer.special_ids:
            return self._take(self._utf8.decode(token))
        if not self.stopped and token.decode(errors="replace") in self._stop:
            rest = self.finish()
            self.stopped = True
            return rest
        return ""

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        text = self._take(self._utf8.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        if text and not self._begun:
            self._begun = True
            text = self._tokenizer.without_leading_space(text)
        text = self._held + text
        met = [(text.index(stop) + len(stop), text.index(stop)) for stop in self._stop if stop in text]
        if met:
            self.stopped, self._held = True, ""
            return text[: min(met)[1]]
        safe = len(text) - self._open_end(text)
        self._held = text[safe:]
        return text[:safe]

    def _open_end(self, text: str) -> int:
        """Characters at the end of `text` that may be the beginning of a stop text."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stop):
                return n
        return 0
