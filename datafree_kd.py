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
from engine.runtime.errors import UserError, run_command
from engine.runtime.flags import Parser, add_flags, add_list, from_args, stage_flags
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
    add_list(parser, models=MODELS, datasets=DATASETS, methods=METHODS)
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
    task_flags, run_flags, distill_flags, config = groups
    # Imported after parsing, so that --help and a misspelt flag answer at once.
    from datafree import filter
    from datafree.base import Task
    from engine.data.bank import ImageBank, Manifest
    from engine.data.crops import crop_flip
    from engine.data.datasets import dataset_info
    from engine.data.splits import allow_train_split, forbid_train_split, load_split
    from engine.data.transfer_set import TransferSet
    from engine.loops.pipeline import Pipeline
    from engine.networks.build import build_classifier, load_teacher, require_batch_norm, short_name
    from engine.runtime.compilation import Compiler
    from engine.runtime.files import weights_digest
    from engine.runtime.precision import Precision, choose_device
    from engine.runtime.processes import join_processes
    from engine.runtime.run import Run
    from engine.runtime.seeding import seed_position
    from engine.runtime.stage_record import Stages

    device, schedule = choose_device(run_flags.gpu), distill_flags.schedule()
    processes, precision = join_processes(run_flags.gpu), Precision(run_flags.amp, device)
    compiler = Compiler(run_flags.compile, device, log=print if processes.main else lambda text: None)
    forbid_train_split()
    info = dataset_info(
        DATASETS, task_flags.dataset, task_flags.data_root, task_flags.image_size, task_flags.domain, task_flags.classes
    )
    normalization = task_flags.teacher_mean, task_flags.teacher_std
    teacher = load_teacher(MODELS, task_flags.teacher, info, device, task_flags.teacher_ckpt, *normalization)
    require_batch_norm(teacher, config, METHODS)
    seed_position(run_flags.seed, "student")
    student = build_classifier(MODELS, task_flags.student, info, device)

    def random_view(images):
        return crop_flip(images, info.crop_padding, info.flip)

    def training_split():
        if processes.main:
            print(f"{name} opens the training images of {info.name}: a control, not a data-free method")
        with allow_train_split():
            return load_split(info, "train", device)

    task = Task(
        info.num_classes, info.image_size, device, random_view, precision, info.class_names, info.flip,
        training_split if method_class.reads_train_split else None, info.prompt, schedule.rounds, schedule.kd_steps, compiler,
        processes.average_gradients,
    )  # fmt: skip
    method = method_class(config, teacher, student, task)

    weights = weights_digest(teacher.network.state_dict())
    manifest = Manifest(info.name, info.num_classes, info.image_size, short_name(task_flags.teacher), weights, name)
    replaced = {
        "synthesize": run_flags.init_bank,
        "generate": run_flags.init_bank,
        "augment": run_flags.init_variants,
    }
    for flag, stages in (("init_bank", ("synthesize", "generate")), ("init_variants", ("augment",))):
        if getattr(run_flags, flag) and not set(stages) & set(method.stages):
            raise UserError(f"--{flag}: {name} has no stage {' or '.join(stages)} that it could take the place of")
    order = [stage for stage in method.stages if not replaced.get(stage)]
    selected = list(run_flags.stages or order)
    if wrong := [stage for stage in selected if stage not in order]:
        raise UserError(f"--stages {','.join(wrong)}: this run has the stages {', '.join(order)}")
    if "distill" in selected:
        processes.check_divides(distill_flags.batch_size)

    pair = f"{info.name}_{short_name(task_flags.teacher)}_{short_name(task_flags.student)}"
    flags = {"method": name} | {k: v for group in groups for k, v in dataclasses.asdict(group).items()}
    folder = Path(run_flags.save_dir or Path("checkpoints", name, f"{pair}_seed{run_flags.seed}"))
    inputs = {"method": name, "teacher_ckpt": f"(weights {weights})"}
    parts = method, info, manifest, schedule, flags, ImageBank, TransferSet, filter, processes
    if not processes.main:  # of those that a launcher started, one keeps the folder
        Pipeline(folder, None, None, *parts).execute(selected, redo=None)
        return folder
    run_folder = Run(folder, flags)
    compiler.log = run_folder.log
    stages = Stages(folder / "stages.json", {stage: inputs | stage_flags(stage, *groups) for stage in order})
    try:
        Pipeline(folder, run_folder, stages, *parts).execute(selected, run_flags.redo)
    finally:
        run_folder.close()
    return folder


if __name__ == "__main__":
    run_command(main, leave_processes)
