"""Exported students (the folder, its readers, ONNX, the hub), and the evaluation of any model."""

import json
import re
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from engine.evaluate import main as evaluate_main
from engine.export import TOLERANCE, network_source
from engine.export import main as export_main
from engine.networks.trained import open_trained, weights_of_run
from engine.runtime.errors import UserError
from engine.runtime.tensors import load_checkpoint
from registry import MODELS
from tests.conftest import ROOT, TINY, TINY_TASK, dataset_info
from tests.data.trees import write_folders

DOCS = (ROOT / "docs" / "export.md").read_text()
LINES = next(block for block in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL) if "load_file" in block)


def run_main(main, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    main()


@pytest.fixture
def export(monkeypatch):
    return lambda *arguments: run_main(export_main, monkeypatch, *arguments)


@pytest.fixture
def measure(monkeypatch):
    return lambda *arguments: run_main(evaluate_main, monkeypatch, *arguments, "--gpu", -1)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def logits_of_run(run, images):
    """Logits of a run's student, computed from its checkpoint without the export."""
    student = open_trained(MODELS, str(run))
    mean, std = (torch.tensor(student.about[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return student.network.eval()((images - mean) / std)


def test_the_ten_lines_of_the_documentation(runs, export, tmp_path, images, monkeypatch, capsys):
    """Runs the documented lines without this project's modules; their logits equal those of the run's student."""
    export(runs["resnet8"], tmp_path / "student")
    assert len([line for line in LINES.splitlines() if line.strip()]) <= 13
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("models", "engine", "network")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(ROOT))])
    (tmp_path / "lines.py").write_text(LINES)
    found = runpy.run_path(str(tmp_path / "lines.py"))
    assert "models" not in sys.modules and "engine" not in sys.modules
    with torch.no_grad():
        logits = found["model"]((images - found["mean"]) / found["std"])
    monkeypatch.undo()
    torch.testing.assert_close(logits, logits_of_run(runs["resnet8"], images))


def test_what_the_folder_holds(runs, export, tmp_path):
    export(runs["resnet8"], tmp_path / "student")
    assert {f.name for f in (tmp_path / "student").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "network.py",
    }
    config = json.loads((tmp_path / "student/config.json").read_text())
    info = dataset_info("digits")
    assert config == {
        "library_name": "datafree_kd",
        "architecture": "resnet8",
        "model_args": {},
        "num_classes": 10,
        "class_names": list(info.class_names),
        "input_size": [3, 32, 32],
        "mean": list(info.mean),
        "std": list(info.std),
    }
    result, card = json.loads((runs["resnet8"] / "result.json").read_text()), (tmp_path / "student/README.md").read_text()
    for wanted in (
        "| method | deepinv |",
        result["teacher_digest"],
        f"{result['acc1_last']:.2f} %",
        f"{result['acc1_best']:.2f} %",
        "| external prior | none |",
        result["command"],
        "license: other  # fill in",
        "Licences",
        "library_name: datafree_kd",
    ):
        assert wanted in card
    assert "{" not in card


@pytest.mark.parametrize("student", ["resnet8", "timm:test_convnext", "torchvision:mobilenet_v3_small"])
def test_the_folder_is_read_back_and_onnx_agrees(student, runs, export, tmp_path, images, capsys):
    import onnxruntime

    export(runs[student], tmp_path / "student", "--onnx")
    difference, of = re.search(
        r"differ from PyTorch's by at most (\S+) on 64 images \((.+)\)", capsys.readouterr().out
    ).groups()
    assert float(difference) <= TOLERANCE and of == "random pixels"  # because a bank of six images is too small
    wanted = logits_of_run(runs[student], images)
    session = onnxruntime.InferenceSession(str(tmp_path / "student/model.onnx"))
    for count in (1, 4):
        (found,) = session.run(None, {"images": images[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), wanted[:count], rtol=0, atol=TOLERANCE)
    back = open_trained(MODELS, str(tmp_path / "student"))
    assert back.about["image_size"] == 32 and back.about["class_names"] == list(dataset_info("digits").class_names)
    state = back.network.state_dict()
    assert all(
        torch.equal(tensor, state[key])
        for key, tensor in load_checkpoint(runs[student] / "student.pth")["state_dict"].items()
    )


def test_timm_loads_a_student_of_timm(runs, export, tmp_path, images):
    import timm

    export(runs["timm:test_convnext"], tmp_path / "student")
    network = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True).eval()
    assert network.pretrained_cfg["label_names"] == list(dataset_info("digits").class_names)
    data = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(network((images - mean) / std), logits_of_run(runs["timm:test_convnext"], images))
    assert data["input_size"] == (3, 32, 32) and not (tmp_path / "student/network.py").exists()


def test_an_exported_folder_is_a_teacher(runs, export, command, tmp_path):
    export(runs["resnet8"], tmp_path / "student")
    flags = TINY_TASK.replace("--teacher resnet8", f"--teacher local-dir:{tmp_path / 'student'}")
    command("datafree_kd", f"--method deepinv {flags} {TINY['deepinv']} --save_dir {tmp_path / 'next'}")
    assert "32 px" in json.loads((tmp_path / "next/result.json").read_text())["dataset_identity"]
    command("train_scratch", f"--model local-dir:{tmp_path / 'student'} --dataset digits --evaluate_only --gpu -1")


@pytest.mark.parametrize("name", [n for n, target in MODELS.items() if not target.startswith("models.imagenet:")])
def test_the_source_of_every_network_stands_alone(name, tmp_path):
    text = network_source(MODELS, name)
    assert not re.search(r"^\s*(from|import) (models|engine|datafree|registry)\b", text, re.MULTILINE)
    (tmp_path / "network.py").write_text(text)
    with torch.device("meta"):
        factory = runpy.run_path(str(tmp_path / "network.py"))[name]
        made, wanted = factory(num_classes=7).state_dict(), open_network(name).state_dict()
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in wanted.items()}


def open_network(name):
    from tests.conftest import build_network

    return build_network(name, 7)


def test_a_folder_is_whole_or_absent(runs, export, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already and is not an empty folder"):
        export(runs["resnet8"], tmp_path / "mine")
    monkeypatch.setattr("engine.export.TOLERANCE", -1.0)
    with pytest.raises(UserError, match=r"differ from PyTorch's by .*at most -1 wanted"):
        export(runs["resnet8"], tmp_path / "student", "--onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["mine"] and len(list((tmp_path / "mine").iterdir())) == 1


def test_what_is_no_finished_run_is_refused(runs, export, tmp_path):
    with pytest.raises(UserError, match="has no finished run"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="nowhere does not exist; give a run folder"):
        export(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match=rf"give one of its folders \(.*{runs['resnet8'].name}"):
        export(runs["resnet8"].parent, tmp_path / "out")
    with pytest.raises(UserError, match="student.pth is a file, a run folder wanted; .* checkpoints/scratch"):
        export(runs["resnet8"] / "student.pth", tmp_path / "out")
    shutil.copytree(runs["resnet8"], tmp_path / "run")
    state = load_checkpoint(tmp_path / "run/student.pth")
    (tmp_path / "run/sha256.txt").unlink()
    torch.save(state | {"arch": "os:getcwd"}, tmp_path / "run/student.pth")
    with pytest.raises(
        UserError,
        match="has the architecture os:getcwd, and code that only a file names is never run; give --arch 'os:getcwd'",
    ):
        export(tmp_path / "run", tmp_path / "out")


@pytest.fixture
def copied_run(runs, tmp_path):
    """A copy of a run whose files may be changed."""
    shutil.copytree(runs["resnet8"], tmp_path / "run")
    (tmp_path / "run/sha256.txt").unlink()
    return tmp_path / "run"


def test_the_card_repeats_no_deletion_and_no_break_of_a_name(copied_run, export, tmp_path):
    result = json.loads((copied_run / "result.json").read_text())
    result |= {"command": "python datafree_kd.py --redo distill --seed 1 --redo", "teacher": "a|b\nc"}
    (copied_run / "result.json").write_text(json.dumps(result))
    export(copied_run, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "```\npython datafree_kd.py --seed 1\n```" in card and r"| teacher | a\|b\nc, weights " in card
    assert "| measured on | digits: 10 classes " in card and "10 classes: 0: 0, 1: 1" in card
    (copied_run / "result.json").write_text(json.dumps(result | {"external_prior": "real training images"}))
    export(copied_run, tmp_path / "kd")
    assert "not data-free" in (tmp_path / "kd/README.md").read_text()


@pytest.mark.parametrize(
    "content", [[], {"acc1_last": "high"}, {"teacher_acc1": "high"}, {"versions": ["torch"]}, {"dataset_identity": 1}]
)
def test_a_damaged_result_is_one_line(content, copied_run, export, tmp_path):
    result = json.loads((copied_run / "result.json").read_text())
    (copied_run / "result.json").write_text(json.dumps(result | content if content else []))
    with pytest.raises(UserError, match=r"result.json does not have the expected contents: .* wanted"):
        export(copied_run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_null_versions_are_unknown(copied_run, export, tmp_path):
    result = json.loads((copied_run / "result.json").read_text())
    (copied_run / "result.json").write_text(json.dumps(result | {"versions": None}))
    export(copied_run, tmp_path / "out")
    assert "versions unknown" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("count", [3, 12])
def test_class_names_must_be_as_many_as_classes(count, copied_run, runs, export, tmp_path):
    state = load_checkpoint(copied_run / "student.pth")
    torch.save(state | {"class_names": list(map(str, range(count)))}, copied_run / "student.pth")
    with pytest.raises(UserError, match=f"student.pth has {count} class names for 10 classes"):
        export(copied_run, tmp_path / "out")
    export(runs["resnet8"], tmp_path / "student")
    config = json.loads((tmp_path / "student/config.json").read_text())
    (tmp_path / "student/config.json").write_text(json.dumps(config | {"class_names": ["a"] * count}))
    with pytest.raises(UserError, match=f"config.json has {count} class names for 10 classes"):
        open_trained(MODELS, str(tmp_path / "student"))


def test_weights_move_with_their_run_folder(tmp_path, command, monkeypatch):
    run = tmp_path / "run"
    flags = f"--model resnet8 --dataset digits --epochs 1 --batch_size 600 --gpu -1 --output {run / 'w.pth'}"
    command("train_scratch", f"{flags} --save_dir {run}")
    run.rename(tmp_path / "moved")
    assert weights_of_run(tmp_path / "moved") == tmp_path / "moved/w.pth"
    run.mkdir()
    (run / "w.pth").write_text("another file")
    assert weights_of_run(tmp_path / "moved") == tmp_path / "moved/w.pth"
    (tmp_path / "moved/w.pth").unlink()
    with pytest.raises(UserError, match="has changed since its run wrote it"):
        weights_of_run(tmp_path / "moved")
    (run / "w.pth").unlink()
    with pytest.raises(UserError, match="no such file there or in .*moved; start this command"):
        weights_of_run(tmp_path / "moved")


def test_a_network_of_a_file_is_exported_with_its_source(export, tmp_path, command):
    spec = "tests/plain_network.py:plain"
    flags = f"--model {spec} --dataset digits --epochs 1 --batch_size 256 --gpu -1 --output {tmp_path / 'a.pth'}"
    command("train_scratch", f"{flags} --save_dir {tmp_path / 'run'}")
    export(tmp_path / "run", tmp_path / "student", "--arch", spec)
    assert (tmp_path / "student/network.py").read_text() == (ROOT / "tests/plain_network.py").read_text()
    assert "Trained on real images" in (tmp_path / "student/README.md").read_text()
    with pytest.raises(
        UserError,
        match="has the architecture tests/plain_network.py:plain, .*code that only a folder names is never run.*mean 0.305",
    ):
        open_trained(MODELS, str(tmp_path / "student"))


def test_the_hub_is_one_line_offline_and_gets_the_folder(runs, export, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--push_to_hub x found, ORG/NAME wanted"):
        export(runs["resnet8"], tmp_path / "a", "--push_to_hub", "x")
    with pytest.raises(UserError, match=r"org/net: the upload failed .*hf upload org/net") as caught:
        export(runs["resnet8"], tmp_path / "a", "--push_to_hub", "org/net")
    assert "\n" not in str(caught.value) and (tmp_path / "a/model.safetensors").exists()
    sent = {}

    class Hub:
        def create_repo(self, repository, exist_ok):
            return f"https://huggingface.co/{repository}"

        def upload_folder(self, *, folder_path, repo_id, commit_message):
            sent[repo_id] = sorted(file.name for file in folder_path.iterdir())

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    export(runs["resnet8"], tmp_path / "b", "--push_to_hub", "org/net")
    assert sent == {"org/net": ["README.md", "config.json", "model.safetensors", "network.py"]}


# Evaluation


def test_evaluation_of_a_run_against_its_teacher(runs, measure, teacher_file, tmp_path, capsys):
    """A run folder is evaluated on its own dataset."""
    run = runs["resnet8"]
    measure(run, "--against", teacher_file, "--csv", tmp_path / "p.csv", "--json", tmp_path / "f.json")
    figures, result = json.loads((tmp_path / "f.json").read_text()), json.loads((run / "result.json").read_text())
    assert figures["acc1"] == result["acc1_last"] and figures["teacher_acc1"] == result["teacher_acc1"]
    rows = [line.split(",") for line in (tmp_path / "p.csv").read_text().splitlines()]
    assert rows[0] == ["image", "label", "predicted", "confidence", "teacher_predicted"]
    assert len(rows) - 1 == figures["images"] == sum(map(sum, figures["confusion"]))
    right = [row[1] == row[2] for row in rows[1:]]
    assert 100 * sum(right) / len(right) == pytest.approx(figures["acc1"], abs=1e-3)
    same = [row[2] == row[4] for row in rows[1:]]
    assert 100 * sum(same) / len(same) == pytest.approx(figures["agreement"], abs=1e-3)
    printed = capsys.readouterr().out
    assert f"acc1 {figures['acc1']:.2f} %" in printed and "acc1 by class" in printed and "agrees with" in printed


def test_an_evaluation_without_finite_figures_or_into_another_file_is_refused(runs, measure, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for flag, file, message in (
        ("--csv", tmp_path / "notes.txt", "was not written by this command"),
        ("--json", runs["resnet8"] / "args.json", "was not written by this command"),
        ("--json", runs["resnet8"] / "result.json", "is the name of a file of the run"),
        ("--std", "1e-320,1,1", "each at least 1e-06"),
        ("--mean", "a", "argument --mean: 'a' found, a number wanted"),
    ):
        before = file.read_bytes() if hasattr(file, "read_bytes") else b""
        with pytest.raises(UserError, match=message):
            measure(runs["resnet8"], "--dataset", "digits", flag, file)
        assert not before or file.read_bytes() == before
    state = load_checkpoint(runs["resnet8"] / "student.pth")
    state["state_dict"]["fc.weight"] = torch.full_like(state["state_dict"]["fc.weight"], 3e38)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match="gives NaN or infinite logits"):
        measure(tmp_path / "w.pth", "--dataset", "digits", "--json", tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


def test_other_classes_name_a_command_that_works(runs, measure, tmp_path):
    write_folders(tmp_path / "two", ["a", "b"], ["test"])
    file = runs["resnet8"] / "student.pth"
    with pytest.raises(UserError, match=re.escape(f"train_scratch.py --model resnet8 --resume {file} --dataset")):
        measure(file, "--dataset", "folder", "--data_root", tmp_path / "two")


def test_evaluation_of_an_exported_folder_on_folders_of_images(runs, export, measure, tmp_path, capsys):
    export(runs["resnet8"], tmp_path / "student")
    for label, name in ((3, "3"), (5, "5")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for k in range(3):
            pixels = np.random.default_rng(10 * label + k).integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"pictures/{name}/{k}.png")
    measure(tmp_path / "student", "--images", tmp_path / "pictures", "--json", tmp_path / "f.json")
    figures = json.loads((tmp_path / "f.json").read_text())
    tested = [label for label, value in enumerate(figures["class_acc1"]) if value is not None]
    assert figures["images"] == 6 and tested == [3, 5]
    measure(tmp_path / "student", "--images", tmp_path / "pictures" / "3", "--csv", tmp_path / "p.csv")
    rows = [line.split(",") for line in (tmp_path / "p.csv").read_text().splitlines()]
    assert rows[0] == ["image", "predicted", "confidence"] and len(rows) == 4 and rows[1][0].endswith("0.png")
    said = capsys.readouterr().out.split("most frequent predictions\n")[1].split()
    assert "acc1" not in said and sum(map(int, said[1::2])) == 3 and set(said[::2]) == {row[1] for row in rows[1:]}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("none --dataset digits", "there is no file or folder none; give one, a public name"),
        ("none --images {tmp}", "there is no file or folder none; give one, a public name"),
        ("{bare} --dataset digits", "does not record its architecture; give --arch NAME"),
        ("{tmp} --dataset digits", "has no finished run"),
        ("{bare} --dataset digits --images x", "give either --dataset NAME or --images FOLDER, not both"),
        ("none", "none is no run folder, .*; give --dataset NAME or --images FOLDER"),
    ],
)
def test_wrong_evaluations_are_one_line(arguments, message, measure, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": torch.zeros(10, 4)}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match=message) as caught:
        measure(*arguments.format(tmp=tmp_path, bare=tmp_path / "bare.pth").split())
    assert "\n" not in str(caught.value)
