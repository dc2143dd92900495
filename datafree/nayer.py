"""NAYER: noise as a layer, labels as input (Tran et al., CVPR 2024, arXiv 2310.00258).

The generator's input is not noise but an embedding of the wanted label, which is the same for all images of a class. Before
the generator, the embedding passes through a *noisy layer*, which makes images of one class differ. Noisy layers are drawn
anew for every batch and are trained together with the generator.

    z_i = BN1d(e(y_i)) W_g      e(y) (d,), W_g (d, nz) ~ N(0, 1), one layer g for one image of each class ("K to 1")
    x_i = generator(z_i)
    synthesis   bn * L_bn + oh * CE(T(x), y) - adv * KL(T(x) || S(x)), KL only where S and T predict the same class

A batch of B images of C classes has ceil(B / C) noisy layers. L_bn uses a running average over batches (``datafree.fast``).
Every ``g_life`` rounds the generator is re-initialized. The first ``init_rounds`` rounds are a warm-up without the
adversarial loss, with ``init_g_loops`` batches each: stage synthesize. The student is trained on all images made so far, by
KL at temperature T.

The embedding e is chosen by ``--label_embedding``:
    orthogonal  random orthonormal codes, one for each class, the same in every run. They need no prior and no download.
                With more classes than ``label_dim`` the codes are random unit vectors. Default.
    clip        the paper's choice: text embeddings of a prompt with the class name, by any CLIP text encoder. This is an
                external prior. The embeddings are computed once and then kept in the synthesizer's state.

Published settings (CIFAR): 20 rounds of warm-up, then 100, 200 or 300 rounds of 400 student steps on batches of 512; SGD lr
.2, cosine to 2e-4, T 20; 2 batches of 400 images per round, 10 in warm-up; g_steps 30 (CIFAR-100: 40), lr_g 4e-3, g_life 10;
bn 10, bn_mmt .9, adv 1.33, oh .5; nz 1000; CLIP ViT-B/32, "a image of <label>".
For Tiny ImageNet (resnet34 -> resnet18) the script has 1000 student steps per round, batches of 256, lr .1, 4 batches of 200
images per round, 20 in warm-up, and g_steps 60.

Deviations:
- The default embedding is not the paper's.
- Noisy layers have no bias. The script's bias starts at 0 and is small next to outputs of standard deviation sqrt(d).
- An incomplete group has each class at most once. The script draws the labels of such a group independently.
- The images kept are those of each batch's own lowest loss. In the script the batches of a round share one lowest loss. A
  later batch that does not fall below it keeps the images of its first step.
- Generators are initialized from N(0, .02).
- Rounds for ``g_life`` are counted from the beginning of each stage.

Left out: the script's settings for ImageNet (a deeper generator, jitter).
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.base import ImageBatch, Method, Synthesizer, Task, state_errors
from datafree.diffusion.hub import check_model_type, hub_errors, prior_name
from datafree.fast import BETAS, Inversion
from datafree.generators import Generator, reset
from datafree.losses import KLDistillation
from engine.loops.session import Stage
from engine.runtime.compilation import CompileTarget
from engine.runtime.errors import UserError
from engine.runtime.flags import flag

BOTH = ("synthesize", "distill")
CODE_SEED = 2310
TEXT_MODEL_TYPES = ("clip", "clip_text_model")


@dataclass(frozen=True)
class NAYERConfig:
    """Flags of NAYER."""

    init_rounds: int = flag(
        20,
        "warm-up rounds of stage synthesize, without the adversarial loss",
        affects=("synthesize",),
        scales=True,
        least=1,
        most=1_000_000,
    )
    init_g_loops: int = flag(10, "batches synthesized per warm-up round", affects=("synthesize",), least=1)
    g_loops: int = flag(2, "batches synthesized per round of stage distill", affects=("distill",), least=0)
    g_steps: int = flag(30, "training steps of generator and noisy layers per batch", affects=BOTH, least=1)
    g_life: int = flag(10, "rounds after which the generator is re-initialized", affects=BOTH, least=1)
    synthesis_batch_size: int = flag(400, "images per synthesized batch", affects=BOTH, least=2, most=1_000_000)
    lr_g: float = flag(4e-3, "Adam learning rate of generator and noisy layers", affects=BOTH, above=0)
    nz: int = flag(1000, "length of a noisy layer's output, which is the generator's input", affects=BOTH, least=1)
    label_embedding: str = flag(
        "orthogonal",
        "label embeddings, the input of the noisy layers; orthogonal: fixed random codes, no external prior; clip: CLIP "
        "text embeddings of --prompt",
        choices=("orthogonal", "clip"),
        affects=BOTH,
    )
    label_dim: int = flag(
        512, "orthogonal: length of the label embeddings (those of clip have the encoder's length)", affects=BOTH, least=1
    )
    text_model: str = flag(
        "openai/clip-vit-base-patch32", "clip: hub id or local directory of a CLIP text encoder", affects=BOTH
    )
    prompt: str = flag(
        "a image of {label}", "clip: text to embed for a class; {label} stands for the class name", affects=BOTH
    )
    bn: float = flag(10.0, "weight of the BN-statistics loss in synthesis", affects=BOTH, least=0)
    bn_mmt: float = flag(
        0.9,
        "momentum of the running average of batch statistics in the BN-statistics loss; 0: the batch alone",
        affects=BOTH,
        least=0,
        below=1,
    )
    oh: float = flag(0.5, "weight of the one-hot loss CE(T(x), y) in synthesis", affects=BOTH, least=0)
    adv: float = flag(
        1.33,
        "weight of the adversarial loss in stage distill: -KL where student and teacher predict the same class",
        affects=("distill",),
        least=0,
    )
    T: float = flag(20.0, "temperature of the distillation loss", affects=("distill",), above=0)


def orthogonal_codes(num_classes: int, dim: int) -> Tensor:
    """Random orthonormal codes (C, dim) float32, one row per class; random unit rows if C > dim.

    The codes depend on the arguments alone.
    """
    normal = torch.randn(dim, num_classes, dtype=torch.double, generator=torch.Generator().manual_seed(CODE_SEED))
    if num_classes > dim:
        return F.normalize(normal, dim=0).T.float().contiguous()
    basis, triangle = torch.linalg.qr(normal)
    return (basis * triangle.diagonal().sign()).T.float().contiguous()


def check_text_model(model_id: str) -> None:
    """Checks from its configuration alone that --text_model exists and is a CLIP model or CLIP text encoder.

    Raises:
        UserError: the model is missing or of another kind.
    """
    check_model_type(model_id, TEXT_MODEL_TYPES, "a CLIP text encoder", "--text_model")


@torch.no_grad()
def text_codes(names: tuple[str, ...], prompt: str, model_id: str, device: torch.device) -> Tensor:
    """Text embeddings of the prompts, not normalized: (C, D) float32 on ``device``.

    Args:
        names: class names in label order.
        prompt: text in which {label} stands for a class name.
        model_id: hub id or local directory of a CLIP model or CLIP text encoder.
        device: device of model and embeddings.
    Raises:
        UserError: the model cannot be loaded, is of another kind, or gives different classes the same embedding.
    """
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    check_text_model(model_id)
    with hub_errors(model_id, None, "--text_model"):
        tokenizer = AutoTokenizer.from_pretrained(model_id)
        model = CLIPTextModelWithProjection.from_pretrained(model_id, dtype=torch.float32).to(device).eval()
    prompts = [prompt.replace("{label}", name) for name in names]
    parts = [prompts[first : first + 100] for first in range(0, len(prompts), 100)]
    tokens = (tokenizer(part, padding=True, truncation=True, return_tensors="pt").to(device) for part in parts)
    codes = torch.cat([model(**part).text_embeds for part in tokens])
    if len(codes.unique(dim=0)) < len(set(prompts)):  # silent result of a model directory without a vocabulary
        raise UserError(
            f"--text_model {model_id} gives different classes the same embedding; give a model with the complete "
            "vocabulary of its tokenizer"
        )
    return codes


def grouped_labels(count: int, num_classes: int, device: torch.device) -> Tensor:
    """Class ids (count,): complete groups of all classes in order, then an incomplete group of random distinct classes."""
    whole = torch.arange(num_classes, device=device).repeat(count // num_classes)
    return torch.cat([whole, torch.randperm(num_classes, device=device)[: count % num_classes]])


def noisy_layers(inputs: Tensor, weights: Tensor, group: int) -> Tensor:
    """Applies to each group of rows its own linear layer.

    Args:
        inputs: (B, d); rows ``g * group`` to ``(g + 1) * group - 1`` are group g, and the last group may be smaller.
        weights: weights of the G layers, (G, d, nz).
        group: number of rows in a group.
    Returns:
        (B, nz).
    """
    padded = F.pad(inputs, (0, 0, 0, len(weights) * group - len(inputs)))
    return torch.bmm(padded.view(len(weights), group, -1), weights).flatten(0, 1)[: len(inputs)]


class NAYERSynthesizer(Synthesizer):
    """Synthesizer of ``g_loops`` batches per round, each with its own noisy layers.

    Args:
        config: flags of NAYER.
        teacher: the teacher.
        task: see ``datafree.base.Task``.
        warm_up: whether this is the warm-up, with ``init_g_loops`` batches per round and without the adversarial loss.
    """

    independent = False

    def __init__(self, config: NAYERConfig, teacher: nn.Module, task: Task, *, warm_up: bool):
        self.config, self.task, self.warm_up = config, task, warm_up
        self.loops = config.init_g_loops if warm_up else config.g_loops
        self.inversion = Inversion(config, teacher, task, 0.0 if warm_up else config.adv)
        self.generator = Generator(config.nz, task.info.image_size).to(task.device, memory_format=torch.channels_last)
        self.run_generator = self.generator
        self.rounds = 0
        clip = ["clip", Path(config.text_model).name, config.prompt]
        self.source = clip if config.label_embedding == "clip" else ["orthogonal", config.label_dim]
        self.codes: Tensor | None = None  # label embeddings; made in the first round unless a loaded state has them
        self.norm: nn.BatchNorm1d | None = None

    def use_codes(self, codes: Tensor) -> None:
        """Sets the label embeddings (C, d) and a new BN layer for them."""
        self.codes = codes.to(self.task.device)
        self.norm = nn.BatchNorm1d(codes.shape[1]).to(self.task.device)

    def make_codes(self) -> Tensor:
        """Label embeddings (C, d) that the flags ask for."""
        config, task = self.config, self.task
        if config.label_embedding == "clip":
            return text_codes(task.info.class_names, config.prompt, config.text_model, task.device)
        return orthogonal_codes(task.info.num_classes, config.label_dim)

    def compile_targets(self) -> list[CompileTarget]:
        return [
            CompileTarget(self, "run_generator", self.loops * self.config.g_steps, "generator"),
            CompileTarget(self.inversion, "measure", self.loops * self.config.g_steps, "synthesis losses"),
        ]

    def synthesize(self, student: nn.Module) -> ImageBatch:
        """Makes the batches of one round; returns them as one batch with the mean of their losses."""
        if self.codes is None:
            self.use_codes(self.make_codes())
        if self.rounds % self.config.g_life == 0:
            reset(self.generator)
            self.norm.reset_parameters()
        self.rounds += 1
        batches = [self.batch(student) for _ in range(self.loops)]
        scalars = {name: torch.stack([b.scalars[name] for b in batches]).mean() for name in batches[0].scalars}
        return ImageBatch(torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches]), scalars)

    def batch(self, student: nn.Module) -> ImageBatch:
        """Trains the generator and new noisy layers for ``g_steps`` steps; returns the best images."""
        config, task = self.config, self.task
        labels = grouped_labels(config.synthesis_batch_size, task.info.num_classes, task.device)
        group = min(task.info.num_classes, len(labels))
        shape = (-(-len(labels) // group), self.codes.shape[1], config.nz)
        weights = torch.randn(shape, device=task.device, requires_grad=True)
        parameters = [*self.generator.parameters(), *self.norm.parameters(), weights]
        optimizer = torch.optim.Adam(parameters, lr=config.lr_g, betas=BETAS, fused=True)

        def generate() -> Tensor:
            return self.run_generator(noisy_layers(self.norm(self.codes[labels]), weights, group))

        return self.inversion.descend(generate, optimizer, labels, student)

    def state_dict(self) -> dict[str, Any]:
        """State of label embeddings, generator, running average, loss scale and the number of rounds."""
        return {
            "warm_up": self.warm_up,
            "rounds": self.rounds,
            "source": self.source,
            "codes": self.codes,
            "norm": self.norm.state_dict() if self.norm else None,
            "generator": self.generator.state_dict(),
            **self.inversion.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned. The number of rounds starts from 0 again after the warm-up.

        Label embeddings that were made with other flags are not restored.
        """
        with state_errors():
            self.rounds = state["rounds"] if state["warm_up"] == self.warm_up else 0
            self.generator.load_state_dict(state["generator"])
            self.inversion.load_state_dict(state)
            if state["codes"] is not None and state["source"] == self.source:
                self.use_codes(state["codes"])
                self.norm.load_state_dict(state["norm"])


class NAYER(Method):
    """Method with stages synthesize (warm-up, without the adversarial loss) and distill (rounds with it)."""

    Config = NAYERConfig
    defaults = {"epochs": 300, "kd_steps": 400, "batch_size": 512, "lr": 0.2, "lr_min": 2e-4}

    def __init__(self, config: NAYERConfig, teacher: nn.Module, student: nn.Module, task: Task):
        super().__init__(config, teacher, student, task)
        if config.label_embedding == "clip":
            if not task.info.class_names:
                raise UserError(
                    "--label_embedding clip needs class names, and this dataset has none; give --label_embedding orthogonal"
                )
            if "{label}" not in config.prompt:
                raise UserError(
                    f"--prompt '{config.prompt}' has no {{label}}, so all classes would have the same embedding; put "
                    "{label} into it"
                )
            self.external_prior = prior_name(config.text_model)

    def check_inputs(self, stages: Collection[str]) -> None:
        """Checks the text model. With --init_bank the label embeddings come from the synthesizer's state instead."""
        if self.config.label_embedding == "clip" and "synthesize" in stages:
            check_text_model(self.config.text_model)

    @property
    def images_per_round(self) -> int:
        return self.config.synthesis_batch_size * self.config.g_loops

    def stages(self) -> tuple[Stage, ...]:
        return self.from_initial_bank(self.config.init_rounds)

    def initial_synthesizer(self) -> NAYERSynthesizer:
        return NAYERSynthesizer(self.config, self.teacher, self.task, warm_up=True)

    def synthesizer(self) -> NAYERSynthesizer:
        return NAYERSynthesizer(self.config, self.teacher, self.task, warm_up=False)

    def objective(self) -> KLDistillation:
        return KLDistillation(self.config.T)
