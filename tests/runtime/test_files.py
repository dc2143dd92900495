"""Files are written whole or not at all, and a damaged file is reported in one line."""

import os

import pytest
import torch

from engine.runtime.errors import UserError
from engine.runtime.files import atomic_path, require_output, write_json
from engine.runtime.tensors import digest, load_checkpoint, load_tensors, save_checkpoint, save_tensors, weights_digest


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


def test_a_link_stays_a_link_and_a_file_keeps_its_mode(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "a.txt", tmp_path / "link.txt"
    link.symlink_to(target)
    for text in ("first", "second"):
        with atomic_path(link) as temporary:
            temporary.write_text(text)
        assert link.is_symlink() and target.read_text() == text
        target.chmod(0o640)
    assert target.stat().st_mode & 0o777 == 0o640 and len(list(tmp_path.rglob("*"))) == 3


def test_what_may_not_be_replaced_stays(tmp_path):
    (tmp_path / "a.csv").write_text("mine")
    (tmp_path / "a.csv").chmod(0o400)
    os.mkfifo(tmp_path / "fifo")
    for path, message in (
        (tmp_path / "a.csv", "read-only"),
        (tmp_path / "fifo", "not a regular file"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(UserError, match=message), atomic_path(path):
            raise AssertionError("it was opened")
    assert (tmp_path / "a.csv").read_text() == "mine" and sorted(f.name for f in tmp_path.iterdir()) == ["a.csv", "fifo"]


def test_an_output_replaces_only_a_file_of_its_kind(tmp_path):
    for name, text in (("notes.txt", "mine"), ("result.json", "{}"), ("old.json", '{"model": 1}'), ("t.csv", "")):
        (tmp_path / name).write_text(text)
    for name in ("new", "t.csv", "notes.csv"):
        require_output("--csv", tmp_path / name, (".csv",))
    require_output("--json", tmp_path / "old.json", (".json",), ("model",))
    for flag, name, fields in (("--csv", "notes.txt", ()), ("--json", "result.json", ("model",)), ("--csv", "old.json", ())):
        with pytest.raises(UserError, match=f"{flag} .*{name} exists and was not written by this command"):
            require_output(flag, tmp_path / name, (f".{flag[2:]}",), fields)
    (tmp_path / "sha256.txt").touch()
    for name in ("student.pth", "confusion.json"):
        with pytest.raises(UserError, match="is the name of a file of the run"):
            require_output("--csv", tmp_path / name, (".csv", ".json"))


def test_no_number_in_a_json_file_is_nan(tmp_path):
    with pytest.raises(UserError, match="a.json was not written, because a number in it is NaN or infinite"):
        write_json(tmp_path / "a.json", {"x": [float("nan")]})
    assert not list(tmp_path.iterdir())
