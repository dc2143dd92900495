"""No command deletes, renames or overwrites a file that this program did not make."""

import hashlib
import json
import os

import pytest
import torch
from PIL import Image

from datafree import bank as bank_module
from datafree.diffusion import glyphs
from engine.data.image_bank import ImageBank, Manifest
from engine.runtime.errors import UserError
from engine.runtime.files import (
    TEMPORARY,
    atomic_folder,
    atomic_path,
    claim_folder,
    delete_files,
    delete_temporaries,
    is_temporary,
)
from engine.runtime.run import Run
from tests.conftest import TINY, TINY_TASK, build_network

FOREIGN = (
    "a.tmp", ".a.tmp", "bank.tmp", ".student.pth.tmp", ".args.json.k2j4h6g8.tmp", f"notes{TEMPORARY}", f".x{TEMPORARY}",
    f".x.SHOUTING{TEMPORARY}", f".x.12345678{TEMPORARY}.bak", ".lock.old", "student.pth.bak",
)  # fmt: skip
OURS = f".student.pth.abcd_012{TEMPORARY}"


def tree(folder):
    """{name: digest of a file or target of a link} for everything below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def scatter(folder):
    """Writes files of others, some with names like temporary files, into a folder and makes it if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FOREIGN:
        (folder / name).write_text(f"{name} of somebody else")


def open_and_close(folder):
    Run(folder, {}).close()


def test_the_names_of_temporary_files_are_known_again(tmp_path):
    with atomic_path(tmp_path / "x.pth") as temporary:
        assert is_temporary(temporary)
    with atomic_folder(tmp_path / "folder") as temporary:
        assert temporary.name.endswith(TEMPORARY)
    scatter(tmp_path)
    assert not any(is_temporary(path) for path in tmp_path.iterdir())


def test_a_run_deletes_its_own_temporary_files_only(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    open_and_close(run)
    for folder in (run, run / "bank", run / "variants", run / "pictures", run / "notes", run / "bank" / "deeper", elsewhere):
        scatter(folder)
    (run / "notes" / OURS).write_text("not directly in a folder of the run")
    (run / "bank" / "deeper" / OURS).write_text("nor this")
    (elsewhere / OURS).write_text("behind a link")
    (run / f".x.k2j4h6g8{TEMPORARY}").symlink_to(elsewhere / "a.tmp")
    (run / "linked").symlink_to(elsewhere)
    (run / f".y.k2j4h6g8{TEMPORARY}").mkdir()
    before = tree(tmp_path)
    for folder in (run, run / "bank", run / "variants", run / "pictures"):
        (folder / OURS).write_text("half a file")
    open_and_close(run)
    assert {k: v for k, v in tree(tmp_path).items() if k != "run/args.json"} == {
        k: v for k, v in before.items() if k != "run/args.json"
    }


@pytest.mark.parametrize("name", ["bank", "variants", "pictures"])
def test_a_linked_folder_of_a_run_is_not_swept(name, tmp_path):
    open_and_close(tmp_path / "run")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / OURS).write_text("perhaps another run's")
    (tmp_path / "run" / name).symlink_to(tmp_path / "disk")
    open_and_close(tmp_path / "run")
    assert (tmp_path / "disk" / OURS).exists()
    delete_temporaries(tmp_path / "run" / name)
    assert (tmp_path / "disk" / OURS).exists()


@pytest.mark.parametrize("content", ["{}", "[]", '{"args": 3}', "no json", '{"train": {"status": "done"}}'])
def test_a_folder_of_others_is_refused_and_left_as_it_is(content, tmp_path):
    scatter(tmp_path / "theirs")
    for name in ("args.json", "stages.json"):
        (tmp_path / "theirs" / name).write_text(content)
    (tmp_path / "theirs" / ".lock").write_text("held")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="contains files, but not those of a run; give a new folder") as caught:
        Run(tmp_path / "theirs", {})
    assert tree(tmp_path) == before and "\n" not in str(caught.value)


def test_the_parent_of_runs_is_refused(tmp_path):
    open_and_close(tmp_path / "runs" / "seed0")
    (tmp_path / "runs" / "seed0" / OURS).write_text("of a run that is under way")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="contains files, but not those of a run"):
        Run(tmp_path / "runs", {})
    assert tree(tmp_path) == before


def test_runs_of_ours_are_taken_up(tmp_path):
    (tmp_path / "empty").mkdir()
    open_and_close(tmp_path / "empty")
    (tmp_path / "killed").mkdir()  # killed before it had written a whole file
    for name in (".lock", f".args.json.k2j4h6g8{TEMPORARY}"):
        (tmp_path / "killed" / name).write_text("")
    open_and_close(tmp_path / "killed")
    assert not any(map(is_temporary, (tmp_path / "killed").iterdir()))
    (tmp_path / "empty" / "args.json").unlink()
    stages = {"train": {"status": "incomplete", "depends_on": {}, "seconds": 0, "facts": {}}}
    (tmp_path / "empty" / "stages.json").write_text(json.dumps(stages))
    open_and_close(tmp_path / "empty")


def test_redo_deletes_what_the_stages_have_made(distill, copied):
    run = copied("csd")
    for folder in (run, run / "bank", run / "bank" / "mine"):
        scatter(folder)
    names = ("bank/synthesize-first.png", "bank/distill-notes.txt", "bank/distill-my-notes.safetensors", "results.json")
    mine = [run / name for name in names]
    for path in mine:
        path.write_text("mine")
    kept = {k: v for k, v in tree(run).items() if ".tmp" in k or ".old" in k or ".bak" in k or run / k in mine}
    distill("csd", run, "--redo synthesize --init_g_steps 3")
    after = tree(run)
    assert {k: after.get(k) for k in kept} == kept and (run / "result.json").exists()


def test_redo_leaves_no_empty_folder(tmp_path):
    (tmp_path / "bank").mkdir()
    for name in ("manifest.json", "synthesize-000000.safetensors"):
        (tmp_path / "bank" / name).write_text("")
    delete_files(tmp_path, ["bank/manifest.json", "bank/synthesize-*.safetensors", "nothing.pth"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("link", ["bank", "bank/synthesize-000000.safetensors"])
def test_redo_deletes_nothing_through_a_link(link, distill, copied, tmp_path):
    run = copied("csd")
    (tmp_path / "disk").mkdir()
    moved = tmp_path / "disk" / "moved"
    (run / link).rename(moved)
    (run / link).symlink_to(moved)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=f"{link} is a link"):
        distill("csd", run, "--redo synthesize")
    after = tree(tmp_path)
    assert all(
        after[k] == v for k, v in before.items() if k.endswith((".safetensors", ".pth", "result.json", "stages.json"))
    )


def test_trained_weights_replace_no_other_file(command, tmp_path):
    output = tmp_path / "teacher.pth"
    flags = f"--model resnet8 --dataset digits --epochs 1 --batch_size 600 --gpu -1 --output {output} --save_dir {tmp_path / 'run'}"
    output.write_text("a thesis")
    with pytest.raises(UserError, match="teacher.pth exists and is not from this run; give another --output"):
        command("train_scratch", flags)
    with pytest.raises(UserError, match="teacher.pth exists and is not from this run"):
        command("train_scratch", f"{flags} --redo")
    assert output.read_text() == "a thesis"
    output.unlink()
    command("train_scratch", flags)
    before = output.read_bytes()
    command("train_scratch", f"{flags} --redo --seed 1")  # it replaces its own file
    assert output.read_bytes() != before


SCRATCH = "--model resnet8 --dataset digits --epochs 1 --batch_size 600 --gpu -1 --amp no"


def test_weights_of_another_run_are_not_replaced(command, interrupted, tmp_path):
    """Both runs have begun with the same --output, and only one of them has written the file."""
    output, run = tmp_path / "w.pth", tmp_path / "run"
    flags = f"{SCRATCH} --output {output} --save_dir {run}"
    with interrupted("engine.loops.train.evaluate", 1):
        command("train_scratch", flags)
    command("train_scratch", f"{SCRATCH} --output {output} --save_dir {tmp_path / 'other'} --seed 1")
    theirs, before = output.read_bytes(), tree(run)
    for extra in ("", "--redo", "--lr .7 --redo"):
        with pytest.raises(UserError, match="w.pth exists and is not from this run; give another --output"):
            command("train_scratch", f"{flags} {extra}")
    assert output.read_bytes() == theirs and tree(run) == before
    output.unlink()
    command("train_scratch", flags)
    output.write_bytes(theirs)  # in place of the run's own weights
    before = tree(run)
    with pytest.raises(UserError, match="w.pth exists and is not from this run"):
        command("train_scratch", f"{flags} --redo")
    assert output.read_bytes() == theirs and tree(run) == before


def test_weights_that_appear_during_the_training_are_not_replaced(command, monkeypatch, tmp_path):
    output, flags = tmp_path / "w.pth", f"{SCRATCH} --output {tmp_path / 'w.pth'} --save_dir {tmp_path / 'run'}"
    with monkeypatch.context() as patch, pytest.raises(UserError, match="w.pth exists and is not from this run"):
        patch.setattr("train_scratch.train", lambda *_: output.write_text("theirs") and [50.0])
        command("train_scratch", flags)
    assert output.read_text() == "theirs"


@pytest.mark.parametrize("earlier", [True, False])
def test_a_run_killed_after_its_last_write_knows_its_weights(earlier, command, tmp_path):
    output, run = tmp_path / "w.pth", tmp_path / "run"
    flags = f"{SCRATCH} --output {output} --save_dir {run}"
    command("train_scratch", flags)
    record = json.loads((run / "stages.json").read_text())
    facts = {"output": str(output)} if earlier else {}  # an earlier version recorded the path at the beginning
    record["train"] |= {"status": "incomplete", "facts": facts}
    (run / "stages.json").write_text(json.dumps(record))
    if earlier:
        (run / "outputs.json").unlink()
    before = output.read_bytes()
    command("train_scratch", flags)
    assert output.read_bytes() == before
    assert json.loads((run / "stages.json").read_text())["train"]["status"] == "done"


def test_a_place_for_no_weights_is_found_at_once(command, tmp_path):
    (tmp_path / "file").write_text("")
    for output, words in ((tmp_path / "file" / "w.pth", "file is no writable folder"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=f"--output .* cannot be written: .*{words}; give another --output"):
            command("train_scratch", f"{SCRATCH} --output {output} --save_dir {tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_a_refused_training_changes_no_file(command, tmp_path):
    flags = f"{SCRATCH} --output {tmp_path / 'w.pth'} --save_dir {tmp_path / 'run'}"
    command("train_scratch", flags)
    before = tree(tmp_path)
    with pytest.raises(UserError, match="--lr 0.1, now 0.5 is given"):
        command("train_scratch", f"{flags} --lr .5")
    assert tree(tmp_path) == before


def test_another_teacher_is_refused_beside_own_images(distill, copied, tmp_path):
    """--init_bank keeps the run folder's own images, so --redo distill must refuse before it deletes the student."""
    run, other = copied("csd"), tmp_path / "other"
    torch.manual_seed(1)
    torch.save({"state_dict": build_network("resnet8", 10).state_dict()}, tmp_path / "teacher.pth")
    flags = f"--teacher_ckpt {tmp_path / 'teacher.pth'}"
    distill("csd", other, f"{flags} --stages synthesize")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="bank was made with the teacher resnet8 .*another --init_bank or --save_dir"):
        distill("csd", run, f"{flags} --init_bank {other} --redo distill")
    assert tree(tmp_path) == before


def test_two_commands_do_not_share_a_folder(command, distill, copied, tmp_path):
    run, trained = copied("csd"), tmp_path / "trained"
    flags = f"{SCRATCH} --output {tmp_path / 'w.pth'} --save_dir"
    command("train_scratch", f"{flags} {trained}")
    before = tree(tmp_path)
    for extra in ("", "--redo"):
        with pytest.raises(
            UserError, match="stage synthesize of --method csd, which this command does not have; .*--save_dir$"
        ):
            command("train_scratch", f"{flags} {run} {extra}")
    for extra in ("", "--redo distill"):
        with pytest.raises(UserError, match="has a stage train, which this command does not have; give another --save_dir$"):
            distill("dafl", trained, extra)
        with pytest.raises(UserError, match="has a stage synthesize of --method csd, which this command does not have"):
            distill("dafl", run, extra)
    with pytest.raises(UserError, match="is done with --method csd, now fast is given"):
        distill("fast", run)
    assert tree(tmp_path) == before


def test_export_wants_a_new_folder(tmp_path, monkeypatch):
    bank = ImageBank(tmp_path / "bank", Manifest("d", 10, 8))
    bank.append("synthesize", 0, torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
    (tmp_path / "png" / "0").mkdir(parents=True)
    (tmp_path / "png" / "0" / "0000000.png").write_text("a photograph")
    with pytest.raises(UserError, match="not an empty folder; give a new folder"):
        bank_module.export_folders(bank, tmp_path / "png")
    assert (tmp_path / "png" / "0" / "0000000.png").read_text() == "a photograph"
    (tmp_path / "empty").mkdir()
    assert bank_module.export_folders(bank, tmp_path / "empty") == 2 and Image.open(tmp_path / "empty" / "1" / "0000001.png")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["bank", "empty", "png"]


def test_import_leaves_a_neighbour_of_its_name_alone(tmp_path, monkeypatch):
    (tmp_path / "png" / "0").mkdir(parents=True)
    (tmp_path / "png" / "0" / "a.png").write_text("no picture")
    scatter(tmp_path / "bank.tmp")
    before = tree(tmp_path)
    words = ["bank", "import", str(tmp_path / "png"), str(tmp_path / "bank"), "--dataset", "digits"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(UserError, match="a.png"):
        bank_module.main()
    assert tree(tmp_path) == before and sorted(f.name for f in tmp_path.iterdir()) == ["bank.tmp", "png"]


def test_generated_files_go_to_a_folder_of_their_own(tmp_path):
    scatter(tmp_path / "theirs")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="not an empty folder"):
        claim_folder(tmp_path / "theirs", "a")
    assert tree(tmp_path) == before
    claim_folder(tmp_path / "new", "a")
    (tmp_path / "new" / "0.png").write_text("")
    claim_folder(tmp_path / "new", "a")
    with pytest.raises(UserError, match="not an empty folder"):
        claim_folder(tmp_path / "new", "b")


def test_export_png_overwrites_no_photograph(command, teacher_file, miniature, tmp_path):
    (tmp_path / "png" / "3").mkdir(parents=True)
    (tmp_path / "png" / "3" / "0000000.png").write_text("a photograph")
    before = tree(tmp_path / "png")
    flags = (
        f"{TINY_TASK} --teacher_ckpt {teacher_file} {TINY['diffdfkd']} --adv 0 --diffusion_model {miniature('patch_prior')}"
    )
    with pytest.raises(UserError, match="png exists already and is not an empty folder"):
        command("datafree_kd", f"--method diffdfkd {flags} --save_dir {tmp_path / 'run'} --export_png {tmp_path / 'png'}")
    assert tree(tmp_path / "png") == before


def test_rendered_glyphs_replace_no_file(tmp_path, monkeypatch):
    (tmp_path / "x.npz").write_text("somebody's")
    before = tree(tmp_path)
    monkeypatch.setattr(glyphs, "find_fonts", lambda paths: [])
    monkeypatch.setattr("sys.argv", ["glyphs", "--output", str(tmp_path / "x.npz")])
    with pytest.raises(UserError, match="exists already"):
        glyphs.main()
    assert tree(tmp_path) == before
