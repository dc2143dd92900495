"""The page of a report: one HTML file with everything in it, to be sent, printed and kept."""

import re
import shlex
import statistics
from pathlib import Path
from typing import Any

from engine.report.cautions import cautions, cautions_of_all, is_loss
from engine.report.curves import SERIES, bars, curves
from engine.report.evidence import confusion, metrics, pictures
from engine.report.layout import filled_columns
from engine.report.tables import Groups, brief_rows, rows_of, spread, what_all_share
from engine.runtime.errors import UserError
from engine.runtime.files import atomic_path
from engine.runtime.run import progress

LIMIT = 4_500_000  # characters of curves and pictures; rows that come later do without
NARROW = ("method", "acc1", "best")  # columns for which a phone has room
DASHES = ("", "4 2", "1 1.5")  # of the lines in the legend, as in ``curves``
NO_PICTURES = {"bank": [], "variants": [], "counts": [], "sheet": ""}
AXES = (("student_steps", "student steps"), ("minutes", "minutes"))  # of the curves; stages without students count rounds


def write_page(file: Path, groups: Groups) -> None:
    """Writes the report on results, each group of which is a row.

    Raises:
        UserError: jinja2 or matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise UserError(f"--html needs {error.name}, which is not installed; install requirements.txt") from None
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(**contents(groups))
    with atomic_path(file) as temporary:
        temporary.write_text(page)


def contents(groups: Groups) -> dict[str, Any]:
    """What the template is filled with."""
    rows = table_rows(groups)
    names = filled_columns(rows)
    entries, room = [], LIMIT
    bar = progress(len(groups), "report", "row", delay=3)
    for number, (runs, short, full) in enumerate(zip(groups, rows, rows_of(groups))):
        runs = sorted(runs, key=lambda run: run["seed"])
        shown = details(runs)
        room -= shown["size"]
        if room < 0:
            shown |= {"curves": [], "pictures": NO_PICTURES, "histogram": "", "left_out": True}
        entries.append(
            {
                "number": number,
                "name": full["method"],
                "series": number % SERIES,
                "dash": DASHES[number // SERIES % len(DASHES)],
                "cells": [(name, short[name], sort_key(short[name])) for name in names],
                "figures": {name: full[name] for name in filled_columns([full]) if name != "method"},
                "runs": runs,
                **shown,
            }
        )
        bar.update()
    bar.close()
    return {
        "shared": what_all_share(groups),
        "names": names,
        "narrow": NARROW,
        "rows": entries,
        "cautions": cautions_of_all(groups),
        "curves": accuracy_curves(groups, (7, 3.2)),
        "narrow_curves": accuracy_curves(groups, (3.7, 2.6)),
    }


def table_rows(groups: Groups) -> list[dict[str, str]]:
    """The rows of the brief table, the best epoch's accuracy beside the last one's."""
    rows = []
    for runs, line in zip(groups, brief_rows(groups)):
        best = {"best": spread([run.get("acc1_best") for run in runs])}
        names = list(line)
        before = {name: line[name] for name in names[: names.index("acc1") + 1]}
        rows.append(before | best | {name: line[name] for name in names[names.index("acc1") + 1 :]})
    return rows


def sort_key(text: str) -> str:
    """The number that a cell begins with, or its words."""
    number = re.match(r"[-+]?\d+(\.\d+)?", text)
    return number[0] if number else text.lower()


def accuracy_curves(groups: Groups, size: tuple[float, float]) -> dict[str, str]:
    """The accuracy on the way, {axis: SVG}: by student steps the mean over seeds, by minutes the first seed."""
    lines: dict[str, list] = {axis: [] for axis, _ in AXES}
    for number, runs in enumerate(groups):
        histories = [
            run["history"] for run in runs if run["history"] and {"student_steps", "acc1"} <= run["history"][0].keys()
        ]
        if histories:
            length = min(map(len, histories))
            mean = [statistics.fmean(history[k]["acc1"] for history in histories) for k in range(length)]
            lines["student_steps"].append((number, [histories[0][k]["student_steps"] for k in range(length)], mean))
        timed = [line for line in metrics(Path(runs[0]["path"])) if "acc1" in line and "minutes" in line]
        if timed:
            lines["minutes"].append((number, [line["minutes"] for line in timed], [line["acc1"] for line in timed]))
    return {axis: curves(lines[axis], x, f"test accuracy in % by {x}", size) for axis, x in AXES if lines[axis]}


def details(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What there is to see of a row's first seed; nothing but its result where only a line of it was kept."""
    first, folder = runs[0], Path(runs[0]["path"])
    lines = metrics(folder)
    seen = NO_PICTURES | (pictures(folder) if folder.is_dir() else {})
    apart = confusion(folder)
    counts = seen["counts"]
    classes = len(apart["names"]) if apart else len(counts) if counts else None
    drawn = _curves(lines or first["history"])
    histogram = bars(counts, f"images of each class in the bank of {first['folder']}") if counts else ""
    size = len(histogram) + len(str(drawn)) + len(str(seen))
    return {
        "first": first,
        "cautions": cautions(runs, lines or first["history"], classes),
        "curves": drawn,
        "pictures": seen,
        "histogram": histogram,
        "command": one_flag_a_line(first.get("command", "")),
        "confusion": apart,
        "left_out": False,
        "size": size,
        "names_of_classes": apart["names"] if apart else [str(k) for k in range(classes or 0)],
    }


def _curves(lines: list[dict[str, Any]]) -> list[tuple[str, list[tuple[str, dict[str, str]]]]]:
    """(stage, [(name, {axis: SVG})]) of the figures of each stage that have at least two values, the accuracy aside."""
    found = []
    for stage in dict.fromkeys(line["stage"] for line in lines):
        of_stage = [line for line in lines if line["stage"] == stage]
        names = dict.fromkeys(name for line in of_stage for name in line if is_loss(name))
        drawn = [(name, by) for name in names if (by := _curve(of_stage, name, f"{name} of stage {stage}"))]
        found += [(stage, drawn)] if drawn else []
    return found


def _curve(lines: list[dict[str, Any]], name: str, title: str) -> dict[str, str]:
    """{axis: SVG} of one figure of one stage."""
    by = {}
    for axis, x in AXES:
        if axis == "student_steps" and axis not in lines[0]:
            points, x = [(line["round"] + 1, line[name]) for line in lines if name in line], "rounds"
        else:
            points = [(line[axis], line[name]) for line in lines if name in line and axis in line]
        if len(points) > 1:
            by[axis] = curves([(0, *map(list, zip(*points)))], x, f"{title} by {x}", (3.2, 1.9))
    return by


def one_flag_a_line(command: str) -> str:
    """A command for the shell with a line for each flag."""
    words = [shlex.quote(word) for word in shlex.split(command)]
    return " ".join(f"\\\n  {word}" if word.startswith("--") else word for word in words)
