"""Result files -> tables. Every table of this project is made here; none is typed.

python -m engine.report checkpoints/dda checkpoints/csd                 print a Markdown table
python -m engine.report RUNS... --rounds                                and the accuracy on the way there
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

from engine.errors import UserError, run_command
from engine.files import atomic_path, read_json

GROUP_BY = ("dataset", "teacher", "student", "method", "external_prior", "student_steps", "bank_images", "variants")


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
            results.append(read_json(file) | {"history": [line for line in lines if "acc1" in line]})
    if not results:
        raise UserError(f"no result.json under {', '.join(map(str, folders))}; a run writes it when it is finished")
    return results


def group(results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Results that differ in nothing but the seed, together; real-data training first, then by method."""
    groups: dict[tuple, list] = {}
    for result in results:
        groups.setdefault(tuple(result.get(name) for name in GROUP_BY), []).append(result)
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


def row(runs: list[dict[str, Any]]) -> dict[str, str]:
    """One line of the table: the runs of one group."""
    first = runs[0]

    def over(name: str, digits: int = 2) -> str:
        return spread([run.get(name) for run in runs], digits)

    def seconds(*stages: str) -> str:
        sums = [[run["seconds"].get(s) for s in stages if s in run["seconds"]] for run in runs]
        return spread([None if not s or None in s else sum(s) for s in sums], 0)

    real = first["method"] == "scratch"
    kept = spread([100 * r["variants_kept"] / r["variants"] for r in runs if r.get("variants")], 0)
    return {
        "method": "real data" if real else first["method"],
        "dataset": first["dataset"],
        "teacher": "" if real else first["teacher"],
        "network": first["student"],
        "external prior": "" if real else first["external_prior"],
        "seeds": ",".join(str(r["seed"]) for r in sorted(runs, key=lambda r: r["seed"])),
        "acc1 last": over("acc1_last"),
        "acc1 best": over("acc1_best"),
        "acc1 mean": over("acc1_mean"),
        "student steps": str(first.get("student_steps", "")),
        "bank images": str(first.get("bank_images", "")),
        "variants (kept %)": f"{first['variants']} ({kept})" if first.get("variants") else "",
        "synthesis s": seconds("synthesize", "augment"),
        "distillation s": seconds("distill"),
        "training s": seconds("train"),
    }


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows of equal keys as a Markdown table, without the columns in which nothing stands."""
    names = [name for name in rows[0] if any(r[name] for r in rows)]
    lines = [names, ["---"] * len(names), *([r[name] for name in names] for r in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rounds_table(groups: list[list[dict[str, Any]]], columns: int = 10) -> str:
    """Accuracy on the way: mean ± std over seeds after up to ``columns`` evenly spaced epochs, by student steps."""
    rows = []
    for runs in groups:
        histories = [run["history"] for run in runs if run["method"] != "scratch" and run["history"]]
        if not histories:
            continue
        length = min(map(len, histories))
        chosen = sorted({round((k + 1) * length / min(columns, length)) - 1 for k in range(min(columns, length))})
        rows.append(
            {"method": runs[0]["method"]}
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m engine.report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of them")
    parser.add_argument("--rounds", action="store_true", help="add the accuracy after the rounds")
    parser.add_argument("--csv", type=Path, help="write the table here too")
    parser.add_argument("--into", type=Path, help="rewrite a table in this file instead of printing it")
    parser.add_argument("--name", help="which table of that file")
    args = parser.parse_args()
    groups = group(collect(args.runs))
    rows = [row(runs) for runs in groups]
    table = markdown(rows)
    if args.rounds and (way := rounds_table(groups)):
        table += "\n\n" + way
    if args.csv:
        with atomic_path(args.csv) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if args.into:
        replace_table(args.into, args.name, table)
    else:
        print(table)


if __name__ == "__main__":
    run_command(main)
