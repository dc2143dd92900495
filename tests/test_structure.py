"""Rules of this project's structure: imports, names, flags and file lengths."""

import ast
import dataclasses
import re

import pytest

import registry
from engine.loops.settings import DistillFlags, RunFlags, TaskFlags
from engine.runtime.errors import resolve
from tests.conftest import ROOT

SOURCES = {p: p.read_text() for room in ("engine", "datafree", "models") for p in ROOT.glob(f"{room}/**/*.py")}
# Packages in the order of imports: each may import itself and those before it.
ROOMS = ("models", "engine.runtime", "engine.data", "engine.networks", "engine.loops", "engine", "datafree", "registry")
ENTRY_POINTS = (  # only these modules may import the registry
    "datafree.bank", "datafree.benchmark", "datafree.diffusion.train_prior", "datafree.int8", "engine.evaluate", "engine.export",
    "engine.report.images",
)  # fmt: skip


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
    """No other file of datafree/ names a method in its code, except a file that imports from the method's file."""
    for name, target in registry.METHODS.items():
        own = ROOT / (target.split(":")[0].replace(".", "/") + ".py")
        if name in ("kd", "noise", "fast"):  # words that have other meanings too
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


OWNERS = ("config", "flags", "task_flags", "run_flags", "distill_flags", "self")


def read(text):
    """Yields the names of flags that a source text may read: ``config.name``, or a name in quotes."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] in OWNERS:
            yield node.attr
        elif isinstance(node, ast.Constant):
            yield node.value


def test_every_flag_is_read_and_documented():
    found = {name for text in [*SOURCES.values(), (ROOT / "datafree_kd.py").read_text()] for name in read(text)}
    for config in configs():
        for field in dataclasses.fields(config):
            assert field.metadata["help"], field.name
            assert field.name in found, f"--{field.name} of {config.__name__} is read nowhere"


def test_the_entry_point_stays_short():
    assert len((ROOT / "datafree_kd.py").read_text().splitlines()) < 150


def test_modules_stay_short():
    tests = {path: path.read_text() for path in ROOT.glob("tests/**/*.py")}
    for path, text in (SOURCES | tests).items():
        assert len(text.splitlines()) <= 400, f"{path} is too long to read at once; split it"
