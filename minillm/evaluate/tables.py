"""Tables of results, as Markdown for people and CSV for programs: a mean, half of its 95 % interval, and the number of
samples in every cell."""

import csv
import hashlib
import json
import math
from collections import defaultdict
from pathlib import Path

from minillm.compress.config import INSTEAD, OUTCOMES, unusual
from minillm.evaluate.statistics import mean_of, mean_of_groups

# The scores of a task that tables show, the first of which decides; those that are better when they are small.
SHOWN = {
    "answers": ("kl", "accuracy", "first", "em"),
    "needle": ("accuracy", "nll", "em", "contained", "words"),
    "verbatim": ("accuracy", "nll", "em"),
    "ruler": ("score",),
    "longbench": ("score",),
    "perplexity": ("nll", "kl"),
    "fidelity": ("kl", "nll", "error"),  # an error compares a method with itself alone
}
LESS_IS_MORE = ("nll", "kl", "error")
LONG = 32  # characters of an option beyond which its digest is shown
PERCENT = ("ruler", "longbench")  # whose scores are shown times 100, as their papers do
MEANING = {
    "accuracy": "share of the answer's tokens that are the most likely ones",
    "first": "share of the answer's tokens before the first that is not the most likely one",
    "em": "share of the answers that greedy decoding gets right to the last token",
    "nll": "nats a token of the right answer",
    "kl": "nats a token from the full cache's distribution",
    "error": "relative error of the attention output, mean over layers",
    "score": "the benchmark's own",
    "contained": "share of the generated answers that contain the right one",
    "words": "share of the right answer's words in the generated one",
}


def label(cache):
    """A configuration's method and what is unusual about it, without its budget; a long value as its digest."""
    values = unusual(cache)
    stored = [values.pop("dtype")] if "dtype" in values else []
    named = (f"{name}={_short(value)}" for name, value in values.items() if name not in INSTEAD)
    return " ".join([cache["method"], *stored, *named])


def _short(value):
    return hashlib.sha256(value.encode()).hexdigest()[:6] if isinstance(value, str) and len(value) > LONG else value


def asked(cache):
    """What a configuration was asked to keep: a share, entries a head, tau, or all."""
    if cache["method"] == "full":
        return "all"
    if cache.get("memory") is not None:
        return f"{100 * cache['memory']:g} % of memory"
    if cache["budget"] is None:
        return next(f"{name} {cache[name]:g}" for name in OUTCOMES if cache.get(name) is not None)
    return f"{100 * cache['budget']:g} %" if isinstance(cache["budget"], float) else str(cache["budget"])


def share(rows, of):
    """The mean share that rows kept of a full cache's entries ("kept") or bytes ("memory"), which are the same where
    nothing else is said."""
    return sum(row.get(of, row["kept"]) for row in rows) / len(rows)


def budget_order(cache):
    if cache.get("memory") is not None:
        return (3, -cache["memory"])
    if cache["budget"] is None:
        return (2, -(cache.get("tau") or 0))
    return (0, -cache["budget"]) if isinstance(cache["budget"], float) else (1, -cache["budget"])


def group(rows, *names):
    """{values of these functions of a row: rows}, in the order they come."""
    found = defaultdict(list)
    for row in rows:
        found[tuple(name(row) for name in names)].append(row)
    return found


def _model(row):
    return f"{row['model']['name']} ({row['model']['sha256'][:8]})"


def task_of(row):
    return row["task"]


def kind_of(row):
    return row["sample"]["kind"]


def length_of(row):
    return row["sample"]["length"] or 0


def protocol_of(row):
    return row["protocol"]


def _label(row):
    return label(row["cache"])


def _asked(row):
    return asked(row["cache"])


# The tables: each a title, a header and lines of texts


def score_tables(rows):
    """Tables 1, 3, 4 and 5: a line a configuration, a column a kind of task; one for each model, protocol, task, length
    and score."""
    made = []
    quality = [row for row in rows if row["task"] in SHOWN]
    for (model, task, length, protocol), part in sorted(
        group(quality, _model, task_of, length_of, protocol_of).items()
    ):
        for score in SHOWN[task]:
            scored, lines = [row for row in part if score in row["scores"]], []
            kinds = list(dict.fromkeys(map(kind_of, scored)))
            shares = ["kept", *(["memory"] if any("dtype" in row["cache"] for row in scored) else [])]
            for (name, kept_asked), found in ordered(scored):
                by_kind = {kind: scores_of(rows_of, score) for (kind,), rows_of in group(found, kind_of).items()}
                cells = [cell(mean_of(by_kind[kind]), task) if kind in by_kind else "" for kind in kinds]
                if len(kinds) > 1:
                    complete = len(by_kind) == len(kinds)
                    cells.append(cell(mean_of_groups(by_kind.values()), task) if complete else "")
                lines.append([name, kept_asked, *(f"{100 * share(found, of):.1f} %" for of in shares), *cells])
            header = ["cache", "asked", *shares, *kinds, *(["mean of sets"] if len(kinds) > 1 else [])]
            if not lines:
                continue
            title = f"{task}, {score} ({MEANING[score]}{', x 100' if task in PERCENT else ''})"
            where = f"{model}, {f'{length} tokens' if length else 'length of the context'}, {protocol}"
            made.append((f"{title}: {where}", header, lines))
    return made


def ordered(rows):
    """((label, asked), rows) of each configuration: the full cache, then methods by name and budgets from large to
    small."""
    found = group(rows, _label, _asked)

    def order(item):
        cache = item[1][0]["cache"]
        return (cache["method"] != "full", item[0][0], budget_order(cache) if cache["method"] != "full" else ())

    return sorted(found.items(), key=order)


def scores_of(rows, score):
    return [row["scores"][score] for row in rows if score in row["scores"]]


def cell(mean, task=None, digits=3):
    if task in PERCENT:
        mean, digits = type(mean)(100 * mean.mean, 100 * mean.half, mean.n), 1
    half = "" if math.isnan(mean.half) else f" ± {mean.half:.{digits}f}"
    return f"{mean.mean:.{digits}f}{half} ({mean.n})"


def difference_tables(rows):
    """At each budget the best configuration, and by how much it leads each other one and the full cache on the same
    samples: paired differences, in the direction in which more is better."""
    made = []
    quality = [row for row in rows if row["task"] in SHOWN]
    for (model, task, length, protocol), part in sorted(
        group(quality, _model, task_of, length_of, protocol_of).items()
    ):
        score = SHOWN[task][0]
        sign = -1 if score in LESS_IS_MORE else 1
        lines = []
        by_budget = {
            budget: {
                name: {json.dumps(row["sample"], sort_keys=True): sign * row["scores"][score] for row in rows_of}
                for (name,), rows_of in group([r for r in found if score in r["scores"]], _label).items()
            }
            for (budget,), found in group(part, _asked).items()
        }
        full = by_budget.pop("all", {})
        for budget, by_config in by_budget.items():
            if budget.startswith("tau") or len(by_config) < 2:
                continue
            best = max(by_config, key=lambda name: sum(by_config[name].values()) / len(by_config[name]))
            for name, values in [*sorted(by_config.items()), *full.items()]:
                common = [sample for sample in by_config[best] if sample in values]
                if name == best or not common:
                    continue
                mean = mean_of(by_config[best][sample] - values[sample] for sample in common)
                sure = "" if math.isnan(mean.half) else "yes" if mean.low > 0 else "no"
                lines.append([budget, best, name, cell(mean, task), sure])
        if lines:
            header = ["asked", "best", "against", "leads by", "interval above 0"]
            where = f"{model}, {length} tokens, {protocol}"
            made.append((f"{task}, {score}, paired differences: {where}", header, lines))
    return made


def efficiency_tables(rows):
    """Tables 2 and 7: time and memory of each configuration, at each length."""
    made = []
    for (model, length), part in sorted(
        group([r for r in rows if r["task"] == "efficiency"], _model, length_of).items()
    ):
        lines = []
        for (name, kept_asked), found in ordered(part):
            row = found[-1]
            times = [cell(mean_of(1000 * t for t in row["times"][kind]), digits=1) for kind in ("ttft", "tpot")]
            mib = [f"{row['scores'][kind] / 2**20:.1f}" for kind in ("cache_bytes", "peak_bytes")]
            lines.append([name, kept_asked, f"{100 * row['kept']:.1f} %", *times, *mib])
        machine = part[-1]["versions"]
        about = f"{machine['backend']}, threads: {machine['n_threads']}, {machine['cpu_info']}"
        header = ["cache", "asked", "kept", "TTFT ms", "TPOT ms", "cache MiB", "peak MiB"]
        made.append((f"efficiency: {model}, {length} tokens, {about}", header, lines))
    return made


def head_tables(rows):
    """Table 6: the share of a prompt's tokens that the heads of each layer keep, mean over samples."""
    made = []
    fidelity = [row for row in rows if "heads" in row and row["cache"]["method"] != "full"]
    for (model, length), part in sorted(group(fidelity, _model, length_of).items()):
        lines = []
        for (name, kept_asked), found in ordered(part):
            shares, errors = mean_heads(found), mean_layers(found)
            for layer, (heads, error) in enumerate(zip(shares, errors, strict=True)):
                lines.append([name, kept_asked, str(layer), *(f"{share:.3f}" for share in heads), f"{error:.3f}"])
        n = len(part[0]["heads"][0])
        header = ["cache", "asked", "layer", *(f"head {i}" for i in range(n)), "error"]
        made.append((f"kept share per layer and head: {model}, {length} tokens", header, lines))
    return made


def mean_heads(rows):
    """(L, H) nested lists: the mean over rows."""
    n = len(rows)
    return [
        [sum(head) / n for head in zip(*layer, strict=True)] for layer in zip(*(r["heads"] for r in rows), strict=True)
    ]


def mean_layers(rows):
    return [sum(layer) / len(rows) for layer in zip(*(row["layers"] for row in rows), strict=True)]


TABLES = {
    "scores": score_tables,
    "differences": difference_tables,
    "efficiency": efficiency_tables,
    "heads": head_tables,
}
IN_MARKDOWN = ("scores", "differences", "efficiency")


def markdown(rows):
    """All tables that the rows suffice for (kept shares per head: as CSV only, they are long)."""
    parts = [notice for notice in [mixed(rows)] if notice]
    for name in IN_MARKDOWN:
        for title, header, lines in TABLES[name](rows):
            body = [header, ["---"] * len(header), *lines]
            parts.append(f"**{title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in body))
    return "\n\n".join([*parts, "Cells: mean ± half of the 95 % interval (number of samples)."])


def mixed(rows):
    """A sentence where rows were made by different programs."""
    versions = {json.dumps(row["versions"], sort_keys=True) for row in rows if row["task"] != "efficiency"}
    return (
        f"Made by {len(versions)} different versions or machines: {'; '.join(sorted(versions))}."
        if len(versions) > 1
        else ""
    )


def write(rows, folder):
    """tables.md, and of each sort of table a CSV file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.md").write_text(markdown(rows) + "\n", encoding="utf-8")
    _write_csv(folder / "scores.csv", score_lines(rows))
    for name in ("differences", "efficiency", "heads"):
        _write_csv(
            folder / f"{name}.csv",
            [
                {"table": title} | dict(zip(header, line, strict=True))
                for title, header, lines in TABLES[name](rows)
                for line in lines
            ],
        )


def score_lines(rows):
    """Every mean as a dict: for score.csv and plots."""
    found = []
    quality = [row for row in rows if row["task"] in SHOWN]
    names = ("model", "task", "length", "protocol", "kind", "cache", "asked")
    for values, part in group(quality, _model, task_of, length_of, protocol_of, kind_of, _label, _asked).items():
        shares = {of: share(part, of) for of in ("kept", "memory")}
        for score in dict.fromkeys(name for row in part for name in row["scores"]):
            mean = mean_of(scores_of(part, score))
            numbers = {"mean": mean.mean, "low": mean.low, "high": mean.high, "n": mean.n}
            found.append(dict(zip(names, values, strict=True)) | shares | {"score": score} | numbers)
    return found


def _write_csv(path, lines):
    if not lines:
        return
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
        table.writeheader()
        table.writerows(lines)
