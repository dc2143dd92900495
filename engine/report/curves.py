"""Draws curves and bars as SVG inside a page, with words as text and colours from the page (light, dark, print)."""

import io
import re
import textwrap
from pathlib import Path
from typing import Any

from engine.report.tables import Groups, folder_of_every_seed, row_names
from engine.runtime.errors import UserError
from engine.runtime.files import atomic_path

SERIES = 8  # number of line colours of the page, --series-0 and on; further lines repeat them, dashed
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
INK, GRID = "#010101", "#020202"  # placeholders for the page's colours
POINTS = 200  # largest number of points drawn of a line; more cannot be told apart

Line = tuple[int, list[float], list[float]]  # number of the series, x values, y values


def curves(lines: list[Line], x: str, title: str, size: tuple[float, float] = (4.2, 2.6)) -> str:
    """Draws lines over one x axis, as SVG.

    Args:
        x: name of the axis.
        title: description of the figure for screen readers.
        size: width and height in inches; the page scales them.
    """
    figure, axes = _axes(size)
    for series, xs, ys in lines:
        step = max(1, -(-len(xs) // POINTS))
        kept = [*range(0, len(xs) - 1, step), len(xs) - 1]
        axes.plot(
            [xs[k] for k in kept],
            [ys[k] for k in kept],
            color=_color(series % SERIES),
            linewidth=1.6,
            linestyle=DASHES[series // SERIES % len(DASHES)],
            marker="o" if len(kept) < 3 else None,
            markersize=3,
        )
    axes.set_xlabel(x)
    axes.xaxis.get_major_locator().set_params(nbins=5, integer=x != "minutes")
    axes.yaxis.get_major_locator().set_params(nbins=5)
    return _svg(figure, title)


def bars(counts: list[int], title: str, size: tuple[float, float] = (4.2, 1.8)) -> str:
    """Draws counts by class number as a bar chart, as SVG."""
    figure, axes = _axes(size)
    axes.bar(range(len(counts)), counts, color=_color(0), width=0.8 if len(counts) <= 50 else 1.0)
    axes.set_xlabel("class")
    if len(counts) <= 20:
        axes.set_xticks(range(len(counts)))
    axes.yaxis.get_major_locator().set_params(nbins=4, integer=True)
    return _svg(figure, title)


def _color(series: int) -> str:
    return f"#0300{series:02x}"


def _axes(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.xaxis.label.set(color=INK, size=9)
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    from html import escape

    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()[file.getvalue().index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # several figures in one page would share their ids
    text = re.sub(r" font-family: [^;]*;| transform=\"rotate\(-0 [^)]*\)\"", "", text)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--rule)")
    text = re.sub(r"#0300([0-9a-f]{2})", lambda m: f"var(--series-{int(m[1], 16)})", text)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{escape(title)}">', text, count=1)
    return re.sub(r"\s*\n\s*", "\n", text)


# One plot of all runs: accuracy during training, against student steps, minutes or CPU-minutes.


AXES = {"steps": "student_steps", "minutes": "minutes", "cpu_minutes": "cpu_minutes"}
WORDS = {"steps": "student steps", "minutes": "minutes", "cpu_minutes": "CPU-minutes"}
FORMATS = (".png", ".svg", ".pdf")


def plot(groups: Groups, file: Path, x: str = "steps", folders: bool = False) -> int:
    """Plots one line for each group, the mean over its seeds in a band from lowest to highest; returns their number.

    Minutes count from the start of the run, so they include the time to make the first bank.

    Args:
        x: a key of ``AXES``.
        folders: whether to name lines by their run folders.
    Raises:
        UserError: there is nothing to plot, the file's suffix is unknown, or matplotlib is missing.
    """
    if file.suffix not in FORMATS:
        raise UserError(f"--plot {file} found, a name that ends in {', '.join(FORMATS)} wanted")
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure  # not pyplot: no window, no global state
    except ImportError:
        raise UserError("--plot draws with matplotlib, which is not installed; run pip install matplotlib") from None
    lines = lines_of(groups, AXES[x], folders)
    if not lines:
        raise UserError(f"no run has recorded its accuracies by {WORDS[x]}; give other runs, or another --x")
    labels = [textwrap.wrap(f"{name}  {mean[-1]:.1f}", 44, break_on_hyphens=False) for name, _, mean, *_ in lines]
    figure = Figure(figsize=(9, max(5.5, 0.17 * sum(map(len, labels)) + 0.5)), layout="constrained")
    axes = figure.subplots()
    for k, (label, (_, xs, mean, low, high)) in enumerate(zip(labels, lines)):
        color, dashed = colormaps["tab10"](k % 10), k // 10
        style = ("-", "--", ":")[dashed % 3]
        axes.plot(xs, mean, color=color, linestyle=style, linewidth=1.8, label="\n".join(label).replace("$", r"\$"))
        axes.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel=WORDS[x], ylabel="test accuracy in %", xlim=(0, None))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, title="run, last epoch")
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format=file.suffix[1:], dpi=150)
    return len(lines)


def lines_of(
    groups: Groups, axis: str, folders: bool
) -> list[tuple[str, list[float], list[float], list[float], list[float]]]:
    """Lines of the plot: (name, x, and mean, lowest and highest accuracy), sorted by final accuracy, highest first.

    Mean, lowest and highest are taken over seeds, epoch by epoch.

    Args:
        axis: key of the x value in the lines of a run's history.
        folders: whether to name lines by their run folders.
    """
    found = []
    for runs, name in zip(groups, row_names(groups)):
        histories = [[line for line in run["history"] if {"acc1", axis} <= line.keys()] for run in runs]
        if not all(histories):
            continue
        name = folder_of_every_seed(runs[0]) if folders else name
        epochs = [*zip(*histories)]
        columns = [[line["acc1"] for line in epoch] for epoch in epochs]
        xs = [sum(line[axis] for line in epoch) / len(epoch) for epoch in epochs]
        found.append((name, xs, [sum(c) / len(c) for c in columns], [*map(min, columns)], [*map(max, columns)]))
    return sorted(found, key=lambda line: -line[2][-1])
