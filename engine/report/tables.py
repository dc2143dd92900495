"""Turns groups of results into the rows of a table, and rows into text."""

import math
import re
import statistics
import textwrap
from pathlib import Path
from typing import Any

from engine.report.results import settings
from engine.runtime.errors import UserError, one_line
from engine.runtime.files import atomic_path
from engine.runtime.stage_record import show

# Rows, which all have the same keys, as text: Markdown, or aligned columns for a terminal.


def filled_columns(rows: list[dict[str, str]]) -> list[str]:
    """Names of the columns that have a value in at least one row."""
    return [name for name in rows[0] if any(row[name] for row in rows)]


def markdown(rows: list[dict[str, str]]) -> str:
    """Formats rows as a Markdown table, without empty columns."""
    names = filled_columns(rows)
    lines = [names, ["---"] * len(names), *([markdown_cell(row[name]) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown_cell(text: str) -> str:
    """Returns a text for a cell of a Markdown table, in which it can neither end the cell nor the row."""
    return one_line(text).replace("|", "\\|")


def aligned(rows: list[dict[str, str]], width: int | None = None) -> str:
    """Formats rows in aligned columns, without empty ones. Columns of numbers are aligned to the right.

    Args:
        width: largest number of characters in a line. If the table is wider, its widest columns are wrapped.
    """
    names = filled_columns(rows)
    cells = [names, *([row[name] for name in names] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(names))]
    while width and sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
    right = [all(re.match(r"[-+(\d]", line[k] or "0") for line in cells[1:]) for k in range(len(names))]

    def lines_of(line: list[str]) -> list[str]:
        parts = [textwrap.wrap(cell, wide) or [""] for cell, wide in zip(line, widths)]
        texts = []
        for k in range(max(map(len, parts))):
            cut = [part[k] if k < len(part) else "" for part in parts]
            padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cut, widths, right)]
            texts.append("  ".join(padded).rstrip())
        return texts

    rule = "  ".join("-" * w for w in widths)
    return "\n".join([*lines_of(names), rule, *(text for line in cells[1:] for text in lines_of(line))])


def replace_table(file: Path, name: str, table: str) -> None:
    """Replaces the text between ``<!-- table:name -->`` and ``<!-- /table:name -->`` in a file by ``table``.

    The rest of the file stays as it is, with its line ends.

    Raises:
        UserError: as for ``with_markers``.
    """
    text, pattern = with_markers(file, name)

    def marked(match: re.Match) -> str:
        end = "\r\n" if match[1].endswith("\r\n") else "\n"
        return match[1] + f"{table}\n".replace("\n", end) + match[2]

    with atomic_path(file) as temporary:
        temporary.write_bytes(pattern.sub(marked, text).encode())


def with_markers(file: Path, name: str) -> tuple[str, re.Pattern]:
    """Returns the text of a file, and the pattern of a table in it with its markers.

    Raises:
        UserError: the file does not exist, is not UTF-8, or does not have the markers.
    """
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    marked = re.escape(name)
    pattern = re.compile(
        rf"(<!-- table:{marked}(?:\s[^>]*)?-->\r?\n)(?:(?!<!-- /?table:).)*(<!-- /table:{marked} -->)", re.DOTALL
    )
    if not pattern.search(text):
        raise UserError(
            f"{file} has no lines <!-- table:{name} --> and <!-- /table:{name} --> around one table; add them where the "
            "table goes"
        )
    return text, pattern


Groups = list[list[dict[str, Any]]]  # each group: results that differ only in the seed
FACTS = ("dataset", "teacher", "network", "student steps", "seeds")  # columns of a table only if its rows differ


def spread(values: list[float | None], digits: int = 2) -> str:
    """ "mean ± standard deviation" over seeds, a single value as it is, or "" if there is no value."""
    numbers = [v for v in values if v is not None]
    if not numbers:
        return ""
    mean = f"{statistics.fmean(numbers):.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


def differing_flags(groups: Groups) -> list[str]:
    """For each group, " --flag value ..." for the settings in which groups of its method, dataset and networks differ."""
    texts = []
    for runs in groups:
        mine = runs[0]
        alike = [
            g[0] for g in groups if all(g[0].get(n) == mine.get(n) for n in ("method", "dataset", "teacher", "student"))
        ]
        flags = [name for name in settings(mine) if len({str(settings(other).get(name)) for other in alike}) > 1]
        texts.append("".join(f" --{name} {show(settings(mine)[name])}" for name in flags))
    return texts


def row_names(groups: Groups) -> list[str]:
    """For each group, its method and ``differing_flags``; with the dataset and networks that set it apart from its namesakes."""
    names = [runs[0]["method"] + flags for runs, flags in zip(groups, differing_flags(groups))]
    found = []
    for runs, name in zip(groups, names):
        namesakes = [others[0] for others, other in zip(groups, names) if other == name]
        apart = [n for n in ("dataset", "teacher", "student") if len({str(run.get(n)) for run in namesakes}) > 1]
        found.append(name + (f" ({', '.join(str(runs[0].get(n)) for n in apart)})" if apart else ""))
    return found


def synthesis_and_distillation(result: dict[str, Any]) -> tuple[float | None, float | None]:
    """Seconds spent on synthesis in all stages, and on training the student; None for a part that is not known."""
    inside = result.get("synthesis_seconds", 0)
    before = [seconds for stage, seconds in result["seconds"].items() if stage != "distill"]
    total = result["seconds"].get("distill")
    making = None if None in before else sum(before) + inside
    return making, None if total is None else total - inside


def steps_to(runs: list[dict[str, Any]], target: float) -> str:
    """Student steps after which ``target`` % was first reached, as mean over seeds, and the number that never did."""
    tested = [lines for run in runs if (lines := [line for line in run["history"] if "acc1" in line])]
    reached = [next((line["student_steps"] for line in lines if line["acc1"] >= target), None) for lines in tested]
    numbers = [steps for steps in reached if steps is not None]
    missed = len(reached) - len(numbers)
    return spread(numbers, 0) + (f"{' ' if numbers else ''}({missed} of {len(reached)} never)" if missed else "")


def row(
    runs: list[dict[str, Any]], flags: str = "", budget: int | None = None, target: float | None = None, hours: bool = False
) -> dict[str, str]:
    """One row of the table, for the runs of one group. Times are left out if the runs used several machines.

    Args:
        flags: text to add to the method's name.
        budget: number of student steps after which the accuracy is shown too.
        target: accuracy in % for which the number of student steps is shown.
        hours: whether times are in hours instead of seconds.
    """
    first = runs[0]
    real = first["method"] == "scratch"
    unit, digits, scale = ("h", 2, 3600) if hours else ("s", 0, 1)

    def over(name: str) -> str:
        return spread([run.get(name) for run in runs])

    images = [run.get("images", run.get("bank_images")) for run in runs]  # a filter keeps other variants for each seed
    machines = sorted({run["machine"] for run in runs if run.get("machine")})

    def times(values: list[float | None]) -> str:
        return spread([v / scale for v in values if v is not None and len(machines) < 2], digits)

    making, learning = zip(*(((None, None) if real else synthesis_and_distillation(run)) for run in runs))
    kept = spread([100 * r["variants_kept"] / r["variants"] for r in runs if r.get("variants")], 0)
    tested = all("acc1_best" in run for run in runs)  # a run with --no_test has no accuracy
    paper = first.get("published") if tested else None
    best = statistics.fmean(run["acc1_best"] for run in runs) if tested else 0.0
    line = {
        "method": ("real data" if real else first["method"]) + flags,
        "dataset": first["dataset"],
        "teacher": "" if real else first["teacher"],
        "network": first["student"],
        "external prior": "" if real else first["external_prior"],
        "seeds": ",".join(str(r["seed"]) for r in sorted(runs, key=lambda r: r["seed"])),
        "acc1 last": over("acc1_last"),
        "acc1 best": over("acc1_best"),
        "acc1 mean": over("acc1_mean"),
        "agreement last": over("agreement_last"),
        "agreement best": over("agreement_best"),
        "published best": "" if paper is None else f"{paper:.2f}",
        "difference": "" if paper is None else f"{best - paper:+.2f}",
    }
    if budget:
        at = [
            next((line.get("acc1") for line in run["history"] if line.get("student_steps", 0) >= budget), None)
            for run in runs
        ]
        line[f"acc1 at {budget} steps"] = "" if real else spread(at, 1)
    if target:
        line[f"steps to {target:g} %"] = "" if real else steps_to(runs, target)
    return line | {
        "student steps": str(first.get("student_steps", "")),
        "images": spread(images if len(set(images)) > 1 else images[:1], 0),
        "teacher acc1 on images": over("bank_teacher_acc1"),
        "BN distance": over("bank_loss_bn"),
        "variants (kept %)": f"{first['variants']} ({kept})" if first.get("variants") else "",
        "teacher acc1 on kept variants": over("variants_kept_teacher_acc1"),
        "BN distance of kept variants": over("variants_kept_loss_bn"),
        f"synthesis {unit}": times(making),
        f"distillation {unit}": times(learning),
        f"training {unit}": times([run["seconds"].get("train") for run in runs]),
        "CPU min": spread([run["cpu_seconds"] / 60 for run in runs if "cpu_seconds" in run and len(machines) < 2], 1),
        "machine": ", ".join(machines),
    }


def rows_of(
    groups: Groups, budget: int | None = None, target: float | None = None, folders: bool = False
) -> list[dict[str, str]]:
    """Rows of the table, with times in hours if any is an hour or more; ``folders`` names rows by their run folders."""
    return [line for _, line in _runs_and_rows(groups, budget, target, folders)]


def wide_rows(
    groups: Groups, budget: int | None = None, target: float | None = None, folders: bool = False
) -> list[dict[str, str]]:
    """Rows with all columns, except those of ``FACTS`` in which the rows agree; ``what_all_share`` states these."""
    pairs = _runs_and_rows(groups, budget, target, folders)
    shared = _shared(pairs)
    rows = []
    for _, line in pairs:
        if not line["teacher"] and "network" in shared:
            line = line | {"method": f"{line['method']} ({line['network']})"}
        rows.append({name: value for name, value in line.items() if name not in shared})
    return rows


def brief_rows(
    groups: Groups, budget: int | None = None, target: float | None = None, folders: bool = False
) -> list[dict[str, str]]:
    """Rows with the most important columns, and those of ``FACTS`` in which the rows differ.

    The time is that of a whole run. It is left out if the runs of the table used several machines.
    """
    pairs = _runs_and_rows(groups, budget, target, folders)
    shared = _shared(pairs)
    rows = []
    for runs, line in pairs:
        hours = "synthesis h" in line
        seconds = [sum(run["seconds"].values()) for run in runs if None not in run["seconds"].values()]
        time = statistics.fmean(seconds) / (3600 if hours else 1) if seconds and not line["machine"] else None
        named = {"run": line["run"]} if folders else {}
        if line["teacher"]:
            named |= {name: line[name] for name in ("method", *FACTS) if name not in shared}
        else:
            named |= {"method": f"{line['method']} ({line['network']})"}
            named |= {name: line[name] if name in ("dataset", "seeds") else "" for name in FACTS if name not in shared}
        rows.append(
            named
            | {"external prior": line["external prior"], "acc1": line["acc1 last"], "agreement": line["agreement last"]}
            | {"published best": line["published best"]}
            | {name: value for name, value in line.items() if name.startswith(("acc1 at ", "steps to "))}
            | {f"time {'h' if hours else 's'}": "" if time is None else f"{time:.{2 if hours else 0}f}"}
            | {"images": line["images"]}
        )
    return rows


def leading_accuracy(row: dict[str, str]) -> float:
    """The accuracy in a row of a table; minus infinity if the row has none."""
    text = row.get("acc1") or row.get("acc1 last")
    return float(text.split()[0]) if text else -math.inf


def what_all_share(groups: Groups, wide: bool = False) -> str:
    """One line that states what all rows of a table have in common, and the unit of its accuracies."""
    shared = _shared(_runs_and_rows(groups))
    words = [shared.get("dataset"), " -> ".join(shared[n] for n in ("teacher", "network") if shared.get(n))]
    words += [f"{shared['student steps']} student steps" if shared.get("student steps") else ""]
    words += [f"seed{'s' * (',' in shared['seeds'])} {shared['seeds']}" if "seeds" in shared else ""]
    meaning = "accuracies in %" if wide else "acc1: test accuracy of the last epoch in %"
    some = any("agreement_last" in run for runs in groups for run in runs)
    untested = "; agreement: with the teacher, on synthetic images alone" if some else ""
    return one_line("; ".join(filter(None, [", ".join(filter(None, words)), meaning + untested])))


def _shared(pairs: list[tuple[list[dict[str, Any]], dict[str, str]]]) -> dict[str, str]:
    """Values of the ``FACTS`` in which all rows agree; of rows of training on real data only the dataset is compared."""
    every = [line for _, line in pairs]
    lines = [line for line in every if line["teacher"]] or every
    return {
        name: lines[0][name] for name in FACTS if len({line[name] for line in (every if name == "dataset" else lines)}) == 1
    }


def _runs_and_rows(
    groups: Groups, budget: int | None = None, target: float | None = None, folders: bool = False
) -> list[tuple[list[dict[str, Any]], dict[str, str]]]:
    known = [t for runs in groups for run in runs if run["method"] != "scratch" for t in synthesis_and_distillation(run)]
    hours = any(t is not None and t >= 3600 for t in known)
    pairs = [(runs, row(runs, text, budget, target, hours)) for runs, text in zip(groups, differing_flags(groups))]
    if len({run.get("machine") for runs, _ in pairs for run in runs}) == 1:
        pairs = [(r, line | {"machine": ""}) for r, line in pairs]
    if folders:
        pairs = [(r, {"run": folder_of_every_seed(r[0])} | line | {"method": r[0]["method"]}) for r, line in pairs]
        pairs.sort(key=lambda pair: pair[1]["run"])
    return pairs


def folder_of_every_seed(result: dict[str, Any]) -> str:
    """The run's folder without the part that names its seed."""
    return "/".join(part for part in Path(result["folder"]).parts if not re.fullmatch(r"seed\d+", part))


def rounds_rows(groups: Groups, columns: int = 10) -> list[dict[str, str]]:
    """Rows of the accuracy by student steps: mean ± std over seeds after up to ``columns`` evenly spaced epochs."""
    rows = []
    for runs, name in zip(groups, row_names(groups)):
        histories = [run["history"] for run in runs if run["method"] != "scratch" and "acc1_last" in run and run["history"]]
        if not histories:
            continue
        length = min(map(len, histories))
        chosen = sorted({round((k + 1) * length / min(columns, length)) - 1 for k in range(min(columns, length))})
        rows.append(
            {"method": name}
            | {str(histories[0][k]["student_steps"]): spread([h[k]["acc1"] for h in histories], 1) for k in chosen}
        )
    names = sorted({n for r in rows for n in r if n != "method"}, key=int)
    return [{"acc1 after student steps": r["method"]} | {n: r.get(n, "") for n in names} for r in rows]


IMAGE_FIGURES = {  # measures of engine.report.images: {name: (column, digits)}
    "wanted": ("teacher acc1 %", 1), "classes": ("classes", 2), "density": ("density", 2), "coverage": ("coverage", 2),
    "bn_distance": ("BN distance", 1), "diversity": ("diversity", 2),
}  # fmt: skip


def image_columns(runs: list[dict[str, Any]]) -> dict[str, str]:
    """The image measures of one group, mean ± std over seeds, by column; empty if no run has any."""
    seen = [run["image_figures"] for run in runs if run.get("image_figures")]
    return {column: spread([f.get(key) for f in seen], digits) for key, (column, digits) in IMAGE_FIGURES.items() if seen}


def image_rows(groups: Groups, folders: bool = False) -> list[dict[str, str]]:
    """Rows with the image measures of each group, mean ± std over seeds, the highest student accuracy first.

    Raises:
        UserError: no run has measures of its images.
    """
    rows = []
    for runs, name in zip(groups, row_names(groups)):
        if not (columns := image_columns(runs)):
            continue
        name = {"run": folder_of_every_seed(runs[0])} if folders else {"method": name}
        acc1 = spread([run.get("acc1_last") for run in runs])
        rows.append((statistics.fmean(run.get("acc1_last", 0) for run in runs), name | {"acc1 last": acc1} | columns))
    if not rows:
        raise UserError("no run has figures of its images; give run folders, or lines that were written with --images")
    return [row for _, row in sorted(rows, key=lambda pair: -pair[0])]
