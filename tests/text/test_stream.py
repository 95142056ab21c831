"""StreamDecoder: pieces of text that add up, hold back what is not decided, and stop where they must."""

import random

import pytest
from vocabularies import DATA, byte_level_metadata

from minillm.errors import UsageError
from minillm.files.gguf_file import read_gguf
from minillm.text.tokenizer import StreamDecoder, Tokenizer


@pytest.fixture(scope="module")
def byte_level(default_model_path) -> Tokenizer:
    return Tokenizer.from_gguf(read_gguf(default_model_path).metadata)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.model").write_bytes((DATA / "tokenizer.model").read_bytes())
    return Tokenizer.from_folder(folder)


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


def cut(text: str, stops: list[str]) -> str:
    """`text` before the stop text that is complete first: character by character."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


def random_answer(tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """Any tokens: broken characters, special tokens, blanks; or the beginning of a text cut at any token."""
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(0, 12))]
    if rng.random() < 0.5:
        words = [rng.choice(["the", " a", "\u00e9", "\U0001f9ec", "\n\n", "  ", "work", "\u4e2d"]) for _ in range(8)]
        ids += tokenizer.encode("".join(words), bos=False)[: rng.randint(1, 12)]
    if rng.random() < 0.3:
        ids.insert(rng.randint(0, len(ids)), rng.choice(sorted(tokenizer.special_ids)))
    return ids


def test_pieces_add_up_to_the_text_before_the_first_stop(tokenizer):
    rng = random.Random(0)
    stopped = 0
    for _ in range(1500):
        ids = random_answer(tokenizer, rng)
        text = tokenizer.decode(ids)
        stops = []
        for _ in range(rng.choice([0, 1, 1, 2, 3])):  # true substrings, and some that only begin like one
            start = rng.randint(0, len(text))
            stop = text[start : start + rng.randint(1, 4)] + rng.choice(["", "", "", "x"])
            stops += [stop] if stop else []
        stream = StreamDecoder(tokenizer, stops)
        shown = ""
        for i in ids:
            shown += stream.push(i)
            assert cut(text, stops).startswith(shown)
        shown += stream.finish()
        assert shown == cut(text, stops), (ids, stops)
        assert stream.stopped == any(stop in text for stop in stops)
        assert stream.push(ids[0] if ids else 5) == "" or not stream.stopped
        stopped += stream.stopped
    assert 300 < stopped < 1300


def test_nothing_is_held_back_without_a_reason(tokenizer):
    stream = StreamDecoder(tokenizer, ["Stop:"])
    ids = tokenizer.encode("The work is done", bos=False)
    first, *others = (tokenizer.token_bytes(i).decode() for i in ids)
    assert [stream.push(i) for i in ids] == [first.removeprefix(" "), *others]


def test_a_split_character_waits_for_its_last_token(tokenizer):
    ids = tokenizer.encode("a\U0001f9ec", bos=False)
    stream = StreamDecoder(tokenizer)
    shown = [stream.push(i) for i in ids]
    assert "".join(shown) == "a\U0001f9ec" and shown[-1] == "\U0001f9ec" and "\ufffd" not in "".join(shown)
    cut_short = StreamDecoder(tokenizer)
    assert "".join(cut_short.push(i) for i in ids[:-1]) == "a"
    assert cut_short.finish() == "\ufffd"


def test_a_stop_text_over_several_tokens_never_shows(tokenizer):
    ids = tokenizer.encode("yes\n\nUser: no", bos=False)
    stream = StreamDecoder(tokenizer, ["\n\nUser:"])
    shown = [stream.push(i) for i in ids]
    assert "".join(shown) == "yes" and stream.stopped and stream.finish() == ""
    # ... and what only began like one is shown after all.
    stream = StreamDecoder(tokenizer, ["\n\nUser:"])
    shown = "".join(stream.push(i) for i in tokenizer.encode("yes\n\nUs", bos=False))
    assert shown == "yes" and not stream.stopped and stream.finish() == "\n\nUs"


def test_the_stop_text_that_is_complete_first_wins():
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(words=("ab", "abc", "abcd")))
    for ids in (tokenizer.encode("abcd"), [i for c in "abcd" for i in tokenizer.encode(c)]):
        stream = StreamDecoder(tokenizer, ["abcd", "bc"])
        assert "".join(map(stream.push, ids)) + stream.finish() == "a" and stream.stopped


def test_special_tokens_are_not_shown_but_may_be_stop_texts(tokenizer):
    special = sorted(tokenizer.special_ids)[-1]
    name = tokenizer.token_bytes(special).decode()
    ids = [*tokenizer.encode("one two", bos=False), special, *tokenizer.encode("three", bos=False)]
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)
    stream = StreamDecoder(tokenizer, [name, "two!"])
    assert "".join(map(stream.push, ids)) == "one two" and stream.stopped and stream.finish() == ""


def test_leading_space(sentencepiece):
    ids = sentencepiece.encode("the work")[1:]
    whole = StreamDecoder(sentencepiece)
    assert "".join(map(whole.push, [1, *ids])) == "the work"
    goes_on = StreamDecoder(sentencepiece, continues=True)
    assert "".join(map(goes_on.push, ids)) == " the work"
    two = sentencepiece.encode("  the")[1:]  # only the space that encoding added is dropped
    stream = StreamDecoder(sentencepiece)
    assert "".join(map(stream.push, two)) == "  the"


def test_ids_beyond_the_vocabulary_show_nothing(tokenizer):
    stream = StreamDecoder(tokenizer)
    assert stream.push(tokenizer.vocab_size) == stream.push(tokenizer.vocab_size + 1000) == ""


def test_an_empty_stop_text_is_refused(tokenizer):
    with pytest.raises(UsageError, match="empty stop text"):
        StreamDecoder(tokenizer, ["x", ""])


def test_one_stop_text_may_be_given_bare(tokenizer):
    stream = StreamDecoder(tokenizer, "work")
    assert "".join(map(stream.push, tokenizer.encode("the work", bos=False))) == "the " and stream.stopped
