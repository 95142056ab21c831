"""LongBench's metrics: what its published scorer gives, recorded for 125 pairs, and the packages it is built on."""

import difflib
import json
import random

import pytest
from paths import DATA
from rouge import Rouge

from minillm.evaluate import metrics
from minillm.evaluate.longbench import SETS

RECORDED = json.loads((DATA / "longbench_metrics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted({pair["set"] for pair in RECORDED}))
def test_recorded_scores_of_the_published_scorer(name):
    """Empty predictions, only full stops, class names inside one another, Chinese, first lines."""
    for pair in RECORDED:
        if pair["set"] == name:
            found = metrics.score_row(
                name, SETS[name]["metric"], pair["prediction"], pair["answers"], pair["all_classes"]
            )
            assert found == pytest.approx(pair["score"], abs=1e-12), pair


def test_every_metric_was_recorded():
    assert {SETS[pair["set"]]["metric"] for pair in RECORDED} == {*metrics.METRICS, "classification"}


def random_text(rng, words, n_words):
    return "".join(rng.choice(words) + rng.choice([" ", " ", " ", "  ", ". ", ".", "\n", ""]) for _ in range(n_words))


def test_rouge_is_that_of_the_package():
    """200 pairs: few words, so that longest common subsequences are many and the choice among them matters."""
    rng, seen = random.Random(0), []
    for i in range(200):
        words = ["the", "The", "cat", "sat", "on", "mat", "a", "b", "c", "3.5", "x"][: rng.randrange(3, 12)]
        said, wanted = (random_text(rng, words, rng.randrange(1, 60)) for _ in range(2))
        try:
            expected = Rouge(metrics=["rouge-l"]).get_scores([said], [wanted], avg=True)["rouge-l"]["f"]
        except ValueError:  # a text of full stops
            expected = 0.0
        assert metrics.rouge(said, wanted) == pytest.approx(expected, abs=1e-12), (i, said, wanted)
        seen.append(expected)
    assert 0.2 < sum(seen) / 200 < 0.9


def test_code_similarity_is_that_of_difflib():
    rng = random.Random(1)
    for _ in range(200):
        a, b = ("".join(rng.choices("abx =+()\t", k=rng.randrange(40))) for _ in range(2))
        assert metrics.code_similarity(a, b) == round(100 * difflib.SequenceMatcher(None, a, b).ratio()) / 100


def test_the_best_of_several_answers_counts():
    assert metrics.score_row("hotpotqa", "qa_f1", "Rome", ["Paris", "in Rome", "Rome"], None) == 1.0
    assert metrics.score_row("hotpotqa", "qa_f1", "Rome", [], None) == 0.0


def test_chinese_needs_jieba(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jieba", None)
    with pytest.raises(metrics.UsageError, match="pip install jieba"):
        metrics.qa_f1_zh("北京", "北京")
