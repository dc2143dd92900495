"""Scripts run as written, shrunk by the flags that a user may add; tables and paths in the README are true."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine import report
from engine.errors import UserError
from tests.conftest import ROOT, TINY, TINY_TASK

SCRIPTS = sorted(p.relative_to(ROOT) for p in ROOT.glob("scripts/*/*.sh"))


def arguments(script):
    """The flags of a script's one python command."""
    text = (ROOT / script).read_text()
    line = re.search(r"^python datafree_kd\.py (.*?)\"\$@\"$", text, re.DOTALL | re.MULTILINE)
    assert line, f'{script} does not end in one datafree_kd.py command with "$@" last'
    return line[1].replace("\\\n", " ").strip()


def test_scripts_are_what_the_tables_say():
    spec = importlib.util.spec_from_file_location("make_scripts", ROOT / "scripts" / "make_scripts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in module.scripts().items():
        assert (ROOT / "scripts" / name).read_text() == text, f"run python scripts/make_scripts.py ({name})"


def test_the_published_names_exist():
    for method in ("csd", "dda"):
        for name in (
            "initBank_wrn402",
            "wrn402_wrn161",
            "resnet34_resnet18",
            "vgg11_resnet18",
            "wrn402_wrn401",
            "wrn402_wrn162",
        ):
            assert (ROOT / f"scripts/{method}/{method}_cifar10_{name}.sh").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_script_is_short_and_stops_at_errors(script):
    text = (ROOT / script).read_text()
    assert "set -euo pipefail" in text and len(text.splitlines()) < 20


@pytest.mark.parametrize("script", [s for s in SCRIPTS if "initBank" not in str(s)], ids=str)
def test_a_script_runs_to_a_student(script, command, teacher_file, tmp_path):
    """Its own flags, then ours: a bank by the script that it names first, then the student."""
    first = re.search(r"First: bash (\S+)", (ROOT / script).read_text())[1]
    method = script.parts[1]
    small = f"{TINY_TASK} {TINY[method]} --teacher_ckpt {teacher_file} --epochs 1 --kd_steps 1"
    command("datafree_kd", f"{arguments(first)} {small} --save_dir {tmp_path / 'bank'}")
    command("datafree_kd", f"{arguments(script)} {small} --init_bank {tmp_path / 'bank'} --save_dir {tmp_path / 'run'}")
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
    assert "training s" not in out and table.read_text().count("\n") == 3


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
def test_readme_tables_are_made_from_result_files(name, command_line, text):
    folders = [ROOT / word for word in command_line.split() if not word.startswith("--")]
    groups = report.group(report.collect(folders))
    expected = report.markdown([report.row(runs) for runs in groups])
    if "--rounds" in command_line:
        expected += "\n\n" + report.rounds_table(groups)
    assert text == expected


def test_readme_has_its_tables():
    assert {name for name, _, _ in tables_in_readme()} >= {"digits", "cifar10"}


def test_every_path_in_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    paths = re.findall(r"(?<![\w/.])((?:scripts|engine|datafree|models|tests|docs)/[\w./-]+\w)", text)
    missing = {p for p in paths if not (ROOT / p).exists() and not (ROOT / (p + ".py")).exists()}
    assert paths and not missing
