"""minillm.bench: what a row measures, in this process; and whole runs, whose rows have processes of their own."""

import csv
import io
import json
import statistics
import time

import pytest
import tiny_chat

from minillm import LLM, CacheConfig
from minillm.compress import reading
from minillm.errors import MinillmError
from minillm.model import Model
from minillm.ops.numpy_ops import NUMPY as numpy_ops
from minillm.programs import bench, bench_row

TEXT = "the cat sat, the dog ran. a bird sang; nobody heard it. " * 40


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_chat.make(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT)
    return str(path)


def request(tiny, kind, n, depth, **cache):
    ids = list(TEXT.encode()[: depth + n])
    load = {"device": "cpu", "dtype": "auto", "threads": None, "offline": True}
    cache = cache or {"method": "full"}
    return {"model": tiny, "load": load, "cache": cache, "repetitions": 2, "kind": kind, "depth": depth, "ids": ids}


# A row


@pytest.mark.parametrize(
    "kind, n, depth, expected",
    [
        # the cold prompt; what is there before; each repetition: (tokens read, tokens seen before them)
        ("pp", 30, 0, [("extend", 30, 0), ("extend", 30, 0), ("extend", 30, 0)]),
        ("pp", 30, 200, [("extend", 230, 0), ("extend", 200, 0), ("extend", 30, 200), ("extend", 30, 200)]),
        ("tg", 3, 200, [("extend", 200, 0), *[("decode", 1, seen) for seen in (200, 201, 202)] * 2]),
        ("tg", 3, 0, [("extend", 1, 0), *[("decode", 1, seen) for seen in (0, 1, 2)] * 2]),
    ],
)
def test_what_is_read(tiny, capsys, monkeypatch, kind, n, depth, expected):
    """Every repetition reads the same tokens over the same past, and nothing else is read."""
    calls, tokens = [], []
    read, decode = reading.read, Model.decode

    def noted_read(model, ids, caches, *rest):
        (cache,) = caches
        calls.append(("extend", len(ids), cache.seen))
        tokens.append(cache.token_ids + list(ids))
        return read(model, ids, caches, *rest)

    def noted_decode(self, ids, caches, *rest):
        calls.append(("decode", len(ids), caches[0].seen))
        tokens.append(caches[0].token_ids + list(ids))
        return decode(self, ids, caches, *rest)

    monkeypatch.setattr("minillm.engine.request.read", noted_read)
    monkeypatch.setattr(Model, "decode", noted_decode)
    asked = request(tiny, kind, n, depth)
    bench_row.answer(asked)
    assert calls == expected
    assert all(read == asked["ids"][: len(read)] for read in tokens)
    first, *samples, rest = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"first_token": True}
    assert [list(sample) for sample in samples] == [["seconds"]] * 2
    assert rest["backend"] == "numpy"


def test_a_row_takes_the_time_that_the_model_takes(tiny, capsys, monkeypatch):
    decode, clock = Model.decode, [0.0]

    def slow(*arguments):
        clock[0] += 0.02
        return decode(*arguments)

    def now():
        clock[0] += 1e-6
        return clock[0]

    monkeypatch.setattr(Model, "decode", slow)
    monkeypatch.setattr(time, "perf_counter", now)
    bench_row.answer(request(tiny, "tg", 5, 0))
    samples = [json.loads(line).get("seconds") for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert samples == pytest.approx([0.1] * 2, rel=0.01)


@pytest.mark.parametrize(
    "cache", [{"method": "full"}, {"method": "streaming", "budget": 0.25}, {"method": "semanticache", "tau": 0.5}]
)
def test_a_row_tells_what_the_cache_holds(tiny, capsys, cache):
    bench_row.answer(request(tiny, "pp", 100, 300, **cache))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    with LLM.load(tiny, cache=CacheConfig(**cache)) as llm:
        session = llm.session()
        for part in (TEXT.encode()[:300], TEXT.encode()[300:400]):
            session.feed(list(part))
            session.read()
        assert found["cache_bytes"] == session.cache.bytes_in_use
        assert found["kept"] == session.cache.kept
        matrices = [w for b in llm.model.blocks for n, w in vars(b).items() if n[0] == "w" and w]
        norms = 2 * llm.config.n_layers + 1
        weights = sum(w.shape[0] * w.shape[1] for w in [*matrices, llm.model.head]) + norms * llm.config.dim
        assert found["weight_bytes"] == 4 * weights


def test_figures_of_a_row():
    found = {"seconds": [2.0, 4.0], "weight_bytes": 90, "cache_bytes": 10, "bandwidth": 200.0}
    row = bench._row(bench.Test("tg", 6, 50), dict(found))
    assert row["samples_ts"] == [3.0, 1.5] and row["avg_ts"] == 2.25
    assert row["stddev_ts"] == pytest.approx(1.5 / 2**0.5)
    assert (row["n_prompt"], row["n_gen"], row["n_depth"]) == (0, 6, 50)
    # 100 bytes a token: half a second at 200 B/s; a token takes 3 s / 6
    assert (row["floor_seconds"], row["floors"], row["achieved"]) == (0.5, 1.0, 200.0)
    row = bench._row(bench.Test("pp", 6, 0), dict(found, seconds=[2.0]))
    assert (row["n_prompt"], row["n_gen"], row["stddev_ts"]) == (6, 0, 0.0)
    assert "floors" not in row  # a prompt is bound by arithmetic


@pytest.mark.parametrize("bytes_read", [1 << 20, 1 << 24])
def test_bandwidth_is_bytes_over_seconds(monkeypatch, bytes_read):
    ticks = iter([0.0, 2.0, 2.0, 2.5, 2.5, 4.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert numpy_ops.bandwidth(bytes_read, repeats=3) == bytes_read / 0.5


# Whole runs


@pytest.fixture
def run(tiny, text, capfd):
    """run(flags) -> (exit status, stdout, stderr)"""

    def call(flags, *more, file=text):
        status = bench.main(["-m", tiny, "-f", file, "--device", "cpu", *flags.split(), *more])
        return (status, *capfd.readouterr())

    return call


def test_json(run, tiny, text):
    flags = "-p 40 -n 3 -d 0,300 -r 2 --kv-budget full,0.25 -t 1 -o json"
    begin = time.perf_counter()
    status, out, err = run(flags)
    wall = time.perf_counter() - begin
    assert (status, err) == (0, "")
    rows = json.loads(out)
    caches, tests = ["full", "default 0.25"], ["pp 40", "pp 40 @ d300", "tg 3", "tg 3 @ d300"]
    assert [(row["test"], row["cache"]) for row in rows] == [(test, cache) for test in tests for cache in caches]
    total = 0
    for row in rows:
        assert len(row["samples_ts"]) == 2
        assert row["avg_ts"] == pytest.approx(statistics.mean(row["samples_ts"]))
        total += sum((row["n_prompt"] + row["n_gen"]) / ts for ts in row["samples_ts"]) + row["first_token_seconds"]
        assert row["first_token_seconds"] > row["load_seconds"] > 0
        assert row["peak_bytes"] > 15 << 20  # Python with NumPy
        assert (row["n_threads"], row["text"], row["model_n_params"]) == (1, text, 35104)
        deep = row["n_depth"] and row["cache"] != "full"
        assert row["kept"] == pytest.approx(0.25, abs=0.2) if deep else row["kept"] == 1
    assert total < wall


def test_markdown_and_csv_say_the_same(run, tmp_path):
    status, out, err = run("-p 20 -n 2 -r 1 --kv-budget full")
    assert (status, err) == (0, "")
    about, _, head, line, *rows = out.splitlines()
    assert "35.10 K parameters, float32, numpy" in about and "text.txt" in about
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    assert columns == bench.COLUMNS and line.count("---") == len(columns)
    assert [[cell.strip() for cell in row.strip("|").split("|")][:2] for row in rows] == [
        ["full", "pp 20"],
        ["full", "tg 2"],
    ]
    assert all(row.count("|") == len(columns) + 1 for row in rows)
    file = tmp_path / "rows.csv"
    status, out, err = run("-p 20 -n 2 -r 1 --kv-budget full -o csv --output-file", str(file))
    assert (status, out, err) == (0, "", "")
    prompt, token = csv.DictReader(io.StringIO(file.read_text()))
    assert (prompt["test"], token["test"], prompt["floors"]) == ("pp 20", "tg 2", "")
    assert float(token["floors"]) * float(token["floor_seconds"]) == pytest.approx(1 / float(token["avg_ts"]))


def test_the_text_that_python_brings_is_long_enough(default_model_path, tiny):
    text, source = bench._text(None)
    stored = bench.open_model(bench.hub.resolve(str(default_model_path)))
    ids = bench._encode(stored, text, 8192, source)
    assert len(ids) == 8192 and "Python" in source
    llm_ids = LLM.load(tiny).encode(text[:100])  # another tokenizer: a byte a token
    assert bench._encode(bench.open_model(bench.hub.resolve(tiny)), text, 100, source) == llm_ids[:100]


def labels(flags):
    return list(bench._caches(bench._parser().parse_args(flags.split())))


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", ["full", "default 0.3"]),
        ("--kv-budget full,0.2 --kv-budget 512", ["full", "default 0.2", "default 512"]),
        (
            "--kv-budget full,0.2 --kv-method semanticache,streaming",
            ["full", "semanticache 0.2", "streaming 0.2"],
        ),
        ("--tau 0.7,0.8", ["semanticache tau=0.7", "semanticache tau=0.8"]),
        ("--tau 0.7 --kv-budget full", ["full", "semanticache tau=0.7"]),
        ("--kv-method full", ["full"]),
        ("--kv-budget 0.2 --kv-window 9 --kv-set reach=9", ["default 0.2 window=9 reach=9"]),
        ("--kv-method razor --kv-budget 0.2 --kv-set retrieval_heads=1:0", ["razor 0.2 retrieval_heads=1:0"]),
    ],
)
def test_caches(flags, expected):
    assert labels(flags) == expected


@pytest.mark.parametrize(
    "flags, status, words",
    [
        ("-p -1", 2, "must be at least 0"),
        ("-p 1,two", 2, "invalid comma-separated value: '1,two'"),
        ("-p 0 -n 0", 2, "nothing is left to measure"),
        ("-r 0", 2, "must be at least 1"),
        ("--kv-budget 2.5", 2, "budget 2.5 is neither"),
        ("--kv-method nothing", 2, "'nothing' is unknown"),
        ("--kv-method full --kv-budget 0.2", 2, "leave the budget out"),
        ("--kv-set color=red", 2, "neither has an option 'color'"),
        ("--device tpu", 2, "it is auto, cpu, cuda or cuda:1"),
        ("-p 4000 -n 0 -d 100", 2, "reads 4096 tokens, and -d with -p or -n comes to 4100"),
        ("-p 3000 -n 0", 2, "has 2240 tokens, and 3000 are to be read"),
        ("-o xml", 2, "invalid choice"),
        ("-p 20 -n 0 --output-file /nowhere/at/all", 1, "/nowhere/at/all"),
    ],
)
def test_what_cannot_be_is_one_line(run, flags, status, words):
    found, out, err = run(flags)
    assert (found, out) == (status, "")
    assert words in err and err.count("\n") == 1


def test_errors_of_a_row_are_those_of_the_run(tiny, monkeypatch):
    asked = request(tiny, "pp", 5, 0)
    with tqdm_off() as bar, pytest.raises(MinillmError, match="nowhere"):
        bench._measure_row(asked | {"model": "/nowhere/model"}, bar)
    monkeypatch.setattr(bench.sys, "executable", "/bin/false")
    with tqdm_off() as bar, pytest.raises(MinillmError, match="ended with status 1"):
        bench._measure_row(asked | {"ids": [1] * 100_000}, bar)


def tqdm_off():
    return bench.tqdm(disable=True)


def test_methods_are_listed(run):
    status, out, _ = run("--kv-method list")
    assert status == 0 and "semanticache" in out
