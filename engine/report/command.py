"""The command ``python -m engine.report``.

python -m engine.report checkpoints/dda checkpoints/csd                 a table that fits a terminal
python -m engine.report RUNS... --wide                                 a table with all columns
python -m engine.report RUNS... --rounds --budget 100 --target 95      also the accuracy during training
python -m engine.report RUNS... --csv table.csv                        also a CSV file with all columns
python -m engine.report RUNS... --html report.html                     one page with table, curves, pictures and cautions
python -m engine.report RUNS... --images                               measures of the runs' images (engine.report.images)
python -m engine.report RUNS... --plot plot.png --x cpu_minutes        accuracy curves of all runs
python -m engine.report RUNS... --lines results.jsonl                  results, a line a run, to keep without the folders
python -m engine.report results.jsonl --wide --into docs/results.md --name digits      replaces that table in a file
"""

import argparse
import csv
from pathlib import Path
from typing import Any

from engine.report.curves import AXES, FORMATS, WORDS, plot
from engine.report.results import collect, group, warn_of_repeated_seeds, write_lines
from engine.report.tables import (
    aligned,
    brief_rows,
    image_rows,
    leading_accuracy,
    markdown,
    replace_table,
    rounds_rows,
    rows_of,
    what_all_share,
    wide_rows,
    with_markers,
)
from engine.runtime.errors import UserError
from engine.runtime.files import atomic_path, require_output
from engine.runtime.flags import Parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line.

    Raises:
        UserError: two flags do not fit together.
    """
    parser = Parser(
        prog="python -m engine.report", description="Prints the results of runs as a table, one row for all seeds."
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, help="run folders, folders of run folders, or files written by --lines"
    )
    parser.add_argument("--wide", action="store_true", help="show all columns; what all rows share is above the table")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument("--rounds", action="store_true", help="add a table of the accuracy during training")
    parser.add_argument(
        "--budget", type=int, least=1, metavar="STEPS", help="add a column: accuracy after this number of student steps"
    )
    parser.add_argument(
        "--target",
        type=float,
        above=0,
        most=100,
        metavar="ACC1",
        help="add a column: student steps until this accuracy in %% was reached",
    )
    parser.add_argument(
        "--folders", action="store_true", help="name rows by their run folders, not by the flags in which they differ"
    )
    parser.add_argument("--best_first", action="store_true", help="sort the rows by accuracy, the highest first")
    parser.add_argument("--csv", type=Path, help="also write the table, with all columns, to this file")
    parser.add_argument(
        "--html", type=Path, metavar="FILE.html", help="write a page with table, curves and pictures, and print no table"
    )
    parser.add_argument(
        "--images",
        action="store_true",
        help="print measures of the runs' images instead (defined in engine/report/images.py); with --lines, --csv or --html, "
        "write them there",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="plot accuracy curves to this .png, .svg or .pdf file, and print no table"
    )
    parser.add_argument("--x", choices=AXES, default="steps", help="--plot: horizontal axis [steps]")
    parser.add_argument(
        "--lines",
        type=Path,
        metavar="FILE.jsonl",
        help="write the results to this file, one line a run, in place of lines of the same folders",
    )
    parser.add_argument("--into", type=Path, help="replace a Markdown table in this file instead of printing it")
    parser.add_argument("--name", help="--into: name of the table between <!-- table:NAME --> and <!-- /table:NAME -->")
    args = parser.parse_args(argv)
    if bool(args.into) != bool(args.name):
        raise UserError("--into FILE and --name TABLE belong together; give both or none")
    if args.images and args.plot:
        raise UserError("--images makes no plot; give --images or --plot")
    return args


def table(args: argparse.Namespace, results: list[dict[str, Any]] | None = None) -> str:
    """The table of the results (None: all under ``args.runs``), in the form that the command line asks for."""
    groups = group(_results(args) if results is None else results)
    if args.images:
        rows = image_rows(groups, args.folders)
        return markdown(rows) if args.markdown or args.into else aligned(rows)
    rows = (wide_rows if args.wide else brief_rows)(groups, args.budget, args.target, args.folders)
    if args.best_first:
        rows.sort(key=leading_accuracy, reverse=True)
    way = rounds_rows(groups, 10 if args.wide else 6) if args.rounds else []
    width = None if args.wide else 100
    tables = [markdown(part) if args.markdown or args.into else aligned(part, width) for part in (rows, way) if part]
    return "\n\n".join([what_all_share(groups, args.wide), *tables])


def _results(args: argparse.Namespace) -> list[dict[str, Any]]:
    results = collect(args.runs)
    warn_of_repeated_seeds(group(results))
    if not args.images:
        return results
    from engine.report.images import measured  # needs torch

    return measured(results)


def _check_outputs(args: argparse.Namespace) -> None:
    """Raises a UserError if a file that the command line names must not be replaced. Call it before the work."""
    for name, suffixes in (("csv", (".csv",)), ("html", (".html", ".htm")), ("plot", FORMATS)):
        if file := getattr(args, name):
            require_output(f"--{name}", file, suffixes)
    if args.into:
        with_markers(args.into, args.name)


def main() -> None:
    args = parse()
    _check_outputs(args)
    results = _results(args)
    if args.lines:
        print(f"{args.lines}: {len(results)} results written, {write_lines(args.lines, results)} results in the file")
    if args.plot:
        groups = group(results)
        lines = plot(groups, args.plot, args.x, args.folders)
        left = f"; no accuracies by {WORDS[args.x]} in {len(groups) - lines} of {len(groups)} rows" * (lines < len(groups))
        print(f"{args.plot}: plot with {lines} line{'s' * (lines != 1)}{left}")
    if args.html:
        from engine.report.page import write_page  # imports matplotlib, which takes a second

        write_page(args.html, group(results))
        print(f"{args.html}: {args.html.stat().st_size / 1e6:.1f} MB")
    if args.csv:
        groups = group(results)
        rows = image_rows(groups, args.folders) if args.images else rows_of(groups, args.budget, args.target, args.folders)
        with atomic_path(args.csv) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        if args.lines or args.plot or args.html or args.into:
            print(f"{args.csv}: {len(rows)} row{'s' * (len(rows) != 1)}")
    if args.into:
        replace_table(args.into, args.name, table(args, results))
    elif not (args.lines or args.plot or args.html):
        print(table(args, results))
