"""Checks README and docs: links exist, commands parse, tables are generated from results, and the example method runs."""

import ast
import importlib
import json
import re
import shlex
import sys

import pytest

import datafree_kd
import registry
import train_scratch
from datafree.benchmark.__main__ import parse as parse_benchmark
from engine import report
from engine.runtime.flags import Parser, add_flags
from engine.runtime.tensors import load_checkpoint, weights_digest
from tests.conftest import ROOT, TINY_TASK

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
TABLE = re.compile(r"<!-- table:(\S+) python -m engine\.report (.*?) -->\n(.*?)\n<!-- /table:\1 -->", re.DOTALL)
TABLES = [pytest.param(*found, id=f"{page}-{found[0]}") for page, text in PAGES.items() for found in TABLE.findall(text)]


def anchors(text):
    """The anchors that GitHub makes from a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page):
    """Links are relative to the page; paths in backticks or commands are relative to the root."""
    text, folder = PAGES[page], (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if not link.startswith("http"):
            target = folder / path if path else ROOT / page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link
    if page == "CHANGELOG.md":  # names files that no longer exist
        return
    rooms = "scripts|engine|datafree|models|tests|docs|checkpoints/results|checkpoints/priors"
    for path in re.findall(rf"(?<![\w/.:}}])((?:{rooms})/[\w./-]+\w)", text):
        allowed = {"datafree/warm.py"}  # docs/new_method.md tells readers to write it
        assert path in allowed or (ROOT / path).exists() or (ROOT / f"{path}.py").exists(), path


def commands(text):
    """Yields (program, arguments) of the commands in backticks and in bash blocks, with variables filled in."""
    lines, variables = re.findall(r"`(python [^`\n]+)`", text), {}
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        lines += re.sub(r"\\\n|\n(?= )", " ", block).splitlines()
    for line in lines:
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        if len(words) == 1 and "=" in words[0]:
            name, _, value = words[0].partition("=")
            variables[name] = value
        names = "datafree_kd.py", "train_scratch.py"
        programs = [k for k, word in enumerate(words) if word.endswith(names) or word == "-m"]
        for start in programs[:1]:
            program, *arguments = words[start + (words[start] == "-m") :]
            yield program, arguments


def parse(program, arguments):
    """Parses the flags of a command; an unknown program or flag is an error."""
    if program == "datafree_kd.py":
        datafree_kd.parse(arguments)
    elif program == "train_scratch.py":
        parser = Parser(prog=program)
        add_flags(parser, train_scratch.ScratchFlags, "task")
        add_flags(parser, importlib.import_module("engine.loops.train").TrainFlags, "lengths")
        parser.parse_args(arguments)
    elif program == "engine.report":
        report.parse(arguments)
    elif program == "datafree.benchmark":
        parse_benchmark(arguments)
    else:
        assert importlib.util.find_spec(program), program


@pytest.mark.parametrize("page", [p for p in PAGES if p != "CHANGELOG.md" and list(commands(PAGES[p]))])
def test_commands_parse(page, monkeypatch):
    monkeypatch.setattr(datafree_kd, "METHODS", registry.METHODS | {"warm": registry.METHODS["csd"]})
    for program, arguments in commands(PAGES[page]):
        if "--help" not in arguments:
            parse(program, arguments)


@pytest.mark.parametrize("name, command_line, text", TABLES)
def test_tables_are_made_from_results(name, command_line, text, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert text == report.table(report.parse(command_line.split()))


def test_the_table_that_the_quickstart_printed_is_one_of_real_runs():
    text = report.table(report.parse([str(ROOT / "checkpoints/results/quickstart.jsonl")]))
    assert f"```\n{text}\n```" in PAGES["README.md"], f"paste this into README.md:\n{text}"


def test_every_file_of_results_is_in_a_table():
    shown = {path for page in PAGES.values() for _, line, _ in TABLE.findall(page) for path in line.split() if "/" in path}
    shown |= {name for name in re.findall(r"checkpoints/results/\w+\.jsonl", PAGES["docs/int8.md"])}  # made by datafree.int8
    shown.add("checkpoints/results/quickstart.jsonl")  # README.md
    assert shown == {path.relative_to(ROOT).as_posix() for path in ROOT.glob("checkpoints/results/*")}


def test_the_readme_is_short_and_lists_every_method():
    text = PAGES["README.md"]
    methods = text[text.index("## Methods") : text.index("##", text.index("## Methods") + 3)]
    assert set(re.findall(r"^\| `(\w+)` \|", methods, re.MULTILINE)) == set(registry.METHODS)
    assert len(text.splitlines()) <= 180


@pytest.fixture
def warm(tmp_path, monkeypatch, command, teacher_file):
    """Runs the example method with the file, the registry line and the tiny flags that the page shows."""
    code, line, tiny = re.findall(r"```python\n(.*?)```", PAGES["docs/new_method.md"], re.DOTALL)
    (tmp_path / "warm.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "warm", raising=False)
    name, path = ast.literal_eval("{" + line + "}").popitem()
    monkeypatch.setattr(datafree_kd, "METHODS", registry.METHODS | {name: path.removeprefix("datafree.")})
    flags = f"--method {name} {TINY_TASK} {ast.literal_eval('{' + tiny + '}')[name]} --teacher_ckpt {teacher_file}"

    def run(folder):
        command("datafree_kd", f"{flags} --save_dir {folder}")
        return load_checkpoint(folder / "student.pth")["state_dict"], json.loads((folder / "result.json").read_text())

    return run


def test_the_example_method_runs_to_a_student(warm, tmp_path):
    _, result = warm(tmp_path / "run")
    assert (result["method"], result["student_steps"], result["images"]) == ("warm", 6, 12)


def test_the_example_method_goes_on_bit_for_bit(warm, tmp_path, monkeypatch):
    whole, _ = warm(tmp_path / "whole")
    synthesizer = sys.modules["warm"].WarmSynthesizer
    synthesize = synthesizer.synthesize
    calls = []

    def stops_at_the_second_round(self, student):
        calls.append(student)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return synthesize(self, student)

    monkeypatch.setattr(synthesizer, "synthesize", stops_at_the_second_round)
    with pytest.raises(KeyboardInterrupt):
        warm(tmp_path / "cut")
    again, _ = warm(tmp_path / "cut")
    assert len(calls) == 3 and weights_digest(again) == weights_digest(whole)
