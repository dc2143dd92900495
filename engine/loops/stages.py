"""The three kinds of stages of a run: ``FillBank``, ``Augment`` and ``Distill``."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.data.crops import KeyedViews, Views
from engine.data.image_bank import ImageBank, to_uint8
from engine.data.splits import load_split
from engine.data.transfer_set import TransferSet
from engine.loops import distill, makers
from engine.loops.fill import STATE, Maker, fill, load_state
from engine.loops.logit_cache import LogitCache, cached_keys, check_logit_cache
from engine.loops.measures import Accuracy, Agreement, confusion, predict
from engine.loops.session import Finished, Session, Stage
from engine.runtime import checksums
from engine.runtime.errors import UserError
from engine.runtime.files import read_json, write_json
from engine.runtime.precision import Precision
from engine.runtime.processes import position_seed, seed_position
from engine.runtime.run import peak_memory
from engine.runtime.schema import require
from engine.runtime.tensors import load_tensors, save_checkpoint, save_tensors

STREAMED, STREAMED_BYTES = "images.safetensors", 2**25  # file and size limit of the sample of streamed images


@dataclass(frozen=True)
class FillBank(Stage):
    """Stage that fills the initial image bank.

    Args:
        name: "synthesize" or "generate".
        rounds: number of rounds; each writes one shard.
        maker: function that builds the maker of the images; called only if rounds are missing.
        external_prior: name of the pretrained model besides the teacher that makes the images, or "none".
    """

    name: str
    rounds: int
    maker: Callable[[Session], Maker]
    external_prior: str = "none"

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("bank/manifest.json", f"bank/{self.name}-*.safetensors", f"bank/{STATE}")

    def run(self, session: Session) -> None:
        bank = session.new_bank("bank", self.external_prior)

        def maker() -> Maker:
            made = self.maker(session)
            session.compiler.compile_all(made.compile_targets(), self.rounds)
            return made

        fill(session.run, session.record, bank, self.name, self.rounds, maker, session.processes)


@dataclass(frozen=True)
class Augment(Stage):
    """Stage that makes variants of every bank image and filters them.

    Args:
        initial: name of the stage that fills the bank.
        augmenter: function that builds a ``datafree.diffusion.variation.Augmenter``.
        variants: number V of variants per image.
        batch_size: number of images that the augmenter processes at once.
        filter: ``datafree.filter.CosineFilter``.
        external_prior: name of the pretrained model besides the teacher that the augmenter uses, or "none".
    """

    initial: str
    augmenter: Callable[[], Any]
    variants: int
    batch_size: int
    filter: Any
    external_prior: str = "none"
    name = "augment"
    outputs = ("variants/manifest.json", "variants/augment-*.safetensors", "prior.pth", "filter_*.safetensors")

    def check(self, session: Session, before: list[str]) -> None:
        if self.initial not in before:
            session.finished(self.initial)
        self.filter.check()

    def run(self, session: Session) -> None:
        sources = session.finished(self.initial).columns

        def maker() -> Maker:
            device, run = session.device, session.run
            made = makers.VariantMaker(self.augmenter(), sources, self.variants, self.batch_size, session.seed, device, run)
            session.compiler.compile_all(made.compile_targets(), rounds)
            return made

        bank = session.new_bank("variants", self.external_prior)
        rounds = -(-self.variants * len(sources["labels"]) // makers.SHARD)
        fill(session.run, session.record, bank, self.name, rounds, maker, session.processes)
        if session.processes.main:
            makers.filter_variants(session.run, bank.path, sources, bank.read("augment"), self.filter)


@dataclass(frozen=True)
class TransferImages:
    """The images that the student learns from before the first round of stage distill.

    Args:
        initial: initial bank; None: there is none.
        variants: bank of variants; None: there is none.
        parts: (images, labels) pairs: the images chosen from the initial bank, and the variants that the filter kept.
        counts: numbers of images and variants, and figures of the filter, for ``result.json``.
    """

    initial: Finished | None
    variants: Finished | None
    parts: tuple[tuple[Any, Tensor], ...]
    counts: dict[str, Any]


@dataclass(frozen=True)
class Distill(Stage):
    """Stage that trains the student on the images of earlier stages and on those that its own rounds synthesize.

    Args:
        method: ``datafree.base.Method``, which has the networks and builds synthesizer and objective.
        initial: name of the stage that fills the initial bank; None: there is none.
        filter: filter of the variants of stage augment; None: there is no such stage.
        external_prior: name of the pretrained model besides the teacher that this stage itself uses, or "none".
        images_per_class: largest number of images per class taken from the initial bank, in bank order; None: all.
        variant_labels: labels of the kept variants in the student's loss: "source" for the label of the source image,
            "teacher" for the class that the teacher predicts.
    """

    method: Any
    initial: str | None = None
    filter: Any = None
    external_prior: str = "none"
    images_per_class: int | None = None
    variant_labels: str = "source"
    name = "distill"
    outputs = ("bank/distill-*.safetensors", "distill.pth", "student.pth", STREAMED, "confusion.json", "result.json")
    checkpoint = "distill.pth"

    def check(self, session: Session, before: list[str]) -> None:
        self.method.objective()  # raises an error if it does not fit the networks
        check_logit_cache(session.flags["logit_cache"])
        if self.initial and self.initial not in before:
            session.finished(self.initial).columns
        if not self.method.streams and session.flags["init_bank"] and session.has_own_images():
            ImageBank(session.path / "bank", session.manifest, create=False)  # refuses another teacher
        if self.filter is None or "augment" in before:
            return
        variants = session.finished("augment")
        if self.initial not in before:
            self._sources_and_variants(session)
        stored = makers.stored_scores(session.path, variants.bank.path, self.filter)
        if stored is None:
            self.filter.check()
        elif self.filter.omega is not None:
            self.filter.keep(stored["cosine"], self.filter.omega, stored["teacher_labels"] == variants.columns["labels"])

    def prepare(self, session: Session) -> None:
        if not self.method.streams:
            session.new_bank("bank", self.external_prior if self.filter is None else "none")
        if self.filter is not None:
            path = session.finished("augment").bank.path
            makers.filter_variants(session.run, path, *self._sources_and_variants(session), self.filter)

    def run(self, session: Session) -> None:
        method, run, record = self.method, session.run, session.record
        processes, device = session.processes, session.device
        bank, transfer, images = None, None, TransferImages(None, None, (), {})
        if not method.streams:
            images = self._images(session)
            bank = ImageBank(session.path / "bank", session.manifest, create=False)  # also stores the images of the rounds
            capacity = images.counts["bank_images"] + images.counts.get("variants_kept", 0)
            transfer = TransferSet(capacity, session.info.image_size, device)
            for part in images.parts:
                transfer.add(*part)
        measure = None
        if processes.main:
            measure = self._measure(session)
            if transfer is not None:
                run.log(transfer.description)
        distillation = distill.Distillation(
            method.distillation_teacher(),
            method.student,
            method.objective().to(device),
            self._synthesizer(session, images.initial),
            session.schedule,
            Precision(session.flags["amp"], device),
            method.images_per_round if bank is not None else 0,
            processes,
            session.compiler,
        )
        self._use_views(session, distillation, transfer if transfer is not None else distillation.synthesizer.image_set)
        figures = distill.distill(run, record, distillation, bank, transfer, method.student_view, measure, seed=session.seed)
        if processes.main:
            if isinstance(measure, Accuracy):
                write_json(run.path / "confusion.json", self._confusion(session, measure.split), indent=None)
            if distillation.logit_cache:
                run.log(distillation.logit_cache.description)
            if method.streams:
                save_tensors(run.path / STREAMED, self._streamed(session, distillation.synthesizer))
            self._finish(session, images, distillation, figures, measure)

    def summary(self, path: Path) -> str:
        """Returns the accuracy or the agreement in ``result.json``."""
        file = path / "result.json"
        result = read_json(file) if file.exists() else {}
        require(result, {"acc1_last?": float, "agreement_last?": float}, str(file))
        told = ((kind.words, result.get(f"{kind.name}_last")) for kind in (Accuracy, Agreement))
        return "".join(f": {words} {value:.2f} % (last)" for words, value in told if value is not None)

    def _use_views(self, session: Session, distillation: distill.Distillation, source: TransferSet | None) -> None:
        """Sets up numbered views (crop and flip) of the images in ``source``, and the cache of teacher logits for them.

        Does nothing if there is no ``source`` or the student's augmentation is not a finite set of views. The cache follows
        ``--logit_cache``. It is used only if the student's loss needs no other output of the teacher than its logits.

        Raises:
            UserError: ``--views`` is given, but there is no finite set of views.
        """
        view, few, processes = self.method.student_view, session.flags["views"], session.processes
        if source is None or not isinstance(view, Views):
            if few:
                raise UserError(
                    f"--views {few} found, but this run has no finite set of crops and flips of stored images; leave it out"
                )
            return
        views = KeyedViews(view, source.capacity, few, session.seed, session.device)
        schedule, logit_cache = session.schedule, None
        text = "logit cache: none, because the student's loss needs more of the teacher than each image's own logits"
        if getattr(distillation.objective, "caches_logits", False):
            lookups = schedule.rounds * schedule.kd_steps * schedule.batch_size
            width = session.info.num_classes * (distillation.precision.dtype or torch.float32).itemsize
            rows, text = cached_keys(session.flags["logit_cache"], views, lookups, width, session.device)
            if rows := processes.broadcast(rows):
                block = schedule.batch_size // processes.count
                compute_logits = lambda keys: distillation.teacher_outputs(source.images_of_keys(views, keys)).logits
                logit_cache = LogitCache(compute_logits, len(views), rows, block, session.device, processes)
        distillation.views, distillation.logit_cache = views, logit_cache
        if processes.main and text and session.flags["logit_cache"] != "no":
            session.run.log(text)

    def _measure(self, session: Session) -> Accuracy | Agreement:
        """Returns the measure of the student after each epoch: test accuracy, or agreement with ``--no_test``."""
        if not session.flags["no_test"]:
            return Accuracy(session.test or load_split(session.info, "test", session.device))
        kind = "drawn anew after each epoch" if self.method.streams else "evenly spaced in its training images"
        session.run.log(
            f"distill: no accuracy (--no_test); the agreement is the share in % of up to {Agreement.MOST} synthetic "
            f"images, {kind}, for which the student predicts the same class as the teacher"
        )
        return Agreement(self.method.teacher, session.schedule.batch_size, session.seed)

    def _streamed(self, session: Session, synthesizer: Any) -> dict[str, Tensor]:
        """Returns up to 1000 images (N, 3, H, W) uint8 and labels (N,), as the student would see them in its next steps."""
        count = max(1, min(1000, STREAMED_BYTES // (3 * session.info.image_size**2)))
        seed_position(session.seed, STREAMED)
        parts, found = [], 0
        for images, labels in synthesizer.batches(session.schedule.batch_size, seed=position_seed(session.seed, STREAMED)):
            parts.append((to_uint8(images).cpu(), labels.cpu()))
            if (found := found + len(labels)) >= count:
                break
        images, labels = (torch.cat(column)[:count] for column in zip(*parts))
        return {"images": images, "labels": labels}

    def _confusion(self, session: Session, test) -> dict[str, Any]:
        """Returns two confusion matrices on the test split, with the student's predictions as columns.

        The rows of "teacher_student" are the teacher's predictions, those of "label_student" the labels.
        """
        (teacher, labels), (student, _) = (predict(network, test) for network in (self.method.teacher, self.method.student))
        said, classes = student.argmax(1), session.info.num_classes
        return {
            "class_names": session.info.class_names,
            "teacher_student": confusion(teacher.argmax(1), said, classes).tolist(),
            "label_student": confusion(labels, said, classes).tolist(),
        }

    def _sources_and_variants(self, session: Session) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the columns of the initial bank and of its variants.

        Raises:
            UserError: the variants belong to another bank.
        """
        initial, made = self._finished(session)
        sources, variants = initial.columns, made.columns
        index = variants["source_index"]
        if int(index.max()) >= len(sources["labels"]) or not torch.equal(sources["labels"][index], variants["labels"]):
            raise UserError(f"{made.bank.path} has the variants of another image bank; give that bank with --init_bank")
        return sources, variants

    def _finished(self, session: Session) -> list[Finished]:
        """Returns the banks of the earlier stages: the initial bank and its variants, as far as the method has them."""
        found = [session.finished(self.initial)] if self.initial else []
        return found + ([session.finished("augment")] if self.filter is not None else [])

    def _images(self, session: Session) -> TransferImages:
        initial, variants = (*self._finished(session), None, None)[:2]
        counts, parts = {"bank_images": session.schedule.rounds * self.method.images_per_round}, []
        if initial:
            columns = initial.columns
            images, labels = columns["images"], columns["labels"]
            if self.images_per_class:
                chosen = first_per_class(labels, self.images_per_class)
                images, labels = images[chosen], labels[chosen]
            parts.append((images, labels))
            counts["bank_images"] += len(labels)
        if variants:
            filtered, columns = load_tensors(makers.filter_file(session.path, self.filter)), variants.columns
            keep = filtered["keep"]
            labels = filtered["teacher_labels"] if self.variant_labels == "teacher" else columns["labels"]
            parts.append((columns["images"][keep], labels[keep]))
            omega = round(filtered["omega"].item(), 4)
            counts |= {"variants": len(keep), "variants_kept": int(keep.sum()), "omega": omega}
            counts |= {f"variants_{name}": value for name, value in makers.stored_figures(filtered).items()}
        return TransferImages(initial, variants, tuple(parts), counts)

    def _synthesizer(self, session: Session, initial: Finished | None) -> Any:
        """Returns the synthesizer of the rounds, with the state that the initial bank's synthesizer saved, if any."""
        synthesizer = self.method.synthesizer()
        session.compiler.compile_all(synthesizer.compile_targets(), session.schedule.rounds)
        file = initial.bank.path / STATE if initial else None
        if file and checksums.missing(file.parent, [STATE]):
            raise UserError(
                f"{file} is missing, and stage distill starts from it; restore it from a copy, or make that bank again"
            )
        if session.processes.main and file and file.exists():  # the others make no images
            synthesizer.load_state_dict(load_state(file)["synthesizer"])
        return synthesizer

    def _finish(
        self, session: Session, images: TransferImages, distillation: distill.Distillation, figures: dict[str, Any], measure
    ) -> None:
        """Writes student.pth and result.json."""
        run, record, flags, info = session.run, session.record, session.flags, session.info
        before = [finished for finished in (images.initial, images.variants) if finished]
        about = {"arch": flags["student"], "epoch": session.schedule.epochs}
        about[measure.name] = figures[f"{measure.name}_last"]
        about |= info.for_checkpoint()
        save_checkpoint(run.path / "student.pth", {"state_dict": self.method.student.network.state_dict(), **about})
        counts = dict(images.counts)
        counts["images"] = counts.get("bank_images", 0) + counts.get("variants_kept", 0)
        if self.method.streams:
            steps = figures["student_steps"] * session.schedule.batch_size
            counts["images"] = distillation.synthesizer.images_total or steps
        priors = {finished.bank.manifest.external_prior for finished in before} | {self.external_prior}
        names = ("teacher_acc1", "loss_bn")
        measured = {f"bank_{n}": f.facts[n] for f in before for n in names if {n, "teacher_acc1"} <= f.facts.keys()}
        settings: dict[str, Any] = {}
        for depends_on in [*(finished.depends_on for finished in before), *record.dependencies.values()]:
            settings |= depends_on
        if session.teacher_acc1 is not None:
            measured["teacher_acc1"] = session.teacher_acc1
        record.update("distill")
        seconds = {finished.stage: finished.seconds for finished in before} | record.seconds()
        run.result(
            {name: flags[name] for name in ("method", "teacher", "student", "seed", "scale")}
            | {"dataset": info.name, "dataset_identity": settings["data_root"]}
            | {"teacher_digest": session.manifest.teacher_digest, "published": session.published(settings)}
            | {"external_prior": " + ".join(sorted(priors - {"none"})) or "none"}
            | figures
            | counts
            | measured
            | {"processes": session.processes.count, "seconds": seconds, "settings": settings}
        )
        record.update("distill", done=True)
        memory = ", ".join(f"{name.replace('_', ' ').removesuffix(' mib')} {mib} MiB" for name, mib in peak_memory().items())
        run.log(
            f"distill: {measure.words} {figures[f'{measure.name}_last']:.2f} % (last), "
            f"{figures[f'{measure.name}_best']:.2f} % (best) after "
            f"{figures['student_steps']} student steps ({record.seconds()['distill']:.0f} s, {memory}) -> "
            f"{run.path / 'result.json'}"
        )


def first_per_class(labels: Tensor, count: int) -> Tensor:
    """Returns (N,) bool: whether an image is among the first ``count`` images of its class.

    Args:
        labels: class ids (N,).
        count: number of images per class.
    """
    order = labels.argsort(stable=True)
    ranks = torch.arange(len(labels)) - torch.searchsorted(labels[order], labels[order])
    return torch.empty(len(labels), dtype=torch.bool).scatter_(0, order, ranks < count)
