"""Curves and bars as SVG that stands inside a page: its words are text, its colours are the page's (light, dark, paper)."""

import io
import re
from typing import Any

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
