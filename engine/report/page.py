"""Writes a report as one self-contained HTML file, which can be sent, printed and kept."""

import re
import shlex
import statistics
from pathlib import Path
from typing import Any

from engine.report.curves import SERIES, bars, curves
from engine.report.results import confusion, metrics, pictures
from engine.report.tables import (
    Groups,
    brief_rows,
    filled_columns,
    image_columns,
    row_names,
    rows_of,
    spread,
    what_all_share,
)
from engine.runtime.errors import UserError
from engine.runtime.files import atomic_path
from engine.runtime.run import progress

# Cautions: reasons to look closer before trusting the results of a row.


CLOSE = 0.2  # points by which the best epoch may exceed the last without a caution


def cautions(runs: list[dict[str, Any]], lines: list[dict[str, Any]], classes: int | None) -> list[str]:
    """One sentence for each reason to be careful with the runs of one row.

    Args:
        runs: results that differ only in the seed.
        lines: metrics of the first run, of all stages.
        classes: number of classes of its dataset; None: not known.
    """
    first, found = runs[0], []
    if len(runs) == 1:
        found.append(f"One seed ({first['seed']}): the spread over seeds is not known. Run more seeds with --seeds.")
    elif len(runs) < 3:
        found.append("Two seeds: the spread over seeds is only a rough estimate.")
    above = max(run.get("acc1_best", 0) - run.get("acc1_last", 0) for run in runs)  # with --no_test neither is known
    if above >= CLOSE:
        found.append(
            f"The best epoch on the test set is up to {above:.2f} points above the last. It is selected on the test set, as "
            "in papers. The last epoch is the result."
        )
    if (prior := first.get("external_prior", "none")) != "none":
        found.append(f"External prior {prior}: the images do not come from the teacher alone.")
    if (share := first.get("bank_teacher_acc1")) is not None and share < 50:
        found.append(f"The teacher classifies only {share:.1f} % of the bank's images as their labels.")
    if str(first.get("commit", "unknown")) == "unknown":
        found.append("The commit of the code is not recorded.")
    elif first["commit"].endswith("+"):
        found.append(f"The code had uncommitted changes ({first['commit']}).")
    return found + _unmoved(first["history"], lines, classes)


def _unmoved(history: list[dict[str, Any]], lines: list[dict[str, Any]], classes: int | None) -> list[str]:
    """Cautions for an accuracy that stayed near chance, and for accuracies and losses that hardly changed."""
    found, accuracies = [], [line["acc1"] for line in history if "acc1" in line]
    if classes and accuracies and max(accuracies) < 150 / classes:
        found.append(f"The accuracy stayed below 1.5 times the chance level of {100 / classes:.3g} %.")
    elif len(accuracies) > 2 and max(accuracies) - min(accuracies) < 0.5:
        found.append("The accuracy changed by less than 0.5 points during the run.")
    for stage in dict.fromkeys(line["stage"] for line in lines):
        of_stage = [line for line in lines if line["stage"] == stage]
        for name in dict.fromkeys(name for line in of_stage for name in line if is_loss(name)):
            values = [line[name] for line in of_stage if name in line]
            if len(values) > 2 and max(values) - min(values) <= 0.01 * max(map(abs, values)):
                found.append(f"{name} of stage {stage} changed by at most 1 % (first value {values[0]:.3g}).")
    return found


def is_loss(name: str) -> bool:
    """Whether a column of metrics.jsonl is drawn as a curve besides the accuracy."""
    return name not in ("stage", "round", "images", "student_steps", "minutes", "cpu_minutes", "acc1", "acc5")


def cautions_of_all(groups: list[list[dict[str, Any]]]) -> list[str]:
    """One sentence for each reason to be careful when comparing the rows."""
    found, runs = [], [run for group in groups for run in group]
    if any(run["method"] == "scratch" for run in runs):
        found.append('The rows "real data" were trained on the real images. They are a reference, not data-free.')
    for dataset in dict.fromkeys(run["dataset"] for run in runs):
        digests = {run["teacher_digest"] for run in runs if run["dataset"] == dataset and run.get("teacher_digest")}
        if len(digests) > 1:
            found.append(f"The rows of {dataset} use {len(digests)} different teachers (their weights differ).")
    machines = {run.get("machine") for run in runs} - {None}
    if len(machines) > 1:
        found.append(
            f"The runs were made on different machines ({', '.join(sorted(machines))}). Do not compare their times."
        )
    if any(run.get("published") for run in runs):
        found.append("Published figures are of the best epoch on the test set. Compare them with the column 'best'.")
    if len({len(group) for group in groups}) > 1:
        found.append("The rows have different numbers of seeds.")
    return found


LIMIT = 4_500_000  # largest number of characters of curves and pictures; later rows have none
NARROW = ("method", "acc1", "best")  # columns shown on a phone
DASHES = ("", "4 2", "1 1.5")  # dashes of the legend's lines, as in ``curves``
NO_PICTURES = {"bank": [], "variants": [], "counts": [], "sheet": ""}
AXES = (("student_steps", "student steps"), ("minutes", "minutes"))  # x axes; rounds in stages without a student


def write_page(file: Path, groups: Groups) -> None:
    """Writes the report on groups of results; each group is a row.

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
    """Values for the template of the page."""
    rows = table_rows(groups)
    names = filled_columns(rows)
    entries, room = [], LIMIT
    bar = progress(len(groups), "report", "row", delay=3)
    for number, (runs, name, short, full) in enumerate(zip(groups, row_names(groups), rows, rows_of(groups))):
        images = {f"images: {column}": value for column, value in image_columns(runs).items() if value}
        runs = sorted(runs, key=lambda run: run["seed"])
        shown = details(runs)
        room -= shown["size"]
        if room < 0:
            shown |= {"curves": [], "pictures": NO_PICTURES, "histogram": "", "left_out": True}
        entries.append(
            {
                "number": number,
                "name": full["method"] if runs[0]["method"] == "scratch" else name,
                "headline": full["acc1 last"] or f"agreement {full['agreement last']}",
                "series": number % SERIES,
                "dash": DASHES[number // SERIES % len(DASHES)],
                "cells": [(name, short[name], sort_key(short[name])) for name in names],
                "figures": {name: full[name] for name in filled_columns([full]) if name != "method"} | images,
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
        "measured": measured,
        "rows": entries,
        "cautions": cautions_of_all(groups),
        "curves": accuracy_curves(groups, (7, 3.2)),
        "narrow_curves": accuracy_curves(groups, (3.7, 2.6)),
    }


def measured(run: dict[str, Any], which: str) -> str:
    """Accuracy of the "last" or "best" epoch of a run; of a run with --no_test, its agreement with the teacher."""
    acc1 = run.get(f"acc1_{which}")
    return f"{acc1:.2f}" if acc1 is not None else f"agreement {run[f'agreement_{which}']:.2f}"


def table_rows(groups: Groups) -> list[dict[str, str]]:
    """Rows of the brief table, with the accuracy of the best epoch beside that of the last."""
    rows = []
    for runs, line in zip(groups, brief_rows(groups)):
        best = {"best": spread([run.get("acc1_best") for run in runs])}
        names = list(line)
        before = {name: line[name] for name in names[: names.index("acc1") + 1]}
        rows.append(before | best | {name: line[name] for name in names[names.index("acc1") + 1 :]})
    return rows


def sort_key(text: str) -> str:
    """Key by which the page sorts a cell: the number at its beginning, else its text in lower case."""
    number = re.match(r"[-+]?\d+(\.\d+)?", text)
    return number[0] if number else text.lower()


def accuracy_curves(groups: Groups, size: tuple[float, float]) -> dict[str, str]:
    """Curves of the test accuracy, {axis: SVG}: by student steps the mean over seeds, by minutes the first seed."""
    lines: dict[str, list] = {axis: [] for axis, _ in AXES}
    for number, runs in enumerate(groups):
        histories = [
            run["history"] for run in runs if run["history"] and {"student_steps", "acc1"} <= run["history"][0].keys()
        ]
        if histories:
            length = min(map(len, histories))
            mean = [statistics.fmean(history[k]["acc1"] for history in histories) for k in range(length)]
            lines["student_steps"].append((number, [histories[0][k]["student_steps"] for k in range(length)], mean))
        timed = [line for line in min(runs, key=lambda run: run["seed"])["history"] if {"acc1", "minutes"} <= line.keys()]
        if timed:
            lines["minutes"].append((number, [line["minutes"] for line in timed], [line["acc1"] for line in timed]))
    return {axis: curves(lines[axis], x, f"test accuracy in % by {x}", size) for axis, x in AXES if lines[axis]}


def details(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page shows of a row's first seed; if there is no run folder, only what its result holds."""
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
    """Curves of each stage, (stage, [(name, {axis: SVG})]), of all metrics with at least two values but accuracies."""
    found = []
    for stage in dict.fromkeys(line["stage"] for line in lines):
        of_stage = [line for line in lines if line["stage"] == stage]
        names = dict.fromkeys(name for line in of_stage for name in line if is_loss(name))
        drawn = [(name, by) for name in names if (by := _curve(of_stage, name, f"{name} of stage {stage}"))]
        found += [(stage, drawn)] if drawn else []
    return found


def _curve(lines: list[dict[str, Any]], name: str, title: str) -> dict[str, str]:
    """Curves of one metric of one stage, {axis: SVG}."""
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
    """Quotes a command for the shell and puts each flag on a line of its own."""
    try:
        words = [shlex.quote(word) for word in shlex.split(command)]
    except ValueError:  # no command of a shell, for example with an open quote
        return command
    return " ".join(f"\\\n  {word}" if word.startswith("--") else word for word in words)
