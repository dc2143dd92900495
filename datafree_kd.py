"""Data-free knowledge distillation: trains a small student from a trained teacher, without training data.

    python datafree_kd.py --help                       flags shared by all methods
    python datafree_kd.py --method dda --help          all flags of one method
    python datafree_kd.py --method dda --dataset cifar10 --teacher wrn40_2 --student wrn16_1

To resume, run the same command again. Data-free methods open only the test split of the real data, to report accuracy.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback during imports; later ``run_command`` handles it

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from datafree.base import build_method, run_folder
from datafree.minutes import choose_scale, trial_groups
from engine import report
from engine.data.image_bank import Manifest
from engine.data.splits import forbid_train_split
from engine.loops import preflight
from engine.loops.session import Session, choose_stages, run_stages
from engine.loops.settings import DistillFlags, RunFlags, TaskFlags, for_seed, scaled, with_recipe
from engine.networks.build import require_batch_norm, short_name
from engine.runtime.compilation import Compiler
from engine.runtime.errors import UserError, lookup, resolve, run_command
from engine.runtime.flags import Parser, add_flags, add_list, from_args, given_flags, stage_flags
from engine.runtime.processes import is_main, join_processes, leave_processes
from engine.runtime.run import Run
from engine.runtime.stage_record import StageRecord
from engine.runtime.tensors import weights_digest
from registry import DATASETS, METHODS, MODELS, PAIRS, PUBLISHED, RECIPES


def parse(argv: list[str]):
    """Returns (name of the method, Method class, [task, run, distill, method flags]), with recipe and scale applied."""
    first = Parser(prog="datafree_kd.py", add_help=False)
    first.add_argument("--method")
    name = first.parse_known_args(argv)[0].method
    method = resolve(lookup(METHODS, name, "method")) if name else None
    groups = [TaskFlags, RunFlags, DistillFlags, *([method.Config] if method else [])]

    known = f"distillation method: one of {', '.join(METHODS)}; --method NAME --help also shows the flags of that method"
    sets = {name: " ".join(f"--{flag} {value}" for flag, value in flags.items()) for name, flags in RECIPES.items()}
    epilog = "".join(f"--recipe {name} sets {flags}. " for name, flags in sets.items() if flags)
    parser = Parser(
        prog="datafree_kd.py", description=__doc__.splitlines()[0], epilog=f"{epilog}To resume, run the same command again."
    )
    parser.add_argument("--method", required=True, metavar="NAME", help=known)
    add_list(parser, models=MODELS, datasets=DATASETS, methods=METHODS, recipes=RECIPES)
    for group in groups:
        add_flags(parser, group, group.__doc__.rstrip("."), method.defaults if method else {})
    args = parser.parse_args(argv)
    groups, given = [from_args(group, args) for group in groups], given_flags(parser, argv)
    if {"seed", "seeds"} <= given:
        raise UserError("--seed and --seeds found, one of them wanted; --seeds also takes a single seed")
    groups = with_recipe(groups, lookup(RECIPES, groups[2].recipe, "recipe"), given)
    return name, method, scaled(groups, args.scale, given)


def main() -> None:
    name, method_class, groups = parse(sys.argv[1:])
    run_flags = groups[1]
    seeds = run_flags.seeds or (run_flags.seed,)
    if run_flags.minutes is not None:
        seeded = [for_seed(seed, bool(run_flags.seeds), groups) for seed in seeds]
        scale = scale_for_minutes(
            name, method_class, seeded, lambda scale: parse([*sys.argv[1:], "--scale", repr(scale)])[2]
        )
        groups = parse([*sys.argv[1:], "--scale", repr(scale)])[2]
    folders = []
    for seed in seeds:
        if len(seeds) > 1 and is_main():
            print(f"== seed {seed}")
        folders.append(run(name, method_class, for_seed(seed, bool(run_flags.seeds), groups)))
    finished = [str(folder) for folder in folders if (folder / "result.json").exists()]
    if len(seeds) > 1 and finished and is_main():
        print(report.table(report.parse(finished)))


def scale_for_minutes(name: str, method_class: type, seeded: list[list], at: Callable[[float], list]) -> float:
    """Returns the scale for ``--minutes``: that of a run to be resumed, else one from speeds measured on this machine.

    Args:
        seeded: flags of the run with each seed.
        at: function that returns the flags of a run with a given scale.
    """
    run_flags = seeded[0][1]
    processes, trial = join_processes(run_flags.gpu), trial_groups(seeded[0])
    forbid_train_split()
    method = build_method(name, method_class, trial, trial[2].schedule(), processes, DATASETS, MODELS)
    stages = choose_stages(name, [stage.name for stage in method.stages()], run_flags)[0]
    folders = [run_folder(name, groups, method.task.info.name) for groups in seeded]
    folder = next((folder for folder in folders if (folder / "args.json").exists()), folders[0])
    return processes.broadcast(choose_scale(folder, method, trial, stages, at) if processes.main else None)


def run(name: str, method_class: type, groups: list) -> Path:
    """Runs all selected stages with one seed; returns the run folder."""
    task_flags, run_flags, distill_flags, _ = groups
    schedule, processes = distill_flags.schedule(), join_processes(run_flags.gpu)
    forbid_train_split()
    method = build_method(name, method_class, groups, schedule, processes, DATASETS, MODELS)
    info, device = method.task.info, method.task.device
    log = print if processes.main else lambda text: None
    compiler = Compiler(run_flags.compile, device, log, auto_graphs=processes.count == 1)
    require_batch_norm(method.teacher, groups[-1], METHODS)
    stages = method.stages()
    order, selected = choose_stages(name, [stage.name for stage in stages], run_flags)
    if "distill" in selected:
        processes.check_divides(distill_flags.batch_size)

    weights = weights_digest(method.teacher.network.state_dict())
    path = run_folder(name, groups, info.name)
    groups[1] = dataclasses.replace(run_flags, amp=method.task.precision.amp)
    flags = {"method": name} | {k: v for group in groups for k, v in dataclasses.asdict(group).items()}
    inputs = {"method": name, "teacher_ckpt": f"(weights {weights})"} | method.teacher.normalization.as_flags("teacher_")
    learns = "distill" in selected
    opens = {"test": learns and not task_flags.no_test, "train": learns and method.reads_train_split}
    data = preflight.data_identities(info, order, **opens)
    depends_on = {s: stage_flags(s, *groups) | inputs | {"data_root": data[s]} for s in order}
    manifest = Manifest(info.name, info.num_classes, info.image_size, short_name(task_flags.teacher), weights, name)
    paper = partial(report.published, PUBLISHED, PAIRS, name, info.name, task_flags.teacher, task_flags.student)
    session = Session(path, None, None, info, manifest, schedule, flags, device, compiler, processes, paper)
    folder, stages = None, [stage for stage in stages if stage.name in order]
    if processes.main:  # only the main process writes the folder
        inputs = preflight.input_digests(method, flags, depends_on)
        session, todo = preflight.check(session, method, stages, depends_on, inputs, selected)
        folder = Run(path, flags, info.class_names)
        compiler.log = folder.log
        session = dataclasses.replace(session, run=folder, record=StageRecord(path / "stages.json", depends_on, inputs))
    try:
        if processes.main and todo:
            session = preflight.log_start(session, method.teacher, todo)
        run_stages(session, stages, selected, run_flags.redo)
    finally:
        if folder:
            folder.close()
    return path


if __name__ == "__main__":
    run_command(main, leave_processes)
