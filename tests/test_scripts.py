"""Scripts run as written, shrunk by the flags that a user may add; tables and paths in the README are true."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import registry
from engine import report
from engine.loops.settings import DistillFlags
from engine.runtime.errors import UserError
from engine.runtime.names import resolve
from tests.conftest import ROOT, TINY, TINY_TASK

SCRIPTS = sorted(p.relative_to(ROOT) for p in ROOT.glob("scripts/*/*.sh"))


def arguments(script):
    """The flags of a script's one python command."""
    text = (ROOT / script).read_text()
    line = re.search(r"^python datafree_kd\.py (.*?)\"\$@\"$", text, re.DOTALL | re.MULTILINE)
    assert line, f'{script} does not end in one datafree_kd.py command with "$@" last'
    return line[1].replace("\\\n", " ").strip()


def generated():
    """{path: text} by the tables of scripts/make_scripts.py."""
    spec = importlib.util.spec_from_file_location("make_scripts", ROOT / "scripts" / "make_scripts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {Path("scripts", name): text for name, text in module.scripts().items()}


GENERATED = generated()


def test_scripts_are_what_the_tables_say():
    for path, text in GENERATED.items():
        assert (ROOT / path).read_text() == text, f"run python scripts/make_scripts.py ({path})"


def test_the_published_names_exist():
    names = ("wrn402_wrn161", "resnet34_resnet18", "vgg11_resnet18", "wrn402_wrn401", "wrn402_wrn162")
    for method in registry.METHODS:
        for dataset in ("cifar10", "cifar100"):
            missing = [name for name in names if not (ROOT / f"scripts/{method}/{method}_{dataset}_{name}.sh").exists()]
            assert not missing, (method, dataset, missing)
    for method in ("csd", "dda"):
        assert (ROOT / f"scripts/{method}/{method}_cifar10_initBank_wrn402.sh").exists()


def test_the_published_numbers_are_of_known_methods():
    for table in registry.PUBLISHED.values():
        for name, values in table.items():
            method, *flags = name.split(" --")
            config = resolve(registry.METHODS[method]).Config
            known = {*config.__dataclass_fields__, *DistillFlags.__dataclass_fields__}
            assert len(values) == len(registry.PAIRS) and {flag.split()[0] for flag in flags} <= known, name


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_script_is_short_and_stops_at_errors(script):
    text = (ROOT / script).read_text()
    assert "set -euo pipefail" in text and len(text.splitlines()) < 20


@pytest.mark.parametrize("script", [s for s in GENERATED if "initBank" not in str(s)], ids=str)
def test_a_script_runs_to_a_student(script, command, teacher_file, tmp_path):
    """Its own flags, then ours: a bank by the script that it names first, then the student."""
    first = re.search(r"First: bash (\S+)", (ROOT / script).read_text())
    method = re.search(r"--method (\w+)", (ROOT / script).read_text())[1]
    small = f"{TINY_TASK} {TINY[method]} --teacher_ckpt {teacher_file} --epochs 1 --kd_steps 1 --ep_steps 1"
    if first:
        command("datafree_kd", f"{arguments(first[1])} {small} --save_dir {tmp_path / 'bank'}")
        small += f" --init_bank {tmp_path / 'bank'}"
    command("datafree_kd", f"{arguments(script)} {small} --save_dir {tmp_path / 'run'}")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["method"] == method


def test_a_script_runs_in_bash(teacher_file, tmp_path):
    environment = os.environ | {"VENV": "none", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    small = f"{TINY_TASK} {TINY['dda']} --teacher_ckpt {teacher_file}".split()
    for name, extra in (("initBank_wrn402", []), ("wrn402_wrn161", ["--init_bank", str(tmp_path / "initBank_wrn402")])):
        script = f"scripts/dda/dda_cifar10_{name}.sh"
        done = subprocess.run(
            ["bash", script, *small, "--save_dir", str(tmp_path / name), *extra],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "wrn402_wrn161" / "result.json").exists()


def write_result(folder, **values):
    folder.mkdir(parents=True)
    base = {
        "method": "m", "dataset": "d", "teacher": "t", "student": "s", "seed": 0, "external_prior": "none", "acc1_last": 90.0,
        "acc1_best": 91.0, "acc1_mean": 80.0, "student_steps": 100, "bank_images": 5, "seconds": {"synthesize": 10.0, "distill": 20.0},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(base | values))
    lines = [{"stage": "distill", "round": k, "acc1": 50.0 + k, "student_steps": 50 * (k + 1)} for k in range(2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_report_takes_mean_and_spread_over_seeds(tmp_path, monkeypatch, capsys):
    write_result(tmp_path / "a", seed=0, acc1_last=90.0)
    write_result(tmp_path / "b", seed=1, acc1_last=92.0)
    write_result(tmp_path / "c", method="n", variants=10, variants_kept=4)
    table = tmp_path / "t.csv"
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path), "--rounds", "--csv", str(table)])
    report.main()
    out = capsys.readouterr().out
    assert "91.00 ± 1.41" in out and "| 0,1 |" in out and "10 (40)" in out and "| m | 50.0 ± 0.0 | 51.0 ± 0.0 |" in out
    assert "training s" not in out and table.read_text().count("\n") == 3 and "published" not in out


def test_report_tells_times_budgets_and_targets(tmp_path):
    """Synthesis inside stage distill counts as synthesis; an hour or more makes all times hours."""
    write_result(tmp_path / "a", synthesis_seconds=15.0)
    write_result(tmp_path / "b", seed=1, seconds={"synthesize": 10.0, "distill": 30.0}, synthesis_seconds=25.0)
    rows = report.rows_of(report.group(report.collect([tmp_path])), budget=60, target=51.0)
    assert rows[0]["synthesis s"] == "30 ± 7" and rows[0]["distillation s"] == "5 ± 0"
    assert rows[0]["acc1 at 60 steps"] == "51.0 ± 0.0" and rows[0]["steps to 51 %"] == "100 ± 0"
    (row,) = report.rows_of(report.group(report.collect([tmp_path])), target=50.5)
    assert row["steps to 50.5 %"] == "100 ± 0"
    (row,) = report.rows_of(report.group(report.collect([tmp_path])), target=60.0)
    assert row["steps to 60 %"] == "(2 of 2 never)"
    write_result(tmp_path / "c", method="n", seconds={"distill": 7200.0}, synthesis_seconds=3600.0)
    rows = report.rows_of(report.group(report.collect([tmp_path])))
    assert [r["synthesis h"] for r in rows] == ["0.01 ± 0.00", "1.00"] and rows[1]["distillation h"] == "1.00"


def test_report_sets_the_papers_number_beside_ours(tmp_path):
    """By method, pair and, where the paper has several rows, the flags; the difference is that of best and best."""
    task = {"dataset": "cifar10", "teacher": "wrn40_2", "student": "wrn16_2"}
    write_result(tmp_path / "a", method="dfq", **task)
    write_result(tmp_path / "b", method="fast", settings={"g_steps": 5}, **task)
    write_result(tmp_path / "c", method="fast", settings={"g_steps": 7}, **task)
    write_result(tmp_path / "d", method="dfq", settings={"bn": 1}, **(task | {"student": "resnet8"}))
    rows = {r["method"] + r["network"]: r for r in report.rows_of(report.group(report.collect([tmp_path])))}
    assert rows["dfqwrn16_2"]["published best"] == "92.01" and rows["dfqwrn16_2"]["difference"] == "-1.01"
    assert rows["fast --g_steps 5wrn16_2"]["published best"] == "91.96"
    assert rows["fast --g_steps 7wrn16_2"]["published best"] == "" == rows["dfqresnet8"]["difference"]


def test_runs_that_differ_in_a_flag_are_apart_and_say_so(tmp_path):
    for k, bn in enumerate((0.0, 0.0, 10.0)):
        write_result(tmp_path / str(k), seed=k, settings={"bn": bn, "oh": 1.0, "seed": k, "init_bank": f"bank{k}"})
    rows = report.rows_of(report.group(report.collect([tmp_path])))
    assert [(r["method"], r["seeds"]) for r in rows] == [("m --bn 0.0", "0,1"), ("m --bn 10.0", "2")]


def test_report_can_name_rows_by_their_folders(tmp_path):
    for seed in (0, 1):
        write_result(tmp_path / "with_x" / f"seed{seed}", seed=seed, settings={"x": 1})
    write_result(tmp_path / "plain", settings={"x": 0})
    text = report.table(report.parse([str(tmp_path), "--folders"]))
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
        text.startswith("before\n<!-- table:x from runs -->\n| method")
        and text.endswith("<!-- /table:x -->\nafter\n")
        and "old" not in text
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no result.json"):
        report.collect([tmp_path / "empty"])
    with pytest.raises(UserError, match="table:y"):
        report.replace_table(file, "y", "")


def tables_in_readme():
    return re.findall(
        r"<!-- table:(\S+) python -m engine\.report (.*?) -->\n(.*?)\n<!-- /table",
        (ROOT / "README.md").read_text(),
        re.DOTALL,
    )


@pytest.mark.parametrize("name, command_line, text", tables_in_readme(), ids=lambda v: v[:20])
def test_readme_tables_are_made_from_result_files(name, command_line, text, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert text == report.table(report.parse(command_line.split()))


def test_readme_has_its_tables():
    assert {name for name, _, _ in tables_in_readme()} >= {"digits", "cifar10"}


def test_every_path_in_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    paths = re.findall(r"(?<![\w/.])((?:scripts|engine|datafree|models|tests|docs)/[\w./-]+\w)", text)
    missing = {p for p in paths if not (ROOT / p).exists() and not (ROOT / (p + ".py")).exists()}
    assert paths and not missing


def test_the_readme_lists_every_method():
    text = (ROOT / "README.md").read_text()
    rows = set(re.findall(r"^\| `(\w+)` \|", text[: text.index("## Every method")], re.MULTILINE))
    assert rows == set(registry.METHODS)
