"""Fixtures of the tests of engine.export and engine.evaluate."""

import sys

import pytest

from engine.evaluate import main as evaluate_main
from engine.export import main as export_main
from tests.conftest import ROOT, TINY, TINY_TASK


def run_main(main, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    main()


@pytest.fixture
def export(monkeypatch):
    return lambda *arguments: run_main(export_main, monkeypatch, *arguments)


@pytest.fixture
def measure(monkeypatch):
    return lambda *arguments: run_main(evaluate_main, monkeypatch, *arguments, "--gpu", -1)


@pytest.fixture(scope="session")
def runs(tmp_path_factory, teacher_file):
    """A finished run of each kind of student, made once: {student: run folder}."""
    import datafree_kd

    folders, patch = {}, pytest.MonkeyPatch()
    patch.chdir(ROOT)
    for student in ("resnet8", "timm:test_convnext", "torchvision:mobilenet_v3_small"):
        folders[student] = tmp_path_factory.mktemp("runs") / "run"
        task = TINY_TASK.replace("--student resnet8", f"--student {student} --image_size 32")
        flags = f"--method deepinv {task} --teacher_ckpt {teacher_file} {TINY['deepinv']} --save_dir {folders[student]}"
        patch.setattr(sys, "argv", ["datafree_kd.py", *flags.split()])
        datafree_kd.main()
    patch.undo()
    return folders
