"""The page of a report: one file with everything in it, tested in a real browser too."""

import json
import re
import shutil
import subprocess

import pytest
import torch

from engine.loops.measures import confusion, predict
from engine.report import command as report_command
from engine.report.curves import bars, curves
from engine.report.page import cautions, cautions_of_all, contents, is_loss, one_flag_a_line, sort_key
from engine.report.results import collect, group
from engine.runtime.errors import UserError
from engine.runtime.run import Run
from tests.conftest import ROOT
from tests.entry.test_report import write_result

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)

# Scripts that are put into a copy of the page, before and after its own script.
LISTEN = """<script>const faults = []; addEventListener("error", (event) => faults.push(String(event.message || event.target)), true);
console.error = (...words) => faults.push(words.join(" "));</script>"""
LOOK = """<script>addEventListener("load", () => {
const first = () => [...document.querySelectorAll(".results tbody th")].map((cell) => cell.textContent.trim());
const column = [...document.querySelectorAll(".results thead th")].findIndex((cell) => cell.textContent.trim() === "acc1");
const button = document.querySelectorAll(".results thead button")[column];
const found = {before: first()};
button.click(); found.once = first(); found.sorted = button.parentElement.ariaSort;
button.click(); found.twice = first();
document.querySelector("[data-axis=minutes]").click();
found.minutes = document.querySelectorAll(".by-minutes").length > 3 &&
  [...document.querySelectorAll(".by-minutes")].every((node) => getComputedStyle(node).display === "block");
location.hash = "#row-0";
document.querySelectorAll("details").forEach((node) => node.open = true);
found.images = document.images.length;
found.broken = [...document.images].filter((image) => !image.complete || !image.naturalWidth).length;
found.width = innerWidth; found.content = document.documentElement.scrollWidth;
found.faults = faults;
parent.postMessage(JSON.stringify(found), "*");
});</script>"""
FRAME = """<!doctype html><title>frame</title><link rel="icon" href="data:,"><pre id="found"></pre>
<script>addEventListener("message", (event) => document.getElementById("found").textContent = event.data);</script>
<iframe src="{page}" style="border: 0; width: {width}px; height: 900px"></iframe>"""  # a window has at least 500 px


def make_page(monkeypatch, folder, *places):
    file = folder / "report.html"
    monkeypatch.setattr("sys.argv", ["report", *map(str, places), "--html", str(file)])
    report_command.main()
    return file


def look(page, width):
    """What a browser finds in the page at a width in px."""
    copy = page.with_name(f"looked_at_{width}.html")
    text = page.read_text()
    copy.write_text(text.replace("<head>", f"<head>{LISTEN}", 1).replace("</body>", f"{LOOK}</body>", 1))
    frame = page.with_name(f"frame_{width}.html")
    frame.write_text(FRAME.format(page=copy.name, width=width))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1000", "--virtual-time-budget=5000"]
    options += [f"--user-data-dir={page.parent / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    called = [BROWSER, *options, frame.as_uri()]
    done = subprocess.run(called, capture_output=True, text=True, timeout=600, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def check_self_contained(page):
    text = page.read_text()
    assert page.stat().st_size < 5e6
    assert not re.search(r'(?:src|href)="(?!data:|#)|url\((?!#)|@import|https?://', text)


@pytest.fixture
def run_folders(distill, tmp_path):
    """A folder with a tiny real run that has a bank and variants, and a result without a run."""
    distill("dda", tmp_path / "runs" / "dda", "--omega 0.9")
    write_result(tmp_path / "runs" / "other", dataset="digits", method="other", acc1_last=95.0, acc1_best=96.5)
    return tmp_path / "runs"


def test_a_run_folder_holds_what_the_page_shows(run_folders, tmp_path, monkeypatch):
    """Also in a browser, wide and narrow: no errors, a table that sorts, all images, and no content beyond the width."""
    run = run_folders / "dda"
    lines, times = ([json.loads(t) for t in (run / f"{n}.jsonl").read_text().splitlines()] for n in ("metrics", "times"))
    assert [(t["stage"], t["round"]) for t in times] == [(line["stage"], line["round"]) for line in lines]
    assert all(a["seconds"] <= b["seconds"] for a, b in zip(times, times[1:]))
    found = json.loads((run / "confusion.json").read_text())
    right = sum(found["label_student"][k][k] for k in range(10))
    images = sum(map(sum, found["teacher_student"]))
    result = json.loads((run / "result.json").read_text())
    assert 100 * right / images == pytest.approx(result["acc1_last"], abs=1e-3)
    assert images == sum(map(sum, found["label_student"]))

    page = make_page(monkeypatch, tmp_path, run_folders)
    text = page.read_text()
    check_self_contained(page)
    assert text.count("kept</figcaption>") + text.count("dropped</figcaption>") == 16  # 8 of 12 sources, two variants each
    assert result["command"].split()[-1] in text and "One seed (0)" in text and "1.50 points above the last" in text
    if BROWSER is None:
        pytest.skip("no Chromium here: the page was made, but no browser has looked at it")
    for width in (1000, 400):
        seen = look(page, width)
        assert seen["faults"] == [] and seen["width"] == width and seen["content"] <= width, seen
        assert seen["images"] > 10 and seen["broken"] == 0, seen
        assert seen["sorted"] == "descending" and seen["once"][0] == "other" and seen["twice"] == seen["once"][::-1], seen
        assert seen["minutes"], seen


def test_results_kept_as_lines_make_a_page_too(tmp_path, monkeypatch):
    page = make_page(monkeypatch, tmp_path, ROOT / "checkpoints/results/sketches.jsonl")
    check_self_contained(page)
    assert "These results contain no times" in page.read_text()
    page = make_page(monkeypatch, tmp_path, ROOT / "checkpoints/results/warm.jsonl")
    assert "These results contain no times" not in page.read_text()


def test_the_page_escapes_what_it_shows(tmp_path, monkeypatch):
    write_result(tmp_path / "a", method="<b>&", command="python x.py --y '<script>'", commit="c+", versions={})
    text = make_page(monkeypatch, tmp_path, tmp_path / "a").read_text()
    assert "<b>&<" not in text and "&lt;b&gt;&amp;" in text and "&lt;script&gt;" in text
    assert "uncommitted changes (c+)" in text


def test_a_run_without_a_test_shows_its_agreement(tmp_path, monkeypatch):
    """Alone, and as a row of two seeds beside a run with a test; a command that no shell reads is shown as it is."""
    untested = {"acc1_last": None, "acc1_best": None, "acc1_mean": None, "agreement_last": 3.25, "agreement_best": 4.5}
    write_result(tmp_path / "runs" / "a", method="n", command="it's", **untested)
    line = json.dumps({"stage": "distill", "round": 0, "agreement": 3.25, "student_steps": 50})
    (tmp_path / "runs/a/metrics.jsonl").write_text(f"{line}\n")
    text = make_page(monkeypatch, tmp_path, tmp_path / "runs").read_text()
    assert "<span>agreement 3.25 %</span>" in text and "it&#39;s" in text and "commit unknown" in text
    shutil.copytree(tmp_path / "runs/a", tmp_path / "runs/b")
    result = json.loads((tmp_path / "runs/a/result.json").read_text()) | {"seed": 1}
    (tmp_path / "runs/b/result.json").write_text(json.dumps(result))
    write_result(tmp_path / "runs" / "c")
    text = make_page(monkeypatch, tmp_path, tmp_path / "runs").read_text()
    assert text.count('<td class="number">agreement 4.50</td>') == 2 and "<span>90.00 %</span>" in text


def test_a_damaged_picture_is_one_line(tmp_path):
    write_result(tmp_path / "a")
    (tmp_path / "a" / "pictures").mkdir()
    (tmp_path / "a" / "pictures" / "images.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="images.png cannot be decoded"):
        contents(group(collect([tmp_path])))


def test_cautions_name_what_is_there_and_nothing_else(tmp_path):
    write_result(tmp_path / "a", seed=0, acc1_best=90.1, commit="abc")
    write_result(tmp_path / "b", seed=1, acc1_best=90.1, commit="abc")
    write_result(tmp_path / "c", seed=2, acc1_best=90.1, commit="abc")
    (runs,) = group(collect([tmp_path]))
    moving = [{"stage": "distill", "round": k, "kd": 3.0 - k, "acc1": 50.0 + k} for k in range(3)]
    assert cautions(runs, moving, 10) == []
    stuck = [line | {"kd": 2.0} for line in moving]
    assert cautions(runs, stuck, 10) == ["kd of stage distill changed by at most 1 % (first value 2)."]
    (said,) = cautions([run | {"external_prior": "tiny"} for run in runs], moving, 10)
    assert "External prior tiny" in said
    flat = [run | {"history": [{"acc1": 10.0 + k / 10} for k in range(3)]} for run in runs]
    assert "chance level" in cautions(flat, moving, 10)[0] and "changed by less" in cautions(flat, moving, None)[0]


def test_rows_side_by_side_have_cautions_of_their_own(tmp_path):
    write_result(tmp_path / "a", teacher_digest="1", machine="x")
    write_result(tmp_path / "b", method="n", teacher_digest="2", machine="y", published=90.0)
    said = " ".join(cautions_of_all(group(collect([tmp_path]))))
    assert "2 different teachers" in said and "different machines (x, y)" in said and "Published figures" in said
    write_result(tmp_path / "c" / "d", teacher_digest="1", machine="x")
    assert cautions_of_all(group(collect([tmp_path / "c"]))) == []


def test_later_rows_do_without_pictures_where_the_page_would_grow(tmp_path, monkeypatch):
    write_result(tmp_path / "a")
    lines = [{"stage": "distill", "round": k, "kd": 1.0 / (k + 1)} for k in range(3)]
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    groups = group(collect([tmp_path]))
    (row,) = contents(groups)["rows"]
    assert row["curves"] and not row["left_out"]
    monkeypatch.setattr("engine.report.page.LIMIT", 10)
    (row,) = contents(groups)["rows"]
    assert row["left_out"] and not row["curves"]


def test_curves_take_the_colours_of_the_page():
    svg = curves([(0, [0, 1, 2], [3, 1, 2]), (9, [0, 2], [1, 1])], "steps", 'a "b" & c')
    assert "var(--series-0)" in svg and "var(--series-1)" in svg and "stroke-dasharray" in svg and "currentColor" in svg
    assert 'aria-label="a &quot;b&quot; &amp; c"' in svg
    assert "<style" not in svg and "#0" not in svg and 'id="axes' not in svg
    assert svg == curves([(0, [0, 1, 2], [3, 1, 2]), (9, [0, 2], [1, 1])], "steps", 'a "b" & c')
    assert len(curves([(0, list(range(5000)), list(range(5000)))], "x", "y")) < 20_000
    assert bars([1, 0, 3], "z").count("var(--series-0)") == 3


@pytest.mark.parametrize("text, key", [("97.40 ± 0.91", "97.40"), ("-1", "-1"), ("None", "none"), ("", "")])
def test_cells_sort_by_their_number(text, key):
    assert sort_key(text) == key


def test_times_are_no_losses():
    assert [name for name in ("round", "minutes", "cpu_minutes", "acc1", "kd") if is_loss(name)] == ["kd"]


def test_confusion_counts_pairs_of_classes():
    class Fixed(torch.nn.Module):
        def __init__(self, says):
            super().__init__()
            self.says = torch.tensor(says)

        def forward(self, images):
            return torch.nn.functional.one_hot(self.says[images[:, 0, 0, 0].long()], 3).float()

    class Four:
        labels = torch.tensor([0, 1, 2, 2])

        def __len__(self):
            return 4

        def batches(self, size):
            images = torch.arange(4.0).view(4, 1, 1, 1)
            yield images[:3], torch.tensor([0, 1, 2])
            yield images[3:], torch.tensor([2])

    student = Fixed([0, 1, 1, 2]).train()
    (said, labels), (teacher, _) = (predict(network, Four()) for network in (student, Fixed([0, 2, 2, 2])))
    assert confusion(teacher.argmax(1), said.argmax(1), 3).tolist() == [[1, 0, 0], [0, 0, 0], [0, 2, 1]]
    assert confusion(labels, said.argmax(1), 3).tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]] and student.training


def test_times_go_on_and_are_rewound_with_the_metrics(tmp_path):
    run = Run(tmp_path / "run", {})
    for round in range(3):
        run.metrics("distill", round, {"x": 1.0})
    run.close()
    file = tmp_path / "run" / "times.jsonl"
    lines = [json.loads(text) | {"seconds": 100.0} for text in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = Run(tmp_path / "run", {})
    run.rewind("distill", 2)
    run.metrics("distill", 2, {"x": 1.0})
    run.close()
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2] and lines[-1]["seconds"] >= 100


def test_a_command_has_a_line_for_each_flag():
    command = "python x.py --a 'b --c' --d"
    assert one_flag_a_line(command) == "python x.py \\\n  --a 'b --c' \\\n  --d"
    echo = one_flag_a_line(command).replace("python x.py", "printf '%s|'")
    assert subprocess.run(["bash", "-c", echo], capture_output=True, text=True).stdout == "--a|b --c|--d|"
