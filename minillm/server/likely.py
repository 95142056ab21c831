"""How likely the tokens of one choice are, as clients are told: of a chat, and of a completion."""

import codecs


class ChatLogprobs:
    """Tokens that are never shown are left out: the texts of the others join to the content, up to a stop text."""

    def __init__(self, llm, prompt=None):
        self.llm, self.hidden = llm, hidden(llm)

    def tell(self, tokens):
        """The object for Logprobs of tokens that follow those told before; None where all are left out."""
        content = [self._one(one) for one in tokens if one.token_id not in self.hidden]
        return {"content": content, "refusal": None} if content else None

    def _one(self, one):
        top = [self._about(token, logprob) for token, logprob in one.top]
        return self._about(one.token_id, one.logprob) | {"top_logprobs": top}

    def _about(self, token, logprob):
        word = word_of(self.llm, token)
        return {"token": word.decode(errors="replace"), "logprob": logprob, "bytes": list(word)}


class TextLogprobs:
    """All tokens, the one that ended the answer, too. Those with the same text count once, as the likeliest of them."""

    def __init__(self, llm, prompt=None):
        """prompt: the Prompt that is told first, if any. Its tokens may spell more than its text, at the beginning; and
        what control tokens are called is a part of it, and not of an answer."""
        self.llm, self.hidden, self.echoed, self.offset = llm, hidden(llm), 0, 0
        if prompt:
            self.echoed, self.offset = len(prompt.ids), len(prompt.text) - len(spelled(llm, prompt.ids))
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def tell(self, tokens):
        """The object for Logprobs of tokens that follow those told before. A logprob of None: nothing is before it."""
        return {
            "tokens": [self._name(one.token_id) for one in tokens],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [None if one.logprob is None else self._top(one) for one in tokens],
            "text_offset": [self._next(one.token_id) for one in tokens],
        }

    def _top(self, one):
        found = {}
        for token, logprob in (*one.top, (one.token_id, one.logprob)):
            found.setdefault(self._name(token), logprob)
        return found

    def _name(self, token):
        """Its text; where its bytes are none, those."""
        word = word_of(self.llm, token)
        try:
            return word.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in word)

    def _next(self, token):
        """Characters of the text before a token."""
        before = max(self.offset, 0)
        if self.echoed > 0 or token not in self.hidden:
            self.offset += len(self.utf8.decode(word_of(self.llm, token)))
        self.echoed -= 1
        return before


def hidden(llm):
    """Ids that are never shown in an answer."""
    return llm.tokenizer.special_ids if llm.tokenizer else llm.stop_ids


def word_of(llm, token):
    """The bytes of a token; none without a tokenizer."""
    return llm.tokenizer.token_bytes(token) if llm.tokenizer else b""


def spelled(llm, ids):
    """The text of token ids, with the names of special ones."""
    return b"".join(word_of(llm, token) for token in ids).decode(errors="replace")
