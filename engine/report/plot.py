"""One plot of all runs: accuracy on the way, against minutes or student steps."""

from pathlib import Path

from engine.report.tables import Groups, differing_flags, folder_of_every_seed
from engine.runtime.errors import UserError
from engine.runtime.files import atomic_path

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
