"""Data-free distillation: a trained teacher and no training data in, a small student out.

    python datafree_kd.py --help                       the flags of every method
    python datafree_kd.py --method dda --help          and those of one
    python datafree_kd.py --method dda --dataset cifar10 --teacher wrn40_2 --student wrn16_1

To resume, run the same command again. Of the real data only the test split is opened, only to report accuracy.
"""

import dataclasses
import sys
from pathlib import Path

from engine.loops.settings import DistillFlags, RunFlags, TaskFlags, for_seed
from engine.runtime.errors import run_command
from engine.runtime.flags import Parser, add_flags, from_args, stage_flags
from engine.runtime.names import lookup, resolve
from engine.runtime.processes import is_main, leave_processes
from registry import DATASETS, METHODS, MODELS


def parse(argv: list[str]):
    """The command line as (name, Method class, [task, run, distill, method flags])."""
    first = Parser(prog="datafree_kd.py", add_help=False)
    first.add_argument("--method")
    name = first.parse_known_args(argv)[0].method
    method = resolve(lookup(METHODS, name, "method")) if name else None
    groups = [TaskFlags, RunFlags, DistillFlags, *([method.Config] if method else [])]

    known = f"one of {', '.join(METHODS)}; --method NAME --help shows its flags too"
    parser = Parser(
        prog="datafree_kd.py", description=__doc__.splitlines()[0], epilog="To resume, run the same command again."
    )
    parser.add_argument("--method", required=True, metavar="NAME", help=known)
    for group in groups:
        add_flags(parser, group, group.__doc__.rstrip("."), method.defaults if method else {})
    args = parser.parse_args(argv)
    return name, method, [from_args(group, args) for group in groups]


def main() -> None:
    name, method_class, groups = parse(sys.argv[1:])
    run_flags = groups[1]
    seeds = run_flags.seeds or (run_flags.seed,)
    folders = []
    for seed in seeds:
        if len(seeds) > 1 and is_main():
            print(f"== seed {seed}")
        folders.append(run(name, method_class, for_seed(seed, bool(run_flags.seeds), groups)))
    finished = [str(folder) for folder in folders if (folder / "result.json").exists()]
    if len(seeds) > 1 and finished and is_main():
        from engine import report

        print(report.table(report.parse(finished)))


def run(name: str, method_class: type, groups: list) -> Path:
    """One run with one seed; returns its folder."""
    # Imported after parsing, so that --help and a misspelt flag answer at once.
    from engine.data.bank import Manifest
    from engine.data.splits import forbid_train_split
    from engine.loops.session import Session, choose_stages, run_stages
    from engine.networks.build import short_name
    from engine.runtime.files import weights_digest
    from engine.runtime.processes import join_processes
    from engine.runtime.run import Run
    from engine.runtime.stage_record import StageRecord

    task_flags, run_flags, distill_flags, config = groups
    schedule, processes = distill_flags.schedule(), join_processes(run_flags.gpu)
    forbid_train_split()
    method, info = build_method(name, method_class, groups, schedule, processes)
    stages = method.stages()
    order, selected = choose_stages(name, [stage.name for stage in stages], run_flags)
    if "distill" in selected:
        processes.check_divides(distill_flags.batch_size)

    weights = weights_digest(method.teacher.network.state_dict())
    pair = f"{info.name}_{short_name(task_flags.teacher)}_{short_name(task_flags.student)}"
    path = Path(run_flags.save_dir or Path("checkpoints", name, f"{pair}_seed{run_flags.seed}"))
    flags = {"method": name} | {k: v for group in groups for k, v in dataclasses.asdict(group).items()}
    inputs = {"method": name, "teacher_ckpt": f"(weights {weights})"}
    manifest = Manifest(info.name, info.num_classes, info.image_size, short_name(task_flags.teacher), weights, name)
    folder = record = None
    if processes.main:  # of those that a launcher started, one keeps the folder
        folder = Run(path, flags)
        method.task.compile.log = folder.log
        record = StageRecord(path / "stages.json", {stage: inputs | stage_flags(stage, *groups) for stage in order})
    session = Session(path, folder, record, info, manifest, schedule, flags, method.task.device, processes)
    try:
        run_stages(session, [stage for stage in stages if stage.name in order], selected, run_flags.redo)
    finally:
        if folder:
            folder.close()
    return path


def build_method(name: str, method_class: type, groups: list, schedule, processes):
    """The method with its networks, and ``engine.data.datasets.DatasetInfo``."""
    from datafree.base import Task
    from engine.data.crops import crop_flip
    from engine.data.datasets import dataset_info
    from engine.data.splits import allow_train_split, load_split
    from engine.networks.build import build_classifier, load_teacher, require_batch_norm
    from engine.runtime.compilation import Compiler
    from engine.runtime.precision import Precision, choose_device
    from engine.runtime.seeding import seed_position

    flags, run_flags, _, config = groups
    device = choose_device(run_flags.gpu)
    info = dataset_info(DATASETS, flags.dataset, flags.data_root, flags.image_size, flags.domain, flags.classes)
    teacher = load_teacher(MODELS, flags.teacher, info, device, flags.teacher_ckpt, flags.teacher_mean, flags.teacher_std)
    require_batch_norm(teacher, config, METHODS)
    seed_position(run_flags.seed, "student")
    student = build_classifier(MODELS, flags.student, info, device)

    def training_split():
        if processes.main:
            print(f"{name} opens the training images of {info.name}: a control, not a data-free method")
        with allow_train_split():
            return load_split(info, "train", device)

    task = Task(
        num_classes=info.num_classes,
        image_size=info.image_size,
        device=device,
        augment=lambda images: crop_flip(images, info.crop_padding, info.flip),
        precision=Precision(run_flags.amp, device),
        class_names=info.class_names,
        flip=info.flip,
        training_split=training_split if method_class.reads_train_split else None,
        prompt=info.prompt,
        rounds=schedule.rounds,
        kd_steps=schedule.kd_steps,
        compile=Compiler(run_flags.compile, device, log=print if processes.main else lambda text: None),
        average_gradients=processes.average_gradients,
    )
    return method_class(config, teacher, student, task), info


if __name__ == "__main__":
    run_command(main)
    leave_processes()
