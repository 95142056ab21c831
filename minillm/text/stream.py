"""StreamDecoder: token ids, one by one -> text that is safe to show.

A token may end inside a UTF-8 character, and text may be the beginning of a stop text: both are held back until the
next token decides.
"""

import codecs
from collections.abc import Sequence

from minillm.errors import UsageError
from minillm.text.tokenizer import Tokenizer


class StreamDecoder:
    """What `push` and `finish` return adds up to `tokenizer.decode` of all ids, cut before the first stop text.

    The first stop text is the one that is complete first. `stop` may also name a special token (which is never shown).
    With `continues`, the answer goes on where a text ended, and keeps a leading space that `decode` would drop.
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
