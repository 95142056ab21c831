"""Needles, RULER, LongBench and held-out text: lengths, depths and counts are those of the rules."""

import json
import random
import re
import string
import zipfile
from collections import Counter

import pytest
import tiny_chat

from minillm import LLM
from minillm.errors import MinillmError, UsageError
from minillm.evaluate import answers, continuation, longbench, needles, ruler, verbatim
from minillm.evaluate.prompt import largest
from minillm.evaluate.text import HAYSTACKS, Text, read_haystack, read_text, split_sentences


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """Its tokens are bytes, so that tokens can be counted by hand."""
    with LLM.load(tiny_chat.make(tmp_path_factory.mktemp("model") / "model", max_position_embeddings=16384)) as llm:
        yield llm


def text_of(llm, ids):
    return b"".join(llm.tokenizer.token_bytes(i) for i in ids).decode()


def whole(llm, prompt):
    return text_of(llm, prompt.context + prompt.question)


# Text


def test_sentences_end_where_a_reader_ends_them():
    text = 'Mr. Smith met J. Doe. "Really?" he said. It cost $3.5 million! Yes.'
    assert split_sentences(text) == ["Mr. Smith met J. Doe.", '"Really?"', "he said.", "It cost $3.5 million!", "Yes."]


def test_the_bundled_texts():
    hay, held_out = read_text(), read_text(None, "heldout.txt")
    assert len(hay.parts) > 3000 and len(hay.text) + len(held_out.text) < 600_000
    for name in HAYSTACKS:
        text = read_haystack(name)
        assert len(text.text) > 30_000 and max(map(len, text.parts)) < 1200 and all(map(str.strip, text.parts))
        assert text.by_line == (name != "prose") and text.join(text.parts) == text.text


def test_a_stretch_goes_on_at_the_beginning():
    text = Text("a\n b\nc", "", by_line=True)
    assert text.stretch(1, 4) == [" b", "c", "a", " b"] and text.join(text.stretch(0, 2)) == "a\n b"
    assert Text("One. Two.", "").stretch(1, 2) == ["Two.", "One."]


def test_a_haystack_of_files(tmp_path):
    (tmp_path / "b.txt").write_text("Two\n\n three.")
    (tmp_path / "a.txt").write_text("One.")
    assert read_text(str(tmp_path)).text == "One. Two three."
    with pytest.raises(UsageError, match="cannot be read"):
        read_text(str(tmp_path / "none.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no text"):
        read_text(str(tmp_path / "empty"))


# Needles


def test_largest():
    for wanted in range(3, 40):
        tried = []
        assert largest(lambda n, wanted=wanted, tried=tried: tried.append(n) or n <= wanted, 3, 39) == wanted
        assert max(tried) <= 2 * wanted  # a text that is far too long takes long to tokenise
    assert largest(lambda n: False, 3, 39) == 3


@pytest.mark.parametrize("kind", needles.KINDS)
@pytest.mark.parametrize("length", [1000, 3000])
def test_a_needle_sample_is_as_long_as_it_may_be_and_holds_its_needles(llm, kind, length):
    hay = read_haystack(needles.haystack_of(kind))
    for sample in needles.samples([kind], [length], [None, 0.0, 0.5, 1.0], range(3), hay):
        prompt = needles.prompt(llm, sample, hay)
        n = len(prompt.context) + len(prompt.question)
        longest = max(len(part.encode()) for part in hay.parts) if kind != "noise" else 30
        assert length - longest < n <= length
        text = whole(llm, prompt)
        answer = text_of(llm, prompt.answer)
        if kind == "sandwich":
            assert text.count(f"The best thing to do in San Francisco is {needles.EAT}.") == 1
            assert text.endswith("The best thing to do in San Francisco is ") and answer == needles.EAT
            continue
        several = needles.KINDS[kind] > 1
        said = r"The (\S+) has number (\d{7})\." if several else r"special magic numbers for (\S+) is: (\d{7})\."
        ends = r"The (\S+) has number $" if several else r"number for (\S+) mentioned in the provided text is: $"
        found = re.findall(said, text)
        assert len(found) == len({key for key, _ in found}) == needles.KINDS[kind]
        asked = re.search(ends, text)[1]
        assert answer == dict(found)[asked]
        assert asked in text_of(llm, prompt.question) and asked in text_of(llm, prompt.context)


def test_the_needle_is_at_its_depth_at_the_end_of_a_sentence():
    """Against a search over all sentence ends for the last one at or before the depth."""
    rng = random.Random(0)
    for _ in range(200):
        hay = ["x" * rng.randrange(1, 30) + "." for _ in range(rng.randrange(1, 12))]
        depth = rng.choice([0, 1, rng.random()])
        before, after = " ".join(needles.hide(hay, ["NEEDLE"], [depth])).split("NEEDLE")
        ends = [sum(map(len, hay[:i])) for i in range(len(hay) + 1)]
        wanted = max(end for end in ends if end <= depth * ends[-1])
        assert len(before.replace(" ", "")) == wanted
        assert before + after in (f"{' '.join(hay)} ", f" {' '.join(hay)}") or "  " in before + after


def test_samples_repeat_themselves_and_differ(llm):
    hay = read_text()
    grid = needles.samples(["prose"], [900], [None], range(4), hay)
    texts = [whole(llm, needles.prompt(llm, sample, hay)) for sample in [*grid, *grid]]
    assert texts[:4] == texts[4:] and len(set(texts)) == 4


def test_grading_the_sandwich():
    right = " Eat a sandwich and sit in Dolores Park on a sunny day, of course"
    assert needles.grade(right) == {"contained": 1.0, "words": 1.0}
    assert needles.grade(" eat in the park") == {"contained": 0.0, "words": pytest.approx(3 / 11)}


def test_a_length_without_room_for_a_needle(llm):
    sample = needles.samples(["prose"], [100], [None], [0], read_text())[0]
    with pytest.raises(UsageError, match="at least"):
        needles.prompt(llm, sample, read_text())


# Verbatim


@pytest.mark.parametrize("kind", HAYSTACKS)
@pytest.mark.parametrize("length", [2000, 4000])
def test_a_verbatim_sample_asks_for_what_stands_once_in_the_text(llm, kind, length):
    text = read_haystack(kind)
    for sample in verbatim.samples([kind], [length], 64, range(2), text):
        prompt = verbatim.prompt(llm, sample, text)
        assert len(prompt.answer) == 64
        n = len(prompt.context) + len(prompt.question)
        assert length - 2 * max(len(part.encode()) for part in text.parts) < n <= length
        head, question = text_of(llm, prompt.context), text_of(llm, prompt.question)
        begun = question.split("Repeat the text.<|im_end|>\n<|im_start|>assistant\n")[1]
        assert len(begun.split()) == verbatim.CUE_WORDS and head.count(begun) == 1
        wanted = b"".join(llm.tokenizer.token_bytes(i) for i in prompt.answer)  # may end within a letter
        assert head.encode().split(begun.encode())[1].startswith(wanted)


def test_the_cue_is_at_its_depth_and_skips_what_is_repeated():
    words = [f"w{i}" for i in range(200)]
    text, room = " ".join(words), 200 - verbatim.CUE_WORDS - 64
    for depth in (0, 0.25, 0.9999):
        assert text[verbatim.find_cue(text, depth, 64)].split() == words[int(depth * room) :][: verbatim.CUE_WORDS]
    repeated = " ".join(words[:60] + words[:60] + words[100:200])
    found = repeated[verbatim.find_cue(repeated, 0.1, 64)].split()
    assert repeated.count(" ".join(found)) == 1 and found[-1] == "w0"  # the first that reaches over the seam
    assert verbatim.find_cue(" ".join(words[:40]), 0.5, 64) is None
    assert verbatim.find_cue("a b " * 100, 0.5, 64) is None


def test_a_length_without_room_to_repeat(llm):
    text = read_text()
    with pytest.raises(UsageError, match="too short to repeat 64 tokens"):
        verbatim.prompt(llm, verbatim.samples(["prose"], [400], 64, [0], text)[0], text)


# RULER


@pytest.fixture(scope="module")
def ruler_prompts(llm):
    """(task, length, seed) -> Prompt, for cwe's rules below 4096 tokens and above."""
    hay = read_text()
    grid = [*ruler.samples(ruler.TASKS, [3000], [0, 1], hay), *ruler.samples(["cwe", "fwe"], [12000], [1], hay)]
    return {(s["kind"], s["length"], s["seed"]): ruler.prompt(llm, s, hay) for s in grid}


def test_ruler_samples_fill_their_length(ruler_prompts):
    """With room for the answer never more, and less only by what one more word, line or repetition would take."""
    step = {"prose": 30, "noise": 120, "needles": 130}
    for (kind, length, _), prompt in ruler_prompts.items():
        haystack = ruler.NEEDLE_TASKS[kind][0] if kind in ruler.NEEDLE_TASKS else None
        slack = step.get(haystack, {"vt": 120, "cwe": 150, "fwe": 400}.get(kind))
        assert prompt.max_tokens == {"vt": 30, "cwe": 120, "fwe": 50}.get(kind, 128)
        assert length - slack < prompt.length <= length, (kind, length, prompt.length)


NUMBER, WORD = r"\d{7}", r"[\w.' -]+-[\w.' -]+"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


@pytest.mark.parametrize(
    ("kind", "key", "value", "n_needles", "n_asked", "values"),
    [
        ("niah_single_1", WORD, NUMBER, 1, 1, "number"),
        ("niah_single_2", WORD, NUMBER, 1, 1, "number"),
        ("niah_single_3", WORD, UUID, 1, 1, "uuid"),
        ("niah_multikey_1", WORD, NUMBER, 4, 1, "number"),
        ("niah_multikey_2", WORD, NUMBER, None, 1, "number"),
        ("niah_multikey_3", UUID, UUID, None, 1, "uuid"),
        ("niah_multivalue", WORD, NUMBER, 4, 1, "numbers"),
        ("niah_multiquery", WORD, NUMBER, 4, 4, "numbers"),
    ],
)
def test_ruler_needles(llm, ruler_prompts, kind, key, value, n_needles, n_asked, values):
    for (name, _, _), prompt in ruler_prompts.items():
        if name != kind:
            continue
        text = whole(llm, prompt)
        found = re.findall(rf"One of the special magic \w+s for ({key}) is: ({value})\.", text)
        assert len(found) == n_needles or n_needles is None and len(found) > 10
        asked = re.search(rf"The special magic {values} for (.*) mentioned in the provided text (is|are)$", text)
        names = asked[1].replace(", and ", ", ").split(", ")
        assert len(names) == n_asked and (asked[2] == "is") == (values in ("number", "uuid"))
        wanted = [number for name in names for found_name, number in found if found_name == name]
        assert len(wanted) == (4 if values == "numbers" else 1)
        assert prompt.grade(f"they are {', '.join(wanted).upper()}") == {"score": 1.0}
        assert prompt.grade("none") == {"score": 0.0}
        if len(wanted) == 4:
            assert prompt.grade(f"{wanted[0]} and {wanted[2]}") == {"score": 0.5}
        beginning = "A special magic" if values in ("number", "uuid") else "Some special magic"
        assert beginning in text and f"What {asked[2]} {'all ' if asked[2] == 'are' else ''}the special" in text


def test_ruler_depths_are_drawn_from_forty():
    assert len(set(ruler.DEPTHS)) == 40 and ruler.DEPTHS[0] == 0 and ruler.DEPTHS[-1] == 100
    sentences = [f"S{i}." for i in range(200)]
    text = ruler.in_sentences(sentences, ["A", "B"], [ruler.DEPTHS[0], ruler.DEPTHS[20]])
    words = text.split()
    assert words[0] == "A" and words.index("B") == 1 + int(200 * 0.51)
    assert [w for w in words if w not in "AB"] == sentences
    assert ruler.in_sentences(sentences, ["A"], [100]).endswith("S199. A ")


def test_ruler_variable_tracking(llm, ruler_prompts):
    for (kind, _, _), prompt in ruler_prompts.items():
        if kind != "vt":
            continue
        text = whole(llm, prompt)
        example, question = text.split("Memorize and track")[1:]
        for part, letters in ((example, 3), (question, 5)):
            first = re.findall(rf"VAR ([A-Z]{{{letters}}}) = (\d{{5}})\n", part)
            steps = re.findall(rf"VAR ([A-Z]{{{letters}}}) = VAR ([A-Z]{{{letters}}}) ?\n", part)
            assert len(first) == 1 and len(steps) == 4
            names = [first[0][0], *(name for name, _ in steps)]
            assert [source for _, source in steps] == names[:4]
            assert f"assigned the value {first[0][1]}" in part
        assert example.count(" ".join(["5 variables are assigned the value"])) == 1
        assert prompt.grade(" ".join(names)) == {"score": 1.0} and prompt.grade(names[1]) == {"score": 0.2}
        assert text.endswith("they are: ")


@pytest.mark.parametrize(("length", "common", "others"), [(3000, 6, 1), (12000, 30, 3)])
def test_ruler_common_words(llm, ruler_prompts, length, common, others):
    prompt = ruler_prompts["cwe", length, 1]
    example, question = whole(llm, prompt).split("Below is a numbered list")[1:]
    for part, n_common, n_others in ((example, *((3, 1) if length < 4096 else (10, 3))), (question, common, others)):
        listed = re.findall(r"(\d+)\. (.+?)(?= \d+\. |\n)", part.split("appear most often.\n")[1].split("Question")[0])
        assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
        counts = Counter(word for _, word in listed)
        top = [word for word, n in counts.items() if n == n_common]
        assert len(top) == 10 and set(counts.values()) == {n_common, n_others}
    assert prompt.grade(" ".join(top)) == {"score": 1.0}


def test_ruler_coded_words(llm, ruler_prompts):
    for (kind, _, _), prompt in ruler_prompts.items():
        if kind != "fwe":
            continue
        text = whole(llm, prompt)
        listed = text.split("coded words. ")[1].split("\nQuestion")[0].split(" ")
        counts = Counter(listed)
        (noise, n), *top = counts.most_common(4)
        assert noise == "..." and all(
            len(w) == 6 and set(w) <= set(string.ascii_lowercase) for w in counts if w != "..."
        )
        for rank, (_, count) in enumerate(top, 2):
            assert abs(count - n / rank**2) <= 1  # the zeta distribution with alpha 2
        assert prompt.grade(" ".join(word for word, _ in top)) == {"score": 1.0}


def test_ruler_scores_ignore_case_and_control_characters():
    assert ruler.string_match_all("\x07 ABC\x01def ", ["abc", "DEF", "x", "abc\ndef"]) == 0.75


def test_ruler_says_when_a_length_is_too_short(llm):
    for sample in ruler.samples(ruler.TASKS, [150], [0], read_text()):
        with pytest.raises(UsageError, match=f"{sample['kind']} does not fit"):
            ruler.prompt(llm, sample, read_text())


# LongBench


def bench_row(**changes):
    row = {"input": "Who?", "context": "A text.", "answers": ["Ann"], "length": 2, "dataset": "hotpotqa"}
    return row | {"language": "en", "all_classes": None, "_id": "a1"} | changes


@pytest.fixture
def data(tmp_path):
    for name in longbench.SETS:
        rows = [bench_row(_id=f"{name}{i}", context=f"{name} {i}. " + "word " * (200 * i)) for i in range(3)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    longbench.rows.cache_clear()
    return str(tmp_path)


def test_longbench_lengths_and_templates():
    """The answer lengths of the published configuration, and what every template asks for."""
    lengths = {name: spec["max_tokens"] for name, spec in longbench.SETS.items()}
    assert lengths == {
        **dict.fromkeys(["narrativeqa", "qasper", "dureader", "samsum"], 128),
        **dict.fromkeys(["multifieldqa_en", "multifieldqa_zh", "trec", "lsht", "lcc", "repobench-p"], 64),
        **dict.fromkeys(["gov_report", "qmsum", "multi_news", "vcsum"], 512),
        **dict.fromkeys(["hotpotqa", "2wikimqa", "musique", "triviaqa", "passage_count"], 32),
        **dict.fromkeys(["passage_retrieval_en", "passage_retrieval_zh"], 32),
    }
    for spec in longbench.SETS.values():
        assert spec["template"].count("{context}") == 1 and spec["template"].count("{input}") <= 1


def test_longbench_prompts(llm, data):
    samples = longbench.samples(longbench.SETS, 2, 4000, data)
    assert len(samples) == 42
    for sample in samples:
        name, prompt = sample["kind"], longbench.prompt(llm, sample, data)
        text, row = whole(llm, prompt), longbench.rows(name, data)[int(sample["id"][-1])]
        plain = longbench.SETS[name]["template"].format(**row)
        no_chat = name in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
        assert text == (plain if no_chat else llm.tokenizer.render_chat([{"role": "user", "content": plain}]))
        assert row["context"].strip() in text_of(llm, prompt.context) or no_chat
        assert "Who?" in text_of(llm, prompt.question) or "{input}" not in longbench.SETS[name]["template"]
        assert prompt.stop_ids == (frozenset([llm.encode("\n")[0]]) if name == "samsum" else frozenset())
        assert (prompt.min_tokens, prompt.max_tokens) == (name == "samsum", longbench.SETS[name]["max_tokens"])


def test_longbench_cuts_the_middle(llm, data):
    """First and last half, of the prompt before the chat template."""
    sample = longbench.samples(["hotpotqa"], 3, 901, data)[2]
    prompt = longbench.prompt(llm, sample, data)
    plain = longbench.SETS["hotpotqa"]["template"].format(**longbench.rows("hotpotqa", data)[2])
    assert plain[:450] + plain[-450:] in whole(llm, prompt) and len(plain) > 2000
    assert text_of(llm, prompt.question).startswith("Answer the question based on the given passages.")
    with pytest.raises(UsageError, match="no room for the question"):
        longbench.prompt(llm, sample | {"length": 200}, data)


def test_longbench_default_lengths():
    assert [longbench.default_length(n) for n in (4096, 8192, 16384, 32768)] == [3500, 7500, 15500, 31500]


def test_longbench_grades_as_its_set(llm, data):
    sample = longbench.samples(["hotpotqa"], 1, None, data)[0]
    assert longbench.prompt(llm, sample, data).grade("the Ann") == {"score": 1.0}


def test_longbench_from_an_archive(llm, data, tmp_path):
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(tmp_path / "qasper.jsonl", "data/qasper.jsonl")
    assert longbench.rows("qasper", str(archive)) == longbench.rows("qasper", data)
    with pytest.raises(MinillmError, match="hotpotqa cannot be read"):
        longbench.rows("hotpotqa", str(archive))


def test_longbench_without_data_says_how_to_get_it(monkeypatch, tmp_path):
    with pytest.raises(UsageError, match="has no qasper.jsonl"):
        longbench.rows("qasper", str(tmp_path))
    longbench._from_hub.cache_clear()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MinillmError, match="data.zip .* --data"):
        longbench.rows("qasper", None, True)


# Held-out text


def test_a_stretch_of_held_out_text(llm):
    text = read_text(None, "heldout.txt")
    for sample in continuation.samples([500, 900], 64, range(3), text):
        prompt = continuation.prompt(llm, sample, text)
        assert (len(prompt.context), len(prompt.question), len(prompt.answer)) == (sample["length"], 0, 64)
        assert whole(llm, prompt) + text_of(llm, prompt.answer) in text.text
    with pytest.raises(UsageError, match="held-out text has"):
        continuation.prompt(llm, sample | {"length": 10**6}, text)


# Answers


@pytest.mark.parametrize("kind", answers.KINDS)
def test_questions_about_a_text(llm, kind):
    text = answers.text_of(kind)
    one, other = (
        answers.prompt(llm, sample, text) for sample in answers.samples([kind], [700], 48, [3, 4], {kind: text})
    )
    assert 500 < len(one.context) <= 700 and not one.question and not one.answer
    begin, tail = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    stretch, another = (text_of(llm, found.context).removeprefix(begin).strip() for found in (one, other))
    assert stretch in text.join(text.stretch(0, 2 * len(text.parts))) and stretch[-200:] not in another
    before = ["", *["<|im_end|>\n" + begin if kind == "talk" else ""] * 3]
    for asked, question, mark in zip(one.asked.questions, answers.KINDS[kind].questions, before, strict=False):
        assert text_of(llm, asked) == mark + question + tail
    assert one.length == len(one.context) + one.asked.length
    with pytest.raises(UsageError, match="no room for one sentence"):
        answers.prompt(llm, answers.samples([kind], [18], 48, [3], {kind: text})[0], text)


def test_samples_of_a_text_hardly_overlap():
    """Of a text of 300 parts, 24 samples begin at places at least a 50th of it apart."""
    starts = sorted(int(seed * answers.SPREAD % 1 * 300) for seed in range(24))
    assert min(b - a for a, b in zip(starts, starts[1:], strict=False)) >= 300 / 50
