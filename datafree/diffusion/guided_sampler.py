"""Images from a generative prior under a teacher's guidance: the loop over timesteps, and the student of ``adv``.

One random stream an image, drawn on the CPU: noise, the template of the prompt, an ancestral sampler's steps and latent
CutMix's boxes. So an image depends on neither order nor restart; with ``bn`` or latent CutMix it depends on the batch it is
drawn with, which is a function of its position.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datafree.base import ImageBatch, Task
from datafree.diffusion.guidance import Guidance, Judgement, batches, check_finite, memory_errors
from datafree.diffusion.priors import DiffusionPrior
from datafree.diffusion.sampling import RULES
from datafree.diffusion.variation import resize, seeded_generators
from datafree.losses import kd_loss
from models.classifier import eval_mode

# Latent CutMix augmentation (LCA) of DiffDFKD (Qi et al. 2025, arXiv 2504.00870; CutMix: Yun et al. 2019, 1905.04899).
#
# Between denoising steps a box of every latent of a batch is replaced by the same box of another one. All latents are at one
# noise level, so the steps that follow blend what was pasted. Each image draws its box and its partner from its own random
# stream, the partner counted from its place in the batch.


LARGEST_SHARE = 0.5  # of the area that is pasted, so that most of an image stays what its label says


@dataclass(frozen=True)
class CutMix:
    """One mixing of a batch: masks (B, 1, h, w) bool, true where pasted; partners (B,); shares (B,) of pasted area."""

    masks: Tensor
    partners: Tensor
    shares: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """Mixes (B, C, h, w)."""
        return torch.where(self.masks, values[self.partners], values)

    def targets(self, targets: Tensor) -> Tensor:
        """Mixes class probabilities (B, C) by area."""
        shares = self.shares[:, None].to(targets)
        return (1 - shares) * targets + shares * targets[self.partners]


def draw_cutmix(generators: list[torch.Generator], height: int, width: int, device: torch.device | str = "cpu") -> CutMix:
    """A box for every image of a batch of at least two, of a uniform share of the area up to ``LARGEST_SHARE``."""
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


def seams(masks: Tensor, width: int = 1) -> Tensor:
    """(B, 1, h, w) bool, true within ``width`` latent pixels of the edge of a pasted box, on either side."""
    inside, kernel = masks.float(), 2 * width + 1
    grown = F.max_pool2d(inside, kernel, 1, width)
    shrunk = -F.max_pool2d(-inside, kernel, 1, width)
    return grown > shrunk


@dataclass
class Drawn(ImageBatch):
    """Images at the dataset's size, and ``full`` (B, 3, R, R) float32 in [0, 1] as they were drawn."""

    full: Tensor | None = None


@dataclass(frozen=True)
class Competitor:
    """How the student of ``adv`` learns: from ``after`` images on, ``steps`` steps of SGD before each round."""

    after: int
    steps: int
    temperature: float
    batch_size: int
    lr: float


class GuidedSampler:
    """Draws images of wanted classes; stage generate calls it.

    Args:
        prior: what draws.
        guidance: what the teacher wants.
        task: see ``datafree.base.Task``.
        student: its copy competes where ``guidance.adv`` is not 0.
        steps: denoising steps.
        rule: "own" or one of ``sampling.RULES``.
        lca: the steps before which latent CutMix comes.
        lca_repair: rounds of inpainting the seams after each.
        competitor: when and how the student learns; ``after`` in images.
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
        self.judgement = Judgement(guidance.teacher, task.device, guidance.statistics)
        self.asks = bool(guidance.oh) or prior.classes == "same"

    def draw(self, labels: Tensor, seeds: list[int], repeats: list[int]) -> Drawn:
        """One image of each label (B,); where neither prior nor guidance was told the class, with the teacher's label.

        Args:
            seeds: B; see the module.
            repeats: B; how many images of its class come before each, so that prompts take turns.
        Raises:
            UserError: a latent became NaN, or the memory does not suffice.
        """
        with memory_errors():
            drawn, finite = self.draw_unread(labels, seeds, repeats)
            check_finite(finite.tolist())
        return drawn

    @torch.no_grad()
    def draw_unread(self, labels: Tensor, seeds: list[int], repeats: list[int]) -> tuple[Drawn, Tensor]:
        """``draw`` that waits for nothing, and whether all was finite after each denoising step, (K,) bool."""
        with eval_mode(self.student or nn.Identity()):
            latents, finite = self._latents(labels, seeds, repeats)
        parts = batches(len(latents), self.guidance.micro_batch)
        full = torch.cat([self.prior.decode(latents[part]).clamp(0, 1) for part in parts]).float()
        finite[-1] = finite[-1] & full.isfinite().all()
        size = (self.task.info.image_size, self.task.info.image_size)
        images = full if full.shape[2:] == size else resize(full, size)
        labels = labels.to(self.prior.device) if self.asks else self.guidance.teacher(images).argmax(1)
        return Drawn(images, labels, full=full), torch.stack(finite)

    def _latents(self, labels: Tensor, seeds: list[int], repeats: list[int]) -> tuple[Tensor, list[Tensor]]:
        """The last latents (B, C, h, w), clean, and whether they were finite after each step, () bool."""
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
        """x_{k+1}, and the clean latents at k."""
        clean = self.trajectory.clamp(self.trajectory.clean(latents, k, output))
        noise = self._noise(generators) if self.rule == "ancestral" else None
        return self.trajectory.step(self.rule, latents, k, clean, previous, noise), clean

    def _repaired(self, latents: Tensor, k: int, condition: Any, seam: Tensor, generators) -> Tensor:
        """Latents at step k whose seams were redrawn ``lca_repair`` times: a step, the way back with fresh noise, and only
        within the seam is that taken over (RePaint, Lugmayr et al. 2022, arXiv 2201.09865)."""
        for _ in range(self.lca_repair if k + 1 < len(self.trajectory) else 0):
            output = self.guidance.predict(self.prior, self.trajectory, latents, k, condition)
            after, _ = self._step(latents, k, output, None, generators)
            latents = torch.where(seam, self.trajectory.renoise(after, k + 1, self._noise(generators)), latents)
        return latents

    def _noise(self, generators: list[torch.Generator]) -> Tensor:
        noise = torch.stack([torch.randn(self.prior.shape, generator=generator) for generator in generators])
        return noise.to(self.prior.device)

    @property
    def competes(self) -> bool:
        """Whether a student learns from each round before the next."""
        return self.student is not None

    def wants_to_learn(self, images: int) -> bool:
        """Whether the student of ``adv`` is to learn from the ``images`` that there are, before more are made."""
        return self.student is not None and images > 0 and images >= self.competitor.after

    def fit(self, images_u8: Tensor, labels: Tensor) -> dict[str, float | Tensor]:
        """``competitor.steps`` steps of KL on random images made so far; from then on the student competes.

        Args:
            images_u8: (N, 3, S, S) uint8; labels: (N,), which play no part.
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
        """The student as it is joins the guidance."""
        self.guidance.student = self.student.eval().requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        """The student of ``adv``: all that ``fit`` changes."""
        if self.student is None:
            return {}
        return {"student": self.student.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undoes ``state_dict``; the student competes at once."""
        self.student.network.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.compete()

    def measure(self, images_u8: Tensor, labels: Tensor) -> dict[str, float]:
        """What the teacher says of finished images (N, 3, S, S) uint8: see ``Judgement.figures``.

        Labels that are its own say nothing of the images, and there is no teacher_acc1 then.
        """
        figures = self.judgement.figures(images_u8, labels)
        return figures if self.asks else {name: value for name, value in figures.items() if name != "teacher_acc1"}
