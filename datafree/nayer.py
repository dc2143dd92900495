"""NAYER: noise as a layer, labels as input (Tran et al., CVPR 2024, arXiv 2310.00258).

The generator's input is not noise but an embedding of the wanted label, which is constant. What differs between images of
one class is the *noisy layer* that the embedding goes through: drawn anew for every batch, and trained with the generator.

    z_i = BN1d(e(y_i)) W_g      e(y) (d,), W_g (d, nz) ~ N(0, 1), one layer g for one image of each class ("K to 1")
    x_i = generator(z_i)
    synthesis   bn * L_bn + oh * CE(T(x), y) - adv * KL(T(x) || S(x)), the last where S and T name the same class

A batch of B images of C classes has ceil(B / C) noisy layers. L_bn takes a running average over batches (``datafree.fast``).
Every ``g_life`` rounds the generator starts afresh. The first ``init_rounds`` rounds are a warm-up without competition, of
``init_g_loops`` batches each: stage synthesize. The student learns from all images so far by KL at temperature T.

Where e comes from, ``--label_embedding``:
    orthogonal  a random orthonormal code for each class, the same in every run: prior-free, nothing is downloaded. Default.
                (With more classes than ``label_dim``: random unit vectors.)
    clip        the paper's: text embeddings, by any CLIP text encoder, of a prompt with the class name. An external prior;
                read once, then kept with the synthesizer's state.

Published settings (CIFAR): 20 rounds of warm-up, then 100, 200 or 300 of 400 student steps on batches of 512; SGD lr .2,
cosine to 2e-4, T 20; 2 batches of 400 images a round, 10 in warm-up; g_steps 30 (CIFAR-100: 40), lr_g 4e-3, g_life 10;
bn 10, bn_mmt .9, adv 1.33, oh .5; nz 1000; CLIP ViT-B/32, "a image of <label>".

Deviations: the default embedding is not the paper's. Noisy layers have no bias (the script's starts at 0, below outputs
of standard deviation sqrt(d)). In an incomplete group each class is there at most once; the script draws its labels
independently. Generators start from N(0, .02). The images kept are a copy of each batch's best, and the script's best
loss is not reset between the batches of a round. Rounds of ``g_life`` are counted from the beginning of each stage.

Left out: the script's settings for ImageNet (a deeper generator, jitter).
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.base import ImageBatch, Method, Synthesizer, Task, own_state
from datafree.diffusion.hub import hub_errors, prior_name, quiet_libraries
from datafree.fast import BETAS, Inversion
from datafree.generators import Generator, reset
from datafree.losses import KLDistillation
from engine.loops.session import Stage
from engine.runtime.compilation import Hot
from engine.runtime.errors import UserError
from engine.runtime.flags import flag

BOTH = ("synthesize", "distill")
CODE_SEED = 2310
TEXT_MODEL_TYPES = ("clip", "clip_text_model")


@dataclass(frozen=True)
class NAYERConfig:
    """Flags of NAYER."""

    init_rounds: int = flag(
        20, "rounds of warm-up, without competition", affects=("synthesize",), scales=True, least=1, most=1_000_000
    )
    init_g_loops: int = flag(10, "batches a round of warm-up", affects=("synthesize",), least=1)
    g_loops: int = flag(2, "batches a round while distilling", affects=("distill",), least=0)
    g_steps: int = flag(30, "steps of generator and noisy layers a batch", affects=BOTH, least=1)
    g_life: int = flag(10, "rounds after which the generator starts afresh", affects=BOTH, least=1)
    synthesis_batch_size: int = flag(400, "images a batch", affects=BOTH, least=2, most=1_000_000)
    lr_g: float = flag(4e-3, "Adam learning rate of generator and noisy layers", affects=BOTH, above=0)
    nz: int = flag(1000, "outputs of a noisy layer, inputs of the generator", affects=BOTH, least=1)
    label_embedding: str = flag(
        "orthogonal",
        "what stands for a label: fixed random codes (no prior), or text embeddings of its name",
        choices=("orthogonal", "clip"),
        affects=BOTH,
    )
    label_dim: int = flag(512, "length of the orthogonal codes; clip has its own", affects=BOTH, least=1)
    text_model: str = flag(
        "openai/clip-vit-base-patch32", "clip: hub id or local directory of a CLIP text encoder", affects=BOTH
    )
    prompt: str = flag("a image of {label}", "clip: the text that is embedded", affects=BOTH)
    bn: float = flag(10.0, "weight of the BN-statistics loss", affects=BOTH, least=0)
    bn_mmt: float = flag(
        0.9, "share of earlier batches' statistics in the BN-statistics loss", affects=BOTH, least=0, below=1
    )
    oh: float = flag(0.5, "weight of the one-hot loss", affects=BOTH, least=0)
    adv: float = flag(1.33, "weight of the competition with the student (warm-up has 0)", affects=("distill",), least=0)
    T: float = flag(20.0, "temperature of the distillation loss", affects=("distill",), above=0)


def orthogonal_codes(num_classes: int, dim: int) -> Tensor:
    """(C, dim) float32: orthonormal rows, or random rows of length 1 where C > dim; a function of its arguments alone."""
    normal = torch.randn(dim, num_classes, dtype=torch.double, generator=torch.Generator().manual_seed(CODE_SEED))
    if num_classes > dim:
        return F.normalize(normal, dim=0).T.float().contiguous()
    basis, triangle = torch.linalg.qr(normal)
    return (basis * triangle.diagonal().sign()).T.float().contiguous()


def check_text_model(model_id: str) -> None:
    """That --text_model is there and of the right kind, by its configuration alone.

    Raises:
        UserError: it is not.
    """
    from transformers import AutoConfig

    quiet_libraries()
    with hub_errors(model_id, None, "--text_model"):
        kind = AutoConfig.from_pretrained(model_id).model_type
    if kind not in TEXT_MODEL_TYPES:
        raise UserError(f"--text_model {model_id} holds a model of type {kind}, but a CLIP text encoder is wanted")


@torch.no_grad()
def text_codes(names: tuple[str, ...], prompt: str, model_id: str, device: torch.device) -> Tensor:
    """Text embeddings of the prompts, not normalized: (C, D) float32 on ``device``.

    Args:
        names: of the classes, in label order.
        prompt: {label} in it stands for a name.
        model_id: hub id or local directory of a CLIP model or CLIP text encoder.
    Raises:
        UserError: the model cannot be had, is of another kind, or cannot tell the classes apart.
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
    if len(codes.unique(dim=0)) < len(set(prompts)):  # what a directory without vocabulary gives, without a word
        raise UserError(
            f"--text_model {model_id} embeds different classes alike; give one whose tokenizer reads the --prompt"
        )
    return codes


def grouped_labels(count: int, num_classes: int, device: torch.device) -> Tensor:
    """(count,) class ids: whole groups of all classes in order, then one of different classes drawn at random."""
    whole = torch.arange(num_classes, device=device).repeat(count // num_classes)
    return torch.cat([whole, torch.randperm(num_classes, device=device)[: count % num_classes]])


def noisy_layers(inputs: Tensor, weights: Tensor, group: int) -> Tensor:
    """Each group of rows through its own linear layer.

    Args:
        inputs: (B, d); rows ``g * group`` to ``(g + 1) * group - 1`` are group g, the last may have fewer.
        weights: (G, d, nz).
    Returns:
        (B, nz).
    """
    padded = F.pad(inputs, (0, 0, 0, len(weights) * group - len(inputs)))
    return torch.bmm(padded.view(len(weights), group, -1), weights).flatten(0, 1)[: len(inputs)]


class NAYERSynthesizer(Synthesizer):
    """``g_loops`` batches a round, each from noisy layers of its own.

    Args:
        warm_up: no competition, and ``init_g_loops`` batches.
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
        self.codes: Tensor | None = None  # of this source; made in the first round, unless a state brings them
        self.norm: nn.BatchNorm1d | None = None

    def use_codes(self, codes: Tensor) -> None:
        """Takes label embeddings (C, d)."""
        self.codes = codes.to(self.task.device)
        self.norm = nn.BatchNorm1d(codes.shape[1]).to(self.task.device)

    def make_codes(self) -> Tensor:
        """Label embeddings (C, d) as the flags say."""
        config, task = self.config, self.task
        if config.label_embedding == "clip":
            return text_codes(task.info.class_names, config.prompt, config.text_model, task.device)
        return orthogonal_codes(task.info.num_classes, config.label_dim)

    def hot(self) -> list[Hot]:
        return [
            Hot(self, "run_generator", self.loops * self.config.g_steps, "generator"),
            Hot(self.inversion, "measure", self.loops * self.config.g_steps, "synthesis losses"),
        ]

    def synthesize(self, student: nn.Module) -> ImageBatch:
        """The batches of one round, with the mean of their losses."""
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
        """``g_steps`` steps of the generator together with new noisy layers."""
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
        """Label embeddings, generator, the running average, the loss scale and the count of rounds."""
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
        """Undoes ``state_dict``; after warm-up the count begins again. Embeddings of another source are not taken."""
        with own_state():
            self.rounds = state["rounds"] if state["warm_up"] == self.warm_up else 0
            self.generator.load_state_dict(state["generator"])
            self.inversion.load_state_dict(state)
            if state["codes"] is not None and state["source"] == self.source:
                self.use_codes(state["codes"])
                self.norm.load_state_dict(state["norm"])


class NAYER(Method):
    """Stages synthesize (warm-up, without competition) and distill (rounds with it)."""

    Config = NAYERConfig
    defaults = {"epochs": 300, "kd_steps": 400, "batch_size": 512, "lr": 0.2, "lr_min": 2e-4}

    def __init__(self, config: NAYERConfig, teacher: nn.Module, student: nn.Module, task: Task):
        super().__init__(config, teacher, student, task)
        if config.label_embedding == "clip":
            if not task.info.class_names:
                raise UserError(
                    "--label_embedding clip wants class names, and this dataset has none; give --label_embedding orthogonal"
                )
            if "{label}" not in config.prompt:
                raise UserError(f"--prompt '{config.prompt}' has no {{label}}, so that all classes would have one embedding")
            self.external_prior = prior_name(config.text_model)

    def check_inputs(self, stages: Collection[str]) -> None:
        """The text model; of a bank that is given, the synthesizer's state brings the codes."""
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
