"""Trains or evaluates a classifier on real data: a teacher, or a student as a baseline for data-free students.

    python train_scratch.py --model wrn40_2 --dataset cifar10
    python train_scratch.py --model wrn40_2 --dataset cifar10 --evaluate_only

The weights are saved in checkpoints/pretrained/<dataset>_<model>.pth, where datafree_kd.py looks for teachers. To resume,
run the same command again.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback during imports; later ``run_command`` handles it

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.datasets import dataset_info
from engine.data.splits import data_identity, load_split
from engine.loops.measures import evaluate
from engine.loops.session import require_no_outputs
from engine.loops.train import TrainFlags, train
from engine.networks.build import (
    PRETRAINED,
    build_network,
    find_checkpoint,
    load_named_weights,
    own_weights,
    require_image_size,
    short_name,
    split_arguments,
    with_own_weights,
    wrap,
)
from engine.networks.public import configuration, is_public, published_weights
from engine.networks.weights import choose_normalization
from engine.runtime import checksums
from engine.runtime.compilation import CHOICES as COMPILE
from engine.runtime.compilation import Compiler
from engine.runtime.errors import UserError, run_command
from engine.runtime.files import delete_files
from engine.runtime.flags import Parser, add_flags, add_list, flag, from_args, stage_flags
from engine.runtime.precision import AMP, Precision, choose_amp, choose_device
from engine.runtime.processes import seed_position
from engine.runtime.run import Run, earlier_value, require_own_output, require_run_folder
from engine.runtime.schema import require
from engine.runtime.stage_record import StageRecord
from engine.runtime.tensors import save_checkpoint
from registry import DATASETS, METHODS, MODELS

TRAIN = ("train",)


@dataclass(frozen=True)
class ScratchFlags:
    """Network, data, output and hardware."""

    model: str = flag(
        "wrn40_2",
        "network: a name of registry.MODELS, a public model (timm:NAME, hf-hub:ORG/NAME, torchvision:NAME, "
        "local-dir:FOLDER), path/to/file.py:factory or package.module:factory(key='value')",
        affects=TRAIN,
    )
    dataset: str = flag(
        "cifar10",
        "dataset: a name of registry.DATASETS (--list datasets), NAME of a file DATA_ROOT/NAME.npz, or "
        "folder for class folders DATA_ROOT/{train,test}/<class>/",
        affects=TRAIN,
    )
    data_root: str = flag(
        "data", "folder of the data, relative to the current directory; datasets that can be downloaded are saved here"
    )
    name: str | None = flag(
        None,
        "name of the dataset in checkpoints, run folders and tables; unset: the value of --dataset, or the folder's name "
        "for --dataset folder",
    )
    domain: str | None = flag(None, "domain, for a dataset that has several (domainnet)", affects=TRAIN)
    classes: str | None = flag(
        None,
        "classes, for a dataset with domains: ten (the usual subset) or all; unset: ten",
        choices=("ten", "all"),
        affects=TRAIN,
    )
    image_size: int | None = flag(
        None,
        "side of the square images in pixels; unset: the size of the public model whose weights are used, else the "
        "dataset's size",
        affects=TRAIN,
        least=1,
        most=4096,
    )
    output: str | None = flag(
        None, "file for the trained weights; unset: checkpoints/pretrained/<dataset>_<model>.pth in the current directory"
    )
    save_dir: str | None = flag(
        None,
        "run folder with logs and the checkpoint for resuming; unset: checkpoints/scratch/<dataset>_<model> in the current "
        "directory",
    )
    evaluate_only: bool = flag(
        False,
        "print the test accuracy of the weights in --resume and exit; without --resume: the weights in --output, else the "
        "published weights of a public model",
    )
    resume: str | None = flag(
        None,
        "file with weights to start from, or to evaluate; for training, a head for other classes is replaced; not needed to "
        "resume an interrupted run",
        affects=TRAIN,
    )
    pretrained: bool = flag(
        False,
        "start from the published weights of a public model, or from torchvision's ImageNet weights for networks named "
        "*_imagenet, with a new head",
        affects=TRAIN,
    )
    redo: bool = flag(False, "delete the checkpoint in the run folder and train again from the start")
    mean: tuple[float, ...] | None = flag(
        None,
        "channel means r,g,b of the normalization; unset: from the weights to start from or to evaluate, else the dataset's",
        affects=TRAIN,
    )
    std: tuple[float, ...] | None = flag(
        None, "channel standard deviations r,g,b of the normalization; unset: as for --mean", affects=TRAIN, above=0
    )
    seed: int = flag(0, "seed; all random numbers depend only on seed and epoch", affects=TRAIN, least=0)
    gpu: int | None = flag(None, "index of the GPU, -1 for the CPU; unset: GPU 0 if there is one", least=-1)
    amp: str = flag(
        "auto",
        "mixed precision; auto: bf16 on hardware where it is faster, else no; a resumed run keeps its precision",
        choices=AMP,
        affects=TRAIN,
    )
    fp16: bool = flag(False, "same as --amp fp16")
    compile: str = flag(
        "auto",
        "torch.compile of the network; auto: only if the run is long enough to save time; graphs: as yes, with CUDA graphs "
        "on a GPU",
        choices=COMPILE,
    )
    workers: int = flag(
        4, "worker processes that decode image files; 0: decode in the main process", short="-j", least=0, most=1024
    )


def main() -> None:
    parser = Parser(
        prog="train_scratch.py", description=__doc__.splitlines()[0], epilog="To resume, run the same command again."
    )
    add_list(parser, models=MODELS, datasets=DATASETS, methods=METHODS)
    groups = (ScratchFlags, TrainFlags)
    for group in groups:
        add_flags(parser, group, group.__doc__.rstrip("."))
    args = parser.parse_args()
    flags, lengths = (from_args(group, args) for group in groups)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("train_scratch.py trains in one process; start it without a launcher")

    if flags.pretrained and (flags.resume or flags.evaluate_only):
        raise UserError(f"--pretrained and {'--resume' if flags.resume else '--evaluate_only'} exclude each other; give one")
    device = choose_device(flags.gpu)
    info = dataset_info(DATASETS, flags.dataset, flags.data_root, flags.image_size, flags.domain, flags.classes, flags.name)
    stem = f"{info.name}_{short_name(flags.model)}"
    output = Path(flags.output) if flags.output else PRETRAINED / f"{stem}.pth"
    save_dir = Path(flags.save_dir) if flags.save_dir else Path("checkpoints", "scratch", stem)
    earlier = None if flags.redo else earlier_value(save_dir, "amp")
    flags = dataclasses.replace(flags, amp="fp16" if flags.fp16 else choose_amp(flags.amp, device, earlier))
    precision = Precision(flags.amp, device)
    own = start = None
    if flags.evaluate_only:
        given = flags.resume or flags.output or (str(output) if output.exists() else None)
        own = own_weights(flags.model, info.name, given)
        start = None if own else find_checkpoint(flags.model, info.name, given, "give its path with --resume")
    elif flags.pretrained and is_public(flags.model):
        own = configuration(split_arguments(flags.model)[0])
    else:
        start = published_weights(MODELS, flags.model) if flags.pretrained else flags.resume
    seed_position(flags.seed, "init")
    kind, stored = "model" if own else "checkpoint", own or {}
    if own:
        wanted = own if flags.evaluate_only else own | {"num_classes": info.num_classes, "class_names": None}
        info = info.adapted_to_model(flags.model, wanted, keep_size=flags.image_size is not None)
        network, start = with_own_weights(MODELS, flags.model, info.num_classes), flags.model
    else:
        network = build_network(MODELS, flags.model, info.num_classes, info.image_size)
    if start and not own:
        loading = {"num_classes": info.num_classes, "new_head": not flags.evaluate_only}
        stored = load_named_weights(MODELS, network, start, "checkpoint", **loading)
        if flags.evaluate_only:
            require_image_size(stored, info, f"checkpoint {start}")
    normalization = choose_normalization(info, flags.mean, flags.std, stored, f"{kind} {start}", kind=kind)
    classifier = wrap(network, flags.model, info, device, normalization)
    if flags.evaluate_only:
        print(f"{flags.model} normalizes with {normalization}")
        accuracy = evaluate(classifier, load_split(info, "test", device, flags.workers))
        print(f"{start}: acc1 {accuracy['acc1']:.2f} %, acc5 {accuracy['acc5']:.2f} % on the test split of {info.name}")
        return
    train_run(flags, lengths, classifier, info, precision, save_dir, output, start, stored.get("dropped_head"))


def checked_record(save_dir: Path, output: Path, settings: dict[str, Any], redo: bool) -> tuple[StageRecord, bool]:
    """Returns the record of stage train, and whether the training is done. Changes no file.

    Args:
        settings: flags and inputs that the weights depend on.
        redo: whether the training is to begin again. The stage is then new in the record.
    Raises:
        UserError: a flag has changed, or the run folder or ``output`` has files of somebody else.
    """
    require_run_folder(save_dir)
    file = save_dir / "stages.json"
    stages = StageRecord(file, {"train": settings}, redo="--redo")
    facts = stages.record.get("train", {}).get("facts", {})
    require(facts, {"output?": str, "sha256?": str, "acc1?": float}, str(file))
    if redo:
        stages.forget("train")
    stages.check(["train"])
    if stages.status("train") == "done" and output.is_file() and not checksums.missing(save_dir, ["result.json"]):
        require(facts, {"acc1": float}, str(file))
        checksums.require(output, facts.get("sha256"))
        return stages, True
    if stages.status("train") == "new" and not redo:
        require_no_outputs(save_dir, "train", ["last.pth"], "--redo")
    digest = facts.get("sha256")
    same = output.is_file() and facts.get("output") == str(output)
    require_own_output(save_dir, output, earlier=same and (not digest or checksums.digest_of(output) == digest))
    return stages, False


def train_run(
    flags: ScratchFlags, lengths, classifier, info, precision, save_dir: Path, output: Path, start=None, dropped_head=None
) -> None:
    """Trains one classifier. Writes the run folder ``save_dir`` and the weights ``output``; resumes an interrupted training.

    Args:
        lengths: ``engine.loops.train.TrainFlags``.
        classifier: classifier on ``precision.device``, with the weights to start from.
        info: ``engine.data.datasets.DatasetInfo``.
        start: checkpoint file or public model that the weights come from; None: random weights.
        dropped_head: description of the head of ``start`` that was left out; None: no head was left out.
    """
    normalization = classifier.normalization.as_flags()
    settings = stage_flags("train", flags, lengths) | normalization | {"data_root": data_identity(info, "train", "test")}
    checked_record(save_dir, output, settings, flags.redo)  # a refused command writes nothing
    run = Run(save_dir, dataclasses.asdict(flags) | dataclasses.asdict(lengths))
    try:
        stages, done = checked_record(save_dir, output, settings, flags.redo)
        if done:
            run.log(f"already trained: {output}, acc1 {stages.fact('train', 'acc1'):.2f} %; --redo trains again")
            return
        run.adopt_output(output)
        if flags.redo:
            delete_files(run.path, ["last.pth"])
            stages.discard("train")
        about = {"arch": flags.model, "dataset": info.name, "epoch": lengths.epochs, "seed": flags.seed}
        if start:
            run.log(f"starting from {start}" + (f", without its head ({dropped_head})" if dropped_head else ""))
            about["start"] = Path(start).name
        run.log(f"{flags.model} normalizes with {classifier.normalization}")
        splits = [load_split(info, split, precision.device, flags.workers) for split in ("train", "test")]
        run.log(
            f"{flags.model} on {info.name}: {len(splits[0])} training and {len(splits[1])} test images on {precision.device}"
        )
        compiler = Compiler(flags.compile, precision.device, run.log)
        accuracies = train(run, stages, classifier, *splits, lengths, info, precision, compiler, flags.seed)
        about |= {"acc1": accuracies[-1], "acc1_best": max(accuracies)}
        state = {"state_dict": classifier.network.state_dict()}
        with run.output(output) as temporary:
            save_checkpoint(temporary, state | info.for_checkpoint() | normalization | about)
        written = {"output": str(output), "sha256": checksums.digest_of(output)}
        stages.update("train", done=True, acc1=accuracies[-1], acc1_best=max(accuracies), **written)
        run.result(
            about
            | {"method": "scratch", "student": flags.model, "acc1_last": accuracies[-1], "seconds": stages.seconds()}
            | {"dataset_identity": settings["data_root"], "settings": settings}
        )
        run.log(f"acc1 {accuracies[-1]:.2f} % (last epoch), {max(accuracies):.2f} % (best) -> {output}")
    finally:
        run.close()


if __name__ == "__main__":
    run_command(main)
