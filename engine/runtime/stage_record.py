"""The record of a run's stages: each is new, incomplete or done, with the flags and inputs that its result depends on."""

import time
from pathlib import Path
from typing import Any

import torch

from engine.runtime.errors import UserError
from engine.runtime.files import read_json, write_json
from engine.runtime.schema import COUNT, SECONDS, require

FACTS = {"files?": {str: COUNT}}  # of a done stage: {pattern of its outputs: number of files}, and further facts
RECORD = {
    str: {
        "status": str, "depends_on": dict, "inputs?": {str: str}, "seconds": SECONDS, "facts": FACTS, "threads?": COUNT
    }
}  # fmt: skip


def read_record(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the contents of a ``stages.json``; {} if there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    record = read_json(path) if path.exists() else {}
    require(record, RECORD, str(path))
    if wrong := [entry["status"] for entry in record.values() if entry["status"] not in ("incomplete", "done")]:
        raise UserError(
            f"{path} has a stage with the status '{wrong[0][:30]}', incomplete or done wanted; restore it from a copy"
        )
    return record


class StageRecord:
    """The record ``stages.json`` of a run folder.

    A done stage is skipped and an incomplete stage is resumed. Both require that its flags and inputs, and those of the
    stages before it, have not changed. A changed flag is an error that names the flag.

    Args:
        path: path of ``stages.json``.
        dependencies: {stage: {flag or input: value}} of this command, in the order of the stages.
        inputs: {stage: {flag: digest of the files that it names}}, as far as the digests are known.
        redo: flag that makes a stage again, for error messages.
    """

    def __init__(
        self,
        path: Path,
        dependencies: dict[str, dict[str, Any]],
        inputs: dict[str, dict[str, str]] | None = None,
        redo: str = "--redo {stage}",
    ):
        self.path, self.dependencies, self.inputs, self.redo = path, dependencies, inputs or {}, redo
        self.record = read_record(path)
        self.started: dict[str, float] = {}

    def check(self, selected: list[str]) -> None:
        """Compares the recorded stages, up to the last selected one, with the flags and inputs of this command.

        Raises:
            UserError: a flag or an input has changed, or the folder has a stage of another command.
        """
        order, folder = list(self.dependencies), self.path.parent
        method = next(iter(self.dependencies.values()), {}).get("method")
        for stage, entry in self.record.items():
            other = entry["depends_on"].get("method")
            if stage not in order and other != method:  # --init_bank and --init_variants take stages from a method
                raise UserError(
                    f"{folder} has a stage {stage}{f' of --method {other}' if other else ''}, which this command does not "
                    "have; give another --save_dir"
                )
        for stage in order[: max(map(order.index, selected), default=-1) + 1]:
            if stage not in self.record:
                continue
            status, before = self.record[stage]["status"], self.record[stage]["depends_on"]
            now = self.dependencies[stage]
            again = "give another --save_dir, or run it and all later stages again with " + self.redo.format(stage=stage)
            for name in sorted(before, key=lambda name: name != "method"):  # another method has other flags
                if before[name] != now.get(name):
                    raise UserError(
                        f"stage {stage} in {folder} is {status} with --{name} {show(before[name])}, now "
                        f"{show(now.get(name))} is given; give the former value, {again}"
                    )
            if unknown := [name for name in now if name not in before and now[name] is not None]:
                raise UserError(
                    f"stage {stage} in {folder} was made by an earlier version, which did not record --{unknown[0]}, now "
                    f"{show(now[unknown[0]])}: the stage may not fit this command; {again}"
                )
            known = self.record[stage].get("inputs") or {}
            for name, digest in self.inputs.get(stage, {}).items():
                if known.get(name, digest) != digest:
                    raise UserError(
                        f"stage {stage} in {folder} is {status} with other files in --{name} {show(now[name])}: they have "
                        f"changed since; restore them, {again}"
                    )

    def status(self, stage: str) -> str:
        """Returns the state of a stage: "new", "incomplete" or "done"."""
        return self.record.get(stage, {}).get("status", "new")

    def begin(self, stage: str) -> None:
        """Records a new stage as incomplete, and starts its clock at the seconds that earlier commands took."""
        self.record.setdefault(
            stage, {"status": "incomplete", "depends_on": self.dependencies[stage], "seconds": 0.0, "facts": {}}
        )
        self.record[stage].setdefault("threads", torch.get_num_threads())
        if self.inputs.get(stage):
            self.record[stage].setdefault("inputs", self.inputs[stage])
        self.started[stage] = time.monotonic() - self.record[stage]["seconds"]
        write_json(self.path, self.record)

    def reopen(self, stage: str) -> None:
        """Marks a done stage as incomplete, so that it is finished once more. Does not write the file."""
        self.record[stage]["status"] = "incomplete"

    def threads(self, stage: str) -> int | None:
        """Returns the number of CPU threads with which a stage was begun; None: new stage, or number unknown."""
        return self.record.get(stage, {}).get("threads")

    def update(self, stage: str, *, done: bool = False, **facts: Any) -> None:
        """Records the duration of a stage so far and further facts, and, with ``done``, that it is done."""
        entry = self.record[stage]
        entry["seconds"] = round(time.monotonic() - self.started[stage], 3)
        entry["facts"].update(facts)
        if done:
            entry["status"] = "done"
        write_json(self.path, self.record)

    def from_on(self, stage: str) -> list[str]:
        """Returns the names of a stage and of all later stages."""
        order = list(self.dependencies)
        return order[order.index(stage) :]

    def forget(self, stage: str) -> None:
        """Removes a stage and all later stages from the record in memory. Does not write the file."""
        for name in self.from_on(stage):
            self.record.pop(name, None)

    def discard(self, stage: str) -> None:
        """Removes a stage and all later stages from the record and its file."""
        self.forget(stage)
        if self.path.exists():
            write_json(self.path, self.record)

    def fact(self, stage: str, name: str) -> Any:
        """Returns a fact of a stage that ``update`` recorded; None if there is none."""
        return self.record.get(stage, {}).get("facts", {}).get(name)

    def seconds(self) -> dict[str, float]:
        """Returns {stage: seconds} over all commands so far."""
        return {stage: entry["seconds"] for stage, entry in self.record.items()}


def show(value: Any) -> str:
    """Returns the value of a flag as a user writes it on the command line."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "unset" if value is None else str(value)
