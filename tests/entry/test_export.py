"""Exported students: the folder, its readers, ONNX, the hub."""

import json
import re
import runpy
import shutil
import sys

import pytest
import torch

from engine.export import TOLERANCE, network_source
from engine.networks.trained import open_trained, weights_of_run
from engine.runtime.errors import UserError
from engine.runtime.tensors import load_checkpoint
from registry import MODELS
from tests.conftest import ROOT, TINY, TINY_TASK, dataset_info

DOCS = (ROOT / "docs" / "export.md").read_text()
LINES = next(block for block in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL) if "load_file" in block)


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
