"""Trains or evaluates a classifier on real data: the teacher, or the student that a data-free one is compared with.

    python train_scratch.py --model wrn40_2 --dataset cifar10
    python train_scratch.py --model wrn40_2 --dataset cifar10 --evaluate_only

The weights go to checkpoints/pretrained/<dataset>_<model>.pth, where datafree_kd.py looks for teachers. To resume, run
the same command again.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while it imports; ``run_command`` takes over

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from engine.runtime.errors import UserError, run_command
from engine.runtime.flags import Parser, add_flags, add_list, flag, from_args, stage_flags
from registry import DATASETS, METHODS, MODELS

TRAIN = ("train",)


@dataclass(frozen=True)
class ScratchFlags:
    """What to train, on what, where to keep it."""

    model: str = flag(
        "wrn40_2",
        "a name of registry.MODELS, a public one (timm:NAME, hf-hub:ORG/NAME, torchvision:NAME, local-dir:FOLDER), "
        "path/to/file.py:factory or package.module:factory(key='value')",
        affects=TRAIN,
    )
    dataset: str = flag("cifar10", "a name of registry.DATASETS, or NAME where DATA_ROOT/NAME.npz exists", affects=TRAIN)
    data_root: str = flag("data", "folder of the data, from the current directory on; what can be downloaded is put there")
    name: str | None = flag(
        None, "what checkpoints, run folders and tables call the dataset; unset: its name, or that of its folder"
    )
    domain: str | None = flag(None, "domain of a dataset that has several (domainnet)", affects=TRAIN)
    classes: str | None = flag(
        None, "of such a dataset: ten (its usual subset) or all; unset: ten", choices=("ten", "all"), affects=TRAIN
    )
    image_size: int | None = flag(
        None, "px; unset: that of public weights to start from, else the dataset's own", affects=TRAIN, least=1, most=4096
    )
    output: str | None = flag(
        None, "the weights; unset, in the current directory: checkpoints/pretrained/<dataset>_<model>.pth"
    )
    save_dir: str | None = flag(
        None, "run folder (logs, resume); unset, in the current directory: checkpoints/scratch/<dataset>_<model>"
    )
    evaluate_only: bool = flag(False, "measure the accuracy of --resume, or of the output, and stop")
    resume: str | None = flag(
        None,
        "weights to start from (a head for other classes is dropped) or to evaluate; an interrupted run resumes without it",
        affects=TRAIN,
    )
    pretrained: bool = flag(
        False,
        "start from a public model's own weights, or torchvision's ImageNet ones (networks named *_imagenet), with a new head",
        affects=TRAIN,
    )
    redo: bool = flag(False, "forget the run folder and train again")
    mean: tuple[float, ...] | None = flag(
        None, "normalization r,g,b; unset: that of weights to start from or evaluate, else the dataset's", affects=TRAIN
    )
    std: tuple[float, ...] | None = flag(None, "see --mean", affects=TRAIN, above=0)
    seed: int = flag(0, "random numbers are a function of seed and epoch", affects=TRAIN, least=0)
    gpu: int | None = flag(None, "index of the GPU, -1 for the CPU; unset: GPU 0 if there is one", least=-1)
    amp: str = flag(
        "auto",
        "mixed precision; auto: bf16 where the processor computes in it, and what the run was begun with",
        choices=("auto", "no", "bf16", "fp16"),
        affects=TRAIN,
    )
    fp16: bool = flag(False, "the same as --amp fp16")
    compile: str = flag(
        "auto", "torch.compile; auto: in a run long enough to win by it", choices=("auto", "yes", "graphs", "no")
    )
    workers: int = flag(4, "processes that decode images which do not fit in memory", short="-j", least=0, most=1024)


def main() -> None:
    from engine.loops.train import TrainFlags

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

    from engine.data.datasets import dataset_info
    from engine.data.splits import load_split
    from engine.loops.evaluate import evaluate
    from engine.networks.build import (
        PRETRAINED,
        build_network,
        find_checkpoint,
        load_named_weights,
        own_weights,
        short_name,
        split_arguments,
        with_own_weights,
        wrap,
    )
    from engine.networks.public import configuration, is_public, published_weights
    from engine.networks.weights import choose_normalization
    from engine.runtime.precision import Precision, choose_amp, choose_device
    from engine.runtime.processes import seed_position
    from engine.runtime.run import earlier_value

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
        given = flags.resume or (str(output) if output.exists() else None)
        own = own_weights(flags.model, info.name, given)
        start = None if own else find_checkpoint(flags.model, info.name, given)
    elif flags.pretrained and is_public(flags.model):
        own = configuration(split_arguments(flags.model)[0])
    else:
        start = published_weights(MODELS, flags.model) if flags.pretrained else flags.resume
    seed_position(flags.seed, "init")
    kind, stored = "model" if own else "checkpoint", own or {}
    if own:
        wanted = own if flags.evaluate_only else own | {"num_classes": info.num_classes, "class_names": None}
        info = info.as_known_to(flags.model, wanted, keep_size=flags.image_size is not None)
        network, start = with_own_weights(MODELS, flags.model, info.num_classes), flags.model
    else:
        network = build_network(MODELS, flags.model, info.num_classes, info.image_size)
    if start and not own:
        loading = {"num_classes": info.num_classes, "new_head": not flags.evaluate_only}
        stored = load_named_weights(MODELS, network, start, "checkpoint", **loading)
    normalization = choose_normalization(info, flags.mean, flags.std, stored, f"{kind} {start}", kind=kind)
    classifier = wrap(network, flags.model, info, device, normalization)
    if flags.evaluate_only:
        print(f"{flags.model} normalizes with {normalization}")
        accuracy = evaluate(classifier, load_split(info, "test", device, flags.workers))
        print(f"{start}: acc1 {accuracy['acc1']:.2f} %, acc5 {accuracy['acc5']:.2f} % on the test split of {info.name}")
        return
    train_run(flags, lengths, classifier, info, precision, save_dir, output, start, stored.get("dropped_head"))


def train_run(
    flags: ScratchFlags, lengths, classifier, info, precision, save_dir: Path, output: Path, start=None, dropped_head=None
) -> None:
    """The run folder ``save_dir`` and the weights ``output`` of one training, which goes on where it was stopped.

    Args:
        lengths: ``engine.loops.train.TrainFlags``.
        classifier: on ``precision.device``, with the weights to start from.
        info: ``engine.data.datasets.DatasetInfo``.
        start: the checkpoint that these are of, None where they are random; ``dropped_head`` says what was left out of it.
    """
    from engine.data.splits import data_identity, load_split
    from engine.loops.train import train
    from engine.runtime import sums
    from engine.runtime.compilation import Compiler
    from engine.runtime.files import delete_files, save_checkpoint
    from engine.runtime.run import Run
    from engine.runtime.stage_record import StageRecord

    normalization = classifier.normalization.as_flags()
    settings = stage_flags("train", flags, lengths) | normalization | {"data_root": data_identity(info, "train", "test")}
    run = Run(save_dir, dataclasses.asdict(flags) | dataclasses.asdict(lengths))
    try:
        stages = StageRecord(run.path / "stages.json", {"train": settings}, redo="--redo")
        written = stages.fact("train", "output")
        if flags.redo:
            delete_files(run.path, ["last.pth"])
            stages.discard("train")
        stages.check(["train"])
        if stages.status("train") == "done" and output.exists() and not sums.missing(run.path, ["result.json"]):
            sums.require(output, stages.fact("train", "sha256"))
            run.log(f"trained before: {output}, acc1 {stages.fact('train', 'acc1'):.2f} %; --redo trains again")
            return
        if output.exists() and written != str(output):
            raise UserError(f"{output} is there and not of this run; give another --output, or move that file away")
        stages.begin("train")
        stages.update("train", output=str(output))
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
        save_checkpoint(output, state | info.for_checkpoint() | normalization | about)
        digest = sums.digest_of(output)
        stages.update("train", done=True, acc1=accuracies[-1], acc1_best=max(accuracies), sha256=digest)
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
