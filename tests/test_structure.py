"""House rules that a machine can check, and the small rooms: flags, stages, seeds, files, errors."""

import ast
import dataclasses
import errno
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import registry
from engine.loops.distill import Schedule
from engine.loops.settings import DistillFlags, RunFlags, TaskFlags
from engine.runtime import errors
from engine.runtime.errors import UserError
from engine.runtime.files import (
    atomic_path,
    digest,
    load_checkpoint,
    load_tensors,
    save_checkpoint,
    save_tensors,
    weights_digest,
)
from engine.runtime.flags import Parser, add_flags, flag, from_args, stage_flags
from engine.runtime.names import resolve
from engine.runtime.seeding import position_seed, seed_position
from engine.runtime.stage_record import StageRecord
from tests.conftest import ROOT

SOURCES = {p: p.read_text() for room in ("engine", "datafree", "models") for p in ROOT.glob(f"{room}/**/*.py")}
# Imports run from right to left only: a room may use itself and the rooms before it.
ROOMS = ("models", "engine.runtime", "engine.data", "engine.networks", "engine.loops", "engine", "datafree", "registry")
ENTRY_POINTS = (
    "datafree.bank", "datafree.benchmark", "datafree.diffusion.train_prior", "engine.evaluate", "engine.export.__main__",
)  # fmt: skip  # they alone look names up


def imports(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module):
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len, default=None)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    module = module_of(path)
    for imported in imports(SOURCES[path]):
        room = room_of(imported)
        allowed = ROOMS[: ROOMS.index(room_of(module)) + 1] + (("registry",) if module.startswith(ENTRY_POINTS) else ())
        assert room is None or room in allowed, f"{module} imports {imported}"


def test_no_imports_in_a_circle():
    graph = {module_of(p): {m for m in imports(text) if room_of(m)} for p, text in SOURCES.items()}
    left = dict(graph)
    while free := [module for module, needs in left.items() if not needs & (left.keys() - {module})]:
        for module in free:
            del left[module]
    assert not left, f"these import one another: {', '.join(left)}"


def test_methods_are_named_in_the_registry_alone():
    names = "|".join(registry.METHODS)
    for path in [
        *ROOT.glob("engine/**/*.py"),
        *ROOT.glob("models/*.py"),
        ROOT / "datafree_kd.py",
        ROOT / "train_scratch.py",
    ]:
        code = re.sub(r'"""[\s\S]*?"""|#.*', "", path.read_text())
        assert not re.search(rf"\b({names})\b", code, re.IGNORECASE), path


def test_a_method_is_one_file():
    """No other file of datafree/ names a method in its code, but one that builds on it and imports from its file."""
    for name, target in registry.METHODS.items():
        own = ROOT / (target.split(":")[0].replace(".", "/") + ".py")
        if name in ("kd", "noise", "fast"):  # words with other meanings
            continue
        for path in (ROOT / "datafree").glob("**/*.py"):
            text = path.read_text()
            code = re.sub(r'"""[\s\S]*?"""|#.*|"[^"\n]*"', "", text)
            builds_on_it = re.search(rf"^from datafree\.{name} import", text, re.MULTILINE)
            if path != own and not builds_on_it:
                assert not re.search(rf"\b{name}", code, re.IGNORECASE), f"{path} names {name}"


def test_no_hard_wired_devices_or_sizes():
    for path, text in SOURCES.items():
        assert not re.search(r"\.cuda\(|\(3, *32, *32\)|except *:", text), path


def configs():
    yield from (TaskFlags, RunFlags, DistillFlags)
    yield from (resolve(path).Config for path in registry.METHODS.values())


def test_every_flag_is_read_and_documented():
    text = "\n".join([*SOURCES.values(), (ROOT / "datafree_kd.py").read_text()])
    for config in configs():
        for field in dataclasses.fields(config):
            assert field.metadata["help"], field.name
            reads = rf"(?:config|flags|task_flags|run_flags|distill_flags|self)\.{field.name}\b|flags\[\"{field.name}\"\]|\"{field.name}\""
            assert re.search(reads, text), f"--{field.name} of {config.__name__} is read nowhere"


def test_the_entry_point_stays_short():
    assert len((ROOT / "datafree_kd.py").read_text().splitlines()) < 150


@dataclasses.dataclass(frozen=True)
class Example:
    number: int = flag(3, "a number", stages=("a",))
    rate: float | None = flag(None, "a rate", stages=("a", "b"))
    names: tuple[str, ...] | None = flag(None, "names")
    long_name: str = flag("x", "a name", choices=("x", "y"), short="-l")
    on: bool = flag(False, "a switch")


def parse(text):
    parser = Parser(prog="p")
    add_flags(parser, Example, "example", {"number": 5})
    return from_args(Example, parser.parse_args(text.split()))


def test_flags_are_the_dataclass():
    assert parse("") == Example(number=5)
    assert parse("--number 7 --rate 1e-3 --names a,b --long-name y --on") == Example(7, 1e-3, ("a", "b"), "y", True)
    assert parse("--long_name y") == parse("-l y")
    assert stage_flags("b", Example(rate=0.5)) == {"rate": 0.5}


@pytest.mark.parametrize("text", ["--numbr 3", "--num 3", "--number x", "--long_name z", "--rate"])
def test_wrong_flags_are_refused(text):
    with pytest.raises(UserError):
        parse(text)


def test_stages_go_on_and_name_what_changed(tmp_path):
    path = tmp_path / "stages.json"
    stages = StageRecord(path, {"a": {"x": 1}, "b": {"y": [1, 2]}})
    stages.check(["a", "b"])
    stages.begin("a")
    assert StageRecord(path, {"a": {"x": 1}}).status("a") == "incomplete"
    stages.update("a", done=True, images=7)
    again = StageRecord(path, {"a": {"x": 1}, "b": {"y": [3]}})
    assert again.status("a") == "done" and again.fact("a", "images") == 7 and again.status("b") == "new"
    again.check(["b"])
    with pytest.raises(UserError, match="--x 1, now 2"):
        StageRecord(path, {"a": {"x": 2}, "b": {}}).check(["b"])
    assert again.discard("a") == ["a", "b"] and again.status("a") == "new"


def test_a_record_without_an_entry_is_refused_in_one_line(tmp_path):
    """A run of an earlier version: what it depended on is not known, so it is never taken for this command's."""
    stages = StageRecord(tmp_path / "stages.json", {"a": {"x": 1}})
    stages.begin("a")
    StageRecord(tmp_path / "stages.json", {"a": {"x": 1, "y": None}}).check(["a"])
    with pytest.raises(UserError, match="earlier version, which did not record --y, now 2: .*--save_dir.*--redo a$"):
        StageRecord(tmp_path / "stages.json", {"a": {"x": 1, "y": 2}}).check(["a"])


def test_a_stage_later_than_those_selected_is_not_compared(tmp_path):
    stages = StageRecord(tmp_path / "s.json", {"a": {"x": 1}, "b": {"y": 1}})
    for stage in "ab":
        stages.begin(stage)
        stages.update(stage, done=True)
    StageRecord(tmp_path / "s.json", {"a": {"x": 1}, "b": {"y": 2}}).check(["a"])


def test_seeds_are_functions_of_position():
    assert position_seed(0, "a", 1) == position_seed(0, "a", 1) != position_seed(0, "a", 2)
    seed_position(3, "x")
    first = torch.rand(2)
    torch.rand(5)
    seed_position(3, "x")
    assert torch.equal(first, torch.rand(2))


def test_learning_rate_is_a_function_of_the_step():
    schedule = Schedule(
        epochs=4, ep_steps=20, kd_steps=10, batch_size=1, lr=0.2, momentum=0.9, weight_decay=0, warmup_epochs=1
    )
    ends_above = dataclasses.replace(schedule, lr_min=0.05)
    assert [ends_above.learning_rate(k) for k in (0, 20, 50, 80)] == pytest.approx([0.01, 0.2, 0.125, 0.05])
    assert schedule.rounds == 8 and schedule.learning_rate(0) == pytest.approx(0.01)
    assert schedule.learning_rate(19) == pytest.approx(0.2) == schedule.learning_rate(20)
    assert schedule.learning_rate(50) == pytest.approx(0.1) and schedule.learning_rate(79) < 1e-3


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.pth"
    save_checkpoint(file, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert load_checkpoint(file) == {"a": 1} and list(tmp_path.iterdir()) == [file]


def test_damaged_files_are_one_line(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"x": torch.arange(100)})
    whole = (tmp_path / "a.safetensors").read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        (tmp_path / "b.safetensors").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="b.safetensors"):
            load_tensors(tmp_path / "b.safetensors")
    save_checkpoint(tmp_path / "a.pth", {"x": torch.arange(100)})
    whole = (tmp_path / "a.pth").read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        (tmp_path / "b.pth").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="b.pth") as caught:
            load_checkpoint(tmp_path / "b.pth")
        assert "\n" not in str(caught.value)


def test_digests_name_content():
    state = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.long)}
    assert weights_digest(state) == weights_digest(dict(reversed(state.items())))
    assert weights_digest(state) != weights_digest(state | {"a": torch.arange(3.0) + 1e-6})
    assert digest(torch.zeros(2, 3)) != digest(torch.zeros(3, 2)) and digest({"x": 1}) == digest({"x": 1})


@pytest.mark.parametrize("code, word", [(errno.ENOSPC, "no space left"), (errno.EACCES, "--save_dir"), (errno.EIO, "error")])
def test_what_the_file_system_refuses_is_one_line(code, word):
    message = str(errors.explain_os_error(OSError(code, "Input/output error", "bank/x")))
    assert word in message and "bank/x" in message and "\n" not in message


def test_a_terminated_run_says_how_to_go_on(tmp_path):
    code = "import time\nfrom engine.runtime.errors import run_command\ndef main():\n    print('ready', flush=True)\n    time.sleep(30)\nrun_command(main)"
    for number, expected in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(20) == expected and "same command again" in process.stderr.read()
