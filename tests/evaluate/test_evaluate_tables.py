"""Means, intervals and paired differences in the tables, against the statistics module and by hand; plots are drawn."""

import csv
import math
import random
import statistics

import pytest

from minillm.compress.config import CacheConfig
from minillm.evaluate import plots, tables
from minillm.evaluate.statistics import mean_of, mean_of_groups, t_quantile

MODEL = {"name": "owner/m", "sha256": "0123456789abcdef", "dtype": "auto"}
VERSIONS = {"minillm": "1"}


def cache(method, budget=0.5, **options):
    usual = {"tau": None, "rope": "unrotated"} if method == "semanticache" else {}
    common = {"method": method, "budget": budget, "window": 32, "sinks": 4, "recompress": 256}
    return common | (CacheConfig("semanticache").as_dict() | common if usual else {}) | options


def row(task, seed, config, scores, kind="prose", length=1000, protocol="aware", **more):
    sample = {"kind": kind, "length": length, "seed": seed, "depth": more.pop("depth", None)}
    decides = {"task": task, "sample": sample, "protocol": protocol, "model": MODEL, "cache": config}
    return decides | {"kept": more.pop("kept", 0.5), "scores": scores, "versions": VERSIONS} | more


def lines_of(text, title):
    """The lines of the table whose title begins so, as lists of cells."""
    part = text.split(f"**{title}", 1)[1].split("\n\n")[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.split("\n")]


def test_quantiles_of_students_t():
    """The values of any printed table."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 23: 2.069, 30: 2.042, 120: 1.980}
    for freedom, wanted in table.items():
        assert t_quantile(freedom) == pytest.approx(wanted, rel=1.5e-3), freedom


def test_the_interval_holds_the_mean_95_times_in_100():
    rng = random.Random(0)
    hits = 0
    for _ in range(4000):
        mean = mean_of(rng.gauss(3, 2) for _ in range(8))
        hits += mean.low <= 3 <= mean.high
    assert 0.94 < hits / 4000 < 0.96


def test_means():
    values = [1.0, 2.0, 4.0, 4.5]
    mean = mean_of(values)
    assert mean.mean == statistics.mean(values) and mean.n == 4
    assert mean.half == pytest.approx(3.182 * statistics.stdev(values) / 2, rel=1e-2)
    assert math.isnan(mean_of([1.0]).half)
    both = mean_of_groups([[0, 0, 0], [1, 2, 3]])
    assert both.mean == 1 and both.n == 6 and both.half == pytest.approx(mean_of([1, 2, 3]).half / 2)


def test_the_interval_of_a_mean_over_groups_holds_it_95_times_in_100():
    """Eleven groups of two values each, which vary by different amounts: more often than 95 times, but not always."""
    rng, hits, widths = random.Random(1), 0, []
    for _ in range(2000):
        mean = mean_of_groups([rng.gauss(i, 1 + i % 3) for _ in range(2)] for i in range(11))
        hits += mean.low <= 5 <= mean.high
        widths.append(mean.half)
    error = math.sqrt(sum((1 + i % 3) ** 2 / 2 for i in range(11))) / 11
    assert 0.94 < hits / 2000 < 0.99 and statistics.mean(widths) < 5 * error
    assert math.isnan(mean_of_groups([[1.0], [2.0, 3.0]]).half)


def test_a_score_table_has_mean_interval_and_number_of_every_cell():
    rng, rows = random.Random(1), []
    configs = [
        cache("full", None),
        cache("streaming", 0.2),
        cache("streaming", 0.5),
        cache("semanticache", None, tau=0.8),
    ]
    configs.append(cache("semanticache", 0.5, rope="cached"))
    values = {}
    for i, config in enumerate(configs):
        for kind in ("prose", "keys4"):
            values[i, kind] = [rng.random() for _ in range(5)]
            scores = ({"accuracy": v, "nll": 1 - v, "em": float(v > 0.5)} for v in values[i, kind])
            rows += [row("needle", s, config, score, kind) for s, score in enumerate(scores)]
    header, _, *lines = lines_of(tables.markdown(rows), "needle, accuracy")
    assert header == ["cache", "asked", "kept", "prose", "keys4", "mean of sets"]
    assert [line[:2] for line in lines] == [
        ["full", "all"],
        ["semanticache", "tau 0.8"],
        ["semanticache rope=cached", "50 %"],
        ["streaming", "50 %"],
        ["streaming", "20 %"],
    ]
    numbers = values[1, "keys4"]
    half = t_quantile(4) * statistics.stdev(numbers) / math.sqrt(5)
    assert lines[-1][4] == f"{statistics.mean(numbers):.3f} ± {half:.3f} (5)"
    assert lines[-1][5].startswith(f"{statistics.mean(values[1, 'prose'] + numbers):.3f} ± ")


def test_a_label_names_what_is_unusual_and_what_a_method_cannot_do_without():
    def label(method, **options):
        return tables.label(CacheConfig(method, 0.2, **options).as_dict())

    assert label("snapkv") == "snapkv"
    assert label("snapkv", window=8) == "snapkv window=8"
    assert label("razor", retrieval_heads="2:1") == "razor retrieval_heads=2:1"
    many, others = (label("razor", retrieval_heads=f"{i}:0" + 20 * ",5:1") for i in (2, 3))
    assert many != others and len(many) == len(others) == len("razor retrieval_heads=") + 6
    assert tables.label({"method": "not.py:HERE", "budget": 0.5, "power": 2}) == "not.py:HERE power=2"


def test_benchmarks_are_shown_times_100_and_single_samples_without_interval():
    text = tables.markdown([row("longbench", 0, cache("full", None), {"score": 0.4321}, "qasper", None)])
    assert "43.2 (1)" in text and "length of the context" in text


def test_differences_are_paired_and_name_the_best():
    """B is better than A by 0.1 in every sample, though the samples differ far more than that."""
    rows = []
    for seed in range(6):
        base = seed / 10
        for name, value in (("streaming", base), ("random", base + 0.1 + seed / 1000), ("semanticache", base + 0.1)):
            rows.append(row("perplexity", seed, cache(name), {"nll": 3 - value, "kl": 1 - value}))
    ((best_semantic, best_streaming),) = [lines for _, _, lines in tables.difference_tables(rows)]
    assert best_semantic[:3] == ["50 %", "random", "semanticache"]
    assert best_streaming[:3] == ["50 %", "random", "streaming"]
    half = t_quantile(5) * statistics.stdev(0.1 + seed / 1000 for seed in range(6)) / math.sqrt(6)
    assert best_streaming[3] == f"{0.1025 + 1e-9:.3f} ± {half:.3f} (6)"
    assert best_streaming[4] == "yes"
    full = [row("perplexity", seed, cache("full", None), {"nll": 2.8 - seed / 10, "kl": 0}) for seed in range(6)]
    *_, against_full = tables.difference_tables(rows + full)[0][2]
    assert against_full == ["50 %", "random", "full", f"-0.098 ± {half:.3f} (6)", "no"]
    rows = [r for r in rows if r["cache"]["method"] != "random" or r["sample"]["seed"] < 2]
    assert tables.difference_tables(rows)[0][2][0][3].endswith("(2)")  # only samples that both have


def test_mixed_versions_are_told():
    rows = [row("needle", s, cache("full", None), {"accuracy": 1.0, "nll": 0.0, "em": 1.0}) for s in range(2)]
    assert "different versions" not in tables.markdown(rows)
    rows[1]["versions"] = {"minillm": "2"}
    assert "Made by 2 different versions" in tables.markdown(rows)


@pytest.fixture
def all_sorts():
    rows, shares = [], [[0.5, 0.25], [0.75, 1.0]]
    for method, budget, kept in (("full", None, 1), ("streaming", 0.5, 0.5), ("streaming", 0.2, 0.2)):
        config = cache(method, budget)
        for seed in range(3):
            for length in (500, 1000):
                for depth in (0.0, 0.5, 1.0):
                    scores = {"accuracy": kept, "nll": 1 - kept, "em": 0.0}
                    rows.append(row("needle", seed, config, scores, length=length, depth=depth, kept=kept))
            more = {"heads": shares, "layers": [0.1, 0.2 + seed / 10], "kept": kept}
            rows.append(row("fidelity", seed, config, {"error": 0.2, "kl": 0.1, "nll": 3.0}, "text", **more))
        for length in (512, 2048):
            times = {"ttft": [length / 1000, length / 900], "tpot": [0.01, 0.012]}
            scores = {"ttft": 1.0, "tpot": 0.011, "cache_bytes": 3 << 20, "peak_bytes": 300 << 20}
            made = row("efficiency", 0, config, scores, "bench", length, times=times, kept=kept)
            rows.append(made | {"versions": {"backend": "amx", "n_threads": 2, "cpu_info": "a processor"}})
    return rows


def test_files_of_tables(all_sorts, tmp_path):
    tables.write(all_sorts, tmp_path / "t")
    read = {p.stem: list(csv.DictReader(p.open(encoding="utf-8"))) for p in (tmp_path / "t").glob("*.csv")}
    assert set(read) == {"scores", "efficiency", "heads"}  # one method: no differences
    line = next(r for r in read["scores"] if (r["task"], r["score"], r["asked"]) == ("needle", "nll", "20 %"))
    assert (float(line["mean"]), float(line["low"]), line["n"]) == (pytest.approx(0.8), pytest.approx(0.8), "9")
    heads = read["heads"]
    assert [heads[1][name] for name in ("layer", "head 0", "head 1", "error")] == ["1", "0.750", "1.000", "0.300"]
    assert [r["TPOT ms"] for r in read["efficiency"]][:1] == [tables.cell(mean_of([10, 12]), digits=1)]
    text = (tmp_path / "t" / "tables.md").read_text(encoding="utf-8")
    assert "efficiency: owner/m" in text and "300.0" in text


def test_pictures(all_sorts, tmp_path):
    """One of each sort; a PNG of some size that is not one colour."""
    import numpy as np
    from matplotlib import image

    made = {path.name.split("-")[0]: path for path in plots.draw(all_sorts, tmp_path)}
    assert set(made) == {"needle", "budget", "heads", "speed"}
    for path in made.values():
        pixels = image.imread(path)
        assert min(pixels.shape[:2]) > 200 and np.unique(pixels[::4, ::4, :3].reshape(-1, 3), axis=0).shape[0] > 20
    depth_by_lot = row("needle", 0, cache("full", None), {"accuracy": 1.0, "nll": 0.0, "em": 1.0})
    assert plots.draw([depth_by_lot], tmp_path) == []


def test_labels_keep_their_distance_and_stay_near():
    """No other places that keep the distance are nearer: none of many by lot, and none a little to either side."""
    rng = random.Random(3)
    for _ in range(50):
        wanted, gap = sorted(rng.random() for _ in range(rng.randrange(1, 7))), rng.choice([0.02, 0.1, 0.15])
        found = plots.spread(wanted, gap, 0, 1)
        n = len(found)

        def allowed(places, gap=gap):
            return all(b - a >= gap - 1e-9 for a, b in zip(places, places[1:], strict=False)) and (
                places[0] >= -1e-9 and places[-1] <= 1 + 1e-9
            )

        def cost(places, wanted=wanted):
            return sum((a - b) ** 2 for a, b in zip(places, wanted, strict=True))

        assert allowed(found)
        for _ in range(300):
            free = sorted(rng.random() for _ in range(n))
            other = [(1 - (n - 1) * gap) * place + i * gap for i, place in enumerate(free)]
            near = [place + rng.gauss(0, 0.02) for place in found]
            for places in (other, near):
                assert not allowed(places) or cost(places) >= cost(found) - 1e-9


def test_the_best_methods_come_first():
    def lines(score, **means):
        return [{"cache": name, "asked": "20 %", "mean": mean, "score": score} for name, mean in means.items()]

    full = {"cache": "full", "asked": "all", "mean": 1.0, "score": "accuracy"}
    panels = {"needle": [full, *lines("accuracy", a=0.2, b=0.9, c=0.5)], "text": lines("kl", a=0.3, b=0.1, c=0.2)}
    assert plots._ranked(panels) == ["b", "c", "a"]


def test_pictures_need_matplotlib(all_sorts, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(plots.UsageError, match="pip install 'minillm-engine"):
        plots.draw(all_sorts, tmp_path)


def test_what_is_kept_of_the_memory_stands_beside_where_it_is_not_the_same():
    scores = {"em": 1.0}
    rows = [row("needle", seed, cache("streaming"), scores) for seed in range(2)]
    (_, header, _), *_ = tables.score_tables(rows)
    assert header == ["cache", "asked", "kept", "prose"]
    rows += [row("needle", seed, cache("streaming", dtype="int8"), scores, memory=0.265) for seed in range(2)]
    (_, header, lines), *_ = tables.score_tables(rows)
    assert header == ["cache", "asked", "kept", "memory", "prose"]
    shares = [["streaming", "50 %", "50.0 %", "50.0 %"], ["streaming int8", "50 %", "50.0 %", "26.5 %"]]
    assert [line[:4] for line in lines] == shares
    found = {line["cache"]: line["memory"] for line in tables.score_lines(rows)}
    assert found == {"streaming": 0.5, "streaming int8": 0.265}
