"""Tokenizer against the references: sentencepiece, the models' own regular expressions, a literal BPE."""

import base64
import json
import random
import re
import shutil

import numpy as np
import pytest
from tokenizers import decoders
from vocabularies import (
    BYTE,
    CONTROL,
    DATA,
    NORMAL,
    SPELL,
    UNKNOWN,
    USER_DEFINED,
    byte_level_metadata,
    prefixed,
    sentencepiece_metadata,
    spell,
    train_library,
    write_folder,
)

from minillm.errors import MinillmError
from minillm.files.gguf_file import read_gguf
from minillm.text.tokenizer import Tokenizer

CUTS = json.loads((DATA / "cuts.json").read_text())
SENTENCEPIECE = json.loads((DATA / "sentencepiece.json").read_text())


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("sentencepiece")
    shutil.copy(DATA / "tokenizer.model", folder)
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def default_metadata(default_model_path) -> dict:
    return read_gguf(default_model_path).metadata


@pytest.fixture(scope="module")
def default_tokenizer(default_metadata) -> Tokenizer:
    return Tokenizer.from_gguf(default_metadata)


# Byte-level BPE


@pytest.mark.parametrize("pre", CUTS)
def test_text_is_cut_like_the_reference_regex(pre):
    library = Tokenizer.from_gguf(byte_level_metadata(pre=pre)).vocabulary.library
    for pieces in CUTS[pre]:
        cut = [piece for piece, _ in library.pre_tokenizer.pre_tokenize_str("".join(pieces))]
        assert cut == [spell(piece) for piece in pieces]


def test_default_model_encodes_like_a_literal_bpe(default_metadata, default_tokenizer):
    rank = {tuple(merge.split(" ")): i for i, merge in enumerate(default_metadata["tokenizer.ggml.merges"])}
    ids = {piece: i for i, piece in enumerate(default_metadata["tokenizer.ggml.tokens"])}
    for pieces in CUTS["smollm"]:
        expected = []
        for piece in pieces:
            symbols = list(spell(piece))
            while True:
                pairs = list(zip(symbols, symbols[1:], strict=False))
                best = min(pairs, key=lambda pair: rank.get(pair, 1 << 30), default=None)
                if best not in rank:
                    break
                at = pairs.index(best)
                symbols[at : at + 2] = ["".join(best)]
            expected += [ids[symbol] for symbol in symbols if symbol in ids]  # eight bytes have no token at all
        text = "".join(pieces)
        assert default_tokenizer.encode(text) == expected
        if all(SPELL[byte] in ids for byte in text.encode()):
            assert default_tokenizer.decode(expected) == text


def test_default_model(default_tokenizer):
    tokenizer = default_tokenizer
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.adds_bos) == (49152, 1, False)
    assert tokenizer.stop_ids == {0, 2} and len(tokenizer.special_ids) == 17
    assert tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n") == [1, 4093, 198, 26843, 2, 198]
    prompt = tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    assert prompt.startswith("<|im_start|>system\nYou are") and prompt.endswith("Hi<|im_end|>\n<|im_start|>assistant\n")


def test_llama3_keeps_words_that_are_tokens_whatever_the_merges():
    unreachable = byte_level_metadata(words=("zq", "hello"), pre="llama-bpe", add_bos_token=False)
    assert len(Tokenizer.from_gguf(unreachable).encode("hello")) == 1
    assert len(Tokenizer.from_gguf(unreachable | {"tokenizer.ggml.pre": "gpt-2"}).encode("hello")) == 5


def test_qwen2_composes_characters_first():
    composed, decomposed = "\u00e9", "e\u0301"
    qwen2, gpt2 = (Tokenizer.from_gguf(byte_level_metadata(pre=pre)) for pre in ("qwen2", "gpt-2"))
    assert qwen2.encode(decomposed) == qwen2.encode(composed) == gpt2.encode(composed) != gpt2.encode(decomposed)


# SentencePiece BPE


def test_sentencepiece_folder_and_gguf_are_the_sentencepiece_package(sentencepiece_tokenizer):
    gguf = Tokenizer.from_gguf(sentencepiece_metadata())
    for text, ids, decoded in SENTENCEPIECE:
        for tokenizer in (sentencepiece_tokenizer, gguf):
            assert tokenizer.encode(text) == [1, *ids]
            assert tokenizer.decode(ids) == decoded
            assert tokenizer.decode([1, *ids, 2]) == decoded
    assert gguf.bos_id == 1 and gguf.stop_ids == {2} == sentencepiece_tokenizer.stop_ids


def test_sentencepiece_text_that_goes_on_gets_no_space(sentencepiece_tokenizer):
    for tokenizer in (sentencepiece_tokenizer, Tokenizer.from_gguf(sentencepiece_metadata())):
        for text, ids, _ in SENTENCEPIECE:
            spelled = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, bos=False))).decode()
            assert " " + spelled == b"".join(map(tokenizer.token_bytes, ids)).decode() or not text
        assert tokenizer.encode("", bos=False) == []


def test_scores_alone_decide_the_merges():
    rng = random.Random(1)
    for _ in range(30):
        pieces = list("ab\u2581")
        while len(pieces) < 40:
            piece = rng.choice(pieces) + rng.choice(pieces)
            if piece not in pieces and len(piece) < 9:
                pieces.append(piece)
        scores = [float(-i) for i in range(len(pieces))]
        rng.shuffle(scores)
        metadata = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": ["<unk>", *pieces],
            "tokenizer.ggml.scores": [0.0, *scores],
            "tokenizer.ggml.token_type": [UNKNOWN] + [NORMAL] * len(pieces),
            "tokenizer.ggml.add_bos_token": False,
        }
        tokenizer, score = Tokenizer.from_gguf(metadata), dict(zip(pieces, scores, strict=True))
        for _ in range(20):
            text = "".join(rng.choice("ab ") for _ in range(rng.randint(1, 25)))
            symbols = list("\u2581" + text.replace(" ", "\u2581"))
            while True:
                joined = [left + right for left, right in zip(symbols, symbols[1:], strict=False)]
                best = max(joined, key=lambda piece: score.get(piece, -1e9), default=None)
                if best not in score:
                    break
                at = joined.index(best)  # leftmost
                symbols[at : at + 2] = [best]
            assert tokenizer.encode(text) == [pieces.index(symbol) + 1 for symbol in symbols]


def test_space_prefix_comes_after_every_special_token_or_as_the_file_says():
    pieces = sentencepiece_metadata()["tokenizer.ggml.tokens"]
    always = Tokenizer.from_gguf(sentencepiece_metadata()).encode("[INST]a[/INST] a")[1:]
    never = Tokenizer.from_gguf(sentencepiece_metadata(add_space_prefix=False)).encode("[INST]a[/INST] a")[1:]
    # SentencePiece itself has no prefix after a user-defined piece; llama.cpp and transformers do.
    tool = Tokenizer.from_gguf(sentencepiece_metadata()).encode("a<tool>a")[1:]
    assert [pieces[i] for i in tool] == ["\u2581a", "<tool>", "\u2581a"]
    assert [pieces[i] for i in always] == ["[INST]", "\u2581a", "[/INST]", "\u2581", "\u2581a"]
    assert [pieces[i] for i in never] == ["[INST]", "a", "[/INST]", "\u2581a"]


def test_legacy_false_puts_a_space_only_at_the_start(tmp_path):
    shutil.copy(DATA / "tokenizer.model", tmp_path)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, None, tokenizer_config={"legacy": False}))
    pieces = sentencepiece_metadata()["tokenizer.ggml.tokens"]
    assert [pieces[i] for i in tokenizer.encode("a[INST]a")] == ["<s>", "\u2581a", "[INST]", "a"]


def test_tokens_added_beyond_a_sentencepiece_model(tmp_path):
    shutil.copy(DATA / "tokenizer.model", tmp_path)
    decoder = {"700": {"content": "<|im_start|>", "special": True}, "701": {"content": "<think>", "special": False}}
    config = {"added_tokens_decoder": decoder, "eos_token": "<|im_start|>"}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, None, tokenizer_config=config))
    assert tokenizer.encode("<|im_start|><think>") == [1, 700, 701]
    assert tokenizer.decode([700, 701]) == "<think>" and tokenizer.vocab_size == 702
    assert tokenizer.stop_ids == {700}
    taken = {"added_tokens_decoder": {"699": {"content": "<new>"}}}
    with pytest.raises(MinillmError, match="<new>.*699"):
        Tokenizer.from_folder(write_folder(tmp_path, None, tokenizer_config=taken))


def test_merges_of_the_file_replace_scores_that_say_nothing():
    metadata = sentencepiece_metadata()
    flat = np.full(len(metadata["tokenizer.ggml.tokens"]), -1000.0)
    with pytest.raises(MinillmError, match="scores"):
        Tokenizer.from_gguf(metadata | {"tokenizer.ggml.scores": flat})
    merges = ["\u2581 t", "\u2581t h", "\u2581th e"]
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.scores": flat, "tokenizer.ggml.merges": merges})
    assert tokenizer.encode("the") == [1, metadata["tokenizer.ggml.tokens"].index("\u2581the")]


# BOS


@pytest.mark.parametrize("post_processor", [True, False])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("name", ["<|begin|>", {"content": "<|begin|>", "lstrip": False}])
def test_exactly_one_bos(tmp_path, post_processor, config, name):
    library = prefixed(train_library(), "<|begin|>") if post_processor else train_library()
    folder = write_folder(tmp_path, library, tokenizer_config=config | {"bos_token": name})
    tokenizer = Tokenizer.from_folder(folder)
    adds = config.get("add_bos_token", post_processor)
    plain = tokenizer.encode("the fox", bos=False)
    assert tokenizer.adds_bos == adds and tokenizer.bos_id == 0 not in plain
    assert tokenizer.encode("the fox") == [0] * adds + plain
    assert tokenizer.encode("<|begin|>the fox") == [0, *plain]
    assert tokenizer.encode("") == [0] * adds


def test_bos_that_only_the_post_processor_names(tmp_path):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, prefixed(train_library(), "<|begin|>")))
    assert tokenizer.bos_id == 0 and tokenizer.encode("the")[0] == 0


@pytest.mark.parametrize(
    ("metadata", "adds"),
    [
        (byte_level_metadata(pre="gpt-2"), False),
        (byte_level_metadata(pre="smollm"), False),
        (byte_level_metadata(pre="llama-bpe"), True),
        (byte_level_metadata(pre="tekken"), True),
        (byte_level_metadata(pre="llama-bpe", add_bos_token=False), False),
        (byte_level_metadata(pre="gpt-2", add_bos_token=True), True),
        (byte_level_metadata(pre="llama-bpe", bos_token_id=9999), False),  # no such token
        (sentencepiece_metadata(), True),
        (sentencepiece_metadata(add_bos_token=False), False),
    ],
)
def test_gguf_bos_defaults_are_llama_cpps(metadata, adds):
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.adds_bos == adds
    assert (tokenizer.encode("a")[0] == tokenizer.bos_id) == adds


# Folders


def test_folder_without_tokenizer_is_none(tmp_path):
    assert Tokenizer.from_folder(write_folder(tmp_path, None, config={"eos_token_id": 2})) is None


def test_settings_of_a_training_run_are_ignored(tmp_path):
    library = train_library()
    library.enable_truncation(4)
    library.enable_padding(length=32)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, library))
    text = "the quick brown fox jumps over the lazy dog. " * 3
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("a")) == 1


def test_stop_ids_are_the_union_of_all_files(tmp_path):
    folder = write_folder(
        tmp_path,
        train_library(),
        tokenizer_config={"eos_token": {"content": "<|end|>"}},
        config={"eos_token_id": 5},
        generation_config={"eos_token_id": [2, 6, 99999, None]},
    )
    assert Tokenizer.from_folder(folder).stop_ids == {1, 2, 5, 6}


def test_special_tokens_map_names_tokens_that_the_config_does_not(tmp_path):
    names = {"bos_token": "<|begin|>", "eos_token": {"content": "<|turn|>"}}
    folder = write_folder(
        tmp_path, train_library(), special_tokens_map=names, tokenizer_config={"eos_token": "<|end|>"}
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.bos_id == 0 and tokenizer.stop_ids == {1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "tokenizer.json"),
        ("tokenizer_config.json", b"[1]", "tokenizer_config.json is not a JSON object"),
        ("generation_config.json", b"{'a'}", "generation_config.json is not JSON"),
        ("config.json", b"\xff\xfe", "cannot read .*config.json"),
        ("chat_template.jinja", b"\xff", "cannot read .*chat_template.jinja"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    write_folder(tmp_path, train_library())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MinillmError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_unknown_decoders_are_refused(tmp_path):
    library = train_library()
    library.decoder = decoders.WordPiece()
    with pytest.raises(MinillmError, match="WordPiece"):
        Tokenizer.from_folder(write_folder(tmp_path, library))


def protobuf(*fields: tuple[int, int | bytes]) -> bytes:
    """A message of small varints and short byte strings."""
    return b"".join(
        bytes([number << 3, value]) if isinstance(value, int) else bytes([number << 3 | 2, len(value)]) + value
        for number, value in fields
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n".join(base64.b64encode(bytes([i])) + b" %d" % i for i in range(256)), "not a SentencePiece model"),
        ((DATA / "tokenizer.model").read_bytes()[:5000], "not a SentencePiece model"),
        (b"", "not a SentencePiece model"),
        (protobuf((1, protobuf((1, b"a"))), (2, protobuf((3, 1)))), "kind unigram"),
        (protobuf((1, protobuf((1, b"a"))), (2, protobuf((3, 2))), (3, protobuf((2, b"map")))), "rewrites text"),
        (protobuf((1, protobuf((1, b"a"))), (2, protobuf((3, 2))), (3, protobuf((4, 1)))), "rewrites text"),
    ],
)
def test_unusable_tokenizer_model_is_refused(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(MinillmError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_tekken_alone_is_refused(tmp_path):
    with pytest.raises(MinillmError, match="tekken"):
        Tokenizer.from_folder(write_folder(tmp_path, None, tekken={}))


# GGUF


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "deepseek-9"}, "tokenizer.ggml.pre = 'deepseek-9' is not supported.*use the model's safetensors"),
        ({"pre": "whitespace"}, "tokenizer.ggml.pre = 'whitespace' is not supported"),
        ({"pre": "default"}, "tokenizer.ggml.pre = 'default'"),
        ({"pre": None}, "tokenizer.ggml.pre = None"),
        (
            {"model": "bert"},
            "tokenizer.ggml.model = 'bert' is not supported: its vocabulary is WordPiece, of models that",
        ),
        (
            {"model": "t5"},
            "'t5' is not supported: its vocabulary is Unigram, .* take a model with BPE .gpt2, llama, gemma4",
        ),
        ({"model": "rwkv"}, "'rwkv' is not supported: its vocabulary is RWKV's own"),
        ({"model": None}, "tokenizer.ggml.model = None is not supported; take a model"),
        ({"tokens": None}, "no vocabulary"),
        ({"tokens": [1, 2]}, "no vocabulary"),
        ({"merges": None}, "tokenizer.ggml.merges"),
        ({"merges": ["h e", "nowhere he"]}, "contradicts itself"),
        ({"token_type": [1, 1]}, "262 tokens and 2 tokenizer.ggml.token_type"),
    ],
)
def test_unusable_gguf_vocabularies_are_refused(change, message):
    with pytest.raises(MinillmError, match=message) as caught:
        Tokenizer.from_gguf(byte_level_metadata(**change))
    assert "\n" not in str(caught.value)


def test_token_types_of_a_gguf():
    metadata = byte_level_metadata(control=("<s>", "</s>", "<ctrl>", "<user>"), eos_token_id=1)
    metadata["tokenizer.ggml.token_type"][3] = USER_DEFINED
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode("<ctrl><user></s>") == [2, 3, 1]
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.decode([2, 3, 1]) == "<user>"
    assert tokenizer.token_bytes(2) == b"<ctrl>"


def test_a_gguf_stops_at_every_end_token_that_llama_cpp_knows():
    control = ("<s>", "<|end_of_text|>", "<|im_end|>", "<|other|>", "<|a|>", "<|b|>")
    metadata = byte_level_metadata(control=control, eos_token_id=1, eot_token_id=4, eom_token_id=5)
    assert Tokenizer.from_gguf(metadata).stop_ids == {1, 2, 4, 5}


def test_ends_of_newer_models_and_what_is_none_where_another_stands():
    def stops(*control):
        tokenizer = Tokenizer.from_gguf(byte_level_metadata(control=("<s>", *control), eos_token_id=0))
        return {tokenizer.token_bytes(i).decode() for i in tokenizer.stop_ids} - {"<s>"}

    assert stops("<end_of_turn>", "<eos>", "<start_of_turn>") == {"<end_of_turn>", "<eos>"}
    assert stops("<|end|>", "<|user|>") == {"<|end|>"}
    assert stops("<|end|>", "<|return|>", "<|call|>") == {"<|return|>", "<|call|>"}  # gpt-oss ends a message with it
    assert stops("</s>", "<turn|>", "<|tool_response>") == {"<turn|>", "<|tool_response>"}


@pytest.mark.parametrize(
    ("pre", "extra"),
    [("gemma4", {"model": "gpt2"}), ("default", {"model": "gemma4"}), ("sarvam-moe", {"model": "gpt2"})],
)
def test_bpe_of_text_with_a_mark_for_a_space(pre, extra):
    """As in the vocabulary file of Gemma 4 that tools/check_vocabularies.py reads: bytes are the fallback only."""
    pieces = [
        "<s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"hiou\u2581",
        "hi",
        "\u2581hi",
        "\u2581\u2581",
        "\n\n",
    ]
    metadata = {
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [CONTROL] + [BYTE] * 256 + [NORMAL] * 8 + [USER_DEFINED],
        "tokenizer.ggml.merges": ["h i", "\u2581 \u2581", "\u2581 hi"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.pre": pre,
    } | {f"tokenizer.ggml.{key}": value for key, value in extra.items()}
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.adds_bos == (pre != "sarvam-moe")
    ids = tokenizer.encode("hi  hi\n\nho\u00e9", bos=False)
    wanted = ["hi", "\u2581\u2581", "hi", "\n\n", "h", "o", "<0xC3>", "<0xA9>"]
    assert [pieces[i] for i in ids] == wanted
    assert tokenizer.decode(ids) == "hi  hi\n\nho\u00e9" and not tokenizer.strips_space


def test_gemmas_runs_of_blanks_are_one_token():
    """The longest one first, as SentencePiece does: user-defined pieces, spelled with the mark."""
    metadata = sentencepiece_metadata(add_space_prefix=False)
    pieces = [*metadata["tokenizer.ggml.tokens"], *("\u2581" * n for n in (2, 3, 4)), "\n\n"]
    more = len(pieces) - len(metadata["tokenizer.ggml.tokens"])
    metadata |= {
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [*metadata["tokenizer.ggml.scores"], *[0.0] * more],
        "tokenizer.ggml.token_type": [*metadata["tokenizer.ggml.token_type"], *[USER_DEFINED] * more],
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    ids = tokenizer.encode("a" + " " * 7 + "a\n\n\na")
    assert [pieces[i] for i in ids[1:]] == ["a", "\u2581" * 4, "\u2581" * 3, "a", "\n\n", "\n", "a"]
    assert tokenizer.decode(ids) == "a" + " " * 7 + "a\n\n\na"


@pytest.mark.parametrize(
    ("name", "taken"), [("Phi 3 Mini", False), ("Phi-3-mini-4k", True), ("phi3", True), (None, False)]
)
def test_phi_3s_tokens_take_the_blanks_after_them(name, taken):
    metadata = sentencepiece_metadata() | ({"general.name": name} if name else {})
    pieces = metadata["tokenizer.ggml.tokens"]
    tokenizer = Tokenizer.from_gguf(metadata)
    ids = tokenizer.encode("[INST] \n a<s> a", bos=False)
    plain = ["\u2581", "\u2581", "\n", "\u2581a"]
    assert [pieces[i] for i in ids] == ["[INST]", *(["\u2581a"] if taken else plain), "<s>", "\u2581", "\u2581a"]


# Bytes and text


def test_a_character_split_over_tokens(default_tokenizer, sentencepiece_tokenizer):
    for tokenizer in (default_tokenizer, sentencepiece_tokenizer):
        ids = tokenizer.encode("x \U0001f9ec", bos=False)
        assert tokenizer.decode(ids) == "x \U0001f9ec"
        assert b"".join(map(tokenizer.token_bytes, ids)).endswith("x \U0001f9ec".encode())
        assert tokenizer.decode(ids[:-1]) == "x \ufffd"
        assert tokenizer.decode(np.array(ids)) == "x \U0001f9ec"


def test_ids_beyond_the_vocabulary_have_no_text(default_tokenizer):
    assert default_tokenizer.token_bytes(49152) == b"" and default_tokenizer.decode([49152, 60000]) == ""


def test_lone_surrogates_are_refused(default_tokenizer):
    with pytest.raises(MinillmError, match="Unicode"):
        default_tokenizer.encode("abc\udcff")


# Tokens that files beside the tokenizer's own name


FLAGS = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}


def added(content, **flags):
    return {"content": content} | FLAGS | flags


BESIDE = {
    "tokenizer_config": {"tokenizer_config": {"added_tokens_decoder": {"400": added("<|t|>")}}},
    "added_tokens": {"added_tokens": {"<|t|>": 400}},
    "special_tokens_map": {"special_tokens_map": {"additional_special_tokens": ["<|t|>"]}},
    "an object there": {"special_tokens_map": {"additional_special_tokens": [added("<|t|>")]}},
    "as the padding": {"tokenizer_config": {"pad_token": "<|t|>"}},
    "as the end": {"tokenizer_config": {"eos_token": added("<|t|>")}, "added_tokens": {"<|t|>": 400}},
    "extra": {"tokenizer_config": {"extra_special_tokens": {"tool": "<|t|>"}}},
}


def sized_library():
    """A byte-level vocabulary of 400 ids."""
    library = train_library()
    library.add_tokens([f"filler{i}" for i in range(400 - library.get_vocab_size())])
    assert library.get_vocab_size() == 400
    return library


@pytest.mark.parametrize("where", BESIDE)
def test_tokens_that_only_another_file_names_are_recognised(tmp_path, where):
    """The ids are what transformers 5 gives for such folders."""
    folder = write_folder(tmp_path, sized_library(), **BESIDE[where])
    tokenizer = Tokenizer.from_folder(folder)
    plain = Tokenizer.from_folder(write_folder(tmp_path, None, **dict.fromkeys(BESIDE[where], {})))
    assert tokenizer.encode("the<|t|>fox") == [*plain.encode("the"), 400, *plain.encode("fox")]
    assert len(plain.encode("<|t|>")) > 1
    assert tokenizer.vocab_size == 401 and tokenizer.token_bytes(400) == b"<|t|>"
    assert (400 in tokenizer.special_ids) == (where != "added_tokens")  # nothing says that it is one
    assert tokenizer.stop_ids == ({400} if where == "as the end" else set())


def test_added_tokens_come_in_the_order_of_their_ids_and_keep_their_flags(tmp_path):
    decoder = {"401": added("<b>", special=False, rstrip=True), "400": added("<a>", lstrip=True)}
    config = {"added_tokens_decoder": decoder | {"2": added("<|turn|>", lstrip=True)}, "pad_token": "<p>"}
    folder = write_folder(tmp_path, sized_library(), tokenizer_config=config, added_tokens={"<c>": 403})
    write_folder(tmp_path, None, special_tokens_map={"additional_special_tokens": ["<d>"]})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("<p> <a><b> <|turn|>") == [402, 400, 401, 2]  # with the blanks before and after them
    assert tokenizer.encode("a <|turn|>") == [67, 2]  # tokenizer.json leaves the blank
    assert len(tokenizer.encode("<c>")) > 1 < len(tokenizer.encode("<d>"))  # files of older folders
    assert tokenizer.decode([400, 401, 402]) == "<b>"


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"5": added("<|t|>")}, r"the token '<\|t\|>' the id 5, and by its vocabulary it has 400"),
        ({"402": added("<|t|>")}, r"the token '<\|t\|>' the id 402, and by its vocabulary it has 400"),
        ({"400": added("<|t|>"), "401": added("<|t|>")}, r"'<\|t\|>' the id 40[01], and by its vocabulary it has"),
        ({"400": added("<|turn|>")}, r"the token '<\|turn\|>' the id 400, and by its vocabulary it has 2"),
        ({str(2**40): added("<|t|>")}, r"the id 1099511627776"),
        ({"400": {"special": True}}, "have token {'special': True}: get them again"),
        ({"400": added(7)}, "have token {'content': 7"),
        ({"four": added("<|t|>")}, "have added tokens {'four'"),
        (["<|t|>"], r"have added tokens \['<\|t\|>'\]"),
    ],
)
def test_added_tokens_that_contradict_the_vocabulary_are_refused(tmp_path, decoder, message):
    folder = write_folder(tmp_path, sized_library(), tokenizer_config={"added_tokens_decoder": decoder})
    with pytest.raises(MinillmError, match=message) as caught:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("named", [{"pad_token": 5}, {"additional_special_tokens": "<|t|>"}, {"eos_token": {"id": 3}}])
def test_named_tokens_that_are_none_are_refused(tmp_path, named):
    with pytest.raises(MinillmError, match="the tokenizer's files have .*: get them again"):
        Tokenizer.from_folder(write_folder(tmp_path, sized_library(), special_tokens_map=named))


def test_a_special_token_beyond_every_vocabulary_is_refused(tmp_path):
    """It would make tables of four thousand million entries."""
    write_folder(tmp_path, sized_library())
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["<|turn|>"] = 2**32 - 1
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] == "<|turn|>"]
    path.write_text(json.dumps(content))
    with pytest.raises(MinillmError, match=r"the token '<\|turn\|>' the id 4294967295, and no model has so many"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("metadata", [byte_level_metadata(words=("he", "hel", "he")), sentencepiece_metadata()])
def test_a_piece_at_two_ids_is_refused(metadata):
    """As llama.cpp refuses it: one of the two could be neither written nor read."""
    pieces = list(metadata["tokenizer.ggml.tokens"])
    if "tokenizer.ggml.scores" in metadata:
        pieces[-1] = pieces[300]
    first = next(i for i, piece in enumerate(pieces) if piece == pieces[-1])
    with pytest.raises(MinillmError, match=f"the piece {re.escape(repr(pieces[-1]))} twice, as the ids {first} and"):
        Tokenizer.from_gguf(metadata | {"tokenizer.ggml.tokens": pieces})
