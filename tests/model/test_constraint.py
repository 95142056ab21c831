"""Constraints: which tokens may come, against the texts that a constraint allows, written out; and whole answers."""

import json
import re
import sys

import pytest
import tiny_chat
import vocabularies
from vocabularies import byte_level_metadata, sentencepiece_metadata

from minillm import LLM, CacheConfig, Constraint, MinillmError, SamplingParams, UsageError
from minillm.constraint import Matchers
from minillm.ops import cpu_lib
from minillm.text.tokenizer import Tokenizer

TEXTS = ["hello", "help", "he said", "hé", "日本", "{}", '{"a": 1}', " the quick brown fox", "the lazy dog", "", "<s>"]
REGEX = Constraint.regex("|".join(map(re.escape, TEXTS)))
GBNF = Constraint.gbnf("root ::= " + " | ".join(json.dumps(text) for text in TEXTS))


def trained(folder):
    library = vocabularies.train_library()
    settings = {"eos_token": "<|end|>", "bos_token": "<|begin|>"}
    return Tokenizer.from_folder(vocabularies.write_folder(folder, library, tokenizer_config=settings))


@pytest.fixture(params=["byte level", "sentencepiece", "trained"])
def tokenizer(request, tmp_path):
    if request.param == "trained":
        return trained(tmp_path)
    metadata = byte_level_metadata() if request.param == "byte level" else sentencepiece_metadata(eos_token_id=2)
    return Tokenizer.from_gguf(metadata)


def may_come(tokenizer, vocab_size, stop_ids, begun):
    """Ids of tokens after `begun` (bytes) by TEXTS alone, byte by byte."""
    texts = [text.encode() for text in TEXTS]
    found = set(stop_ids) if begun in texts else set()
    for token in range(vocab_size):
        word = tokenizer.token_bytes(token)
        if word and token not in tokenizer.special_ids and any(text.startswith(begun + word) for text in texts):
            found.add(token)
    return found


@pytest.mark.parametrize("constraint", [REGEX, GBNF], ids=["regex", "gbnf"])
def test_allowed_tokens_are_those_of_the_texts(tokenizer, constraint):
    """On every way through them. Where only one byte can follow, one spelling of it in tokens is enough."""
    vocab_size, stop_ids = tokenizer.vocab_size + 7, sorted(tokenizer.stop_ids)  # rows beyond the tokenizer
    matchers = Matchers(tokenizer, vocab_size, stop_ids)
    ways, ended, free = [()], set(), 0
    while ways:
        way = ways.pop()
        matcher, begun = matchers.matcher(constraint), b"".join(map(tokenizer.token_bytes, way))
        for token in way:
            matcher.take(token)
        allowed = matcher.allowed()
        assert allowed.shape == (vocab_size,) and allowed.dtype == bool
        allowed, expected = set(allowed.nonzero()[0].tolist()), may_come(tokenizer, vocab_size, stop_ids, begun)
        following = {text.encode()[len(begun) :][:1] for text in TEXTS if text.encode().startswith(begun)}
        if len(following) > 1:
            free += 1
            assert allowed == expected, begun
        assert allowed and allowed <= expected, begun
        if allowed & set(stop_ids):
            ended.add(begun.decode())
        ways += [(*way, token) for token in sorted(allowed - set(stop_ids))]
    assert ended == set(TEXTS) and free > 5


def test_an_end_that_the_tokenizer_does_not_know(tokenizer):
    """A model's config may name one."""
    end = tokenizer.vocab_size + 2
    matcher = Matchers(tokenizer, end + 5, {end, *tokenizer.stop_ids}).matcher(Constraint.regex("a|"))
    allowed = matcher.allowed()
    assert allowed[[end, *tokenizer.stop_ids]].all() and allowed[tokenizer.encode("a", bos=False)].all()
    assert allowed.sum() == sum(tokenizer.token_bytes(i) == b"a" for i in range(end)) + 1 + len(tokenizer.stop_ids)


def test_a_token_that_may_not_come_is_an_error(tokenizer):
    matcher = Matchers(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids).matcher(Constraint.regex("a+"))
    with pytest.raises(MinillmError, match="^the constraint cannot be followed any more: "):
        matcher.take(tokenizer.encode("b", bos=False)[0])


def test_a_model_that_names_no_end(tokenizer):
    with pytest.raises(UsageError, match="needs a token that ends an answer"):
        Matchers(tokenizer, tokenizer.vocab_size, frozenset())


# answers


@pytest.fixture(scope="module", params=["numpy", *cpu_lib.available_paths()[:1]])
def llm(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILLM_CPU", request.param)
        folder = tiny_chat.make(tmp_path_factory.mktemp("model") / "tiny")
        with LLM.load(folder, cache=CacheConfig("full")) as llm:
            yield llm


def answers(llm, constraint, n=6, max_tokens=200):
    """(text, stop reason) of n answers drawn at random, together with one that is free."""
    wanted = [SamplingParams(max_tokens, 1.0, seed=i, constraint=constraint) for i in range(n)]
    wanted.append(SamplingParams(12, 0.8, seed=5))
    sessions = [llm.session() for _ in wanted]
    for session in sessions:
        session.feed("say: ")
    requests = [session.request(params) for session, params in zip(sessions, wanted, strict=True)]
    llm.engine.run(requests)
    for request, session in zip(requests, sessions, strict=True):
        assert request.error is None
        session.close()
    assert requests[-1].text == llm.generate("say: ", wanted[-1])
    return [(request.text, request.stop_reason) for request in requests[:-1]]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["cat", "dog", None]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "of": {"const": "a\u00e9"},
    },
    "required": ["name", "kind", "ages", "of"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def test_answers_by_a_json_schema(llm):
    found = answers(llm, Constraint.json_schema(SCHEMA))
    for text, reason in found:
        value = json.loads(text)
        assert reason == "eos" and set(value) == {"name", "kind", "ages", "of"}
        assert isinstance(value["name"], str) and len(value["name"]) <= 5 and value["kind"] in ("cat", "dog", None)
        assert len(value["ages"]) <= 3 and all(type(n) is int and 0 <= n <= 99 for n in value["ages"])
        assert value["of"] == "a\u00e9"
    assert len({text for text, _ in found}) > 1


def test_answers_that_are_json_objects(llm):
    found = answers(llm, Constraint.json_object(), n=12, max_tokens=30)
    ended = [json.loads(text) for text, reason in found if reason == "eos"]
    assert ended and all(isinstance(value, dict) for value in ended)
    assert all(text.lstrip().startswith("{") for text, _ in found)


CONSTRAINTS = {
    "regex": (Constraint.regex("[a-c]{3,5}-[0-9]+x?"), "[a-c]{3,5}-[0-9]+x?"),
    "lark": (Constraint.lark('start: "a" D ("," D){2}\nD: /[0-9]{2}/'), "a[0-9]{2}(,[0-9]{2}){2}"),
    "gbnf": (
        Constraint.gbnf('# a rule\nroot ::= word (" " word){1,3} . "\\u00e9\\x41"\nword ::= [a-c]+ "." | "\\"/"'),
        r'([a-c]+\.|"/)( ([a-c]+\.|"/)){1,3}(.|\n)éA',
    ),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_answers_by_a_grammar(llm, name):
    constraint, pattern = CONSTRAINTS[name]
    found = answers(llm, constraint)
    for text, reason in found:
        assert reason == "eos" and re.fullmatch(pattern, text), text
    assert len({text for text, _ in found}) > 1


def test_each_turn_of_a_chat_follows_it_anew(llm):
    session, params = llm.session(), SamplingParams(20, constraint=Constraint.regex("(yes|no), [a-d]{2}"))
    for question in ("is it?", "and that?"):
        assert re.fullmatch("(yes|no), [a-d]{2}", "".join(piece.text for piece in session.ask(question, params)))
    session.close()


def test_a_constraint_with_biases_and_log_probabilities(llm):
    a, b = (llm.encode(letter)[0] for letter in "ab")
    params = SamplingParams(8, constraint=Constraint.regex("[ab]{4}"), logit_bias={b: 50}, logprobs=1)
    pieces = list(llm.stream("say: ", params))
    assert "".join(piece.text for piece in pieces) == "bbbb"
    row = llm.logits(llm.encode("say: "))[-1]
    assert pieces[0].logprob.top[0][0] == int(row.argmax())  # of the logits as they are
    with pytest.raises(MinillmError, match="^no token is left to come next: constraint and logit_bias"):
        llm.generate("x", SamplingParams(8, constraint=Constraint.regex("[ab]{4}"), logit_bias={a: -1e999, b: -1e999}))


# what is refused

WRONG = {
    "{": lambda: Constraint.json_schema("{"),
    "hiccup": lambda: Constraint.json_schema("hiccup"),
    "no JSON": lambda: Constraint.json_schema({"type": object()}),
    "must be an object or boolean": lambda: Constraint.json_schema(123),
    "type must be a string or array": lambda: Constraint.json_schema({"type": 123}),
    "Invalid type: hiccup": lambda: Constraint.json_schema({"type": "hiccup"}),
    "unevaluatedProperties": lambda: Constraint.json_schema({"type": "object", "unevaluatedProperties": False}),
    "Unsatisfiable": lambda: Constraint.json_schema({"type": "integer", "minimum": 2, "maximum": 1}),
    "unclosed group": lambda: Constraint.regex("("),
    "look-around": lambda: Constraint.regex("(?=a)b"),
    "must be a text, not 5": lambda: Constraint.regex(5),
    "Expected ::=": lambda: Constraint.gbnf("hello"),
    "Unexpected end of input": lambda: Constraint.gbnf('root ::= "a'),
    "it ends too early": lambda: Constraint.gbnf('root ::= "a\\'),
    "'foo' not found": lambda: Constraint.gbnf("root ::= foo"),
    "No 'root' rule": lambda: Constraint.gbnf('rot ::= "a"'),
    "is no character": lambda: Constraint.gbnf('root ::= "\\ud800"'),
    "one of json_schema, regex, lark, gbnf, not 'yaml'": lambda: Constraint("yaml", "a: b"),
    "no start rule": lambda: Constraint.lark('x: "a"'),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_makes_no_sense(llm, said):
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        llm.generate("x", SamplingParams(5, constraint=WRONG[said]()))
    assert "\n" not in str(caught.value)


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with LLM.load(tiny_chat.make(tmp_path / "tiny")) as llm:
        with pytest.raises(UsageError, match=r"needs llguidance: pip install 'minillm-engine\[grammar\]'$"):
            llm.generate("x", SamplingParams(5, constraint=Constraint.json_object()))
        assert llm.generate("x", SamplingParams(3)) and llm.pool.bytes_in_use == 0


def test_a_constraint_that_is_none():
    with pytest.raises(UsageError, match="^constraint must be a Constraint, or None, not 'json'"):
        SamplingParams(constraint="json")
    with pytest.raises(UsageError, match="ignore_eos"):
        SamplingParams(constraint=Constraint.json_object(), ignore_eos=True)
