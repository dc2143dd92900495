"""Curves and bars as SVG that stands inside a page: its words are text, its colours are the page's (light, dark, paper)."""

import io
import re
from pathlib import Path
from typing import Any

from engine.report.tables import Groups, differing_flags, folder_of_every_seed
from engine.runtime.errors import UserError
from engine.runtime.files import atomic_path

SERIES = 8  # colours of the page, --series-0 and on; after them the same again, dashed
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
INK, GRID = "#010101", "#020202"  # stand for the colours of the page
POINTS = 200  # of a line; more cannot be told apart

Line = tuple[int, list[float], list[float]]  # which of the series, x, y


def curves(lines: list[Line], x: str, title: str, size: tuple[float, float] = (4.2, 2.6)) -> str:
    """Lines over one x axis.

    Args:
        x: name of the axis.
        title: of the curve, also what a screen reader says.
        size: inches; the page scales it.
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
    """Counts by class number."""
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
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # of several pictures in one page they would be the same
    text = re.sub(r" font-family: [^;]*;| transform=\"rotate\(-0 [^)]*\)\"", "", text)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--rule)")
    text = re.sub(r"#0300([0-9a-f]{2})", lambda m: f"var(--series-{int(m[1], 16)})", text)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{escape(title)}">', text, count=1)
    return re.sub(r"\s*\n\s*", "\n", text)


# One plot of all runs: accuracy on the way, against minutes or student steps.


AXES = {"steps": "student_steps", "minutes": "minutes", "cpu_minutes": "cpu_minutes"}
WORDS = {"steps": "student steps", "minutes": "minutes", "cpu_minutes": "CPU-minutes"}
FORMATS = (".png", ".svg", ".pdf")


def plot(groups: Groups, file: Path, x: str = "steps", folders: bool = False) -> int:
    """Draws a line a group, the mean over its seeds with a band from the least to the most; returns how many lines.

    Minutes begin with the run, so that making the first bank is in them.

    Args:
        x: a key of ``AXES``.
        folders: name lines by their folders.
    Raises:
        UserError: there is nothing to draw, the file's ending is unknown, or matplotlib is missing.
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
        raise UserError(f"no run has an accuracy with its {WORDS[x]}; give others, or another --x")
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for k, (name, xs, mean, low, high) in enumerate(lines):
        color, dashed = colormaps["tab10"](k % 10), k // 10
        style = ("-", "--", ":")[dashed % 3]
        axes.plot(xs, mean, color=color, linestyle=style, linewidth=1.8, label=f"{name}  {mean[-1]:.1f}")
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
    """(name, x, mean, least, most accuracy over seeds), the highest last accuracy first; seeds meet epoch by epoch.

    Args:
        axis: name in a line of a run's history.
    """
    found = []
    for runs, flags in zip(groups, differing_flags(groups)):
        histories = [[line for line in run["history"] if {"acc1", axis} <= line.keys()] for run in runs]
        if not all(histories):
            continue
        name = folder_of_every_seed(runs[0]) if folders else runs[0]["method"] + flags
        epochs = [*zip(*histories)]
        columns = [[line["acc1"] for line in epoch] for epoch in epochs]
        xs = [sum(line[axis] for line in epoch) / len(epoch) for epoch in epochs]
        found.append((name, xs, [sum(c) / len(c) for c in columns], [*map(min, columns)], [*map(max, columns)]))
    return sorted(found, key=lambda line: -line[2][-1])
