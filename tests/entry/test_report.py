"""Tables from result files: which runs share a row, and what the rows contain."""

import functools
import json

import pytest

import registry
from engine import report
from engine.report.page import contents
from engine.report.results import RESULT
from engine.runtime.errors import UserError


def write_result(folder, **values):
    folder.mkdir(parents=True)
    base = {
        "method": "m",
        "dataset": "d",
        "teacher": "t",
        "student": "s",
        "seed": 0,
        "external_prior": "none",
        "acc1_last": 90.0,
        "acc1_best": 91.0,
        "acc1_mean": 80.0,
        "student_steps": 100,
        "bank_images": 5,
        "seconds": {"synthesize": 10.0, "distill": 20.0},
    }
    (folder / "result.json").write_text(json.dumps(base | values))
    lines = [{"stage": "distill", "round": k, "acc1": 50.0 + k, "student_steps": 50 * (k + 1)} for k in range(2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_report_takes_mean_and_spread_over_seeds(tmp_path, monkeypatch, capsys):
    write_result(tmp_path / "a", seed=0, acc1_last=90.0)
    write_result(tmp_path / "b", seed=1, acc1_last=92.0)
    write_result(tmp_path / "c", method="n", variants=10, variants_kept=4)
    table = tmp_path / "t.csv"
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path), "--wide", "--markdown", "--rounds", "--csv", str(table)])
    report.main()
    out = capsys.readouterr().out
    assert "91.00 ± 1.41" in out and "| 0,1 |" in out and "10 (40)" in out and "| m | 50.0 ± 0.0 | 51.0 ± 0.0 |" in out
    monkeypatch.setattr("sys.argv", ["report", *(str(tmp_path / name / "result.json") for name in "abc"), "--markdown"])
    report.main()
    assert "91.00 ± 1.41" in capsys.readouterr().out
    assert "training s" not in out and table.read_text().count("\n") == 3 and "published" not in out


def test_a_field_that_is_null_counts_as_missing(tmp_path):
    """Optional fields may be null: a result line with a null command once ended in a traceback."""
    kept = {"folder", "history", "teacher", "external_prior", "acc1_last", "acc1_best"}
    optional = {name[:-1] for name in RESULT if name.endswith("?")} - kept
    write_result(tmp_path / "a", **dict.fromkeys(optional))
    (result,) = report.collect([tmp_path])
    assert not optional & result.keys()
    page = str(contents(report.group([result])))
    assert "90.0" in report.table(report.parse([str(tmp_path), "--wide"])) and "90.0" in page


def test_a_run_without_a_test_has_a_row_and_a_page(tmp_path):
    write_result(tmp_path / "a", agreement_last=3.0, agreement_best=4.0, acc1_last=None, acc1_best=None, acc1_mean=None)
    lines = [{"stage": "distill", "round": k, "agreement": 3.0, "student_steps": 50 * (k + 1)} for k in range(3)]
    (tmp_path / "a/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = contents(report.group(report.collect([tmp_path])))
    assert shown["rows"][0]["figures"]["agreement best"] == "4.00" and shown["curves"] == {}


def test_report_tells_times_budgets_and_targets(tmp_path):
    """Synthesis inside stage distill counts as synthesis. If a time is an hour or more, all times are in hours."""
    write_result(tmp_path / "a", synthesis_seconds=15.0)
    write_result(tmp_path / "b", seed=1, seconds={"synthesize": 10.0, "distill": 30.0}, synthesis_seconds=25.0)
    rows = report.rows_of(report.group(report.collect([tmp_path])), budget=60, target=51.0)
    assert rows[0]["synthesis s"] == "30 ± 7" and rows[0]["distillation s"] == "5 ± 0"
    assert rows[0]["acc1 at 60 steps"] == "51.0 ± 0.0" and rows[0]["steps to 51 %"] == "100 ± 0"
    (row,) = report.rows_of(report.group(report.collect([tmp_path])), target=50.5)
    assert row["steps to 50.5 %"] == "100 ± 0"
    (row,) = report.rows_of(report.group(report.collect([tmp_path])), target=60.0)
    assert row["steps to 60 %"] == "(2 of 2 never)"
    (tmp_path / "b/metrics.jsonl").write_text("")
    (row,) = report.rows_of(report.group(report.collect([tmp_path])), target=60.0)
    assert row["steps to 60 %"] == "(1 of 1 never)"
    write_result(tmp_path / "c", method="n", seconds={"distill": 7200.0}, synthesis_seconds=3600.0)
    rows = report.rows_of(report.group(report.collect([tmp_path])))
    assert [r["synthesis h"] for r in rows] == ["0.01 ± 0.00", "1.00"] and rows[1]["distillation h"] == "1.00"


def rows(folder):
    return report.rows_of(report.group(report.collect([folder])))


def test_the_papers_number_stands_beside_ours(tmp_path):
    """The number is taken from the result, and the difference compares best epochs. A result may have no number."""
    write_result(tmp_path / "a", published=92.01)
    write_result(tmp_path / "b", method="n", published=None)
    write_result(tmp_path / "c", method="o")
    found = {r["method"]: (r["published best"], r["difference"]) for r in rows(tmp_path)}
    assert found == {"m": ("92.01", "-1.01"), "n": ("", ""), "o": ("", "")}


def test_the_papers_number_is_of_a_method_pair_and_flags():
    table = {"d": {"one": (1.0, 2.0), "two --steps 5": (3.0, 4.0), "two --steps 2": (5.0, 6.0)}}
    of = functools.partial(report.published, table, (("t", "s"), ("t", "u")))
    assert of("one", "d", "t", "u", {}) == 2.0
    assert of("two", "d", "t", "s", {"steps": 5}) == 3.0 and of("two", "d", "t", "s", {"steps": 2}) == 5.0
    assert of("two", "d", "t", "s", {"steps": 7}) is of("one", "d", "s", "t", {}) is of("one", "e", "t", "s", {}) is None
    real = functools.partial(report.published, registry.PUBLISHED, registry.PAIRS)
    assert real("dfq", "cifar10", "wrn40_2", "wrn16_2", {}) == 92.01


def test_runs_that_differ_in_a_flag_are_apart_and_say_so(tmp_path):
    for k, bn in enumerate((0.0, 0.0, 10.0)):
        write_result(tmp_path / str(k), seed=k, settings={"bn": bn, "oh": 1.0, "seed": k, "init_bank": f"seed{k}/bank"})
    assert [(r["method"], r["seeds"]) for r in rows(tmp_path)] == [("m --bn 0.0", "0,1"), ("m --bn 10.0", "2")]


def test_an_unset_flag_counts_as_one_that_an_earlier_version_did_not_have(tmp_path):
    for seed, settings in enumerate(({"bn": 1.0}, {"bn": 1.0, "views": None}, {"bn": 1.0, "views": 4})):
        write_result(tmp_path / str(seed), seed=seed, settings=settings)
    assert [(r["method"], r["seeds"]) for r in rows(tmp_path)] == [("m", "0,1"), ("m --views 4", "2")]


@pytest.mark.parametrize("name, one, other", [
    ("data_root", "(pics: 2 classes ab, 16 px, 40 test images cd)", "(pics: 2 classes ab, 16 px, 40 test images ef)"),
    ("teacher_ckpt", "(weights ab)", "(weights cd)"),
    ("init_bank", "bank0", "bank1"),
])  # fmt: skip
@pytest.mark.parametrize("method", ["m", "scratch"])
def test_other_data_teachers_or_banks_are_other_rows(name, one, other, method, tmp_path, capsys):
    """Runs with equal names, seeds and flags. The table shows in what they differ, and counts no seed twice."""
    for k, value in enumerate((one, other)):
        for seed in (0, 1):
            settings = {name: value, "seed": seed}
            write_result(tmp_path / f"{k}{seed}", method=method, seed=seed, settings=settings, acc1_last=50.0 + k)
    found = rows(tmp_path)
    assert [(r["seeds"], r["acc1 last"]) for r in found] == [("0,1", "50.00 ± 0.00"), ("0,1", "51.00 ± 0.00")]
    assert [r["method"].partition(" ")[2] for r in found] == [
        f"{'data ' * (method == 'scratch')}--{name} {v}" for v in (one, other)
    ]
    report.table(report.parse([str(tmp_path)]))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "paths", [["t/seed0/a.pth", "t/seed1/a.pth"], ["'t/seed{seed}/a.pth'"] * 2, ["'a t/seed0/a.pth'", "'a t/seed1/a.pth'"]]
)
def test_a_teacher_for_each_seed_is_one_row(paths, tmp_path):
    for seed, path in enumerate(paths):
        command = f"python datafree_kd.py --teacher_ckpt {path} --seeds 0"
        write_result(tmp_path / str(seed), seed=seed, command=command, settings={"teacher_ckpt": f"(weights {seed})"})
    assert [r["seeds"] for r in rows(tmp_path)] == ["0,1"]
    command = "python datafree_kd.py --teacher_ckpt other/seed2/a.pth"
    write_result(tmp_path / "2", seed=2, command=command, settings={"teacher_ckpt": "(weights 2)"})
    assert [r["seeds"] for r in rows(tmp_path)] == ["0,1", "2"]


def test_a_repeated_seed_is_a_warning(tmp_path, monkeypatch, capsys):
    for k, seed in enumerate((0, 1, 1)):
        write_result(tmp_path / f"run{k}", seed=seed)
    assert "seeds 0,1,1" in report.table(report.parse([str(tmp_path), "--wide", "--markdown"]))
    warning = capsys.readouterr().err
    assert warning.startswith("warning: seed 1 occurs 2 times in one row") and warning.count("\n") == 1
    assert "run1" in warning and "run2" in warning and "run0" not in warning
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path), "--lines", str(tmp_path / "lines.jsonl")])
    report.main()
    assert capsys.readouterr().err == warning


def test_the_images_of_a_row_are_their_mean_where_seeds_differ(tmp_path):
    for seed, images in enumerate((10, 12)):
        write_result(tmp_path / f"a{seed}", seed=seed, images=images)
        write_result(tmp_path / f"b{seed}", seed=seed, images=10, method="n")
    assert [row["images"] for row in rows(tmp_path)] == ["11 ± 1", "10"]


def test_rows_are_sorted_by_steps_as_numbers(tmp_path):
    for steps in (1000, 300):
        write_result(tmp_path / str(steps), student_steps=steps)
    assert [row["student steps"] for row in rows(tmp_path)] == ["300", "1000"]


@pytest.mark.parametrize("wide", [[], ["--wide"]])
def test_real_data_of_another_dataset_is_told(wide, tmp_path):
    write_result(tmp_path / "a")
    write_result(tmp_path / "b", method="scratch", dataset="other")
    shown = report.table(report.parse([str(tmp_path), *wide]))
    assert "other" in shown and not shown.startswith("d,")


def test_report_can_name_rows_by_their_folders(tmp_path):
    for seed in (0, 1):
        write_result(tmp_path / "with_x" / f"seed{seed}", seed=seed, settings={"x": 1})
    write_result(tmp_path / "plain", settings={"x": 0})
    text = report.table(report.parse([str(tmp_path), "--wide", "--markdown", "--folders"]))
    assert (
        "| plain | m |" in text
        and "| with_x | m |" in text
        and "--x" not in text
        and text.index("plain") < text.index("with_x")
    )


def test_report_rewrites_a_table_in_place(tmp_path, monkeypatch):
    write_result(tmp_path / "a")
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- table:x from runs -->\nold\n<!-- /table:x -->\nafter\n")
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path), "--into", str(file), "--name", "x"])
    report.main()
    text = file.read_text()
    assert (
        text.startswith("before\n<!-- table:x from runs -->\nd, t -> s, 100 student steps, seed 0; acc1: ")
        and text.endswith("<!-- /table:x -->\nafter\n")
        and "old" not in text
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no result.json"):
        report.collect([tmp_path / "empty"])
    with pytest.raises(UserError, match="table:y"):
        report.replace_table(file, "y", "")


def test_only_the_named_table_is_replaced(tmp_path):
    """Names that begin alike, text between tables, a table without its end, line ends, and a file that is not UTF-8."""
    file = tmp_path / "page.md"
    longer = "<!-- table:x-long y -->\r\nold\r\n<!-- /table:x-long -->\r\nprecious text\r\n"
    file.write_bytes((longer + "<!-- table:x y -->\r\nold\r\n<!-- /table:x -->\r\n").encode())
    report.replace_table(file, "x", "| a |\n| ± |")
    assert file.read_bytes().decode() == longer + "<!-- table:x y -->\r\n| a |\r\n| ± |\r\n<!-- /table:x -->\r\n"
    for content, message in (
        (b"<!-- table:x -->\n<!-- table:y -->\n<!-- /table:x -->\n", "around one table"),
        (b"caf\xe9\n<!-- table:x -->\n<!-- /table:x -->\n", "is not UTF-8 text .byte 3."),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            report.replace_table(file, "x", "new")
        assert file.read_bytes() == content


def test_every_output_of_a_command_is_written_and_no_other_file(tmp_path, monkeypatch, capsys):
    write_result(tmp_path / "a")
    (tmp_path / "page.md").write_text("<!-- table:x -->\n<!-- /table:x -->\n")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "a" / "student.pth").write_text("weights")
    flags = f"--plot {tmp_path}/p.png --html {tmp_path}/p.html --lines {tmp_path}/l.jsonl --into {tmp_path}/page.md --name x"

    def run(csv):
        monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "a"), *flags.split(), "--csv", str(csv)])
        report.main()

    for csv in (tmp_path / "notes.txt", tmp_path / "a" / "student.pth", tmp_path / "a" / "result.json"):
        before = csv.read_text()
        with pytest.raises(UserError, match="was not written by this command"):
            run(csv)
        assert csv.read_text() == before and not (tmp_path / "p.png").exists()
    run(tmp_path / "t.csv")
    run(tmp_path / "t.csv")
    assert all((tmp_path / name).stat().st_size for name in ("p.png", "p.html", "l.jsonl", "t.csv"))
    assert "| m |" in (tmp_path / "page.md").read_text() and "90.00" not in capsys.readouterr().out


def test_a_name_cannot_break_the_table(tmp_path):
    write_result(tmp_path / "a", method="m|n\no", dataset="d\n| e |")
    first, _, header, rule, *rest = report.table(report.parse([str(tmp_path), "--markdown"])).splitlines()
    assert first.startswith(r"d\n| e |, ") and len(rest) == 1 and rest[0].startswith(r"| m\|n\no | ")


@pytest.fixture
def three_runs(tmp_path):
    for seed in (0, 1):
        write_result(tmp_path / "runs" / "m" / f"seed{seed}", seed=seed, acc1_last=90.0 + 2 * seed)
    write_result(tmp_path / "runs" / "long", method="n", settings={"x": 1}, external_prior="a prior with a rather long name")
    real = {"method": "scratch", "teacher": None, "student": "t", "student_steps": None, "seconds": {"train": 7.0}}
    write_result(tmp_path / "runs" / "real", **real)
    return tmp_path / "runs"


def run_report(*arguments):
    return report.table(report.parse([str(argument) for argument in arguments]))


def test_a_terminal_gets_aligned_columns_that_fit(three_runs):
    """A first line states what all distilled rows share. The table has only the main columns, and the time of a run."""
    write_result(three_runs / "flags", method="n", settings={f"a_long_flag_{k}": k for k in range(9)}, student_steps=200)
    text = run_report(three_runs, "--rounds")
    assert text.startswith("d, t -> s; acc1: test accuracy")
    assert max(map(len, text.splitlines())) <= 100 and "|" not in text
    (mean,) = [line for line in text.splitlines() if "91.00" in line]
    assert mean.split() == ["m", "100", "0,1", "none", "91.00", "±", "1.41", "30", "5"]
    (real,) = [line for line in text.splitlines() if line.startswith("real data")]
    assert real.split() == ["real", "data", "(t)", "0", "90.00", "7", "5"]
    assert "--a_long_flag_8" in " ".join(text.split()) and "acc1 best" not in text and "50.0 ± 0.0" in text


def test_wide_has_more_columns_and_markdown_the_same_figures(three_runs):
    """What all rows share is above the table, and no column of it."""
    wide, brief = run_report(three_runs, "--wide"), run_report(three_runs, "--markdown")
    assert "acc1 best" in wide and "distillation s" in wide and "|" not in wide
    assert wide.startswith("d, t -> s, 100 student steps; accuracies in %\n\n") and "real data (t)" in wide
    assert {"seeds", "images"} <= set(wide.splitlines()[2].split()) and "dataset" not in wide and "network" not in wide
    assert brief.splitlines()[2] == "| method | seeds | external prior | acc1 | time s | images |"
    assert "| m | 0,1 | none | 91.00 ± 1.41 | 30 | 5 |" in brief
    assert run_report(three_runs / "real", "--wide").startswith("d, t, seed 0; accuracies in %\n\n")


@pytest.mark.parametrize("wide", [(), ("--wide",)])
def test_the_best_row_first(tmp_path, wide):
    for name, acc1 in (("a", 9.5), ("b", 70.0), ("c", 10.0)):
        write_result(tmp_path / name, settings={"x": name}, acc1_last=acc1)
    text = run_report(tmp_path, "--folders", "--best_first", "--markdown", *wide)
    assert [line.split(" | ")[0] for line in text.splitlines()[4:]] == ["| b", "| c", "| a"]


@pytest.mark.parametrize("flags", [(), ("--wide", "--rounds", "--budget", "60"), ("--wide", "--folders", "--markdown")])
def test_result_lines_make_the_tables_that_their_folders_made(three_runs, tmp_path, monkeypatch, capsys, flags):
    lines = tmp_path / "results.jsonl"
    monkeypatch.setattr("sys.argv", ["report", str(three_runs), "--lines", str(lines)])
    report.main()
    report.main()  # lines of the same runs are replaced
    assert capsys.readouterr().out.splitlines() == [f"{lines}: 4 results written, 4 results in the file"] * 2
    assert run_report(lines, *flags) == run_report(three_runs, *flags)
    kept = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["folder"] for line in kept] == ["long", "m/seed0", "m/seed1", "real"]
    assert kept[1]["acc1_last"] == 90.0 and len(kept[1]["history"]) == 2 and "path" not in kept[1]


def test_a_rerun_takes_the_place_of_its_line_and_others_stay(three_runs, tmp_path):
    lines = tmp_path / "results.jsonl"
    report.write_lines(lines, report.collect([three_runs]))
    write_result(tmp_path / "again" / "m" / "seed1", seed=1, acc1_last=50.0)
    assert report.write_lines(lines, report.collect([tmp_path / "again"])) == 4
    assert [r["acc1_last"] for r in report.collect([lines])] == [90.0, 90.0, 50.0, 90.0]
    assert [p.name for p in tmp_path.glob("*.jsonl*")] == ["results.jsonl"]


@pytest.mark.parametrize(
    "values, differs", [({"method": "n"}, "method"), ({"seed": 1}, "seed"), ({"settings": {"lr": 0.2}}, "--lr"), ({}, None)]
)
def test_a_line_of_another_run_is_not_replaced(values, differs, tmp_path):
    for name, changes in (("a", {"settings": {"lr": 0.1}}), ("b", {"settings": {"lr": 0.1, "new_flag": 1}} | values)):
        write_result(tmp_path / name / "seed0", **changes)
    lines = tmp_path / "results.jsonl"
    report.write_lines(lines, report.collect([tmp_path / "a"]))
    before = lines.read_text()
    if differs:
        with pytest.raises(UserError, match=f"has the folder name seed0, .*another {differs}; give a folder that contains"):
            report.write_lines(lines, report.collect([tmp_path / "b"]))
    else:
        assert report.write_lines(lines, report.collect([tmp_path / "b"])) == 1
        lines.write_text(before)
    with pytest.raises(UserError, match="has the folder name seed0"):  # one of two runs of the same command
        report.write_lines(tmp_path / "new.jsonl", report.collect([tmp_path / "a", tmp_path / "b"]))
    assert lines.read_text() == before and not (tmp_path / "new.jsonl").exists()
    assert report.write_lines(lines, report.collect([tmp_path])) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"teacher_digest": []},
        {"image_figures": 1},
        {"image_figures": {"wanted": "much"}},
        {"versions": [1]},
        {"history": [{"stage": "distill", "round": 0, "acc1": 1.0, "student_steps": 1, "kd": "low"}]},
        {"history": [{"stage": "distill", "round": 0, "acc1": 1.0, "student_steps": 1, "minutes": "few"}]},
    ],
)
def test_a_field_of_another_type_is_one_line(wrong, tmp_path):
    write_result(tmp_path / "a")
    report.write_lines(tmp_path / "l.jsonl", report.collect([tmp_path]))
    (tmp_path / "l.jsonl").write_text(json.dumps(json.loads((tmp_path / "l.jsonl").read_text()) | wrong) + "\n")
    with pytest.raises(UserError, match=f"line 1 of .*{next(iter(wrong))}.* wanted"):
        report.collect([tmp_path / "l.jsonl"])


def test_a_metric_that_is_null_counts_as_missing(tmp_path):
    write_result(tmp_path / "a")
    (found,) = report.collect([tmp_path])
    line = found | {"history": [line | {"kd": None, "agreement": None} for line in found["history"]]}
    (tmp_path / "l.jsonl").write_text(json.dumps(line) + "\n")
    assert report.collect([tmp_path / "l.jsonl"])[0]["history"] == found["history"]


@pytest.mark.parametrize("text", ["{", '{"stage": "distill", "acc1": 1.0}', "[1]", '{"folder": "a", "history": []}'])
def test_a_file_of_anything_else_is_one_line(text, tmp_path):
    (tmp_path / "x.jsonl").write_text(text + "\n")
    with pytest.raises(UserError, match="line 1 of .*x.jsonl .*--lines wrote"):
        report.collect([tmp_path / "x.jsonl"])


def test_a_table_goes_into_a_file_by_its_name():
    with pytest.raises(UserError, match="--into FILE and --name TABLE"):
        report.parse(["runs", "--into", "page.md"])
