"""python -m minillm.evaluate from flags to tables, on a tiny model."""

import json
import zipfile

import longbench_rows
import pytest
import tiny_chat

from minillm import LLM
from minillm.compress.config import CacheConfig
from minillm.evaluate import cli, commands, efficiency, longbench
from minillm.evaluate.cli import main
from minillm.evaluate.evaluator import ready_methods


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_chat.make(tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture
def run(model, tmp_path, capsys):
    def run(*flags, status=0):
        words = [str(flag) for flag in flags]
        command = words if words[0] in ("table", "plot") else [*words, "-m", model, "--out", str(tmp_path / "r.jsonl")]
        assert main(command) == status
        found = capsys.readouterr()
        return found.out if status == 0 else found.err

    run.file = tmp_path / "r.jsonl"
    run.rows = lambda: [json.loads(line) for line in run.file.read_text(encoding="utf-8").splitlines()]
    return run


def configs(*flags, command="needle"):
    args = cli._parser().parse_args([command, *flags])
    return [(c.method, c.as_dict()["budget"], c.options, c.window) for c in cli._configs(args)]


def test_methods_times_budgets_times_options():
    usual = CacheConfig("semanticache").options
    found = configs(
        "--kv-method", "semanticache,streaming", "--kv-budget", "0.5,64", "--kv-set", "rope=cached,unrotated"
    )
    assert found == [
        ("full", None, {}, 32),
        *(("semanticache", b, usual | {"rope": r}, 32) for r in ("cached", "unrotated") for b in (0.5, 64)),
        *(("streaming", b, CacheConfig("streaming").options, 32) for b in (0.5, 64)),
    ]
    assert [c[:2] for c in configs("--kv-window", "8")[1:]] == [("semanticache", b) for b in (0.5, 0.35, 0.2)]
    assert {c[3] for c in configs("--kv-window", "8")[1:]} == {8}
    taus = configs("--tau", "0.9,0.7")
    assert [(c[1], c[2]["tau"]) for c in taus[1:]] == [(None, 0.9), (None, 0.7)]
    chunks = configs("--kv-budget", "0.2", "--kv-set", "chunking=delimiter,fixed:64,none")
    assert [c[2]["chunking"] for c in chunks[1:]] == ["delimiter", "fixed:64", "none"]
    assert {c[0] for c in configs(command="suite")} == set(ready_methods(None))
    assert len(configs("--kv-budget", "0.5,0.5,full")) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["needle", "--kv-method", "nonsense"], "cache method 'nonsense' is unknown"),
        (["needle", "--kv-budget", "0"], "budget 0"),
        (["needle", "--kv-set", "no=1"], "--kv-set no"),
        (["needle", "--kv-set", "rope=sideways"], "'sideways' is not one of"),
        (["needle", "--tau", "2"], "tau: 2.0"),
        (["needle", "--task", "haystack"], "not one of noise, prose"),
        (["needle", "--depth", "1.5"], "not from 0 to 1"),
        (["needle", "--length", "100"], "too short for a needle"),
        (["needle", "--length", "5000", "-n", "1"], "context is 4096"),
        (["needle", "--haystack", "/nowhere"], "/nowhere cannot be read"),
        (["needle", "-n", "0"], "at least 1"),
        (["verbatim", "--length", "300"], "too short to repeat"),
        (["verbatim", "--task", "keys2"], "not one of prose, code"),
        (["ruler", "--length", "200"], "does not fit"),
        (["longbench", "--data", "/nowhere"], "cannot be read from /nowhere"),
        (["needle", "--protocol", "aware,blind"], "'blind' is not one of aware, agnostic"),
        (["perplexity", "--protocol", "agnostic"], "unrecognized arguments: --protocol"),
        (["answers", "--protocol", "aware"], "'aware' is not one of agnostic, document"),
        (["answers", "--task", "poems"], "not one of prose, dialogue, code"),
        (["everything"], "invalid choice"),
        (["table", "/nowhere.jsonl"], "/nowhere.jsonl cannot be read"),
    ],
)
def test_bad_flags_are_one_line(run, flags, message):
    status = 1 if flags[0] == "longbench" or "5000" in flags else 2
    error = run(*flags, status=status)
    assert message in error and len(error.splitlines()) == 1, error


def test_needle_from_flags_to_tables(run, tmp_path):
    flags = ["needle", "--task", "noise,keys2", "--length", "500", "-n", "2", "--depth", "0,1"]
    flags += ["--kv-method", "streaming,random", "--kv-budget", "0.5,0.2", "--protocol", "aware,agnostic"]
    printed = run(*flags)
    rows = run.rows()
    assert len(rows) == 2 * 2 * 2 * 2 * 5  # kinds, seeds, depths, protocols, configurations
    assert len({json.dumps([r["sample"], r["protocol"], r["cache"]], sort_keys=True) for r in rows}) == len(rows)
    assert {r["kept"] for r in rows if r["cache"]["method"] == "full"} == {1.0}
    assert all(abs(r["kept"] - r["cache"]["budget"]) < 0.01 for r in rows if r["cache"]["budget"])
    for title in ("needle, accuracy", "needle, nll", "needle, em", "paired differences"):
        assert title in printed
    assert run("table", run.file, "--out", tmp_path / "t") == printed
    assert "needle-noise-aware-model.png" in run("plot", run.file, "--out", tmp_path / "p")
    again = run(*flags, "--kv-set", "rope=cached", status=2)
    assert "with an option of a method" in again
    assert run(*flags) == printed and len(run.rows()) == len(rows)
    fewer = run("needle", "--task", "noise", "--length", "500", "-n", "1", "--depth", "0", "--kv-method", "full")
    assert "random | 20 %" in fewer and "keys2" not in fewer and "(2)" not in fewer  # those samples, every method


@pytest.mark.parametrize(
    ("flags", "n_rows"),
    [
        (["answers", "--task", "prose,talk", "--length", "400", "--following", "5", "--text", "{text}"], 8),
        (["perplexity", "--length", "400", "--following", "40"], 4),
        (["fidelity", "--length", "400", "--text", "{text}"], 4),
        (["verbatim", "--task", "prose,lists", "--length", "900", "--following", "20"], 8),
        (["needle", "--task", "code,dialogue", "--length", "900"], 8),
        (["ruler", "--task", "vt,niah_single_1", "--length", "1800"], 8),
        (["longbench", "--task", "hotpotqa,samsum", "--data", "{data}"], 8),
    ],
)
def test_every_task_makes_rows_and_a_table(run, tmp_path, flags, n_rows):
    (tmp_path / "text.txt").write_text("some words. " * 500)
    for name in ("hotpotqa", "samsum"):
        line = {"input": "Who?", "context": "word " * 60, "answers": ["Ann"], "all_classes": None, "length": 60}
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line | {"_id": str(i)}) + "\n" for i in range(2)))
    flags = [flag.format(text=tmp_path / "text.txt", data=tmp_path) for flag in flags]
    printed = run(*flags, "-n", "2", "--kv-method", "streaming", "--kv-budget", "0.3")
    assert len(run.rows()) == n_rows
    assert f"**{flags[0]}, " in printed and "(2)" in printed and "(4)" in printed or n_rows == 4


def test_a_table_says_what_it_leaves_out(run, capsys):
    run("perplexity", "--length", "300", "--following", "9", "-n", "2", "--kv-method", "full")
    run.file.write_bytes(run.file.read_bytes()[:-9])
    assert main(["table", str(run.file)]) == 0
    printed = capsys.readouterr()
    assert "the last line is damaged and left out" in printed.err and "(1)" in printed.out


def test_longbench_all_sets_from_an_archive(run, tmp_path, monkeypatch):
    """Rows in the format of its data.zip, in three languages, some without a question, some with classes. Answers are
    short: how long they may be is the prompts' affair."""
    pytest.importorskip("jieba")
    short = {name: spec | {"max_tokens": min(spec["max_tokens"], 16)} for name, spec in longbench.SETS.items()}
    monkeypatch.setattr(longbench, "SETS", short)
    archive = tmp_path / "data.zip"
    longbench_rows.write_zip(archive, longbench.SETS, n=1)
    flags = ["--data", archive, "--kv-method", "streaming", "--kv-budget", "0.5", "--protocol", "agnostic"]
    printed = run("longbench", *flags)
    rows = run.rows()
    assert len(rows) == 21 * 2  # sets, configurations
    assert {r["sample"]["kind"] for r in rows} == set(longbench.SETS)
    assert all(0 <= r["scores"]["score"] <= 1 and "prediction" in r for r in rows)
    assert all(f"| {name} |" in printed for name in longbench.SETS) and "mean of sets" in printed
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path)
    assert run("longbench", "--data", tmp_path, *flags[2:]) == printed and len(run.rows()) == len(rows)


@pytest.mark.parametrize("name", longbench.SETS)
def test_longbench_gives_a_right_answer_all_points(name, model, tmp_path):
    pytest.importorskip("jieba")
    longbench_rows.write_zip(tmp_path / "data.zip", [name])
    llm, data = LLM.load(model, cache=CacheConfig("full")), str(tmp_path / "data.zip")
    for sample, row in zip(longbench.samples([name], 2, None, data), longbench.rows(name, data), strict=True):
        grade = longbench.prompt(llm, sample, data).grade
        for answer in row["answers"]:
            later = "\nDialogue: more" if name in ("trec", "triviaqa", "samsum", "lsht") else ""  # is cut off
            assert grade(answer + later) == pytest.approx({"score": 1.0}, abs=1e-6)
        assert grade("zebra")["score"] < 0.3


def test_the_suite_is_all_methods_on_all_small_tasks(run, monkeypatch):
    monkeypatch.setattr(commands, "SUITE_LENGTH", 950)
    printed = run("suite", "-n", "2", "--kv-budget", "0.5", "--workers", "1")
    rows = run.rows()
    assert {r["task"] for r in rows} == {"needle", "fidelity"}
    assert {r["cache"]["method"] for r in rows} == set(ready_methods(None))
    assert all(name in printed for name in ready_methods(None))


def test_efficiency_by_the_bench(run):
    """Times of a repetition, and what the cache takes."""
    printed = run("efficiency", "--length", "400", "-r", "1", "--kv-method", "streaming", "--kv-budget", "0.5")
    rows = {(r["sample"]["length"], r["cache"]["method"]): r for r in run.rows()}
    assert set(rows) == {(n, m) for n in (400,) for m in ("full", "streaming")}
    for row in rows.values():
        assert all(len(row["times"][name]) == 1 and row["times"][name][0] > 0 for name in ("ttft", "tpot"))
    assert rows[400, "streaming"]["kept"] == pytest.approx(0.5, abs=0.01)
    assert rows[400, "streaming"]["scores"]["cache_bytes"] < 0.6 * rows[400, "full"]["scores"]["cache_bytes"]
    assert "TTFT ms" in printed


def test_flags_of_a_method_that_needs_an_option():
    flags = efficiency.cache_flags(CacheConfig("razor", 0.2, retrieval_heads="1:0,1:1"))
    assert flags == ["--kv-method", "razor", "--kv-budget", 0.2, "--kv-set", "retrieval_heads=1:0,1:1"]


@pytest.mark.parametrize(
    "config",
    [
        CacheConfig("full"),
        CacheConfig("streaming", 64, window=8, sinks=2, recompress=0),
        CacheConfig("semanticache", tau=0.8, rope="cached", log_size=False, window=16),
        CacheConfig("semanticache", 0.35, chunking="fixed:32"),
    ],
)
def test_flags_of_a_configuration_are_that_configuration(config):
    from minillm.programs import bench

    args = bench._parser().parse_args(list(map(str, efficiency.cache_flags(config))))
    (made,) = bench._caches(args).values()
    assert CacheConfig(**made).as_dict()["method"] == config.method
    if config.method != "full":
        budget = made.pop("budget")
        assert CacheConfig(**made, **({} if budget is None else {"budget": budget})).as_dict() == config.as_dict()
