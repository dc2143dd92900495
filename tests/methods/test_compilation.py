"""Compiled steps: they equal uncompiled ones, and the conditions under which functions are compiled."""

import shutil
from unittest import mock

import pytest
import torch
from torch import nn

from datafree.csd import CSD, AlignedDistillation, CSDConfig
from datafree.generators import Generator
from engine.loops.distill import StudentStep
from engine.runtime.compilation import Compiler, _copying, _tunes_for_no_processor
from models.classifier import Output, frozen, weights_fixed
from tests.conftest import CPU, make_classifier, make_task

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler"
)


def classifier(seed, width):
    """A small network for 16 px digits with BN statistics that are not the initial ones."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(width)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    layers = nn.Conv2d(3, width, 3, 2), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)
    return make_classifier(nn.Sequential(*layers), mean=0.5, std=0.1).to(memory_format=torch.channels_last)


def relative(values, expected):
    """Norm of the difference of two lists of tensors, each concatenated to one vector, relative to the second's norm."""
    value, expected = (torch.cat([v.detach().flatten() for v in each]) for each in (values, expected))
    return float((value - expected).norm() / expected.norm())


@needs_compiler
def test_an_inversion_step_is_the_plain_one():
    """Images, losses and the gradient with respect to the noise agree with the uncompiled step."""
    torch._dynamo.reset()
    teacher, student, lines, found = frozen(classifier(0, 8)), classifier(1, 6), [], []
    for choice in ("no", "yes"):
        compiler = Compiler(choice, CPU, log=lines.append)
        torch.manual_seed(2)
        synthesizer = CSD(CSDConfig(synthesis_batch_size=20, nz=16), teacher, student, make_task()).synthesizer()
        compiler.compile_all(synthesizer.compile_targets(), 1)
        z, labels = torch.randn(20, 16, requires_grad=True), torch.arange(20) % 10
        with weights_fixed(student):
            images = synthesizer.generate(z)
            losses = synthesizer.measure(images, labels, student)
            losses["loss"].backward()
        found.append([*losses.values(), images, z.grad])
    assert len(lines) == 2 and not any("uncompiled" in line for line in lines), lines
    assert all(relative([compiled], [plain]) < 1e-4 for plain, compiled in zip(*found))


@needs_compiler
def test_a_student_step_is_the_plain_one():
    """Outputs of a teacher with constant weights, losses, and gradients of all weights agree with the uncompiled step."""
    torch._dynamo.reset()
    teacher, lines, found = frozen(classifier(0, 8)), [], []
    images, labels = torch.rand(20, 3, 16, 16).to(memory_format=torch.channels_last), torch.arange(20) % 10
    for choice in ("no", "yes"):
        compiler, student = Compiler(choice, CPU, log=lines.append), classifier(1, 6)
        torch.manual_seed(2)
        objective = AlignedDistillation(CSDConfig(), student.block_map_shape, teacher.block_map_shape)
        step = StudentStep(student, objective).train()
        with torch.no_grad():
            output = compiler(teacher, 1, "teacher", constant_weights=True)(images, return_features=True)
        losses = compiler(step, 1, "student step")(images, labels, output)
        losses["loss"].backward()
        buffers = [b for b in student.buffers() if b.is_floating_point()]
        found.append([[output.logits], [output.features], losses.values(), [p.grad for p in step.parameters()], buffers])
    assert len(lines) == 2 and not any("uncompiled" in line for line in lines), lines
    assert all(relative(compiled, plain) < 1e-4 for plain, compiled in zip(*found))


@needs_compiler
def test_gradients_of_a_generator_in_bf16_are_the_plain_ones():
    """GCC 12.2 makes wrong code of a transposition in its first BatchNorm's gradient if it does not know the processor."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    generator, lines, found = Generator(16, 32, (64, 32, 32)).to(memory_format=torch.channels_last), [], []
    z, weights = torch.randn(8, 16), torch.randn(8, 3, 32, 32)
    for choice in ("no", "yes"):
        call = Compiler(choice, CPU, lines.append)(generator, 1, "generator")
        generator.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            images = call(z)
        (images.float() * weights).sum().backward()
        found.append([parameter.grad.clone() for parameter in generator.parameters()])
    assert len(lines) == 1, lines
    assert relative(found[1], found[0]) < 0.02
    assert all(relative([compiled], [plain]) < 0.1 for plain, compiled in zip(*found))


def test_a_compiler_that_does_not_know_the_processor(monkeypatch):
    for told, expected in (("  -mtune=   \t\tgeneric\n", True), ("  -mtune=   \t\tznver3\n", False), ("", False)):
        _tunes_for_no_processor.cache_clear()
        monkeypatch.setattr("subprocess.run", lambda *_, told=told, **__: mock.Mock(stdout=told))
        assert _tunes_for_no_processor("g++") == expected
    _tunes_for_no_processor.cache_clear()


def test_a_function_that_cannot_be_compiled_runs_as_it_is(monkeypatch):
    lines = []
    monkeypatch.setattr("torch.compile", lambda function, **_: raising)
    double = Compiler("yes", CPU, lines.append)(lambda x: 2 * x, 1, "doubling")
    assert double(3) == 6 and double(4) == 8
    assert len(lines) == 2 and lines[1] == "compile: the doubling will run uncompiled: OSError: no space left on device"


def raising(*_):
    raise OSError("no space left on device\nand a traceback")


def test_its_own_errors_come_up():
    def wrong(x):
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        Compiler("yes", CPU, lambda line: None)(wrong, 1, "function")(1)


@pytest.mark.parametrize("choice, calls, compiled", [("auto", 1999, 0), ("auto", 2000, 1), ("yes", 1, 1), ("no", 9999, 0)])
def test_what_is_compiled(choice, calls, compiled):
    assert (Compiler(choice, CPU)(abs, calls, "function") is not abs) == bool(compiled)


@pytest.mark.parametrize(
    "choice, auto_graphs, expected",
    [("auto", True, True), ("auto", False, False), ("yes", True, False), ("graphs", False, True)],
)
def test_which_functions_are_cuda_graphs(monkeypatch, choice, auto_graphs, expected):
    found = []
    monkeypatch.setattr("torch.compile", lambda function, dynamic, options: found.append(options["triton.cudagraphs"]))
    compiler = Compiler(choice, torch.device("cuda"), auto_graphs=auto_graphs)
    compiler(abs, 20_000, "student step")
    compiler(abs, 20_000, "losses", keeps_tensors=True)
    Compiler(choice, CPU, auto_graphs=auto_graphs)(abs, 20_000, "student step")
    assert found == [expected, False, False]


def test_outputs_of_a_graph_are_copied():
    """The next call of a CUDA graph overwrites its outputs, so the outputs are copied."""
    place = torch.zeros(2)

    def replay(x):
        return {"loss": place.copy_(x), "named": Output(place, place, None, {(1, 1): place})}

    copying = _copying(replay)
    first, second = copying(torch.ones(2)), copying(torch.full((2,), 2.0))
    assert first["loss"].eq(1).all() and first["named"].feature_maps[1, 1].eq(1).all() and second["loss"].eq(2).all()
    weight = torch.ones(2, requires_grad=True)
    _copying(lambda x: x * weight)(torch.ones(2)).sum().backward()
    assert weight.grad.eq(1).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphs_replay_to_the_plain_results():
    device = torch.device("cuda")
    teacher, images = frozen(classifier(0, 8)).to(device), torch.rand(3, 20, 3, 16, 16, device=device)
    replayed = Compiler("graphs", device)(teacher, 1, "teacher", constant_weights=True)
    with torch.no_grad():
        found, expected = [replayed(x) for x in images], [teacher(x) for x in images]
    assert relative(found, expected) < 1e-2  # TF32


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    lines = []
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert Compiler("yes", CPU, lines.append)(abs, 1, "function") is abs
    assert lines == ["compile: the function will run uncompiled: there is no C++ compiler"]
