"""DiffDFKD: a diffusion model guided by the teacher makes the transfer set (Qi et al., IEEE ICME 2025, arXiv 2504.00870).

No generator is trained. A pretrained generative prior makes images of every class. At every denoising step the teacher
guides the latent: towards its BN statistics, towards the wanted class, and towards images on which a student still differs
from it.

    generate    z <- z - lr * d/dz [bn * L_bn + oh * CE(T(x), y) + adv * L_adv]  at every denoising step; latent CutMix
    distill     KL_T + msarc * L_mSARC  on those images, and on nothing else

``--oh 0 --bn 0 --adv 0 --lca_every 0`` is the unguided baseline, DM-KD (arXiv 2305.12954). ``--diffusion_model`` chooses the
prior (``datafree.diffusion.priors``). For digits the default prior is a file of this repository.

A class-conditional prior can have other classes than the dataset. It is then run without class, or with its own classes in
turn (``--prior_classes``), and only the teacher's guidance gives an image its class. If the guidance has no one-hot loss
either (``--oh 0``), an image gets the teacher's prediction as its label.

The table shows CIFAR-10 with natural_32 (after 601,600 training images): 100 images of a resnet20's ten classes, made in 20
steps with oh 1. Columns: setting, the teacher's accuracy, L_bn over all 100 images, and the visual impression.

    no class, unguided                            12 %   4.97   blurred scenes
    ddim, bn 0 / .1 / .3                          92 / 97 / 97 %   4.83 / 3.92 / 3.19   few classes recognisable; some grain
    ddim, bn .1, own classes at scale 2           92 %   4.29   the prior's class shows through
    ancestral, bn .1                              96 %   3.88   cars, ships, dogs, frogs, horses; 4 images of grain
    ancestral, bn .1 / .3, --guidance_max_step 2  97 / 98 %   4.18 / 3.77   the same without grain
    the last, with natural_32 of 1.5 million draws     94 %   3.70
    ddim, bn .1, decoder alone                    98 %   6.46   patterns for the teacher alone; half the time
    ddim, bn .1, --guidance_lr 10                 84 %   6.60
    ancestral, bn .3, max_step 2, 50 steps        82 %   4.62   the best to look at, but for a fine checked pattern

Published settings: Stable Diffusion 1.5 with DDPM's ancestral steps (``--scheduler ancestral``), one class per batch
(``--batch_classes one``), no latent CutMix (``--lca_every 0``), T 30. CIFAR-10: prompt "A realistic photo of {label}",
guidance scale 3, oh 1, adv 0, bn .1 and 50 steps (teacher resnet34: bn 0 and 10 steps), 5000 images per class; SGD lr .2,
240 epochs, weight decay 5e-4. DomainNet: prompt "an image.", without the label, guidance scale 7 (3 in the distilled sets),
70 steps, bn .1, oh 1, adv 1 from 20 images per class on, with a student trained at lr .1 on batches of 256; 200 images per
class; distillation with lr .1, 220 epochs, weight decay 1e-4, ``--student_crop resized``, at most 4500 images per class. The
authors trained their DomainNet teachers with mean and std .5. To use one of them, give ``--teacher_mean .5,.5,.5
--teacher_std .5,.5,.5``.

Deviations. The published script cannot run: it takes the gradient of a tensor that was computed without gradient. Its
authors call it a recreation of lost code. There is therefore no run of the script to reproduce, and this file follows the
paper.
- The guidance step is the gradient of B times the batch-mean loss, so that it does not shrink as batches grow. The script's
  batches are single images (``--diffusion_batch_size 1``), and its L_bn compares the statistics of one image.
- By default a batch has images of all classes, because the teacher's BN statistics describe a mixture of all classes. By
  default latent CutMix is on, as in the paper.
- The noise prediction is computed once per step. Guidance moves the latent, and the sampler's step reuses the prediction.
  The script computes the prediction again. It takes one step fewer, without the last timestep.
- The paper does not say which student L_adv uses. Here it is a network of the run's student architecture, starting from its
  initial weights. As soon as there are ``--adv_from`` images per class, it is trained before each round for ``--adv_steps``
  steps by KL, at a constant learning rate, on the images made so far with the task's random crop and flip. It keeps its
  weights from round to round. The script trains its student for 30 epochs on all images whenever 10 more images per class
  exist, each time with a cosine schedule and also before L_adv is used. L_adv has temperature 1.
- Latent CutMix pastes at most about half of the area. The mixed labels are soft targets of the one-hot loss. The bank keeps the
  label for which an image was prompted.
- The repair of the seams (``--lca_repair``) is our reading of the paper's inpainting. It is RePaint's resampling with the
  same prior, applied to one latent pixel on either side of the seam.
- mSARC (SpaceshipNet, Yu et al., CVPR 2023) compares class activation maps. These need the classifier's weights, which fit
  the last scale only. At the other scales attention maps are compared, the mean squares over channels. The class is the one
  that the teacher predicts.
- Stable Diffusion 1.5 is saved with the scheduler PNDM. It is replaced by DPM-Solver++, another multistep solver, unless
  ``--scheduler`` names a rule.
- Images are resized from the prior's size to the dataset's size by bicubic interpolation with antialiasing, both in guidance
  and for the bank. The student's crops are taken from images at the dataset's size, the script's from images at 256 px.
- The student's learning rate has a warm-up and a cosine schedule. The script has flags for both, and divides the learning
  rate by 10 after epochs 150, 180 and 210.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from datafree.activation_maps import MapDistillation
from datafree.base import Method, Synthesizer, Task
from datafree.diffusion.default_prior import default_prior
from datafree.diffusion.guidance import BACKPROP, Guidance, lca_steps
from datafree.diffusion.guided_sampler import Competitor, GuidedSampler
from datafree.diffusion.hub import DTYPES, diffusion_dtype, prior_name
from datafree.diffusion.prior_base import CLASSES
from datafree.diffusion.priors import check_prior, load_prior
from datafree.diffusion.sampling import RULES
from engine.data.crops import mixed, resized_crop_flip
from engine.loops.makers import GuidedMaker, Order
from engine.loops.session import Session, Stage
from engine.loops.stages import Distill, FillBank
from engine.runtime.errors import UserError
from engine.runtime.files import claim_folder, is_claimed, require_new
from engine.runtime.flags import flag
from engine.runtime.tensors import digest

GENERATE = ("generate",)
DISTILL = ("distill",)


@dataclass(frozen=True)
class DiffDFKDConfig:
    """Flags of DiffDFKD."""

    diffusion_model: str | None = flag(
        None,
        "generative prior: hub id or directory of a text-to-image, DiT or class-conditional pixel pipeline, or .safetensors "
        "file or name (glyphs_digits_16, natural_32) of a prior of this project; unset: glyphs_digits_16 for digits, else "
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        affects=GENERATE,
    )
    diffusion_revision: str | None = flag(None, "revision of the model on the hub", affects=GENERATE)
    prompt: str | None = flag(
        None,
        "prompt for a text-to-image prior; several prompts, separated by |, are used in turn for the images of a class; "
        "unset: the dataset's prompt, for example 'a photo of a {label}'",
        affects=GENERATE,
    )
    class_map: tuple[int, ...] | None = flag(
        None,
        "class-conditional prior: the prior's class id for each class of the dataset, comma-separated; unset: the same ids",
        affects=GENERATE,
        least=0,
    )
    prior_classes: str | None = flag(
        None,
        "class-conditional prior: class that is given to the prior; same: that of --class_map; own: all classes of the "
        "prior in turn; none: no class; unset: same, or none for a prior of this project with another number of classes",
        choices=CLASSES,
        affects=GENERATE,
    )
    null_class: int | None = flag(
        None,
        "class-conditional pixel pipeline: the prior's class id for 'no class'; unset: the id after the dataset's last "
        "class, if the prior has exactly one class more than the dataset",
        affects=GENERATE,
        least=0,
    )
    images_per_class: int = flag(5000, "images to generate per class", affects=GENERATE, scales=True, least=1)
    synthesis_batch_size: int = flag(
        200,
        "images per round; a round is one shard of the bank, and an interrupted round is repeated",
        affects=GENERATE,
        least=1,
        most=1_000_000,
    )
    diffusion_batch_size: int = flag(
        16,
        "images generated together; the guidance's BN statistics and latent CutMix are computed over this batch",
        affects=GENERATE,
        least=1,
        most=1_000_000,
    )
    batch_classes: str = flag(
        "all",
        "classes of the images generated together; all: images of all classes; one: images of one class",
        choices=("all", "one"),
        affects=GENERATE,
    )
    num_inference_steps: int = flag(20, "denoising steps per image", affects=GENERATE, least=1, most=1000)
    scheduler: str = flag(
        "own",
        "sampling rule of the denoising steps; own: the rule nearest to the prior's scheduler",
        choices=("own", *RULES),
        affects=GENERATE,
    )
    guidance_scale: float = flag(
        3.0, "classifier-free guidance scale, for prompt or class; at most 1: no guidance", affects=GENERATE, least=0
    )
    resolution: int | None = flag(
        None,
        "text-to-image prior: size in px at which the prior makes images; unset: the prior's own",
        affects=GENERATE,
        least=1,
        most=4096,
    )
    diffusion_dtype: str | None = flag(
        None,
        "data type of the prior; the guidance loss is always fp32; unset: fp16 on a GPU, else fp32",
        choices=tuple(DTYPES),
        affects=GENERATE,
    )
    bn: float = flag(0.1, "weight of the BN-statistics loss in the teacher's guidance", affects=GENERATE, least=0)
    oh: float = flag(1.0, "weight of the one-hot loss CE(T(x), y) in the teacher's guidance", affects=GENERATE, least=0)
    adv: float = flag(
        0.0,
        "weight of the adversarial loss in the teacher's guidance: -KL where student and teacher predict the same class",
        affects=GENERATE,
        least=0,
    )
    adv_from: int = flag(
        20, "with --adv: number of images per class from which on the adversarial loss is used", affects=GENERATE, least=0
    )
    adv_steps: int = flag(
        200,
        "with --adv: training steps of the adversarial loss's student before each round",
        affects=GENERATE,
        scales=True,
        least=1,
    )
    adv_batch_size: int = flag(
        128,
        "with --adv: images per training step of the adversarial loss's student",
        affects=GENERATE,
        least=1,
        most=1_000_000,
    )
    adv_lr: float = flag(0.05, "with --adv: SGD learning rate of the adversarial loss's student", affects=GENERATE, above=0)
    adv_T: float = flag(
        30.0, "with --adv: temperature of the distillation loss of the adversarial loss's student", affects=GENERATE, above=0
    )
    guidance_lr: float = flag(
        1.0,
        "step size of the teacher's guidance: z <- z - guidance_lr * gradient at every denoising step",
        affects=GENERATE,
        least=0,
    )
    guidance_max_step: float = flag(
        0.0,
        "largest L2 norm of a teacher-guidance step of one image, in latent space; longer steps are shortened to it; "
        "0: no limit",
        affects=GENERATE,
        least=0,
    )
    guidance_backprop: str = flag(
        "unet",
        "path of the guidance gradient; unet: through decoder and denoising network; decoder: through the decoder alone",
        choices=BACKPROP,
        affects=GENERATE,
    )
    guidance_micro_batch: int = flag(
        0, "images that pass through prior and decoder at a time, to save memory; 0: all of a batch", least=0
    )
    gradient_checkpointing: bool = flag(False, "save memory by recomputing the prior's activations in the backward pass")
    lca_every: int | None = flag(
        None,
        "denoising steps from one latent CutMix to the next; unset: a fifth of all steps; 0: no latent CutMix",
        affects=GENERATE,
        least=0,
    )
    lca_repair: int = flag(0, "inpainting passes over the seams after each latent CutMix", affects=GENERATE, least=0)
    export_png: str | None = flag(None, "folder to which images are also written in full size, as <class id>/<position>.png")
    T: float = flag(30.0, "temperature of the distillation loss", affects=DISTILL, above=0)
    msarc: float = flag(
        0.0,
        "weight of the distance between activation maps of student and teacher, at every scale, in the student's loss",
        affects=DISTILL,
        least=0,
    )
    mix: str = flag(
        "no", "mixing of the images in the student's batches", choices=("no", "mixup", "cutmix"), affects=DISTILL
    )
    student_crop: str = flag(
        "padded",
        "random crop of the student's images; padded: of the zero-padded image; resized: of 8 to 100 % of the area, resized "
        "to full size",
        choices=("padded", "resized"),
        affects=DISTILL,
    )
    student_images_per_class: int | None = flag(
        None,
        "images per class that the student is trained on, the first ones of the bank; unset: all",
        affects=DISTILL,
        least=1,
    )


class DiffDFKD(Method):
    """Method with stages generate (the teacher-guided bank) and distill (on that bank)."""

    Config = DiffDFKDConfig
    defaults = {"epochs": 240, "kd_steps": 200, "batch_size": 256, "lr": 0.2, "weight_decay": 5e-4, "warmup_epochs": 20}

    def __init__(self, config: DiffDFKDConfig, teacher: nn.Module, student: nn.Module, task: Task):
        super().__init__(config, teacher, student, task)
        if config.msarc and not (teacher.feature_map_shapes and student.feature_map_shapes):
            raise UserError(
                "the activation maps of --msarc need feature maps, which the teacher or the student does not have; give "
                "--msarc 0"
            )
        self.model = config.diffusion_model or default_prior(task)
        self.prompts = tuple(text.strip() for text in (config.prompt or task.info.prompt).split("|") if text.strip())

    def check_inputs(self, stages: Collection[str]) -> None:
        """Checks the prior and the export folder, and that prompt or one-hot loss gives an image its class."""
        if "generate" not in stages:
            return
        config = self.config
        if config.export_png and not is_claimed(Path(config.export_png)):
            require_new(Path(config.export_png))
        by_prompt = check_prior(self.model, config.diffusion_revision, self.prompts, self.task.info.class_names)
        if by_prompt and not config.oh and not all("{label}" in prompt for prompt in self.prompts):
            raise UserError(
                f"--prompt '{config.prompt}' has a prompt without {{label}} and --oh is 0, so its images would not depend "
                "on the class; put {label} into every prompt, or give --oh 1"
            )

    def stages(self) -> tuple[Stage, ...]:
        config = self.config

        def order(seed: int) -> Order:
            return Order(
                config.images_per_class * self.task.info.num_classes,
                self.task.info.num_classes,
                config.synthesis_batch_size,
                config.diffusion_batch_size,
                seed,
                Path(config.export_png) if config.export_png else None,
                config.batch_classes == "one",
            )

        def maker(session: Session) -> GuidedMaker:
            if config.export_png and session.processes.main:
                claim_folder(Path(config.export_png), digest(session.record.dependencies["generate"]))
            sampler, run = self.sampler(), getattr(session, "run", None)  # a trial of --minutes has no run
            if run and sampler.prior.classes == "none" and config.prior_classes is None:
                run.log(
                    f"generate: {sampler.prior.external_prior} has another number of classes than the dataset "
                    f"({self.task.info.num_classes}), so it draws without a class (--prior_classes none) and the teacher "
                    "alone gives images their classes; --class_map gives the prior's class for each class"
                )
            return GuidedMaker(sampler, order(session.seed))

        prior = prior_name(self.model, config.diffusion_revision)
        return FillBank("generate", order(0).rounds, maker, prior), Distill(
            self, "generate", images_per_class=config.student_images_per_class
        )

    @property
    def student_view(self) -> Callable[[Tensor], Tensor]:
        """Augmentation of images (B, 3, H, W) uint8: random crop and flip, then mixing if ``--mix`` asks for it."""
        view = self.task.random_view
        if self.config.student_crop == "resized":
            view = partial(resized_crop_flip, flip=self.task.info.flip)
        return view if self.config.mix == "no" else lambda images: mixed(view(images), self.config.mix)

    @property
    def images_per_round(self) -> int:
        """0, because stage distill adds no images to the bank of stage generate."""
        return 0

    def synthesizer(self) -> Synthesizer:
        """Placeholder: stage distill synthesizes nothing."""
        return Synthesizer()

    def sampler(self) -> GuidedSampler:
        """Builds the guided sampler of stage generate.

        Raises:
            UserError: the prior cannot be loaded, or does not fit the flags or the dataset.
        """
        config, task = self.config, self.task
        prior = load_prior(
            self.model,
            config.diffusion_revision,
            num_classes=task.info.num_classes,
            class_names=task.info.class_names,
            prompts=self.prompts,
            class_map=config.class_map,
            classes=config.prior_classes,
            null_class=config.null_class,
            guidance_scale=config.guidance_scale,
            resolution=config.resolution,
            device=task.device,
            dtype=diffusion_dtype(config.diffusion_dtype, task.device),
        )
        if config.gradient_checkpointing:
            prior.checkpoint_gradients()
        guidance = Guidance(
            self.teacher,
            task.info.image_size,
            config.bn,
            config.oh,
            config.adv,
            config.guidance_lr,
            config.guidance_backprop,
            config.guidance_micro_batch,
            config.guidance_max_step,
        )
        return GuidedSampler(
            prior,
            guidance,
            task,
            self.student,
            steps=config.num_inference_steps,
            rule=config.scheduler,
            lca=lca_steps(config.num_inference_steps, config.lca_every),
            lca_repair=config.lca_repair,
            competitor=Competitor(
                config.adv_from * task.info.num_classes, config.adv_steps, config.adv_T, config.adv_batch_size, config.adv_lr
            ),
        )

    def objective(self) -> MapDistillation:
        return MapDistillation(self.config.T, self.config.msarc, self.teacher, self.student)
