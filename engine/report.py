"""Result files -> tables. Every table of this project is made here; none is typed.

python -m engine.report checkpoints/dda checkpoints/csd                 print a Markdown table
python -m engine.report RUNS... --rounds --budget 100 --target 95      and the accuracy on the way there
python -m engine.report RUNS... --csv table.csv
python -m engine.report RUNS... --into README.md --name digits          rewrite that table in a file
"""

import argparse
import csv
import json
import re
import statistics
from pathlib import Path
from typing import Any

from engine.runtime.errors import UserError, run_command
from engine.runtime.files import atomic_path, read_json
from engine.runtime.stage_record import show
from registry import PAIRS, PUBLISHED

GROUP_BY = ("dataset", "teacher", "student", "method", "external_prior", "student_steps", "bank_images", "variants")
PER_SEED = ("seed", "teacher_ckpt", "init_bank", "init_variants")  # differ within a group


def collect(folders: list[Path]) -> list[dict[str, Any]]:
    """Every result.json under the folders, each with its run's metrics.jsonl as "history".

    Raises:
        UserError: a folder does not exist, or none holds a result.
    """
    results = []
    for folder in folders:
        if not folder.exists():
            raise UserError(f"{folder} does not exist; give run folders, or folders of them")
        for file in sorted(folder.rglob("result.json")):
            metrics = file.parent / "metrics.jsonl"
            lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
            parts = [part for part in file.parent.relative_to(folder).parts if not re.fullmatch(r"seed\d+", part)]
            results.append(
                read_json(file) | {"folder": "/".join(parts), "history": [line for line in lines if "acc1" in line]}
            )
    if not results:
        raise UserError(f"no result.json under {', '.join(map(str, folders))}; a run writes it when it is finished")
    return results


def group(results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Results that differ in nothing but the seed, together; real-data training first, then by method."""
    groups: dict[tuple, list] = {}
    for result in results:
        key = *(result.get(name) for name in GROUP_BY), json.dumps(settings(result), sort_keys=True)
        groups.setdefault(key, []).append(result)
    return sorted(
        groups.values(),
        key=lambda g: (g[0]["dataset"], g[0]["method"] != "scratch", str(g[0].get("student_steps")), g[0]["method"]),
    )


def spread(values: list[float | None], digits: int = 2) -> str:
    """ "mean ± standard deviation" over seeds, or the value alone; "" where there is none."""
    numbers = [v for v in values if v is not None]
    if not numbers:
        return ""
    mean = f"{statistics.fmean(numbers):.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


def differing_flags(groups: list[list[dict[str, Any]]]) -> list[str]:
    """For each group " --flag value ..." of what sets it apart from the others of its method, dataset and networks."""
    texts = []
    for runs in groups:
        mine = runs[0]
        alike = [
            g[0] for g in groups if all(g[0].get(n) == mine.get(n) for n in ("method", "dataset", "teacher", "student"))
        ]
        flags = [name for name in settings(mine) if len({str(settings(other).get(name)) for other in alike}) > 1]
        texts.append("".join(f" --{name} {show(settings(mine)[name])}" for name in flags))
    return texts


def settings(result: dict[str, Any]) -> dict[str, Any]:
    """The flags on which a result depends, but for the seed and what has the seed in its path."""
    return {k: v for k, v in result.get("settings", {}).items() if k not in PER_SEED}


def synthesis_and_distillation(result: dict[str, Any]) -> tuple[float | None, float | None]:
    """Seconds spent on making images, in whatever stage, and on the student; None where a part is not known."""
    inside = result.get("synthesis_seconds", 0)
    before = [seconds for stage, seconds in result["seconds"].items() if stage != "distill"]
    total = result["seconds"].get("distill")
    making = None if None in before else sum(before) + inside
    return making, None if total is None else total - inside


def published(result: dict[str, Any]) -> float | None:
    """The accuracy that its paper reports for this method, pair and dataset (best test epoch), or None."""
    for name, by_pair in PUBLISHED.get(result["dataset"], {}).items():
        method, *flags = name.split(" --")
        wanted = dict(flag.split() for flag in flags)
        if method == result["method"] and all(str(settings(result).get(k)) == v for k, v in wanted.items()):
            return dict(zip(PAIRS, by_pair)).get((result.get("teacher"), result["student"]))
    return None


def steps_to(runs: list[dict[str, Any]], target: float) -> str:
    """Student steps after which ``target`` % was first reached, mean over seeds; those that never did are counted."""
    reached = [next((line["student_steps"] for line in run["history"] if line["acc1"] >= target), None) for run in runs]
    numbers = [steps for steps in reached if steps is not None]
    missed = len(reached) - len(numbers)
    return spread(numbers, 0) + (f"{' ' if numbers else ''}({missed} of {len(reached)} never)" if missed else "")


def row(
    runs: list[dict[str, Any]], flags: str = "", budget: int | None = None, target: float | None = None, hours: bool = False
) -> dict[str, str]:
    """One line of the table: the runs of one group.

    Args:
        flags: what to say behind the method's name.
        budget: student steps at which to show the accuracy too.
        target: accuracy in % for which to show the student steps.
        hours: times in hours, not in seconds.
    """
    first = runs[0]
    real = first["method"] == "scratch"
    unit, digits, scale = ("h", 2, 3600) if hours else ("s", 0, 1)

    def over(name: str) -> str:
        return spread([run.get(name) for run in runs])

    def times(values: list[float | None]) -> str:
        return spread([None if v is None else v / scale for v in values], digits)

    making, learning = zip(*(((None, None) if real else synthesis_and_distillation(run)) for run in runs))
    kept = spread([100 * r["variants_kept"] / r["variants"] for r in runs if r.get("variants")], 0)
    paper = published(first)
    best = statistics.fmean(run["acc1_best"] for run in runs)
    line = {
        "method": "real data" if real else first["method"] + flags,
        "dataset": first["dataset"],
        "teacher": "" if real else first["teacher"],
        "network": first["student"],
        "external prior": "" if real else first["external_prior"],
        "seeds": ",".join(str(r["seed"]) for r in sorted(runs, key=lambda r: r["seed"])),
        "acc1 last": over("acc1_last"),
        "acc1 best": over("acc1_best"),
        "acc1 mean": over("acc1_mean"),
        "published best": "" if paper is None else f"{paper:.2f}",
        "difference": "" if paper is None else f"{best - paper:+.2f}",
    }
    if budget:
        at = [
            next((line["acc1"] for line in run["history"] if line.get("student_steps", 0) >= budget), None) for run in runs
        ]
        line[f"acc1 at {budget} steps"] = "" if real else spread(at, 1)
    if target:
        line[f"steps to {target:g} %"] = "" if real else steps_to(runs, target)
    return line | {
        "student steps": str(first.get("student_steps", "")),
        "images": str(first.get("images", first.get("bank_images", ""))),
        "teacher acc1 on them": over("bank_teacher_acc1"),
        "BN distance": over("bank_loss_bn"),
        "variants (kept %)": f"{first['variants']} ({kept})" if first.get("variants") else "",
        f"synthesis {unit}": times(making),
        f"distillation {unit}": times(learning),
        f"training {unit}": times([run["seconds"].get("train") for run in runs]),
    }


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows of equal keys as a Markdown table, without the columns in which nothing stands."""
    names = [name for name in rows[0] if any(r[name] for r in rows)]
    lines = [names, ["---"] * len(names), *([r[name] for name in names] for r in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rounds_table(groups: list[list[dict[str, Any]]], columns: int = 10) -> str:
    """Accuracy on the way: mean ± std over seeds after up to ``columns`` evenly spaced epochs, by student steps."""
    rows = []
    for runs, text in zip(groups, differing_flags(groups)):
        histories = [run["history"] for run in runs if run["method"] != "scratch" and run["history"]]
        if not histories:
            continue
        length = min(map(len, histories))
        chosen = sorted({round((k + 1) * length / min(columns, length)) - 1 for k in range(min(columns, length))})
        rows.append(
            {"method": runs[0]["method"] + text}
            | {str(histories[0][k]["student_steps"]): spread([h[k]["acc1"] for h in histories], 1) for k in chosen}
        )
    names = sorted({n for r in rows for n in r if n != "method"}, key=int)
    return (
        markdown([{"acc1 after student steps": r["method"]} | {n: r.get(n, "") for n in names} for r in rows])
        if rows
        else ""
    )


def replace_table(file: Path, name: str, table: str) -> None:
    """Puts ``table`` between ``<!-- table:name -->`` and ``<!-- /table:name -->`` of a file.

    Raises:
        UserError: the markers are not there.
    """
    text = file.read_text()
    pattern = re.compile(rf"(<!-- table:{re.escape(name)}[^>]*-->\n).*?(<!-- /table:{re.escape(name)} -->)", re.DOTALL)
    if not pattern.search(text):
        raise UserError(
            f"{file} has no lines <!-- table:{name} --> and <!-- /table:{name} -->; add them where the table goes"
        )
    with atomic_path(file) as temporary:
        temporary.write_text(pattern.sub(lambda m: m[1] + table + "\n" + m[2], text))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m engine.report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of them")
    parser.add_argument("--rounds", action="store_true", help="add the accuracy on the way")
    parser.add_argument("--budget", type=int, metavar="STEPS", help="add the accuracy after so many student steps")
    parser.add_argument("--target", type=float, metavar="ACC1", help="add the student steps to this accuracy in %%")
    parser.add_argument("--folders", action="store_true", help="name rows by their folders, not by the flags that differ")
    parser.add_argument("--csv", type=Path, help="write the table here too")
    parser.add_argument("--into", type=Path, help="rewrite a table in this file instead of printing it")
    parser.add_argument("--name", help="which table of that file")
    return parser.parse_args(argv)


def rows_of(
    groups: list[list[dict[str, Any]]], budget: int | None = None, target: float | None = None, folders: bool = False
) -> list[dict]:
    """The lines of the table, times in hours if any is an hour or more; ``folders`` names them by their folders."""
    known = [t for runs in groups for run in runs if run["method"] != "scratch" for t in synthesis_and_distillation(run)]
    hours = any(t is not None and t >= 3600 for t in known)
    flags = differing_flags(groups)
    rows = [row(runs, text, budget, target, hours) for runs, text in zip(groups, flags)]
    if folders:
        rows = [{"run": runs[0]["folder"]} | line | {"method": runs[0]["method"]} for runs, line in zip(groups, rows)]
        rows.sort(key=lambda line: line["run"])
    return rows


def table(args: argparse.Namespace) -> str:
    """The Markdown table of every result under ``args.runs``, as the command line asks for it."""
    groups = group(collect(args.runs))
    text = markdown(rows_of(groups, args.budget, args.target, args.folders))
    way = rounds_table(groups) if args.rounds else ""
    return text + ("\n\n" + way if way else "")


def main() -> None:
    args = parse()
    if args.csv:
        rows = rows_of(group(collect(args.runs)), args.budget, args.target, args.folders)
        with atomic_path(args.csv) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    text = table(args)
    if args.into:
        replace_table(args.into, args.name, text)
    else:
        print(text)


if __name__ == "__main__":
    run_command(main)
