"""What the text of an answer may be: a JSON schema, a regular expression, a grammar. It masks logits, and no more, with
llguidance (extra `grammar`), which is imported where there is a constraint.

A Constraint says it, Matchers prepare a vocabulary for all of them, a Matcher follows one answer."""

import json
import re
import reprlib
from dataclasses import dataclass

import numpy as np

from minillm.errors import MinillmError, UsageError

NAMES = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "Lark grammar", "gbnf": "GBNF grammar"}
MISSING = "a constraint needs llguidance: pip install 'minillm-engine[grammar]'"
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_GBNF_PART = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*|\.', re.DOTALL)


@dataclass(frozen=True)
class Constraint:
    """All that an answer may be, from its first character to its last. Made by one of the methods below; whether the
    text makes sense is seen where an answer is asked for."""

    kind: str  # one of NAMES
    text: str

    def __post_init__(self):
        if self.kind not in NAMES:
            raise UsageError(f"a constraint is one of {', '.join(NAMES)}, not {self.kind!r}")
        if not isinstance(self.text, str):
            raise UsageError(f"a constraint's {NAMES[self.kind]} must be a text, not {reprlib.repr(self.text)}")

    @classmethod
    def json_schema(cls, schema):
        """JSON that is valid by a schema: an object (dict), a bool, or their JSON text. The object's "x-guidance" sets
        llguidance's options, such as {"whitespace_flexible": false}. Raises UsageError for what is no JSON."""
        try:
            return cls("json_schema", json.dumps(json.loads(schema) if isinstance(schema, str) else schema))
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"the JSON schema {reprlib.repr(schema)} is no JSON: {error}") from None

    @classmethod
    def json_object(cls):
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern):
        """All of what a regular expression matches: Rust's syntax, without look-around and back references."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, grammar):
        """A grammar in llguidance's variant of Lark, with the rule `start`."""
        return cls("lark", grammar)

    @classmethod
    def gbnf(cls, grammar):
        """A grammar as llama.cpp writes it, with the rule `root`."""
        return cls("gbnf", grammar)


class Matchers:
    """The vocabulary of a tokenizer, prepared once (a second for 50,000 tokens), and Matchers of it."""

    def __init__(self, tokenizer, vocab_size, stop_ids):
        """tokenizer: text.tokenizer.Tokenizer. vocab_size: of the model's logits. stop_ids: that end an answer; they
        may come only where the constraint is satisfied. Raises UsageError where there is none, or no llguidance."""
        try:
            import llguidance
        except ImportError:
            raise UsageError(MISSING) from None
        ends = sorted(i for i in stop_ids if i < vocab_size)
        if not ends:
            raise UsageError("a constraint needs a token that ends an answer, and this model names none")
        self.library, self.vocab_size = llguidance, vocab_size
        words = _Words(tokenizer, vocab_size, ends)
        self.words = words.library = llguidance.LLTokenizer(llguidance.TokenizerWrapper(words), eos_token=ends)

    def matcher(self, constraint):
        """A Matcher at the beginning of an answer. Raises UsageError with llguidance's reason."""
        limits = self.library.LLParserLimits(verbose_errors=False)
        try:
            grammar = self._grammar(constraint)
            found = self.library.LLMatcher(self.words, grammar, log_level=0, limits=limits)
            reason = found.get_error() or " ".join(found.get_grammar_warnings())
        except ValueError as error:
            reason = str(error)
        if reason:
            raise UsageError(f"the {NAMES[constraint.kind]} of the constraint cannot be used: {_one_line(reason)}")
        return Matcher(found, self.vocab_size)

    def _grammar(self, constraint):
        """Its text for LLMatcher. Raises ValueError."""
        if constraint.kind != "gbnf":
            return self.library.grammar_from(constraint.kind, constraint.text)
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            return self.library.grammar_from("lark", gbnf_to_lark(_GBNF_PART.sub(_plain, constraint.text)))
        except IndexError:
            raise ValueError("it ends too early") from None
        except Exception as error:  # mostly the converter's own, which are of the plain type
            raise ValueError(str(error)) from None


class Matcher:
    """Follows one answer: what may come next."""

    def __init__(self, matcher, vocab_size):
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self):
        """(vocab,) bool: the tokens that may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(bool)

    def take(self, token_id):
        """This token came."""
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self):
        if self._matcher.is_error():
            raise MinillmError(f"the constraint cannot be followed any more: {_one_line(self._matcher.get_error())}")


class _Words:
    """What llguidance wants to know of a tokenizer: see its TokenizerWrapper."""

    def __init__(self, tokenizer, vocab_size, ends):
        self.tokenizer, self.library = tokenizer, None
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        self._special = {i for i in tokenizer.special_ids if i < vocab_size} | {*ends}
        self.special_token_ids = sorted(self._special)
        self.eos_token_id, self.bos_token_id = ends[0], None

    def __call__(self, data):
        """Token ids of text that is sure to come: how the tokenizer would write it, where it would write just that."""
        ids = self.tokenizer.encode(data.decode(), bos=False)
        spelled = b"".join(self.tokens[i] if i < len(self.tokens) else b"" for i in ids)
        if spelled == data and not self._special & {*ids}:
            return ids
        return self.library.greedy_tokenize(data.decode()) if self.library else []


def _plain(part):
    """A part of GBNF as gbnf_to_lark understands it: its `.` leaves line ends out, and it misreads \\u and \\U."""
    text = part.group()
    if text == ".":
        return '(. | "\\n")'
    return text if text.startswith("#") else _ESCAPE.sub(_unescaped, text)


def _unescaped(escape):
    digits = escape[1] or escape[2] or escape[3]
    if digits is None:
        return escape.group()
    code = int(digits, 16)
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise ValueError(f"{escape.group()} is no character")
    return f"\\x{code:02x}" if code < 0x80 else chr(code)


def _one_line(text):
    return " ".join(text.replace("<non-verbose/>", "").split())
