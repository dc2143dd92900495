"""Figures of images and plots: engine.report --images and --plot."""

import json
import math
import shutil
import sys

import pytest
import torch
from PIL import Image

from datafree.losses import batch_statistics, bn_loss
from engine.report import curves, images
from engine.report.command import main
from engine.report.results import bank_stages
from engine.report.tables import image_rows, rounds_rows
from engine.runtime.errors import UserError
from engine.runtime.tensors import load_tensors
from tests.conftest import STREAMED_BYTES, make_classifier


@pytest.fixture
def report(monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr("sys.argv", ["report", *map(str, words)])
        capsys.readouterr()  # drops what the runs of the fixtures printed
        main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    teacher = make_classifier().train()
    with torch.no_grad():
        teacher(torch.rand(64, 3, 16, 16))
    return teacher.eval().requires_grad_(False)


def test_real_images_are_as_diverse_and_dense_as_themselves(teacher):
    pixels = torch.rand(40, 3, 16, 16)
    real = images.features(teacher, [pixels])
    labels = teacher(pixels).argmax(1)
    labels[:10] = (labels[:10] + 1) % 10
    found = images.compare(teacher, list(pixels.split(16)), labels, real)
    assert (found["wanted"], found["coverage"], found["diversity"], found["count"]) == (75, 1, 1, 40)
    shares = teacher(pixels).argmax(1).bincount(minlength=10) / 40
    entropy = -sum(float(p) * math.log(p) for p in shares if p)
    assert found["classes"] == pytest.approx(entropy / math.log(10), abs=1e-3)


def test_a_bn_layer_that_runs_in_training_alone_has_no_distance(teacher):
    """Like those of an auxiliary head (GoogLeNet)."""
    pixels = torch.rand(8, 3, 16, 16)
    real = images.features(teacher, [pixels])
    before = images.compare(teacher, [pixels], torch.arange(8), real)
    teacher.network.auxiliary = torch.nn.BatchNorm2d(4)
    assert images.compare(teacher, [pixels], torch.arange(8), real) == before


def test_one_image_again_and_again_is_neither(teacher):
    pixels = torch.rand(40, 3, 16, 16)
    found = images.compare(
        teacher, [pixels[:1].expand(40, -1, -1, -1)], torch.full((40,), -1), images.features(teacher, [pixels])
    )
    assert found["wanted"] is None and found["classes"] == 0 and found["coverage"] < 0.5
    assert found["diversity"] == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize("count, constant", [(1, False), (3, False), (40, True)])
def test_few_or_equal_test_images_have_fewer_measures(count, constant, teacher):
    pixels = torch.rand(1 if constant else count, 3, 16, 16).expand(count, -1, -1, -1)
    real = images.features(teacher, [pixels])
    found = images.compare(teacher, [torch.rand(40, 3, 16, 16)], torch.zeros(40), real)
    assert found["count"] == 40 and found["bn_distance"] > 0
    assert (found["diversity"] is None) == (count == 1 or constant) and (found["density"] is None) == (count < 40)
    about = {"method": "m", "folder": "a", "seed": 0, "acc1_last": 1.0}
    (row,) = image_rows([[about | {"image_figures": found}]])
    assert row["density"] == ("" if count < 40 else row["density"]) and row["BN distance"]


def test_test_images_that_all_occur_twice_have_no_diversity(teacher):
    real = images.features(teacher, [torch.rand(10, 3, 16, 16)]).repeat(2, 1)
    found = images.compare(teacher, [torch.rand(20, 3, 16, 16)], torch.zeros(20), real)
    assert found["diversity"] is None and found["density"] is not None


@pytest.mark.parametrize("text", ['{"args": {"data', "[]", '{"args": {"dataset": "digits"}}', '{"args": {"init_bank": 1}}'])
def test_damaged_flags_are_one_line(text, copied, report):
    folder = copied("dfq")
    (folder / "args.json").write_text(text)
    with pytest.raises(UserError, match="args.json"):
        report(folder, "--images")


def test_the_bn_distance_is_that_of_all_images_at_once(teacher):
    """The distance equals the BN loss of DeepInversion on one batch of all images, however they are split."""
    pixels, layers, seen = torch.rand(30, 3, 16, 16), [], []
    layers = [m for m in teacher.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    hooks = [m.register_forward_pre_hook(lambda m, args: seen.append(batch_statistics(args[0]))) for m in layers]
    teacher(pixels)
    [hook.remove() for hook in hooks]
    expected = float(bn_loss(seen, [(m.running_mean, m.running_var) for m in layers]))
    with images.Statistics(teacher) as statistics:
        for part in pixels.split(7):
            teacher(part)
    assert statistics.distance() == pytest.approx(expected, rel=1e-3)


def test_training_images(finished, distill, tmp_path, monkeypatch):
    seen, labels = images.training_images(finished("csd"))
    assert seen.shape == (24, 3, 16, 16) and seen.dtype == torch.uint8 and labels.min() >= 0  # 2 + 2 rounds of 6
    assert len(images.training_images(finished("dda"))[1]) == 48  # and two variants of each of the first 12
    distill("csd", tmp_path / "second", f"--init_bank {finished('csd')}")  # the rounds of that run are none of this one's
    assert len(images.training_images(tmp_path / "second")[1]) == 24
    assert [len(bank.read(stage)["labels"]) for bank, stage in bank_stages(tmp_path / "second", str(finished("csd")))] == [
        12,
        12,
    ]
    seen, labels = images.training_images(finished("dfq"))
    assert len(seen) == 100 and set(labels.tolist()) == {-1}
    monkeypatch.setattr("engine.loops.stages.STREAMED_BYTES", STREAMED_BYTES)
    distill("kd", tmp_path / "kd")
    kept = load_tensors(tmp_path / "kd" / "images.safetensors")
    assert kept["images"].shape == (1000, 3, 16, 16) and set(kept["labels"].tolist()) == set(range(10))


def test_a_table_from_folders_and_from_lines(finished, report, tmp_path, monkeypatch):
    runs = [finished(method) for method in ("csd", "dfq")]
    text = report(*runs, "--images")
    header, _, *rows = text.splitlines()
    assert header.split("  ")[0].strip() == "method" and "teacher acc1 %" in header and "diversity" in header
    assert sorted(row.split()[0] for row in rows) == ["csd", "dfq"]
    lines = tmp_path / "lines.jsonl"
    report(*runs, "--images", "--lines", lines)
    assert all(json.loads(line)["image_figures"]["count"] for line in lines.read_text().splitlines())
    assert report(lines, "--images") == text
    with pytest.raises(UserError, match="--images makes no plot"):
        report(lines, "--images", "--plot", tmp_path / "plot.png")
    said = report(lines, "--images", "--csv", tmp_path / "table.csv", "--html", tmp_path / "page.html")
    assert "teacher acc1 %" in (tmp_path / "table.csv").read_text().splitlines()[0] and "table.csv: 2 rows" in said
    assert "images: coverage" in (tmp_path / "page.html").read_text()
    report(*runs, "--lines", tmp_path / "without.jsonl")
    with pytest.raises(UserError, match="no run has figures of its images"):
        report(tmp_path / "without.jsonl", "--images")


def test_a_run_that_kept_no_image_is_told(copied):
    folder = copied("dfq")
    (folder / "images.safetensors").unlink()
    with pytest.raises(UserError, match="neither a bank nor images.safetensors"):
        images.training_images(folder)


@pytest.mark.parametrize("x", ["steps", "minutes", "cpu_minutes"])
def test_a_plot_of_all_runs(x, finished, report, tmp_path):
    out = report(finished("csd"), finished("dfq"), "--plot", tmp_path / "plot.png", "--x", x)
    assert "2 lines\n" in out
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 900


def test_a_plot_shows_a_dollar_as_it_is(tmp_path):
    lines = [{"acc1": 10.0, "student_steps": 1}, {"acc1": 20.0, "student_steps": 2}]
    about = {"method": "$x_{$", "dataset": "d", "teacher": "t", "student": "s", "seed": 0, "history": lines}
    assert curves.plot([[about]], tmp_path / "p.svg") == 1


def test_long_names_leave_room_for_the_curves(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    about = {"method": "dda " + "--a_flag 1 " * 20, "dataset": "d", "teacher": "t", "student": "s", "seed": 0}
    save, shares = Figure.savefig, []

    def savefig(figure, *words, **named):
        save(figure, *words, **named)
        shares.append(figure.axes[0].get_position().width)

    monkeypatch.setattr(Figure, "savefig", savefig)
    curves.plot([[about | {"history": history(10, 20)}]], tmp_path / "p.png")
    assert shares[0] > 0.5


def history(*acc1):
    return [{"acc1": value, "student_steps": 10 * (k + 1), "minutes": k / 2} for k, value in enumerate(acc1)]


def test_lines_are_means_over_seeds_the_best_first():
    about = {"dataset": "d", "teacher": "t", "student": "s", "settings": {}, "folder": "x/seed0"}
    groups = [
        [
            about | {"method": "a", "seed": 0, "history": history(10, 20)},
            about | {"method": "a", "seed": 1, "history": history(20, 40)},
        ],
        [about | {"method": "b", "seed": 0, "history": history(50, 60)}],
        [about | {"method": "c", "seed": 0, "history": [{"acc1": 3.0}]}],
    ]
    lines = curves.lines_of(groups, "student_steps", folders=False)
    assert lines == [("b", [10, 20], [50, 60], [50, 60], [50, 60]), ("a", [10, 20], [15, 30], [10, 20], [20, 40])]


def test_rows_with_the_same_flags_are_named_by_their_networks():
    about = {"dataset": "d", "student": "s", "settings": {}, "seed": 0, "history": history(1, 2), "acc1_last": 2.0}
    measures = {"wanted": 1.0}
    groups = [
        [about | {"method": m, "teacher": t, "image_figures": measures}] for m, t in (("a", "t"), ("a", "u"), ("b", "t"))
    ]
    names = ["a (t)", "a (u)", "b"]
    assert [name for name, *_ in curves.lines_of(groups, "student_steps", folders=False)] == names
    assert [row["method"] for row in image_rows(groups)] == names
    assert [row["acc1 after student steps"] for row in rounds_rows(groups)] == names


def test_what_a_plot_cannot_be(finished, report, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"plot.jpeg found, a name that ends in .png"):
        report(finished("dfq"), "--plot", tmp_path / "plot.jpeg")
    old = tmp_path / "old"
    shutil.copytree(finished("dfq"), old)
    (old / "times.jsonl").unlink()
    with pytest.raises(UserError, match="no run has recorded its accuracies by minutes"):
        report(old, "--plot", tmp_path / "plot.png", "--x", "minutes")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="matplotlib, which is not installed"):
        report(finished("dfq"), "--plot", tmp_path / "plot.png")
