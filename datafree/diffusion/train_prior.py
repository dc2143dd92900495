"""Trains a diffusion prior, a class-conditional U-Net, on the training images of a dataset, and writes it as one small file.

    python -m datafree.diffusion.train_prior --dataset cifar100 --output checkpoints/priors/natural_32.safetensors

The dataset may be any ``DATA_ROOT/NAME.npz`` (``--dataset NAME``) or tree of class folders (``--dataset folder``).
``--diffusion_model`` takes the written file by its path or, if the file lies in ``checkpoints/priors``, by its name. The
file is rewritten after every report, so it can be used while the training goes on. To resume, run the same command again.
With a larger --images a finished training continues. ``--start FILE`` starts from the weights of such a file.

``datafree.diffusion.patch_unet`` has the network and ``datafree.diffusion.denoising`` the loss and the moving average of the
weights. The learning rate is constant after a warm-up, since it is often not known for how long a machine is available. The
moving average takes the place of a learning rate decay.

The defaults were chosen by measurements on CIFAR-100, on one core of an AMD EPYC with AVX512-BF16. Training speed in images
per CPU-second, with batches of 64, 2 x 2 pixel patches and bf16: channels 32,64 without attention 236; 32,64,128 175;
48,96,192 107; 64,128,128 98; 64,128 96 (with batches of 32 and 128: 90 and 95; in fp32: 61); 64,128,256 68; 128,256 on 4 x 4
patches 121. Loss on held-out images with 32,64,128: .164 after 300 CPU-seconds, .153 after 451; with 48,96,192: .166 after
305, .152 after 487. These losses do not differ yet. The larger network was chosen, for trainings of hours.

The shipped ``natural_32`` was trained on 1,536,000 images, in batches of 256. This took about four minutes on an H100 that
other runs shared (about 7,500 images per second). The held-out loss is .108. A resnet20 of 57.9 % accuracy predicted the
label for 58 % of 500 samples at guidance scale 3 (training images: 62 %). In the features of the resnet20, the Fréchet
distance between samples and test split is 10.9 (training images: 1.7), the density .97 (.96) and the coverage .86 (.96). At
guidance scale 2 the figures are 43 %, 12.5, 1.08 and .86. An earlier training in batches of 64 took 94 CPU-minutes for
601,600 images: held-out loss .111, at guidance scale 2 27 %, 16.6, 1.21 and .80.
"""

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from datafree.diffusion.denoising import Denoising, Diverged
from datafree.diffusion.patch_unet import PatchUNet, add_noise, load_patch_prior, save_patch_prior, velocity
from datafree.diffusion.pixel import PriorAugmenter
from datafree.diffusion.priors import PatchPrior
from datafree.diffusion.variation import seeded_noise
from engine.data.datasets import DatasetInfo, dataset_info
from engine.data.image_bank import to_uint8
from engine.data.pictures import grid
from engine.data.splits import Split, load_split
from engine.loops.measures import density_coverage, frechet_distance
from engine.networks.build import load_teacher
from engine.runtime.errors import UserError, run_command
from engine.runtime.files import delete_files
from engine.runtime.flags import Parser, add_flags, flag, from_args, stage_flags
from engine.runtime.precision import Precision, choose_amp, choose_device
from engine.runtime.processes import position_seed, seed_position
from engine.runtime.run import Run, earlier_value, progress, require_own_output, require_run_folder
from engine.runtime.tensors import load_checkpoint, save_checkpoint
from models.classifier import Classifier
from registry import DATASETS, MODELS

TRAIN = ("train",)
WARMUP_STEPS = 200
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # times at which the loss on held-out images is measured
SAMPLING_STEPS = 20
SHOWN = (10, 10)  # rows (classes) and columns of the picture of samples
HELD_OUT = 1000  # number of held-out images on which the loss is measured
CHUNK = 250  # batch size of forward passes in a report


@dataclass(frozen=True)
class PriorFlags:
    """Data, network, training and output."""

    dataset: str = flag(
        "cifar100", "dataset: a name of registry.DATASETS, NAME of DATA_ROOT/NAME.npz, or folder", affects=TRAIN
    )
    data_root: str = flag(
        "data", "folder of the data; with --dataset folder, the folder that holds train/<class>/* and test/<class>/*"
    )
    image_size: int | None = flag(None, "image size in px; unset: the dataset's", affects=TRAIN, least=1, most=4096)
    output: str | None = flag(None, "file of weights to write; unset: checkpoints/priors/<dataset>_<image_size>.safetensors")
    save_dir: str | None = flag(
        None, "run folder for logs, pictures and resuming; unset: checkpoints/train_prior/<output's name>"
    )
    start: str | None = flag(
        None, "file of a prior with the same network sizes; training starts from its weights", affects=TRAIN
    )
    redo: bool = flag(False, "discard the training in the run folder and start again")
    images: int = flag(
        3_000_000, "total number of training images to draw, including those drawn for the --start prior", least=1
    )
    minutes: float | None = flag(None, "stop after this many minutes; the same command resumes the training", above=0)
    patch: int = flag(
        2, "side in px of the pixel blocks that form one position of the network's input", affects=TRAIN, least=1
    )
    channels: tuple[int, ...] = flag((48, 96, 192), "width of each level of the network", affects=TRAIN, least=1)
    no_attention: bool = flag(False, "no self-attention at the coarsest level", affects=TRAIN)
    batch_size: int = flag(64, "images per training step", affects=TRAIN, least=1, most=1_000_000)
    lr: float = flag(1e-3, f"AdamW learning rate, reached after {WARMUP_STEPS} warm-up steps", affects=TRAIN, above=0)
    no_flip: bool = flag(False, "never mirror training images, even if the dataset allows it", affects=TRAIN)
    amp: str = flag(
        "auto",
        "mixed precision; auto: bf16 if the device computes in bf16 in hardware, else no",
        choices=("auto", "no", "bf16"),
        affects=TRAIN,
    )
    round_steps: int = flag(
        50, "training steps per round; a stopped training loses at most one round", affects=TRAIN, least=1
    )
    report_every: int = flag(
        30, "rounds between reports, which measure the held-out loss, draw samples and rewrite the output", least=1
    )
    eval_classifier: str | None = flag(
        None,
        "checkpoint of a classifier of the dataset (train_scratch.py); reports then compare samples with the test split in "
        "its features; unset: no comparison",
    )
    samples: int = flag(500, "number of samples for the comparison with --eval_classifier", least=1)
    guidance_scale: float = flag(2.0, "scale of classifier-free guidance in reports; at most 1: no guidance", least=0)
    seed: int = flag(0, "random seed; the random numbers of a round depend only on seed and round", affects=TRAIN, least=0)
    gpu: int | None = flag(None, "index of the GPU, -1 for the CPU; unset: GPU 0 if there is one", least=-1)


def _spread(*tensors: Tensor, count: int) -> list[Tensor]:
    """``count`` evenly spaced rows of each tensor, or all rows if there are fewer; the tensors have equal length."""
    step = max(1, len(tensors[0]) // count)
    return [tensor[::step][:count] for tensor in tensors]


class Report:
    """Measures a prior during its training, always with the same held-out images, noise and labels.

    Args:
        split: held-out images, with which samples are compared.
        eval_classifier: frozen classifier, or None.
    """

    def __init__(
        self, flags: PriorFlags, info: DatasetInfo, split: Split, eval_classifier: Classifier | None, device: torch.device
    ):
        self.flags, self.info, self.eval_classifier, self.device = flags, info, eval_classifier, device
        self.held_out = _spread(split.images, split.labels, count=HELD_OUT)
        self.labels = torch.arange(max(flags.samples, info.num_classes)) % info.num_classes
        self.real = self._features(split.images)[0] if eval_classifier else None

    @torch.no_grad()
    def losses(self, training: Denoising) -> dict[str, float]:
        """Mean squared error of v on held-out images, on average and at each time of ``LEVELS``."""
        images, labels = self.held_out
        found = {}
        for t in LEVELS:
            level, total = torch.full((1,), t, device=self.device), 0.0
            for start in range(0, len(images), CHUNK):
                clean = images[start : start + CHUNK].to(self.device).float().div(127.5).sub(1)
                seeds = [position_seed("held out", start + k, round(100 * t)) for k in range(len(clean))]
                noise = seeded_noise(seeds, tuple(clean.shape[1:])).to(self.device)
                with training.autocast():
                    v = training.ema(add_noise(clean, noise, level), level.expand(len(clean)), labels[start : start + CHUNK])
                total += float(F.mse_loss(v.float(), velocity(clean, noise, level), reduction="sum"))
            found[f"held_out_{t:g}"] = round(total / images.numel(), 5)
        return {"held_out": round(sum(found.values()) / len(found), 5)} | found

    def draw(self, training: Denoising, labels: Tensor) -> Tensor:
        """Samples one image per label (B,), from noise that depends only on its position: (B, 3, H, W) uint8."""
        classes, size = self.info.num_classes, self.info.image_size
        prior = PatchPrior(training.ema, "", size, classes, num_classes=classes, guidance_scale=self.flags.guidance_scale)
        sampler = PriorAugmenter(prior, classes, 1.0, SAMPLING_STEPS)  # from pure noise: nothing of the sources is left
        drawn = []
        for start in range(0, len(labels), CHUNK):
            part = labels[start : start + CHUNK]
            seeds = [position_seed("sample", start + k) for k in range(len(part))]
            with training.autocast():
                images = sampler.augment(torch.zeros(len(part), 3, size, size), part, seeds)
            drawn.append(to_uint8(images).cpu())
        return torch.cat(drawn)

    def quality(self, images_u8: Tensor, labels: Tensor) -> dict[str, float]:
        """Quality of images (B, 3, H, W) uint8 with labels (B,), in the classifier's features.

        Returns:
            The Fréchet distance to the test split, density and coverage with respect to B images of the test split, and the
            classifier's accuracy on the labels in %.
        """
        features, predicted = self._features(images_u8)
        (real,) = _spread(self.real, count=len(features))
        density, coverage = density_coverage(real, features)
        return {
            "frechet": round(frechet_distance(self.real, features), 4),
            "density": round(density, 4),
            "coverage": round(coverage, 4),
            "eval_classifier_acc1": round(100 * float((predicted == labels.cpu()).float().mean()), 2),
        }

    def picture(self, training: Denoising) -> Tensor:
        """Picture of samples with one class per row, for evenly spaced classes: (3, H', W') uint8."""
        rows, columns = min(SHOWN[0], self.info.num_classes), SHOWN[1]
        classes = torch.arange(rows) * self.info.num_classes // rows
        labels = classes.repeat_interleave(columns)
        return grid(self.draw(training, labels), columns, labels=labels, names=self.info.class_names)

    @torch.no_grad()
    def _features(self, images_u8: Tensor) -> tuple[Tensor, Tensor]:
        outputs = [
            self.eval_classifier(part.to(self.device).float().div(255), return_features=True)
            for part in images_u8.split(CHUNK)
        ]
        return torch.cat([o.features for o in outputs]).cpu(), torch.cat([o.logits.argmax(1) for o in outputs]).cpu()


def train_prior(flags: PriorFlags) -> Path:
    """Trains a prior, or resumes its training, and returns the path of the file that it wrote.

    Raises:
        UserError: the run was begun with other flags, ``flags.output`` belongs to another run, the data or the ``--start``
            file cannot be read, or the training diverged.
    """
    device = choose_device(flags.gpu)
    info = dataset_info(DATASETS, flags.dataset, flags.data_root, flags.image_size)
    output = Path(flags.output or f"checkpoints/priors/{info.name}_{info.image_size}.safetensors")
    save_dir = Path(flags.save_dir or Path("checkpoints/train_prior", output.stem))
    earlier = None if flags.redo else earlier_value(save_dir, "amp")
    flags = dataclasses.replace(flags, amp=choose_amp(flags.amp, device, earlier))
    settings = stage_flags("train", flags) | {"image_size": info.image_size}
    settings["start"] = flags.start and Path(flags.start).name
    _unfinished(save_dir, output, flags, settings)  # a refused command writes nothing
    train, test = (load_split(info, split, device) for split in ("train", "test"))
    if train.images is None or test.images is None:
        raise UserError(f"the images of {info.name} do not fit into memory; give a smaller --image_size")
    report = Report(flags, info, test, _eval_classifier(flags, info, device), device)
    run = Run(save_dir, dataclasses.asdict(flags))
    try:
        state = _unfinished(save_dir, output, flags, settings)
        network, about = _network(flags, info, device, state)
        run.adopt_output(output)
        if flags.redo:
            delete_files(run.path, ["last.pth"])
        run.rewind("prior", state["round"] if state else 0)
        training = Denoising(
            network,
            info.num_classes,
            lambda step: flags.lr * min(1, (step + 1) / WARMUP_STEPS),
            flip=info.flip and not flags.no_flip,
            autocast=Precision(flags.amp, device).autocast,
            start=about["images_drawn"] // flags.batch_size,
        )
        if state:
            training.load_state_dict(state["training"])
        about |= {"training_images": len(train), "settings": settings}
        _rounds(run, flags, training, train, report, about, output, state["round"] if state else 0)
        return output
    finally:
        run.close()


def _unfinished(save_dir: Path, output: Path, flags: PriorFlags, settings: dict[str, Any]) -> dict[str, Any] | None:
    """State of the training in the run folder; None if there is none, or with ``--redo``. Changes no file.

    Raises:
        UserError: the training was begun with other settings, or the run folder or ``output`` has files of somebody else.
    """
    require_run_folder(save_dir)
    if (save_dir / "stages.json").exists():
        raise UserError(f"--save_dir {save_dir} is the folder of a run of another command; give another --save_dir")
    file = save_dir / "last.pth"
    state = load_checkpoint(file, "unfinished training") if file.exists() and not flags.redo else None
    for name, value in settings.items() if state else ():
        if state["settings"].get(name) != value:
            found = f"{save_dir} was started with --{name} {state['settings'].get(name)}, now {value} is given"
            raise UserError(f"{found}; give the former value, another --save_dir, or --redo")
    renewed = flags.start and Path(flags.start).resolve() == output.resolve()
    if state or not renewed:  # a training that begins may replace the file that it starts from
        require_own_output(save_dir, output, earlier=file.exists())
    return state


def _network(
    flags: PriorFlags, info: DatasetInfo, device: torch.device, state: dict[str, Any] | None
) -> tuple[PatchUNet, dict[str, Any]]:
    """The network, with initial weights or those of ``--start``, and the metadata of its file.

    The ``--start`` file is read only when a training begins, since it may be the file that the training overwrites.
    """
    shape = {
        "num_classes": info.num_classes,
        "image_size": info.image_size,
        "patch": flags.patch,
        "channels": flags.channels,
        "attention": not flags.no_attention,
    }
    names = info.class_names or tuple(map(str, range(info.num_classes)))
    about = {"dataset": info.name, "class_names": names, "images_drawn": state["drawn_before"] if state else 0, **shape}
    seed_position(flags.seed, "init")
    network = PatchUNet(**shape)
    if flags.start and not state:
        loaded, known = load_patch_prior(Path(flags.start))
        if other := [name for name, value in shape.items() if known[name] != value]:
            raise UserError(
                f"--start {flags.start} has {other[0]} {known[other[0]]}, but this training has {shape[other[0]]}; give "
                "equal values"
            )
        network.load_state_dict(loaded.state_dict())
        about["images_drawn"] = known.get("images_drawn", 0)
    return network.to(device, memory_format=torch.channels_last), about


def _eval_classifier(flags: PriorFlags, info: DatasetInfo, device: torch.device) -> Classifier | None:
    """The frozen classifier of ``--eval_classifier``; its checkpoint names its architecture."""
    if not flags.eval_classifier:
        return None
    about = load_checkpoint(Path(flags.eval_classifier), "classifier for evaluation")
    if "arch" not in about:
        raise UserError(
            f"--eval_classifier {flags.eval_classifier} does not record its architecture; give a file that "
            "train_scratch.py wrote"
        )
    return load_teacher(MODELS, about["arch"], info, device, flags.eval_classifier)


def _rounds(
    run: Run,
    flags: PriorFlags,
    training: Denoising,
    train: Split,
    report: Report,
    about: dict[str, Any],
    output: Path,
    first: int,
) -> None:
    """Trains in rounds until --images or --minutes is reached; reports and writes the file at intervals and at the end.

    If there is nothing left to do and the file is missing, it is written again.
    """

    def write(drawn: int) -> None:
        with run.output(output) as temporary:
            save_patch_prior(temporary, training.ema, about | {"name": output.stem, "images_drawn": drawn})

    before, a_round = about["images_drawn"], flags.round_steps * flags.batch_size
    rounds = max(0, -(-(flags.images - before) // a_round))
    end = time.monotonic() + 60 * flags.minutes if flags.minutes else float("inf")
    images, labels = train.images, train.labels
    if report.eval_classifier and first < rounds:
        run.log(f"training images, for comparison: {report.quality(*_spread(images, labels, count=len(report.labels)))}")
    if first >= rounds and not output.exists():
        write(before + first * a_round)
    bar = progress(rounds * a_round, f"train {output.stem}", "img", first * a_round)
    for number in range(first, rounds):
        seed_position(flags.seed, "prior", number)
        started = time.monotonic(), time.process_time()
        batches = torch.randint(len(images), (flags.round_steps, flags.batch_size)).unbind()
        try:
            loss = training.fit(images, labels, batches)
        except Diverged as error:
            raise UserError(f"{error}; lower --lr {flags.lr:g}") from None
        spent = time.monotonic() - started[0], time.process_time() - started[1]
        drawn = before + (number + 1) * a_round
        figures = {
            "images": drawn,
            "loss": round(loss, 5),
            "images_per_s": round(a_round / spent[0], 1),
            "images_per_cpu_s": round(a_round / spent[1], 1),
        }
        over = number + 1 == rounds or time.monotonic() >= end
        if over or (number + 1) % flags.report_every == 0:
            figures |= report.losses(training) | (
                report.quality(report.draw(training, report.labels), report.labels) if report.eval_classifier else {}
            )
            run.picture(f"samples_{drawn:09d}", report.picture(training), number)
            write(drawn)
            run.log(f"{drawn} images: " + ", ".join(f"{name} {figures[name]}" for name in list(figures)[1:]))
        run.metrics("prior", number, figures)
        state = {
            "settings": about["settings"],
            "drawn_before": before,
            "round": number + 1,
            "training": training.state_dict(),
        }
        save_checkpoint(run.path / "last.pth", state)
        bar.set_postfix({"loss": f"{loss:.4f}"}, refresh=False)
        bar.update(a_round)
        if over:
            break
    bar.close()


def main() -> None:
    """Runs the command line ``python -m datafree.diffusion.train_prior``."""
    parser = Parser(
        prog="python -m datafree.diffusion.train_prior",
        description=__doc__.splitlines()[0],
        epilog="To resume, run the same command again.",
    )
    add_flags(parser, PriorFlags, PriorFlags.__doc__.rstrip("."))
    output = train_prior(from_args(PriorFlags, parser.parse_args()))
    print(f"{output}: {os.path.getsize(output) / 2**20:.2f} MiB")


if __name__ == "__main__":
    run_command(main)
