"""From flags to a method with its networks."""

from dataclasses import replace
from pathlib import Path

from datafree.base import Method, Task
from engine.data.datasets import dataset_info
from engine.data.splits import allow_train_split, load_split
from engine.data.views import Views
from engine.loops.distill import Schedule
from engine.networks.build import build_classifier, load_teacher, own_weights, short_name
from engine.runtime.errors import UserError
from engine.runtime.precision import Precision, choose_amp, choose_device
from engine.runtime.processes import Processes
from engine.runtime.run import earlier_value
from engine.runtime.seeding import seed_position


def run_folder(name: str, groups: list, dataset: str) -> Path:
    """Where a run of a method on a dataset of that name is kept."""
    task_flags, run_flags = groups[:2]
    pair = f"{dataset}_{short_name(task_flags.teacher)}_{short_name(task_flags.student)}"
    return Path(run_flags.save_dir or Path("checkpoints", name, f"{pair}_seed{run_flags.seed}"))


def build_method(
    name: str,
    method_class: type[Method],
    groups: list,
    schedule: Schedule,
    processes: Processes,
    datasets: dict,
    models: dict,
) -> Method:
    """The method with its networks.

    Args:
        groups: the flags: ``TaskFlags``, ``RunFlags``, ``DistillFlags`` and the method's Config.
        datasets, models: the tables of ``registry.py``.
    Raises:
        UserError: the dataset, the teacher or a flag of the method is not as it should be.
    """
    flags, run_flags, _, config = groups
    device = choose_device(run_flags.gpu)
    if flags.no_test and method_class.reads_train_split:
        raise UserError(f"--no_test opens no real image, and {name} learns from them; leave it out")
    named = flags.dataset, flags.data_root, flags.image_size, flags.domain, flags.classes, flags.name, flags.num_classes
    info = dataset_info(datasets, *named, unseen=flags.no_test)
    earlier = earlier_value(run_folder(name, groups, info.name), "amp")
    precision = Precision(processes.broadcast(choose_amp(run_flags.amp, device, earlier)), device)
    if own := own_weights(flags.teacher, info.name, flags.teacher_ckpt):
        info = info.as_known_to(flags.teacher, own, keep_size=flags.image_size is not None)
    teacher = load_teacher(models, flags.teacher, info, device, flags.teacher_ckpt, flags.teacher_mean, flags.teacher_std)
    if not info.reader:  # what is known of the dataset's pixels is how the teacher normalizes them
        info = replace(info, mean=teacher.normalization.mean, std=teacher.normalization.std)
    seed_position(run_flags.seed, "student")
    student = build_classifier(models, flags.student, info, device)

    def training_split():
        if processes.main:
            print(f"{name} opens the training images of {info.name}: a control, not a data-free method")
        with allow_train_split():
            return load_split(info, "train", device)

    task = Task(
        info=info,
        device=device,
        random_view=Views(info.crop_padding, info.flip),
        precision=precision,
        kd_steps=schedule.kd_steps,
        training_split=training_split if method_class.reads_train_split else None,
        average_gradients=processes.average_gradients,
    )
    return method_class(config, teacher, student, task)
