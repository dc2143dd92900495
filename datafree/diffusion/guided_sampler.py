"""Samples images from a generative prior under a teacher's guidance, and trains the student of ``adv``.

Each image has its own random stream, drawn on the CPU. It gives the initial noise, the noise of an ancestral sampler, the
boxes and partners of latent CutMix and the noise of its repair. The prompt of an image follows from its position. An image
therefore depends neither on the order of the images nor on a restart. With ``bn`` or latent CutMix it also depends on the
other images of its batch. Which images form a batch is a function of their positions.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datafree.base import ImageBatch, Task
from datafree.diffusion.guidance import Guidance, batches, check_latents, memory_errors
from datafree.diffusion.prior_base import DiffusionPrior
from datafree.diffusion.sampling import RULES
from datafree.diffusion.variation import resize, seeded_generators
from datafree.losses import kd_loss
from datafree.teacher_metrics import TeacherMetrics
from models.classifier import eval_mode

# Latent CutMix augmentation (LCA) of DiffDFKD (Qi et al. 2025, arXiv 2504.00870; CutMix: Yun et al. 2019, 1905.04899).
#
# Between denoising steps a box of every latent is replaced by the same box of another latent of the batch, its partner. All
# latents are at one noise level, so the denoising steps that follow blend the pasted boxes. Each image draws its box and its
# partner from its own random stream. The partner is drawn relative to the image's position in the batch.


LARGEST_SHARE = 0.5  # largest pasted share of the area, so that most of an image still fits its label


@dataclass(frozen=True)
class CutMix:
    """One mixing of a batch.

    Attributes:
        masks: (B, 1, h, w) bool, true in the pasted box.
        partners: (B,) index of the latent from which each box is taken.
        shares: (B,) pasted share of the area.
    """

    masks: Tensor
    partners: Tensor
    shares: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """Mixes latents (B, C, h, w)."""
        return torch.where(self.masks, values[self.partners], values)

    def targets(self, targets: Tensor) -> Tensor:
        """Mixes class probabilities (B, C) by area."""
        shares = self.shares[:, None].to(targets)
        return (1 - shares) * targets + shares * targets[self.partners]


def draw_cutmix(generators: list[torch.Generator], height: int, width: int, device: torch.device | str = "cpu") -> CutMix:
    """Draws a box and a partner for every image of a batch of at least two.

    The box's share of the area is uniform between 0 and ``LARGEST_SHARE``, before its sides are rounded to latent pixels.
    """
    count = len(generators)
    assert count > 1, "latent CutMix needs a batch of two"
    masks = torch.zeros(count, 1, height, width, dtype=torch.bool)
    partners = torch.empty(count, dtype=torch.long)
    for i, generator in enumerate(generators):
        share, top, left = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        partners[i] = (i + 1 + int(torch.randint(count - 1, (), generator=generator))) % count
        rows, columns = (max(1, round((LARGEST_SHARE * share) ** 0.5 * side)) for side in (height, width))
        y, x = int(top * (height - rows + 1)), int(left * (width - columns + 1))
        masks[i, :, y : y + rows, x : x + columns] = True
    return CutMix(masks.to(device), partners.to(device), masks.double().mean((1, 2, 3)).float().to(device))


def seams(masks: Tensor) -> Tensor:
    """Masks (B, 1, h, w) bool that are true within a latent pixel of the edge of a pasted box, on either side."""
    inside = masks.float()
    grown, shrunk = F.max_pool2d(inside, 3, 1, 1), -F.max_pool2d(-inside, 3, 1, 1)
    return grown > shrunk


@dataclass
class Drawn(ImageBatch):
    """Images at the dataset's size, and ``full``: the same images as sampled, (B, 3, R, R) float32 in [0, 1]."""

    full: Tensor | None = None


@dataclass(frozen=True)
class Competitor:
    """Training settings of the student of ``adv``.

    Attributes:
        after: number of images from which on the student is trained before each round.
        steps: SGD steps before each round.
    """

    after: int
    steps: int
    temperature: float
    batch_size: int
    lr: float


class GuidedSampler:
    """Samples images of given classes in stage generate.

    Args:
        prior: generative prior that is sampled.
        guidance: the teacher's guidance.
        task: see ``datafree.base.Task``.
        student: network whose copy is the student of ``adv`` if ``guidance.adv`` is not 0.
        steps: number of denoising steps.
        rule: one of ``sampling.RULES``, or "own" for the rule of the prior's scheduler.
        lca: denoising steps before which latent CutMix is applied.
        lca_repair: rounds of inpainting of the seams after each mixing.
        competitor: training settings of the student of ``adv``; None: there is no such student.
    """

    def __init__(
        self,
        prior: DiffusionPrior,
        guidance: Guidance,
        task: Task,
        student: nn.Module | None = None,
        *,
        steps: int,
        rule: str = "own",
        lca: list[int] | tuple[int, ...] = (),
        lca_repair: int = 0,
        competitor: Competitor | None = None,
    ):
        self.prior, self.guidance, self.task = prior, guidance, task
        self.trajectory, self.steps = prior.trajectory(steps), steps
        self.rule = prior.own_rule if rule == "own" else rule
        assert self.rule in RULES, self.rule
        self.lca, self.lca_repair, self.competitor = frozenset(lca), lca_repair, competitor
        self.student = None
        if guidance.adv and competitor:
            self.student = copy.deepcopy(student)
            self.optimizer = torch.optim.SGD(self.student.parameters(), lr=competitor.lr, momentum=0.9, weight_decay=5e-4)
        self.metrics = TeacherMetrics(guidance.teacher, task.device, guidance.statistics)
        self.uses_labels = bool(guidance.oh) or prior.classes == "same"  # whether the guidance or the prior uses the labels

    def draw(self, labels: Tensor, seeds: list[int], repeats: list[int]) -> Drawn:
        """Samples one image per label (B,).

        If neither the prior nor the guidance uses the labels, the returned labels are the teacher's predictions.

        Args:
            seeds: B seeds, one per image.
            repeats: B numbers: how many images of its class come before each image. Prompts are used in turn by this number.
        Raises:
            UserError: a latent became NaN or infinite, or the memory was not enough.
        """
        with memory_errors():
            drawn, finite = self.draw_async(labels, seeds, repeats)
            check_latents(finite.tolist())
        return drawn

    @torch.no_grad()
    def draw_async(self, labels: Tensor, seeds: list[int], repeats: list[int]) -> tuple[Drawn, Tensor]:
        """Does the work of ``draw`` without waiting for the device.

        Returns:
            The images, and whether all latents were finite after each denoising step, (K,) bool on the device.
        """
        with eval_mode(self.student or nn.Identity()):
            latents, finite = self._latents(labels, seeds, repeats)
        parts = batches(len(latents), self.guidance.micro_batch)
        full = torch.cat([self.prior.decode(latents[part]).clamp(0, 1) for part in parts]).float()
        finite[-1] = finite[-1] & full.isfinite().all()
        images = resize(full, (self.task.info.image_size, self.task.info.image_size))
        labels = labels.to(self.prior.device) if self.uses_labels else self.guidance.teacher(images).argmax(1)
        return Drawn(images, labels, full=full), torch.stack(finite)

    def _latents(self, labels: Tensor, seeds: list[int], repeats: list[int]) -> tuple[Tensor, list[Tensor]]:
        """The final, clean latents (B, C, h, w), and after each step whether all latents were finite, () bool."""
        prior, trajectory, device = self.prior, self.trajectory, self.prior.device
        generators = seeded_generators(seeds)
        condition, labels = prior.condition(labels, repeats), labels.to(device)
        targets = F.one_hot(labels, self.task.info.num_classes).float()
        latents, previous, whole = self._noise(generators), None, []
        for k in range(len(trajectory)):
            if k in self.lca and len(latents) > 1:
                mix = draw_cutmix(generators, *prior.shape[1:], device)
                latents, targets = mix(latents), mix.targets(targets)
                previous = None if previous is None else mix(previous)
                latents = self._repaired(latents, k, condition, seams(mix.masks), generators)
            latents, output = self.guidance.steer(prior, trajectory, latents, k, condition, targets)
            latents, previous = self._step(latents, k, output, previous, generators)
            whole.append(latents.isfinite().all())
        return latents, whole

    def _step(self, latents, k, output, previous, generators) -> tuple[Tensor, Tensor]:
        """The latents at step k + 1, and the clean latents predicted at step k."""
        clean = self.trajectory.clamp(self.trajectory.clean(latents, k, output))
        noise = self._noise(generators) if self.rule == "ancestral" else None
        return self.trajectory.step(self.rule, latents, k, clean, previous, noise), clean

    def _repaired(self, latents: Tensor, k: int, condition: Any, seam: Tensor, generators) -> Tensor:
        """Latents at step k after ``lca_repair`` rounds of inpainting (RePaint, Lugmayr et al. 2022, arXiv 2201.09865).

        A round takes one denoising step and adds fresh noise to return to step k. Only the seam takes the new values.
        """
        for _ in range(self.lca_repair if k + 1 < len(self.trajectory) else 0):
            output = self.guidance.predict(self.prior, self.trajectory, latents, k, condition)
            after, _ = self._step(latents, k, output, None, generators)
            latents = torch.where(seam, self.trajectory.renoise(after, k + 1, self._noise(generators)), latents)
        return latents

    def _noise(self, generators: list[torch.Generator]) -> Tensor:
        noise = torch.stack([torch.randn(self.prior.shape, generator=generator) for generator in generators])
        return noise.to(self.prior.device)

    @property
    def trains_student(self) -> bool:
        """Whether a student of ``adv`` is trained between the rounds."""
        return self.student is not None

    def student_is_due(self, images: int) -> bool:
        """Whether the student of ``adv`` is to be trained before the next round, given the number of images so far."""
        return self.student is not None and images > 0 and images >= self.competitor.after

    def fit(self, images_u8: Tensor, labels: Tensor) -> dict[str, float | Tensor]:
        """Trains the student of ``adv`` for ``competitor.steps`` steps with the KL loss, then adds it to the guidance.

        Args:
            images_u8: all images sampled so far, (N, 3, S, S) uint8; each batch is drawn from them at random.
            labels: (N,), not used.
        Returns:
            Named scalars for the log.
        """
        settings, device, losses = self.competitor, self.task.device, []
        self.student.train().requires_grad_(True)
        for _ in range(settings.steps):
            index = torch.randint(len(images_u8), (settings.batch_size,))
            batch = self.task.random_view(images_u8[index].to(device)).float().div_(255)
            with torch.no_grad():
                teacher_logits = self.guidance.teacher(batch)
            loss = kd_loss(self.student(batch), teacher_logits, settings.temperature)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        self.compete()
        return {"loss_student": torch.stack(losses).mean()}

    def compete(self) -> None:
        """Freezes the student of ``adv`` in its present state and hands it to the guidance."""
        self.guidance.student = self.student.eval().requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        """State of the student of ``adv`` and of its optimizer; empty before the first ``fit``."""
        if self.guidance.student is None:
            return {}
        return {"student": self.student.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned and hands the student to the guidance, unless the state is empty."""
        if not state:
            return
        self.student.network.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.compete()

    def measure(self, images_u8: Tensor, labels: Tensor) -> dict[str, float]:
        """The teacher's figures for finished images (N, 3, S, S) uint8; see ``TeacherMetrics.figures``.

        If the labels are the teacher's own predictions, its accuracy has no meaning and teacher_acc1 is left out.
        """
        figures = self.metrics.figures(images_u8, labels)
        return figures if self.uses_labels else {name: value for name, value in figures.items() if name != "teacher_acc1"}
