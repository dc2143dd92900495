"""Writes scripts/<method>/*.sh from the tables below. Run it after a change; a test compares the scripts with the tables.

python scripts/make_scripts.py

A header gives the paper's accuracy (``registry.PUBLISHED``), and ours if ``checkpoints/results`` holds runs with the
script's settings.
"""

import shlex
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent))

from datafree_kd import parse  # noqa: E402
from engine.report.results import collect  # noqa: E402
from engine.report.results import settings as settings_of  # noqa: E402
from engine.report.tables import spread  # noqa: E402
from engine.runtime.flags import stage_flags  # noqa: E402
from registry import PAIRS, PUBLISHED  # noqa: E402

CIFAR = ("cifar10", "cifar100")
METHODS = {
    "kd": "Ordinary distillation on the real training images, the upper bound (arXiv 1503.02531)",
    "noise": "Distillation on noise, the lower bound; with --images FOLDER, on unrelated pictures",
    "one_image": "Distillation on crops of one picture (arXiv 2112.00725); needs --image FILE",
    "dafl": "DAFL, ICCV 2019 (arXiv 1904.01186)",
    "zskt": "ZSKT, NeurIPS 2019 (arXiv 1905.09768)",
    "dfad": "DFAD, 2019 (arXiv 1912.11006)",
    "dfq": "DFQ, CVPRW 2020 (arXiv 2005.04136)",
    "deepinv": "DeepInversion, CVPR 2020 (arXiv 1912.08795)",
    "adi": "Adaptive DeepInversion, CVPR 2020 (arXiv 1912.08795)",
    "cmi": "CMI, IJCAI 2021 (arXiv 2105.08584)",
    "fast": "Fast-10, AAAI 2022 (arXiv 2112.06253); "
    "Fast-5: --g_steps 5 --lr_g 3e-3; Fast-2: --g_steps 2 --lr_g 5e-3 --lr_z .015",
    "nayer": "NAYER, CVPR 2024 (arXiv 2310.00258), with label codes that need no prior; the paper's: --label_embedding clip",
    "csd": "CSD, ICME 2023 (arXiv 2307.04542)",
    "dda": "DDA, ACM MM 2024 (arXiv 2410.17606)",
    "diffdfkd": "DiffDFKD, ICME 2025 (arXiv 2504.00870), Stable Diffusion 1.5",
    "dm_kd": "DM-KD (arXiv 2305.12954), Stable Diffusion 1.5: DiffDFKD without guidance",
}
# Scripts under a name of their own that run another method with other flags: {name: method}.
BASELINES = {"dm_kd": "diffdfkd"}
CONTROLS = ("kd", "noise", "one_image")
# Methods whose initial bank has a script of its own, as it is the same for every student of a teacher: {method: images}.
INITIAL_BANK = {"cmi": 51_200, "csd": 80_000, "dda": 80_000, "diffdfkd": 50_000, "dm_kd": 50_000}
SHARED_BANK = {"dda": "csd"}  # {method: the method whose run folder and initial bank it shares}
GENERATED = ("diffdfkd", "dm_kd")  # the methods of INITIAL_BANK whose bank is filled by stage generate
DATASETS = dict.fromkeys(("csd", "dda", "diffdfkd", "dm_kd"), (*CIFAR, "tiny_imagenet"))
# Published settings that differ from the method's defaults: {(method, dataset or network, ...): flags}.
FLAGS = {
    ("adi",): "--g_steps 2000",
    ("cmi",): "--epochs 40 --g_steps 200 --synthesis_batch_size 256 --oh 0.5 --cr_T 0.1 \\\n ",
    ("deepinv",): "--g_steps 2000",
    ("dfq", "resnet34"): "--lr 0.05",
    ("fast", "resnet34"): "--adv 1.33 --oh 0.5",
    ("fast", "vgg11"): "--adv 1.0 --oh 0.5",
    ("nayer", "cifar100"): "--g_steps 40",
}
# Such settings of the initial bank alone.
BANK_FLAGS = {
    ("dm_kd",): "--oh 0 --bn 0 --adv 0 --lca_every 0 --scheduler ancestral",
    ("diffdfkd",): "--scheduler ancestral --batch_classes one --lca_every 0",
    **{(m, teacher): "--num_inference_steps 50" for m in GENERATED for teacher in ("wrn40_2", "vgg11")},
    ("dm_kd", "resnet34"): "--num_inference_steps 10",
    ("diffdfkd", "resnet34"): "--num_inference_steps 10 --bn 0",
    ("diffdfkd", "cifar100"): "--images_per_class 500",
    ("diffdfkd", "tiny_imagenet"): "--images_per_class 250",
    ("dm_kd", "cifar100"): "--images_per_class 500",
    ("dm_kd", "tiny_imagenet"): "--images_per_class 250",
    ("cmi",): "--init_rounds 200 --synthesis_batch_size 256 --oh 0.5 --cr_T 0.1",
}
# Scripts for CIFAR-10 on a CPU with the shipped prior of natural images: {method: (settings in words, flags)}.
CPU_PAIR = ("resnet20", "wrn16_1")
STEPS_4000 = "--epochs 10 --kd_steps 400 --batch_size 256"
CPU_TWINS = {
    "dda": (
        "4,000 student steps; variants by natural_32 under the teacher's guidance",
        f"--prior natural --strength 0.6 --guidance_oh 1 --guidance_bn 0.3 --guidance_max_step 2 --agree \\\n  {STEPS_4000} "
        "--init_rounds 20 --init_g_steps 100 \\\n  --lr_g 4e-3 --g_steps 40",
    ),
    "diffdfkd": (
        "4,000 student steps on 2,000 images drawn by natural_32 under the teacher's guidance",
        f"--diffusion_model natural_32 --scheduler ancestral --bn 0.3 --guidance_max_step 2 --lca_every 0 \\\n"
        f"  --images_per_class 200 --diffusion_batch_size 50 {STEPS_4000} --warmup_epochs 1",
    ),
}
# Source of a method's settings, if they were not published for the script's dataset and networks.
KINDS = {
    "csd": "published for CIFAR-10, wrn40_2 -> wrn16_1",
    "dda": "published for CSD; none are published for the diffusion stage, whose prior is trained here",
    "cmi": "published for CIFAR-10, wrn40_2 -> wrn16_1",
    "dafl": "published for CIFAR-10, wrn40_2 -> wrn16_1",
    "dfq": "published for CIFAR-10, wrn40_2 -> wrn16_1, and for CIFAR-100, resnet34 -> resnet18",
    "dfad": "published for CIFAR-10, wrn40_2 -> wrn16_1, except the generator's learning rate, which falls as in the paper",
    "zskt": "published for CIFAR-10, wrn40_2 -> wrn16_1, except attention and the falling --lr_g, which are the paper's",
    "adi": "published for CIFAR-10, wrn40_2 -> wrn16_1, except the number of steps",
    "deepinv": "those of ADI without its competition term",
    **dict.fromkeys(CONTROLS, "student steps and learning rates as for the methods"),
    "diffdfkd": "published for CIFAR-10, wrn40_2 -> wrn16_2",
    "dm_kd": "those of DiffDFKD without guidance; DM-KD itself draws its images with a DiT",
}
# The same for the script of the initial bank, if it differs.
BANK_KINDS = {
    "cmi": "none are published for the initial bank; loss weights as in CMI's script, 500 steps per image as in CSD's",
    "diffdfkd": "published for CIFAR-10, resnet34 and wrn40_2, except that 16 images are generated together (published: one)",
}
# Row of registry.PUBLISHED that a method's scripts correspond to, if the row is not named after the method alone.
TABLE_ROW = {
    "adi": "adi --g_steps 2000",
    "fast": "fast --g_steps 10",
    "nayer": "nayer --epochs 300",
    "dm_kd": "diffdfkd --oh 0.0 --bn 0.0 --adv 0.0 --lca_every 0",
}

# Flags that are not settings of a script: seed, paths, the teacher's normalization, and --amp, which the machine decides.
INPUTS = ("seed", "data_root", "teacher_ckpt", "teacher_mean", "teacher_std", "init_bank", "init_variants", "amp")

HEAD = """#!/usr/bin/env bash
# {paper}.
# {dataset}, {what}.
# Settings: {kind}.{published}{measured}
# {note}
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method {method} --dataset {dataset} --teacher {teacher} \\
  {flags} "$@"
"""


def short(network: str) -> str:
    """Name of a network in the file names of scripts, as in the published ones: wrn40_2 -> wrn402."""
    return network.replace("_", "")


def published(method: str, dataset: str, pair: tuple[str, str]) -> str:
    """The header line with the paper's accuracy for this script; "" if the paper's table is not known."""
    table = PUBLISHED.get(dataset, {})
    values = table.get(TABLE_ROW.get(method, method))
    return f"\n# The paper's acc1 (best test epoch): {dict(zip(PAIRS, values))[pair]:.2f} %." if values else ""


def results() -> list[dict[str, Any]]:
    """All results of this repository."""
    files = sorted(ROOT.parent.glob("checkpoints/results/*.jsonl"))
    return collect([file for file in files if file.name != "int8.jsonl"])  # int8.jsonl has no runs


def measured(results: list[dict[str, Any]], command: str, bank_command: str) -> str:
    """The header line with the accuracy of this repository's runs with a script's settings; "" if there is no such run.

    Args:
        results: results of this repository's runs.
        command: flags that the script gives to datafree_kd.py.
        bank_command: flags of the script that makes its initial bank.
    """
    name, _, groups = parse(shlex.split(command.replace("\\\n", " ")))
    about = {"method": name, "dataset": groups[0].dataset, "teacher": groups[0].teacher, "student": groups[0].student}
    runs = [run for run in results if about.items() <= run.items() and "acc1_last" in run]
    if not runs:
        return ""
    bank_groups = parse(shlex.split(bank_command.replace("\\\n", " ")))[2]
    wanted = stage_flags("synthesize", *bank_groups) | stage_flags("generate", *bank_groups)
    wanted |= stage_flags("augment", *groups) | stage_flags("distill", *groups)
    wanted = {flag: value for flag, value in wanted.items() if flag not in INPUTS}
    runs = [run for run in runs if all(settings_of(run).get(flag) == value for flag, value in wanted.items())]
    if not runs:
        return ""
    hours = [sum(run["seconds"].values()) / 3600 for run in runs if None not in run["seconds"].values()]
    time = f"; {statistics.fmean(hours):.1f} h" if hours else ""
    seeds = ", ".join(str(run["seed"]) for run in runs)
    acc1 = spread([run["acc1_last"] for run in runs])
    return f"\n# Ours (last epoch): {acc1} %, seed{'s' * (len(runs) > 1)} {seeds}{time} on {runs[0]['machine']}."


def settings(method: str, *conditions: str, table: dict[tuple[str, ...], str] = FLAGS) -> str:
    """The flags that a table has for this method and these conditions (dataset, networks)."""
    held = [flags for (name, *of), flags in table.items() if name == method and set(of) <= set(conditions)]
    return "".join(f" {flags}" for flags in held)


def of_method(method: str, paper: str, results: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """(path below scripts/, text) of every script of one method; ``results`` are those of this repository's runs."""
    for dataset in DATASETS.get(method, CIFAR):
        for teacher, student in PAIRS:
            kind = KINDS.get(method, "published")
            bank_kind = BANK_KINDS.get(method, kind)
            common = {"paper": paper, "dataset": dataset, "teacher": teacher, "kind": kind}
            common["method"] = BASELINES.get(method, method)
            note = f"Needs one GPU and checkpoints/pretrained/{dataset}_{teacher}.pth."
            flags = f"--student {student}" + settings(method, dataset, teacher, student)
            task = f"--method {common['method']} --dataset {dataset} --teacher {teacher} "
            bank_flags = flags
            if method in INITIAL_BANK:
                owner = SHARED_BANK.get(method, method)
                bank = f"checkpoints/{owner}/{dataset}_{teacher}_initBank"
                first = f"{owner}/{owner}_{dataset}_initBank_{short(teacher)}.sh"
                bank_flags = f"--stages {'generate' if method in GENERATED else 'synthesize'} --save_dir {bank}" + (
                    f" \\\n {more}" if (more := settings(method, dataset, teacher, table=BANK_FLAGS)) else ""
                )
                shared = f", shared with {owner}" if owner != method else ""
                yield (
                    f"{method}/{method}_{dataset}_initBank_{short(teacher)}.sh",
                    HEAD.format(
                        **common | {"method": BASELINES.get(owner, owner), "kind": bank_kind},
                        what=f"initial image bank of {teacher} ({INITIAL_BANK[method]:,} images{shared})",
                        note=f"Needs one GPU and checkpoints/pretrained/{dataset}_{teacher}.pth.\n# Makes {bank}/bank.",
                        published="",
                        measured="",
                        flags=bank_flags,
                    ),
                )
                note = f"Needs one GPU. First: bash scripts/{first}"
                flags += f" --init_bank {bank}/bank"
            if method in BASELINES:  # a folder apart from the runs of the method itself
                flags += f" \\\n  --save_dir checkpoints/{method}/{dataset}_{teacher}_{student}_seed{{seed}}"
            yield (
                f"{method}/{method}_{dataset}_{short(teacher)}_{short(student)}.sh",
                HEAD.format(
                    **common,
                    what=f"{teacher} -> {student}",
                    note=note,
                    published=published(method, dataset, (teacher, student)),
                    measured=measured(results, task + flags, task + bank_flags),
                    flags=flags,
                ),
            )


def cpu_twin(method: str, results: list[dict[str, Any]]) -> tuple[str, str]:
    """(path below scripts/, text) of a method's script that needs no GPU and downloads no model."""
    teacher, student = CPU_PAIR
    kind, flags = CPU_TWINS[method]
    flags = f"--student {student} {flags} \\\n  --save_dir checkpoints/{method}/cifar10_{teacher}_{student}_cpu"
    command = f"--method {method} --dataset cifar10 --teacher {teacher} {flags}"
    text = HEAD.format(
        paper=METHODS[method].split(", Stable")[0],
        dataset="cifar10",
        what=f"{teacher} -> {student} on a CPU",
        kind=kind,
        published="",
        measured=measured(results, command, command),
        note=f"Needs one CPU core and checkpoints/pretrained/cifar10_{teacher}.pth. Not measured yet.",
        method=method,
        teacher=teacher,
        flags=flags,
    )
    return f"{method}/{method}_cifar10_{short(teacher)}_{short(student)}_cpu.sh", text


def scripts() -> dict[str, str]:
    """{path below scripts/: text} of every generated script."""
    known = results()
    texts = dict(pair for method, paper in METHODS.items() for pair in of_method(method, paper, known))
    return texts | dict(cpu_twin(method, known) for method in CPU_TWINS)


if __name__ == "__main__":
    for name, text in scripts().items():
        path = ROOT / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    print(f"{len(scripts())} scripts")
