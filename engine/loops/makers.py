"""The three makers of a bank: rounds of synthesis, images sampled position by position, and variants of a bank."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.data.image_bank import to_uint8
from engine.data.pictures import variants_grid
from engine.loops.fill import Maker, Part, Share
from engine.loops.measures import check_finite
from engine.runtime.compilation import CompileTarget
from engine.runtime.errors import UserError
from engine.runtime.files import atomic_path
from engine.runtime.flags import Range
from engine.runtime.processes import position_seed, seed_position
from engine.runtime.run import Run, progress
from engine.runtime.schema import Array, require
from engine.runtime.tensors import load_checkpoint, load_tensors, save_checkpoint, save_tensors
from models.classifier import weights_fixed

# Maker of the initial bank by rounds of synthesis.


class SynthesisMaker(Maker):
    """Makes each round by one call of a synthesizer, with a student that is not trained yet.

    Args:
        synthesizer: ``datafree.base.Synthesizer``; decides whether the rounds are ``independent``.
        student: ``models.classifier.Classifier``.
        seed: seed of the run.
    """

    advice = "lower --lr_g or the loss weights, or give --amp no, and run again"

    def __init__(self, synthesizer, student: nn.Module, seed: int):
        self.synthesizer, self.student, self.seed = synthesizer, student, seed
        self.independent = synthesizer.independent

    def make(self, round: int, share: Share, show) -> dict[int, Part]:
        """Makes the whole round in the first of the processes that share it; the others return {}."""
        if share.rank:
            return {}
        seed_position(self.seed, "synthesize", round)
        with weights_fixed(self.student):
            batch = self.synthesizer.synthesize(self.student)
        show(1)
        figures = {name: float(value) for name, value in batch.scalars.items()}
        return {0: Part({"images": to_uint8(batch.images).cpu(), "labels": batch.labels.cpu()}, figures)}

    def compile_targets(self) -> list[CompileTarget]:
        return self.synthesizer.compile_targets()

    def state_dict(self) -> dict[str, Any]:
        return self.synthesizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.synthesizer.load_state_dict(state)


# Maker of the initial bank by a diffusion sampler.
#
# The position of an image in the bank determines its class, its seed and its batch. The images therefore depend neither on
# restarts nor on the number of processes.


@dataclass(frozen=True)
class Order:
    """The images to sample: their number, order of classes, rounds and batches.

    The positions are divided into cycles. A cycle has C positions, one for each class in a random order of its own. With
    ``one_class`` it has C * batch_size positions, with batch_size positions in a row for each class.

    Args:
        images: total number of images.
        num_classes: number of classes C.
        round_size: images per round, which are one shard of the bank.
        batch_size: largest number of images sampled together; a batch lies within one round.
        seed: seed of the run.
        one_class: whether all images of a batch have the same class; a new batch then begins with each class.
        export: folder for full-size PNG files ``<class id>/<position>.png``; None: no such files.
    """

    images: int
    num_classes: int
    round_size: int
    batch_size: int
    seed: int
    export: Path | None = None
    one_class: bool = False

    @property
    def rounds(self) -> int:
        return -(-self.images // self.round_size)

    def positions(self, round: int) -> range:
        """Returns the positions of one round."""
        return range(round * self.round_size, min((round + 1) * self.round_size, self.images))

    def batches(self, round: int) -> list[range]:
        """Returns the positions of each batch of a round."""
        positions = self.positions(round)
        first, stop = positions.start, positions.stop
        if self.one_class:
            starts = [p for p in positions if p == first or self._place(p)[2] == 0]
        else:
            starts = list(positions[:: self.batch_size])
        return [range(start, end) for start, end in zip(starts, [*starts[1:], stop])]

    def labels(self, positions: range) -> Tensor:
        """Returns the class ids (len(positions),) of positions."""
        places = map(self._place, positions)
        return torch.tensor([self._cycle(number)[index] for number, index, _ in places])

    def repeats(self, positions: range) -> list[int]:
        """Returns, for each position, the number of images of its class at earlier positions."""
        return [number * self._run + place for number, _, place in map(self._place, positions)]

    @property
    def _run(self) -> int:
        """Number of images of one class in a row."""
        return self.batch_size if self.one_class else 1

    def _place(self, position: int) -> tuple[int, int, int]:
        """Returns (number of the position's cycle, index of its class there, place among the images of that class)."""
        number, rest = divmod(position, self._run * self.num_classes)
        run = min(self._run, -(-self.images // self.num_classes) - number * self._run)  # the last cycle may be shorter
        return number, *divmod(rest, run)

    def _cycle(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(position_seed(self.seed, "generate", "order", number))
        return torch.randperm(self.num_classes, generator=generator).tolist()


class GuidedMaker(Maker):
    """Makes the images of ``order`` with a sampler such as ``datafree.diffusion.guided_sampler.GuidedSampler``.

    Args:
        sampler: object with ``draw(labels, seeds, repeats)``, ``measure(images, labels)``, ``trains_student``,
            ``student_is_due(images)``, ``fit(images, labels)``, ``state_dict()`` and ``load_state_dict(state)``.
        order: images to sample.
    """

    unit = "img"
    advice = "lower --guidance_lr, --bn or --oh, give --adv 0 or fewer --adv_steps, and run again"

    def __init__(self, sampler, order: Order):
        self.sampler, self.order = sampler, order
        self.independent = not sampler.trains_student

    def size(self, round: int) -> int:
        return len(self.order.positions(round))

    def compile_targets(self) -> list[CompileTarget]:
        batches = len(self.order.batches(0))
        return [CompileTarget(self.sampler.prior.network, "forward", batches * self.sampler.steps, "denoising network")]

    def learn(self, round: int, made) -> dict[str, float] | None:
        """Trains the sampler's competing student on the images so far, if its adversarial loss needs one."""
        if not self.sampler.student_is_due(self.order.positions(round).start):
            return None
        seed_position(self.order.seed, "generate", "learn", round)
        columns = made()
        return {name: float(value) for name, value in self.sampler.fit(columns["images"], columns["labels"]).items()}

    def make(self, round: int, share: Share, show) -> dict[int, Part]:
        parts = {}
        for index, positions in share.of(self.order.batches(round)):
            labels = self.order.labels(positions)
            seeds = [position_seed(self.order.seed, "generate", p) for p in positions]
            batch = self.sampler.draw(labels, seeds, self.order.repeats(positions))
            if self.order.export:
                export(self.order.export, batch.full, batch.labels, positions)
            parts[index] = Part({"images": to_uint8(batch.images).cpu(), "labels": batch.labels.cpu()})
            show(len(positions))
        return parts

    def report(self, columns: dict[str, Tensor]) -> dict[str, float]:
        """Returns the sampler's figures of the images, for example the teacher's accuracy on them."""
        return self.sampler.measure(columns["images"], columns["labels"])

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)


def export(folder: Path, images: Tensor, labels: Tensor, positions: range) -> None:
    """Writes images (B, 3, R, R) in [0, 1] as ``<folder>/<class id>/<position>.png``."""
    from PIL import Image

    for image, label, position in zip(to_uint8(images).cpu(), labels.tolist(), positions, strict=True):
        with atomic_path(folder / str(label) / f"{position:07d}.png") as temporary:
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, format="PNG")


# Maker of a bank of variants of every image of another bank, and the filter that selects variants.


SCORES = {
    "cosine": Array(torch.float32, (None,)), "teacher_labels": Array(torch.int64, (None,)), "keep": Array(torch.bool, (None,)),
    "calibrated_omega": Array(torch.float32, (1,)), "omega": Array(torch.float64, (1,)), "agree": Array(torch.bool, (1,)),
}  # fmt: skip
SHARD = 512  # variants per round; a killed run loses at most one round


class VariantMaker(Maker):
    """Makes V variants of each source image with an augmenter, which may first be trained on the source images.

    Position p = k * N + i of the bank is variant k of source i. Its seed depends only on (seed, i, k).

    Args:
        augmenter: ``datafree.diffusion.variation.Augmenter``.
        sources: "images" (N, 3, H, W) uint8 and "labels" (N,).
        variants: number V of variants per source.
        batch_size: number of images that the augmenter processes at once.
        seed: seed of the run.
        device: device of the augmenter.
        run: run folder writer of the main process; None in the other processes.
    """

    unit = "img"

    def __init__(
        self, augmenter, sources: dict[str, Any], variants: int, batch_size: int, seed: int, device, run: Run | None
    ):
        self.augmenter, self.sources, self.batch_size = augmenter, sources, batch_size
        self.seed, self.device, self.run = seed, device, run
        self.total = variants * len(sources["labels"])

    def size(self, round: int) -> int:
        return min((round + 1) * SHARD, self.total) - round * SHARD

    def compile_targets(self) -> list[CompileTarget]:
        network = self.augmenter.network
        batches = -(-SHARD // self.batch_size)
        calls = batches * self.augmenter.steps
        return [CompileTarget(network, "forward", calls, "denoising network")] if network is not None else []

    def learn(self, round: int, made) -> dict[str, float] | None:
        """Trains the augmenter on the source images, if it is one that is trained."""
        if not self.augmenter.fit_rounds:
            return None
        fit_augmenter(self.run, self.augmenter, self.sources["images"], self.sources["labels"], self.seed)
        return {}

    def make(self, round: int, share: Share, show) -> dict[int, Part]:
        images, labels = self.sources["images"], self.sources["labels"]
        positions = torch.arange(round * SHARD, round * SHARD + self.size(round))
        parts = {}
        for index, part in share.of(list(positions.split(self.batch_size))):
            source_index = part % len(labels)
            seeds = [position_seed(self.seed, "variant", int(p % len(labels)), int(p // len(labels))) for p in part]
            source = images[source_index].to(self.device).float().div_(255)
            varied = self.augmenter.augment(source, labels[source_index].to(self.device), seeds)
            if not bool(torch.isfinite(varied).all()):
                raise UserError(f"the diffusion model made NaN pixels in shard {round}; give --diffusion_dtype fp32")
            columns = {"images": to_uint8(varied).cpu(), "labels": labels[source_index], "source_index": source_index}
            parts[index] = Part(columns)
            show(len(part))
        return parts

    def state_dict(self) -> dict[str, Any]:
        return self.augmenter.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.augmenter.load_state_dict(state)


def fit_augmenter(run: Run, augmenter, images: Tensor, labels: Tensor, seed: int) -> None:
    """Trains an augmenter on images of the bank, with a checkpoint after each of its rounds.

    A resumed training gives the same weights as an uninterrupted one.

    Args:
        run: run folder writer.
        augmenter: ``datafree.diffusion.variation.Augmenter``.
        images, labels: images (N, 3, H, W) uint8 and their class ids (N,).
        seed: seed of the run.
    """
    file = run.path / "prior.pth"
    start = 0
    if file.exists():
        saved = load_checkpoint(file, "diffusion checkpoint")
        require(saved, {"round": (int, Range(least=0, most=augmenter.fit_rounds)), "augmenter": dict}, str(file))
        start = saved["round"]
        augmenter.load_state_dict(saved["augmenter"])
    run.rewind("prior", start)
    bar = progress(augmenter.fit_rounds, "train the prior", "round", start)
    for round in range(start, augmenter.fit_rounds):
        seed_position(seed, "fit", round)
        figures = {name: float(value) for name, value in augmenter.fit(images, labels).items()}
        check_finite(figures, f"round {round} of training the diffusion prior", "lower --fit_lr and run again")
        run.metrics("prior", round, figures)
        save_checkpoint(file, {"round": round + 1, "augmenter": augmenter.state_dict()})
        bar.set_postfix({name: f"{value:.3g}" for name, value in figures.items()}, refresh=False)
        bar.update()
    bar.close()


def filter_variants(run: Run, folder: Path, sources: dict[str, Any], variants: dict[str, Any], filter) -> None:
    """Decides which variants are kept. Stores the result in ``filter_<name>.safetensors``, logs it and saves a picture.

    Cosine similarities and teacher labels are computed once for each embedding. A later run with the same variants reads
    them from the file, so that the selection rule can change without new variants or embeddings. The file also has the
    teacher's figures on the kept and on the dropped variants: ``kept_teacher_acc1`` and so on, one number each.

    Args:
        run: run folder writer.
        folder: folder of the variants.
        sources: "images" (N, 3, H, W) and "labels" (N,).
        variants: "images" (N * V, 3, H, W), "labels" and "source_index" (N * V,).
        filter: ``datafree.filter.CosineFilter``.
    """
    file, stored = filter_file(run.path, filter), stored_scores(run.path, folder, filter)
    if stored is None or len(stored["cosine"]) != len(variants["labels"]):
        teacher_labels = filter.metrics.labels(variants["images"])
        with progress(len(sources["labels"]) + len(variants["labels"]), "embed images", "img", delay=3) as bar:
            cosine, calibrated = filter.score(sources, variants, bar.update)
    else:
        cosine, calibrated = stored["cosine"], stored["calibrated_omega"].item()
        teacher_labels = stored["teacher_labels"]
    omega = calibrated if filter.omega is None else filter.omega
    rule = {"omega": torch.tensor([omega], dtype=torch.float64), "agree": torch.tensor([filter.agree])}
    if file.exists() and stored is not None and all(torch.equal(stored[name], value) for name, value in rule.items()):
        return  # the stored decision is by the same rule
    keep = filter.keep(cosine, omega, teacher_labels == variants["labels"])
    parts = {name: part for name, part in (("kept", keep), ("dropped", ~keep)) if part.any()}
    found = {
        name: filter.metrics.figures(variants["images"][part], variants["labels"][part]) for name, part in parts.items()
    }
    figures = {f"{name}_{figure}": torch.tensor([value]) for name, some in found.items() for figure, value in some.items()}
    scores = {"cosine": cosine, "teacher_labels": teacher_labels, "calibrated_omega": torch.tensor([calibrated])}
    low, middle, high = torch.quantile(cosine[:1_000_000].float(), torch.tensor([0.1, 0.5, 0.9])).tolist()
    run.log(
        f"filter: {int(keep.sum())} of {len(keep)} variants kept at omega {omega:.3f} ({filter.name} embedding; "
        f"cosine percentiles 10/50/90: {low:.3f} {middle:.3f} {high:.3f})"
    )
    for name, some in found.items():
        distance = f", BN distance {some['loss_bn']:.3f}" if "loss_bn" in some else ""
        run.log(
            f"filter: the teacher classifies {some['teacher_acc1']:.1f} % of the {name} variants as their source's "
            f"label{distance}"
        )
    run.board.add_histogram("filter/cosine", cosine)
    run.board.add_scalar("filter/keep_rate", keep.float().mean())
    total = len(sources["labels"])
    shown = torch.arange(0, total, max(1, total // 16))[:16]
    of_shown = torch.arange(min(4, len(keep) // total))[:, None] * total + shown
    picture = variants_grid(sources["images"][shown], variants["images"][of_shown], cosine[of_shown], keep[of_shown])
    run.picture("variants", picture)
    save_tensors(file, scores | rule | figures | {"keep": keep})  # last: a stopped filter logs and draws again


def stored_scores(run: Path, folder: Path, filter) -> dict[str, Tensor] | None:
    """Returns the contents of a run's filter file; if it has none, those of the run that made the variants in ``folder``.

    Returns None if neither run has a usable file.
    """
    files = filter_file(run, filter), filter_file(folder.parent, filter)
    for file in files:
        scores = load_tensors(file) if file.exists() else {}
        if "teacher_labels" in scores:  # a file of an earlier version has no such field
            require(scores, SCORES, str(file))
            if len({len(scores[name]) for name in ("cosine", "teacher_labels", "keep")}) > 1:
                raise UserError(
                    f"{file} has different numbers of labels and cosines; delete it and run the same command again"
                )
            return scores
    return None


def stored_figures(scores: dict[str, Tensor]) -> dict[str, float]:
    """Returns the teacher's figures on kept and dropped variants from a filter file: {"kept_teacher_acc1": ...}."""
    return {name: round(value.item(), 4) for name, value in scores.items() if name.startswith(("kept_", "dropped_"))}


def filter_file(folder: Path, filter) -> Path:
    """Returns the path of the file with the cosine similarities of a run's variants and the decision which to keep."""
    return folder / f"filter_{filter.name}.safetensors"
