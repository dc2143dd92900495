"""The stages of a data-free run, in order, each skipped if done. Knows banks and methods only by what they offer."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.data.splits import load_split
from engine.loops import augment, distill, generate, synthesize
from engine.loops.evaluate import evaluate
from engine.runtime.errors import UserError
from engine.runtime.files import delete_files, load_checkpoint, read_json, save_checkpoint
from engine.runtime.precision import Precision
from engine.runtime.processes import Processes
from engine.runtime.run import Run, peak_memory
from engine.runtime.seeding import seed_position
from engine.runtime.stage_record import Stages

FIRST = ("synthesize", "generate")  # the stages that fill the initial bank; a method has one of them or none
OUTPUTS = {
    "synthesize": ("bank/manifest.json", "bank/synthesize-*.safetensors", f"bank/{synthesize.STATE}"),
    "generate": ("bank/manifest.json", "bank/generate-*.safetensors", generate.STATE),
    "augment": ("variants/manifest.json", "variants/augment-*.safetensors", "prior.pth", "filter_*.safetensors"),
    "distill": ("bank/distill-*.safetensors", "distill.pth", "student.pth", "result.json"),
}


@dataclasses.dataclass
class Pipeline:
    """One run.

    Args:
        method: ``datafree.base.Method``.
        info: ``engine.data.datasets.DatasetInfo``.
        manifest: what the banks of this run must be.
        flags: every flag of the command by name.
        open_bank: (path, manifest, create) -> image bank.
        transfer_set: (capacity, image_size, device) -> the images that the student learns from.
        filter: ``datafree.filter``.
        path: the run folder.
        run, stages: the main process's; None in the others, which read what it has written to the folder.
        processes: those that share the stages.
    """

    path: Path
    run: Run | None
    stages: Stages | None
    method: Any
    info: Any
    manifest: Any
    schedule: distill.Schedule
    flags: dict[str, Any]
    open_bank: Callable
    transfer_set: Callable
    filter: Any
    processes: Processes = Processes()
    provenance: dict[str, tuple[str, float | None]] = dataclasses.field(default_factory=dict)
    measured: dict[str, float] = dataclasses.field(default_factory=dict)
    made_with: dict[str, Any] = dataclasses.field(default_factory=dict)
    banks: dict[str, Any] = dataclasses.field(default_factory=dict)
    filtered: tuple[dict[str, Tensor], Tensor] | None = None
    omega: float | None = None

    def execute(self, selected: list[str], redo: str | None) -> None:
        """Runs the selected stages that are not done, as the main process finds."""
        for stage, done in self.processes.broadcast(self.plan(selected, redo) if self.processes.main else None):
            if not done:
                seed_position(self.flags["seed"], stage)
                getattr(self, stage)()
            elif self.processes.main:
                self.run.log(f"{stage}: done before, skipped ({self.path})")

    def plan(self, selected: list[str], redo: str | None) -> list[tuple[str, bool]]:
        """The selected stages in order and whether each is done, after what is to be made again is deleted."""
        stages = self.stages
        if redo:
            delete_files(self.path, [pattern for stage in stages.from_on(redo) for pattern in OUTPUTS[stage]])
            stages.discard(redo)
        stages.check(selected)
        return [(stage, stages.status(stage) == "done") for stage in stages.dependencies if stage in selected]

    @property
    def device(self) -> torch.device:
        return self.method.task.device

    @property
    def config(self) -> Any:
        return self.method.config

    def synthesize(self) -> None:
        synthesize.synthesize(
            self.run, self.stages, self.own_bank("synthesize"), self.method.initial_synthesizer(), self.method.student,
            rounds=self.config.init_rounds, seed=self.flags["seed"], processes=self.processes,
        )  # fmt: skip

    def generate(self) -> None:
        config, seed = self.config, self.flags["seed"]
        order = generate.Order(
            config.images_per_class * self.info.num_classes, self.info.num_classes, config.synthesis_batch_size,
            config.diffusion_batch_size, seed, Path(config.export_png) if config.export_png else None,
        )  # fmt: skip
        generate.generate(self.run, self.stages, self.own_bank("generate"), self.method.generator, order, self.processes)

    def augment(self) -> None:
        sources = self.sources()
        store = self.own_bank("augment", "variants")
        augment.augment(
            self.run, self.stages, sources, store, self.method.augmenter, self.device,
            variants=self.config.variants, batch_size=self.config.diffusion_batch_size, seed=self.flags["seed"],
            processes=self.processes,
        )  # fmt: skip
        self.kept(sources)  # cosines, mask and picture now; distill takes them up

    def transfer(self) -> tuple[Any, Any, dict[str, Any]]:
        """This run's bank, the images that are there before the first round, and figures for result.json."""
        if self.method.streams:
            return None, None, {}
        bank = self.own_bank(self.first or "distill")
        self.meet()
        bank = bank or self.open_bank(self.path / "bank", self.manifest, create=False)
        counts = {"bank_images": self.schedule.rounds * self.method.images_per_round}
        parts = []
        if self.first:
            sources = self.sources()
            parts.append((sources["images"], sources["labels"]))
            counts["bank_images"] += len(sources["labels"])
        if "augment" in self.method.stages:
            variants, keep = self.kept(sources)
            parts.append((variants["images"][keep], variants["labels"][keep]))
            counts |= {"variants": len(keep), "variants_kept": int(keep.sum()), "omega": self.omega}
        capacity = counts["bank_images"] + counts.get("variants_kept", 0)
        transfer = self.transfer_set(capacity, self.info.image_size, self.device)
        for images, labels in parts:
            transfer.add(images, labels)
        return bank, transfer, counts

    def distill(self) -> None:
        method, run = self.method, self.run
        bank, transfer, counts = self.transfer()
        test = load_split(self.info, "test", self.device) if self.processes.main else None
        if self.processes.main:
            if transfer is not None:
                run.log(transfer.description)
            teacher_acc1 = evaluate(method.teacher, test)["acc1"]
            run.log(
                f"teacher {self.flags['teacher']}: {teacher_acc1:.2f} % on the {len(test)} test images of {self.info.name}"
            )
        distillation = distill.Distillation(
            method.teacher, method.student, method.objective().to(self.device), self.synthesizer(), self.schedule,
            Precision(self.flags["amp"], self.device), method.images_per_round if bank is not None else 0,
            self.processes, method.task.compile,
        )  # fmt: skip
        figures = distill.distill(
            run, self.stages, distillation, bank, transfer, method.task.augment, test, seed=self.flags["seed"]
        )
        if not self.processes.main:
            return
        about = {
            "arch": self.flags["student"],
            "dataset": self.info.name,
            "epoch": self.schedule.epochs,
            "acc1": figures["acc1_last"],
        }
        save_checkpoint(self.path / "student.pth", {"state_dict": method.student.network.state_dict(), **about})
        if bank is None:
            counts["images"] = distillation.synthesizer.images_total or figures["student_steps"] * self.schedule.batch_size
        else:
            counts["images"] = counts["bank_images"] + counts.get("variants_kept", 0)
        names = ("method", "teacher", "student", "seed")
        settings = self.made_with | {k: v for values in self.stages.dependencies.values() for k, v in values.items()}
        self.stages.update("distill")
        run.result(
            {name: self.flags[name] for name in names}
            | {"dataset": self.info.name, "external_prior": self.external_prior(), "teacher_acc1": teacher_acc1}
            | figures | counts | self.measured
            | {"processes": self.processes.count, "seconds": self.seconds(), "settings": settings}
        )  # fmt: skip
        self.stages.update("distill", done=True)
        memory = ", ".join(f"{name.replace('_', ' ').removesuffix(' mib')} {mib} MiB" for name, mib in peak_memory().items())
        run.log(
            f"distill: acc1 {figures['acc1_last']:.2f} % (last), {figures['acc1_best']:.2f} % (best) after "
            f"{figures['student_steps']} student steps ({self.stages.seconds()['distill']:.0f} s, {memory}) -> "
            f"{self.path / 'result.json'}"
        )

    def synthesizer(self) -> Any:
        """That of the rounds, going on from where the one of the initial bank stopped, if that left a state."""
        synthesizer = self.method.synthesizer()
        if not self.processes.main:  # it makes no images
            return synthesizer
        state = self.banks[self.first].path / synthesize.STATE if self.first else None
        if state and state.exists():
            synthesizer.load_state_dict(load_checkpoint(state, "synthesizer")["synthesizer"])
        return synthesizer

    @property
    def first(self) -> str | None:
        """The stage of this method that fills the initial bank."""
        return next((stage for stage in FIRST if stage in self.method.stages), None)

    def own_bank(self, stage: str, folder: str = "bank") -> Any:
        """The bank in a folder of this run, made if there is none; None in the processes that only compute."""
        return self.open_bank(self.path / folder, self.manifest_of(stage)) if self.processes.main else None

    def meet(self) -> None:
        """Waits for the main process, whose files the others read from now on.

        Raises:
            UserError: this one does not see them.
        """
        self.processes.broadcast()
        if not (self.path / "args.json").exists():
            raise UserError(
                f"process {self.processes.rank} does not see {self.path.resolve()}, where the main one writes; give a "
                "--save_dir on a file system that all machines share"
            )

    def manifest_of(self, stage: str) -> Any:
        """For the bank that a stage of this run fills."""
        return dataclasses.replace(self.manifest, external_prior=self.method.external_priors.get(stage, "none"))

    def sources(self) -> dict[str, Tensor]:
        """images (N, 3, H, W) uint8 and labels (N,) of the initial bank: this run's, or ``--init_bank``."""
        bank = self.banks[self.first] = self.made_by(self.first, "init_bank", "bank")
        columns = bank.read(next((stage for stage in FIRST if bank.rounds(stage)), self.first))
        if not len(columns["labels"]):
            raise UserError(f"the image bank {bank.path} is empty; make images with --stages {self.first}")
        return columns

    def kept(self, sources: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The variants of ``sources`` and the mask (N * V,) of those that the filter keeps, which it also stores."""
        if self.filtered:
            return self.filtered
        store = self.made_by("augment", "init_variants", "variants")
        variants = store.read("augment")
        index = variants["source_index"]
        if int(index.max()) >= len(sources["labels"]) or not torch.equal(sources["labels"][index], variants["labels"]):
            raise UserError(f"{store.path} holds variants of another image bank; give theirs with --init_bank")

        def score(show: Callable[[int], None]) -> tuple[Tensor, float]:
            embedding = self.method.embedding()
            cosine = self.filter.cosines(embedding, sources["images"], variants["images"], index, progress=show)
            return cosine, self.filter.calibrated_omega(embedding, sources["images"], sources["labels"])

        keep = None
        if self.processes.main:
            keep, self.omega = augment.filter_variants(
                self.run, store.path, sources, variants, omega=self.config.omega, name=self.method.embedding_name,
                score=score, keep_mask=self.filter.keep_mask,
            )  # fmt: skip
        self.filtered = variants, self.processes.broadcast(keep)
        return self.filtered

    def made_by(self, stage: str, flag: str, folder: str):
        """The bank that a finished stage left in this run, or in the run or folder that ``--<flag>`` names.

        Raises:
            UserError: the stage is not done, or the bank does not fit this run.
        """
        self.meet()
        given = self.flags[flag]
        path = Path(given) if given else self.path / folder
        if given and not (path / "manifest.json").exists() and (path / folder).is_dir():
            path = path / folder
        record = path.parent / "stages.json"
        made = read_json(record) if record.exists() else {}
        stage = next((s for s in FIRST if s in made), stage) if given and stage in FIRST else stage
        entry = made.get(stage)
        if entry and entry["status"] != "done" or not given and not entry:
            advice = (
                f"run it first with --stages {stage}, or give --{flag}" if not given else "finish it with its own command"
            )
            raise UserError(f"stage {stage} in {path.parent} is {'incomplete' if entry else 'not begun'}; {advice}")
        bank = self.open_bank(path, self.manifest, create=False)
        self.provenance[stage] = (bank.manifest.external_prior, entry["seconds"] if entry else None)
        self.made_with |= entry["depends_on"] if entry else {}
        told = entry["facts"] if entry else {}
        self.measured |= {f"bank_{name}": told[name] for name in ("teacher_acc1", "loss_bn") if name in told}
        return bank

    def external_prior(self) -> str:
        """Pretrained models besides the teacher that shaped this run's images, or "none"."""
        names = {prior for prior, _ in self.provenance.values()} | {self.method.external_priors.get("distill", "none")}
        return " + ".join(sorted(names - {"none"})) or "none"

    def seconds(self) -> dict[str, float | None]:
        """{stage: seconds}; of a bank that was given, as its own run recorded it (None: not known)."""
        return {stage: seconds for stage, (_, seconds) in self.provenance.items()} | self.stages.seconds()
