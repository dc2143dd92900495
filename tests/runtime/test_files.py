"""Files are written whole or not at all, and a damaged file is reported in one line."""

import pytest
import torch

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
