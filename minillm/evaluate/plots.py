"""Pictures of results, as PNG. Each is drawn where the rows suffice for it:

needle    accuracy over length and depth, a panel a configuration     (needle with --depth)
budget    the score over the memory that was kept, a line a method, a panel a task (two budgets or more)
heads     kept share of every layer and head, a panel a configuration (fidelity)
speed     time a token and to the first one over the prompt's length  (efficiency with two lengths or more)"""

import statistics
from pathlib import Path

from minillm.errors import UsageError
from minillm.evaluate import tables
from minillm.evaluate.statistics import mean_of

DPI = 110
TICKS = (100, 50, 20, 10, 5, 2, 1)  # percent
# Okabe and Ito's, without yellow and black, and two dark ones of Tol's: told apart by the colour-blind.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#332288", "#882255")
GREY, INK = "#b8b8b8", "#555555"
FLATTENED = 3  # medians of what is lost, at which an axis ends
LABEL_HEIGHT = 0.042  # of a label, as a share of a panel's


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
    """A panel a task. The methods that do best over all panels are coloured, the same in each; the others are grey."""
    quality = [row for row in rows if row["task"] in tables.SHOWN]
    for (model, length, protocol), part in tables.group(quality, _model, tables.length_of, tables.protocol_of).items():
        panels = {}
        for (task, kind), found in tables.group(part, tables.task_of, tables.kind_of).items():
            score = tables.SHOWN[task][0]
            lines = [line for line in tables.score_lines(found) if line["score"] == score]
            if len({line["asked"] for line in lines if line["cache"] != "full"}) > 1:
                panels[task, kind] = lines
        if not panels:
            continue
        colours = dict(zip(_ranked(panels), COLOURS, strict=False))
        figure, axes = _figure(len(panels), width=5.6, height=4.2, columns=2)
        for axis, ((task, kind), lines) in zip(axes, panels.items(), strict=True):
            _curves(axis, lines, colours)
            score = tables.SHOWN[task][0]
            axis.set_ylim(*_limits(axis, lines, score))
            axis.set_title(f"{task}: {kind}", fontsize=10, loc="left")
            axis.set_ylabel(f"{score} ({'less' if score in tables.LESS_IS_MORE else 'more'} is better)", fontsize=9)
            _labels(axis, lines, colours)
        figure.suptitle(f"{model}, {f'{length} tokens' if length else 'whole prompts'}, {protocol}", fontsize=11)
        yield _name("budget", length or "whole", protocol, model), figure


def _limits(axis, lines, score):
    """Of the axis of a score: from 0 to 1, or up to so much that one method that fails does not flatten the others."""
    if score not in tables.LESS_IS_MORE:
        return 0, 1.03
    low, high = axis.get_ylim()
    least = min(line["mean"] for line in lines)
    losses = [points[-1]["mean"] - least for name, points in _points(lines).items() if name != "full"]
    if lost := statistics.median(losses):
        high = min(high, least + FLATTENED * lost)
    return max(low, least - 0.05 * (high - least)), high


def _ranked(panels):
    """The methods of {panel: lines}, the best first: by their mean rank over panels and budgets."""
    ranks = {}
    for lines in panels.values():
        sign = 1 if lines[0]["score"] in tables.LESS_IS_MORE else -1
        for (asked,), found in tables.group(lines, lambda line: line["asked"]).items():
            if asked != "all":
                for rank, line in enumerate(sorted(found, key=lambda line: sign * line["mean"])):  # noqa: B023
                    ranks.setdefault(line["cache"], []).append(rank)
    return sorted(ranks, key=lambda name: sum(ranks[name]) / len(ranks[name]))


def _points(lines):
    """{method: its lines, from the largest share kept to the smallest}"""
    found = tables.group(lines, lambda line: line["cache"])
    return {name: sorted(part, key=lambda line: -line["memory"]) for (name,), part in found.items()}


def _curves(axis, lines, colours):
    """Over the share of the memory kept, which falls to the right, from the full cache on. Bands are 95 % intervals."""
    axis.set_xscale("log")
    axis.set_xlim(100, 80 * min(line["memory"] for line in lines))
    ticks = [tick for tick in TICKS if tick >= axis.get_xlim()[1]]
    axis.set_xticks(ticks, [f"{tick} %" for tick in ticks], fontsize=9)
    axis.minorticks_off()
    axis.tick_params(length=0, labelsize=9, colors=INK)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.set_xlabel("share of the cache's memory that is kept", fontsize=9)
    methods = _points(lines)
    full = [line["mean"] for line in methods.pop("full", [])]
    for mean in full:
        axis.axhline(mean, color="black", linewidth=0.8)
    for name, points in methods.items():
        x, y = [100 * line["memory"] for line in points], [line["mean"] for line in points]
        best = name in colours
        style = {"color": colours.get(name, GREY), "zorder": 3 if best else 2, "linewidth": 1.8 if best else 1}
        axis.plot([100] * len(full) + x, full + y, **style)
        axis.plot(x, y, "o", markersize=3.5 if best else 2, **style)
        if best:
            bounds = ([line[side] if line["n"] > 1 else line["mean"] for line in points] for side in ("low", "high"))
            axis.fill_between(x, *bounds, color=style["color"], alpha=0.1, linewidth=0)


def _labels(axis, lines, colours):
    """The name of each line: beside the panel, or under its end where that is far from there."""
    ends = sorted(((points[-1], name) for name, points in _points(lines).items()), key=lambda end: end[0]["mean"])
    last = 1.3 * min(line["memory"] for line, _ in ends)
    beside = [(line, name) for line, name in ends if name == "full" or line["memory"] <= last]
    low, high = axis.get_ylim()
    places = spread([min(line["mean"], high) for line, _ in beside], (high - low) * LABEL_HEIGHT, low, high)
    for (line, name), place in zip(beside, places, strict=True):
        colour = "black" if name == "full" else colours.get(name, GREY)
        axis.annotate(
            name if line["mean"] <= high else f"{name} ({line['mean']:.2f})",
            (80 * last / 1.3 if name == "full" else 100 * line["memory"], min(line["mean"], high)),
            (1.06, place),
            textcoords=axis.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color=INK if colour == GREY else colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0, 0.5), "shrinkB": 2},
            annotation_clip=False,
        )
    for line, name in (end for end in ends if end not in beside):
        end = (100 * line["memory"], line["mean"])
        axis.annotate(name, end, (3, -10), textcoords="offset points", fontsize=8, color=colours.get(name, INK))


def spread(wanted, gap, low, high):
    """Places as near to the wanted ones (rising) as can be, in least squares, with `gap` or more from one to the next
    and all of them from low to high where that is possible: pool adjacent violators."""
    blocks = []  # sums and numbers of what is left of places that touch when i gaps are taken off the i-th
    for i, place in enumerate(wanted):
        blocks.append((place - i * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            (total, n), (more, m) = blocks[-2:]
            blocks[-2:] = [(total + more, n + m)]
    means = [total / n for total, n in blocks for _ in range(n)]
    top = max(low, high - (len(wanted) - 1) * gap)
    return [min(max(mean, low), top) + i * gap for i, mean in enumerate(means)]


def _heads(rows):
    fidelity = [row for row in rows if "heads" in row and row["cache"]["method"] != "full"]
    for (model, length), part in tables.group(fidelity, _model, tables.length_of).items():
        configs = list(tables.ordered(part))
        figure, axes = _figure(len(configs), width=2.1, height=3.2, columns=6)
        for axis, (names, found) in zip(axes, configs, strict=True):
            image = axis.imshow(tables.mean_heads(found), vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axis.set_title("\n".join(names), fontsize=8)
            axis.set_xlabel("KV head", fontsize=8)
            axis.set_ylabel("layer", fontsize=8)
            axis.tick_params(labelsize=8)
        lines = -(-len(configs) // 6)
        figure.colorbar(image, ax=list(axes), label="share of the tokens kept", shrink=1 / lines, anchor=(0, 1))
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
