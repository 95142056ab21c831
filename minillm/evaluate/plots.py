"""Pictures of results, as PNG. Each is drawn where the rows suffice for it:

needle    accuracy over length and depth, a panel a configuration     (needle with --depth)
budget    the score over what was kept, a line a method               (two budgets or more)
heads     kept share of every layer and head, a panel a configuration (fidelity)
speed     time a token and to the first one over the prompt's length  (efficiency with two lengths or more)"""

from pathlib import Path

from minillm.errors import UsageError
from minillm.evaluate import tables
from minillm.evaluate.statistics import mean_of

DPI = 110


def draw(rows, folder):
    """-> the paths of the pictures made."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UsageError("pictures need matplotlib: pip install 'minillm-engine[eval]'") from None
    matplotlib.use("Agg")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for drawer in (_needle, _budget, _heads, _speed):
        for name, figure in drawer(rows):
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=DPI, bbox_inches="tight")
            made.append(path)
    return made


def _figure(n_panels=1, width=4.2, height=3.2, columns=3):
    from matplotlib.figure import Figure

    columns = min(columns, n_panels)
    lines = -(-n_panels // columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[n_panels:]:
        axis.set_axis_off()
    return figure, axes[:n_panels]


def _name(*parts):
    text = "-".join(str(part) for part in parts)
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in text)


def _model(row):
    return row["model"]["name"].rpartition("/")[2]


def _title(found):
    """Of a configuration, from its rows."""
    cache = found[0]["cache"]
    return tables.label(cache) if cache["method"] == "full" else f"{tables.label(cache)}, {tables.asked(cache)}"


def _needle(rows):
    gridded = [row for row in rows if row["task"] == "needle" and row["sample"]["depth"] is not None]
    for (model, kind, protocol), part in tables.group(gridded, _model, tables.kind_of, tables.protocol_of).items():
        configs = [found for _, found in tables.ordered(part)]
        lengths = sorted({row["sample"]["length"] for row in part})
        depths = sorted({row["sample"]["depth"] for row in part})
        figure, axes = _figure(len(configs), width=1.6 + 0.5 * max(len(lengths), 4))
        for axis, found in zip(axes, configs, strict=True):
            cells = tables.group(found, lambda row: row["sample"]["length"], lambda row: row["sample"]["depth"])
            grid = [
                [
                    mean_of(tables.scores_of(cells[n, d], "accuracy")).mean if (n, d) in cells else float("nan")
                    for n in lengths
                ]
                for d in depths
            ]
            image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axis.set_xticks(range(len(lengths)), lengths, rotation=45)
            axis.set_yticks(range(len(depths)), [f"{100 * d:.0f} %" for d in depths])
            axis.set_title(_title(found), fontsize=9)
            axis.set_xlabel("prompt, tokens")
            axis.set_ylabel("depth of the needle")
        figure.colorbar(image, ax=list(axes), label="share of answer tokens that are the likeliest")
        figure.suptitle(f"{kind}, {protocol}, {model}")
        yield _name("needle", kind, protocol, model), figure


def _budget(rows):
    quality = [row for row in rows if row["task"] in tables.SHOWN]
    names = (_model, tables.task_of, tables.kind_of, tables.length_of, tables.protocol_of)
    for (model, task, kind, length, protocol), part in tables.group(quality, *names).items():
        score = tables.SHOWN[task][0]
        lines = [line for line in tables.score_lines(part) if line["score"] == score]
        methods = list(dict.fromkeys(line["cache"] for line in lines if line["cache"] != "full"))
        if len({line["asked"] for line in lines if line["cache"] != "full"}) < 2:
            continue
        figure, (axis,) = _figure(width=6.4, height=4.4)
        for method in methods:
            points = sorted((line for line in lines if line["cache"] == method), key=lambda line: line["kept"])
            half = [0.0 if line["n"] < 2 else line["high"] - line["mean"] for line in points]
            x, y = ([100 * line["kept"] for line in points], [line["mean"] for line in points])
            axis.errorbar(x, y, half, marker="o", markersize=3, capsize=2, linewidth=1.2, label=method)
        for line in lines:
            if line["cache"] == "full":
                axis.axhline(line["mean"], color="black", linestyle="--", linewidth=1, label="full")
        axis.set_xlabel("kept, percent of the entries of a full cache")
        axis.set_ylabel(f"{score} ({'less' if score in tables.LESS_IS_MORE else 'more'} is better)")
        axis.set_title(f"{task} {kind}, {length or 'whole'} tokens, {protocol}, {model}", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        yield _name("budget", task, kind, length, protocol, model), figure


def _heads(rows):
    fidelity = [row for row in rows if "heads" in row and row["cache"]["method"] != "full"]
    for (model, length), part in tables.group(fidelity, _model, tables.length_of).items():
        configs = [found for _, found in tables.ordered(part)]
        figure, axes = _figure(len(configs), width=2.6, height=4.2, columns=6)
        for axis, found in zip(axes, configs, strict=True):
            image = axis.imshow(tables.mean_heads(found), vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axis.set_title(_title(found), fontsize=8)
            axis.set_xlabel("KV head")
            axis.set_ylabel("layer")
        figure.colorbar(image, ax=list(axes), label="share of the tokens kept")
        figure.suptitle(f"{model}, {length} tokens")
        yield _name("heads", length, model), figure


def _speed(rows):
    timed = [row for row in rows if row["task"] == "efficiency"]
    for (model,), part in tables.group(timed, _model).items():
        if len({tables.length_of(row) for row in part}) < 2:
            continue
        figure, axes = _figure(2, width=5.2, height=4)
        for axis, kind, unit in zip(axes, ("ttft", "tpot"), (1, 1000), strict=True):
            for _, found in tables.ordered(part):
                points = sorted((tables.length_of(row), mean_of(unit * t for t in row["times"][kind])) for row in found)
                x, y, half = ([p[0] for p in points], [p[1].mean for p in points], [p[1].half for p in points])
                axis.errorbar(x, y, half, marker="o", markersize=3, capsize=2, label=_title(found))
            axis.set_xlabel("prompt, tokens")
            axis.set_ylabel("seconds to the first token" if kind == "ttft" else "milliseconds a token")
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        figure.suptitle(model)
        yield _name("speed", model), figure
