"""DiffDFKD: a diffusion model guided by the teacher makes the transfer set (Qi et al., IEEE ICME 2025, arXiv 2504.00870).

No generator is trained. A pretrained prior draws images of every class, and at every timestep the teacher pulls the latent
towards what it knows: its BN statistics, the wanted class, and where a student still differs from it.

    generate    z <- z - lr * d/dz [bn * L_bn + oh * CE(T(x), y) + adv * L_adv]  at every denoising step; latent CutMix
    distill     KL_T + msarc * L_mSARC  on those images, and on nothing else

``--oh 0 --bn 0 --adv 0 --lca_every 0`` is the unguided baseline, DM-KD (arXiv 2305.12954). ``--diffusion_model`` says which
prior (``datafree.diffusion.generative``); for digits it is a file of this repository.

Published settings, CIFAR-10: Stable Diffusion 1.5, 10 to 50 steps, guidance scale 3, bn 0 to .1, oh 1, adv 0, 5000 images a
class; SGD lr .2, 240 epochs, warm-up 20, weight decay 5e-4, T 30. DomainNet: scale 7 (3 in the distilled sets), 70 steps,
bn .1, adv 1 from 20 images a class on, 200 a class; lr .1, 220 epochs, weight decay 1e-4.

Deviations. The published script takes the gradient of a tensor computed without one, so there is no run of it to follow;
this is the paper's algorithm.
- The step is the gradient of B times the batch-mean loss, so that it does not shrink as batches grow.
- The noise prediction is made once a step: guidance moves the latent, and the sampler's step reuses the prediction.
- "Current student": what is known of the paper leaves open which. Here one of the run's architecture, from its initial
  weights, learns by KL for ``--adv_steps`` steps before each round from what was made so far, and goes on from there before
  the next. L_adv has temperature 1.
- Latent CutMix pastes at most half of the area, and the mixed labels are the one-hot term's soft targets; the bank keeps the
  label that an image was prompted for. Its repair (``--lca_repair``) is our reading of the paper's inpainting: RePaint's
  resampling by the same prior, a latent pixel to either side of the seam.
- mSARC (SpaceshipNet, Yu et al., CVPR 2023): class activation maps need the classifier's weights, which fit the last scale
  only; at the others it compares attention maps, mean squares over channels. The class is the teacher's.
- PNDM, the scheduler that Stable Diffusion 1.5 is saved with, is replaced by DPM-Solver++, another multistep solver.
- Resizing from the prior's to the dataset's size is bicubic with antialiasing, in guidance and for the bank alike.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from datafree.base import Method, Synthesizer, Task
from datafree.diffusion.generator import Competitor, GuidedGenerator
from datafree.diffusion.guidance import BACKPROP, Guidance, lca_steps
from datafree.diffusion.patch_unet import SHIPPED
from datafree.diffusion.prior import DTYPES, diffusion_dtype, prior_name
from datafree.diffusion.sampling import RULES
from datafree.losses import kd_loss
from engine.errors import UserError
from engine.flags import check_least, flag

EMBEDDED = SHIPPED / "glyphs_digits_16.safetensors"
DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
GENERATE = ("generate",)
DISTILL = ("distill",)


@dataclass(frozen=True)
class DiffDFKDConfig:
    """Flags of DiffDFKD."""

    diffusion_model: str | None = flag(
        None,
        "hub id or directory of a text-to-image, DiT or class-conditional pixel pipeline, or a prior of this project, by its "
        ".safetensors file or its name (glyphs_digits_16, natural_32); unset: the embedded glyphs for digits, else stable-diffusion-v1-5/stable-diffusion-v1-5",
        stages=GENERATE,
    )
    diffusion_revision: str | None = flag(None, "revision of the hub id", stages=GENERATE)
    prompt: str | None = flag(
        None,
        "of a text-to-image prior; several, separated by |, take turns within a class; unset: the dataset's, as "
        "'a photo of a {label}'",
        stages=GENERATE,
    )
    class_map: tuple[int, ...] | None = flag(
        None, "of a class-conditional prior: its class id of each class of the dataset; unset: the same ids", stages=GENERATE
    )
    null_class: int | None = flag(
        None,
        "of a class-conditional pixel pipeline: its id for no class; unset: the id after the dataset's last",
        stages=GENERATE,
    )
    images_per_class: int = flag(5000, "images to draw of each class", stages=GENERATE)
    synthesis_batch_size: int = flag(200, "images a round: a shard of the bank, and what a kill costs", stages=GENERATE)
    diffusion_batch_size: int = flag(
        16, "images drawn together; BN statistics and latent CutMix range over them", stages=GENERATE
    )
    num_inference_steps: int = flag(20, "denoising steps", stages=GENERATE)
    scheduler: str = flag(
        "own", "how a step is made; own: as the prior's scheduler does", choices=("own", *RULES), stages=GENERATE
    )
    guidance_scale: float = flag(3.0, "classifier-free guidance by prompt or class; at most 1 is none", stages=GENERATE)
    resolution: int | None = flag(None, "px at which a text-to-image prior draws; unset: its own", stages=GENERATE)
    diffusion_dtype: str | None = flag(
        None, "of the prior (the guidance is fp32); unset: fp16 on a GPU, else fp32", choices=tuple(DTYPES), stages=GENERATE
    )
    bn: float = flag(0.1, "weight of the BN-statistics loss in the guidance", stages=GENERATE)
    oh: float = flag(1.0, "weight of CE(T(x), y) in the guidance", stages=GENERATE)
    adv: float = flag(0.0, "weight of -KL(S||T) where both name the same class, in the guidance", stages=GENERATE)
    adv_from: int = flag(20, "images a class from which on the adversarial term counts", stages=GENERATE)
    adv_steps: int = flag(200, "steps that its student learns before each round of images", stages=GENERATE)
    guidance_lr: float = flag(1.0, "lr of the guidance, z <- z - lr * gradient at every denoising step", stages=GENERATE)
    guidance_backprop: str = flag(
        "unet", "the gradient's way: decoder and denoising network, or the decoder alone", choices=BACKPROP, stages=GENERATE
    )
    guidance_micro_batch: int = flag(0, "images that go through prior and decoder at a time, to save memory; 0: all")
    gradient_checkpointing: bool = flag(False, "save memory by computing the prior's activations twice")
    lca_every: int | None = flag(
        None, "denoising steps from one latent CutMix to the next; unset: a fifth of all; 0: none", stages=GENERATE
    )
    lca_repair: int = flag(0, "rounds of inpainting of the seams after each latent CutMix", stages=GENERATE)
    export_png: str | None = flag(None, "folder to which images are written in full size, too: <class id>/<position>.png")
    T: float = flag(30.0, "temperature of the distillation loss", stages=DISTILL)
    msarc: float = flag(0.0, "weight of the consistency of activation maps at every scale", stages=DISTILL)
    mix: str = flag("no", "mixing of the student's batches", choices=("no", "mixup", "cutmix"), stages=DISTILL)


class MapDistillation(nn.Module):
    """KL_T + msarc * L_mSARC.

    L_mSARC is the sum over scales, paired from the last one backwards, of the squared distance between the normalised
    activation maps of teacher and student, batch mean; the finer map is pooled to the coarser one's size.

    Args:
        teacher, student: classifiers, for their last linear layers. They are not part of this module.
    """

    def __init__(self, temperature: float, msarc: float, teacher: nn.Module, student: nn.Module):
        super().__init__()
        self.temperature, self.msarc = temperature, msarc
        self.heads = (head_of(teacher), head_of(student))

    def forward(self, teacher_out, student_out, labels: Tensor) -> dict[str, Tensor]:
        """Outputs with logits (B, C) and feature_maps -> named scalar losses."""
        losses = {"kd": kd_loss(student_out.logits, teacher_out.logits, self.temperature)}
        losses["loss"] = losses["kd"]
        if self.msarc:
            classes = teacher_out.logits.argmax(1)
            losses["msarc"] = self.map_distance(teacher_out.feature_maps, student_out.feature_maps, classes)
            losses["loss"] = losses["loss"] + self.msarc * losses["msarc"]
        return losses

    def map_distance(self, teacher_maps: dict, student_maps: dict, classes: Tensor) -> Tensor:
        """L_mSARC of {(h, w): (B, C_l, h, w)}, fine to coarse, for classes (B,), scalar in [0, 4 * scales]."""
        pairs = list(zip(reversed(teacher_maps.values()), reversed(student_maps.values())))
        total = torch.zeros((), device=classes.device)
        for scale, pair in enumerate(pairs):
            maps = [m.float() for m in pair]
            cam = scale == 0 and all(h is not None and h.weight.shape[1] == m.shape[1] for h, m in zip(self.heads, maps))
            if cam:
                weights = [head.weight.flatten(1)[classes].float() for head in self.heads]
                maps = [torch.einsum("bc,bchw->bhw", w, m) for w, m in zip(weights, maps)]
            else:
                maps = [m.square().mean(1) for m in maps]
            size = tuple(min(sides) for sides in zip(*(m.shape[1:] for m in maps)))
            t, s = (F.normalize(F.adaptive_avg_pool2d(m[:, None], size).flatten(1)) for m in maps)
            total = total + (t - s).square().sum(1).mean()
        return total


def head_of(classifier: nn.Module) -> nn.Module | None:
    """The last linear layer or 1x1 convolution with as many outputs as there are classes."""
    layers = [m for m in classifier.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    heads = [m for m in layers if m.weight.shape[0] == classifier.num_classes and m.weight[0, 0].numel() == 1]
    return heads[-1] if heads else None


def mixed(images: Tensor, kind: str) -> Tensor:
    """Each image of (B, 3, H, W), uint8 or float, mixed with another by a uniform share of its own.

    Args:
        kind: "mixup" blends pixels (Zhang et al. 2017, arXiv 1710.09412), "cutmix" pastes a box (Yun et al. 2019, arXiv
            1905.04899). No labels are mixed: the teacher says what the result is.
    """
    count, device = len(images), images.device
    others = images[torch.randperm(count, device=device)]
    share, middle_y, middle_x = torch.rand(3, count, 1, 1, 1, device=device)
    if kind == "mixup":
        blend = images.float().lerp(others.float(), share)
        return blend.round_().to(images.dtype) if images.dtype == torch.uint8 else blend
    half = share.sqrt() / 2
    y, x = ((torch.arange(n, device=device) + 0.5) / n for n in images.shape[2:])
    inside = ((y[:, None] - middle_y).abs() < half) & ((x - middle_x).abs() < half)
    return torch.where(inside, others, images)


class DiffDFKD(Method):
    """Stages generate (the teacher-guided bank) and distill (on that bank)."""

    Config = DiffDFKDConfig
    stages = ("generate", "distill")
    defaults = {
        "epochs": 240, "kd_steps": 200, "batch_size": 256, "lr": 0.2, "weight_decay": 5e-4, "warmup_epochs": 20,
    }  # fmt: skip

    def __init__(self, config: DiffDFKDConfig, teacher: nn.Module, student: nn.Module, task: Task):
        if config.mix != "no":
            augment = task.augment
            task = dataclasses.replace(task, augment=lambda images: mixed(augment(images), config.mix))
        super().__init__(config, teacher, student, task)
        positive = ("images_per_class", "synthesis_batch_size", "diffusion_batch_size", "num_inference_steps", "adv_steps")
        check_least(config, **dict.fromkeys(positive, 1), lca_every=0, lca_repair=0, guidance_micro_batch=0)
        if config.msarc and not (teacher.feature_map_shapes and student.feature_map_shapes):
            raise UserError("a network without feature maps has no activation maps; give --msarc 0")
        self.model = config.diffusion_model or default_model(task)
        self.external_priors = {"generate": prior_name(self.model, config.diffusion_revision)}

    @property
    def images_per_round(self) -> int:
        """None: the bank of stage generate is all."""
        return 0

    def synthesizer(self) -> Synthesizer:
        """Of no use: nothing is synthesized while distilling."""
        return Synthesizer()

    def generator(self) -> GuidedGenerator:
        """For stage generate.

        Raises:
            UserError: the prior cannot be had, or does not fit the flags or the dataset.
        """
        from datafree.diffusion.generative import TextToImage, load_prior

        config, task = self.config, self.task
        prompts = tuple(prompt.strip() for prompt in (config.prompt or task.prompt).split("|") if prompt.strip())
        prior = load_prior(
            self.model, config.diffusion_revision, num_classes=task.num_classes, class_names=task.class_names,
            prompts=prompts, class_map=config.class_map, null_class=config.null_class,
            guidance_scale=config.guidance_scale, resolution=config.resolution, device=task.device,
            dtype=diffusion_dtype(config.diffusion_dtype, task.device),
        )  # fmt: skip
        if isinstance(prior, TextToImage) and not config.oh and not all("{label}" in prompt for prompt in prompts):
            raise UserError(
                f"--prompt '{config.prompt}' does not name the class and --oh is 0, so nothing would make an image one of "
                "its class; put {label} into every prompt, or give --oh 1"
            )
        if config.gradient_checkpointing:
            prior.checkpoint_gradients()
        calls = config.images_per_class * task.num_classes * config.num_inference_steps // config.diffusion_batch_size
        prior.network.forward = task.compile(prior.network.forward, calls, "denoising network")
        guidance = Guidance(
            self.teacher, task.image_size, config.bn, config.oh, config.adv, config.guidance_lr, config.guidance_backprop,
            config.guidance_micro_batch,
        )  # fmt: skip
        return GuidedGenerator(
            prior, guidance, task, self.student, steps=config.num_inference_steps, rule=config.scheduler,
            lca=lca_steps(config.num_inference_steps, config.lca_every), lca_repair=config.lca_repair,
            competitor=Competitor(config.adv_from * task.num_classes, config.adv_steps),
        )  # fmt: skip

    def objective(self) -> MapDistillation:
        return MapDistillation(self.config.T, self.config.msarc, self.teacher, self.student)


def default_model(task: Task, embedded: Path = EMBEDDED) -> str:
    """The embedded prior where it draws this dataset's classes at this size, else Stable Diffusion."""
    if embedded.exists():
        with safe_open(embedded, framework="pt") as file:
            about = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
        if about.get("image_size") == task.image_size and about.get("class_names") == list(task.class_names or ()):
            return str(embedded)
    return DEFAULT_MODEL
