"""The record of stages in a run folder."""

import pytest

from engine.runtime.errors import UserError
from engine.runtime.stage_record import StageRecord


def test_stages_go_on_and_name_what_changed(tmp_path):
    path = tmp_path / "stages.json"
    stages = StageRecord(path, {"a": {"x": 1}, "b": {"y": [1, 2]}})
    stages.check(["a", "b"])
    stages.begin("a")
    assert StageRecord(path, {"a": {"x": 1}}).status("a") == "incomplete"
    stages.update("a", done=True, images=7)
    again = StageRecord(path, {"a": {"x": 1}, "b": {"y": [3]}})
    assert again.status("a") == "done" and again.fact("a", "images") == 7 and again.status("b") == "new"
    again.check(["b"])
    with pytest.raises(UserError, match="--x 1, now 2"):
        StageRecord(path, {"a": {"x": 2}, "b": {}}).check(["b"])
    again.discard("a")
    assert again.status("a") == "new" and StageRecord(path, {"a": {}}).status("a") == "new"


def test_a_record_without_an_entry_is_refused_in_one_line(tmp_path):
    """An earlier version did not record a flag, so its run is never mistaken for a run of this command."""
    stages = StageRecord(tmp_path / "stages.json", {"a": {"x": 1}})
    stages.begin("a")
    StageRecord(tmp_path / "stages.json", {"a": {"x": 1, "y": None}}).check(["a"])
    with pytest.raises(UserError, match="earlier version, which did not record --y, now 2: .*--save_dir.*--redo a$"):
        StageRecord(tmp_path / "stages.json", {"a": {"x": 1, "y": 2}}).check(["a"])


def test_a_stage_later_than_those_selected_is_not_compared(tmp_path):
    stages = StageRecord(tmp_path / "s.json", {"a": {"x": 1}, "b": {"y": 1}})
    for stage in "ab":
        stages.begin(stage)
        stages.update(stage, done=True)
    StageRecord(tmp_path / "s.json", {"a": {"x": 1}, "b": {"y": 2}}).check(["a"])
