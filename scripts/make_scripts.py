"""Writes scripts/<method>/*.sh from the tables below; run it after changing them. A test checks that all are up to date.

python scripts/make_scripts.py
"""

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent))

from registry import PAIRS, PUBLISHED  # noqa: E402

CIFAR = ("cifar10", "cifar100")
METHODS = {
    "kd": "ordinary distillation on the real training images, the upper bound (arXiv 1503.02531)",
    "noise": "distillation on noise, the lower bound; --images FOLDER for unrelated pictures",
    "dafl": "DAFL, ICCV 2019 (arXiv 1904.01186)",
    "zskt": "ZSKT, NeurIPS 2019 (arXiv 1905.09768)",
    "dfad": "DFAD, 2019 (arXiv 1912.11006)",
    "dfq": "DFQ, CVPRW 2020 (arXiv 2005.04136)",
    "deepinv": "DeepInversion, CVPR 2020 (arXiv 1912.08795)",
    "adi": "Adaptive DeepInversion, CVPR 2020 (arXiv 1912.08795)",
    "cmi": "CMI, IJCAI 2021 (arXiv 2105.08584)",
    "fast": "Fast-10, AAAI 2022 (arXiv 2112.06253); --g_steps 5 --lr_g 3e-3, or 2 and 5e-3 --lr_z .015, for Fast-5, -2",
    "nayer": "NAYER, CVPR 2024 (arXiv 2310.00258), prior-free label codes; --label_embedding clip for the paper's",
    "csd": "CSD, ICME 2023 (arXiv 2307.04542)",
    "dda": "DDA, ACM MM 2024 (arXiv 2410.17606)",
    "diffdfkd": "DiffDFKD, ICME 2025 (arXiv 2504.00870), Stable Diffusion 1.5",
    "dm_kd": "DM-KD (arXiv 2305.12954), Stable Diffusion 1.5: DiffDFKD without guidance",
}
# Scripts of a method under another name; flags make the difference.
BASELINES = {"dm_kd": "diffdfkd"}
CONTROLS = ("kd", "noise")
# Methods whose initial bank is the same for every student of a teacher, made by a script of its own; bank size.
INITIAL_BANK = {"cmi": 51_200, "csd": 80_000, "dda": 80_000, "diffdfkd": 50_000, "dm_kd": 50_000}
GENERATED = ("diffdfkd", "dm_kd")  # of them, those whose bank stage generate fills
DATASETS = dict.fromkeys(("csd", "dda", "diffdfkd", "dm_kd"), (*CIFAR, "tiny_imagenet"))
# Published settings that differ from the method's defaults, by what they depend on.
FLAGS = {
    ("adi",): "--g_steps 2000",
    ("cmi",): "--epochs 40 --g_steps 200 --synthesis_batch_size 256 --oh 0.5 --cr_T 0.1 \\\n ",
    ("deepinv",): "--g_steps 2000",
    ("fast", "resnet34"): "--adv 1.33 --oh 0.5",
    ("fast", "vgg11"): "--adv 1.0 --oh 0.5",
    ("nayer", "cifar100"): "--g_steps 40",
}
# The same for the initial bank alone.
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
# Settings that were published for other datasets than the script's, or not at all.
KINDS = {
    "csd": "settings published for CIFAR-10, wrn40_2 -> wrn16_1",
    "dda": "CSD's published settings; for the diffusion stage none are, and its prior is trained here",
    "cmi": "settings published for CIFAR-10, wrn40_2 -> wrn16_1",
    "adi": "settings published for CIFAR-10, wrn40_2 -> wrn16_1, but for the steps",
    "deepinv": "ADI's settings without its competition",
    **dict.fromkeys(CONTROLS, "steps and rates as the methods'"),
    **{("diffdfkd", dataset): "CIFAR-10's published settings" for dataset in ("cifar100", "tiny_imagenet")},
    "dm_kd": "DiffDFKD's settings, unguided; DM-KD's images are a DiT's",
}
# Which row of registry.PUBLISHED a method's scripts go for, where that is not its name alone.
TABLE_ROW = {
    "adi": "adi --g_steps 2000",
    "fast": "fast --g_steps 10",
    "nayer": "nayer --epochs 300",
    "dm_kd": "diffdfkd --oh 0.0 --bn 0.0 --adv 0.0 --lca_every 0",
}

HEAD = """#!/usr/bin/env bash
# {paper}:
# {dataset}, {what}; {kind}.{published}
# acc1: not measured yet. Time: not measured yet. Device: one GPU.
# {note}
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method {method} --dataset {dataset} --teacher {teacher} \\
  {flags} "$@"
"""


def short(network: str) -> str:
    """As the published scripts write it: wrn40_2 -> wrn402."""
    return network.replace("_", "")


def published(method: str, dataset: str, pair: tuple[str, str]) -> str:
    """What the paper reports for this script, as a sentence; nothing where its table is not known."""
    table = PUBLISHED.get(dataset, {})
    values = table.get(TABLE_ROW.get(method, method))
    return f"\n# The paper's acc1 (best test epoch): {dict(zip(PAIRS, values))[pair]:.2f} %." if values else ""


def settings(method: str, *conditions: str, table: dict[tuple[str, ...], str] = FLAGS) -> str:
    """The flags that hold for this method under these conditions."""
    held = [flags for (name, *of), flags in table.items() if name == method and set(of) <= set(conditions)]
    return "".join(f" {flags}" for flags in held)


def of_method(method: str, paper: str) -> Iterator[tuple[str, str]]:
    """(path below scripts/, text) of every script of one method."""
    for dataset in DATASETS.get(method, CIFAR):
        for teacher, student in PAIRS:
            kind = KINDS.get((method, dataset)) or KINDS.get(method, "published settings")
            common = {"paper": paper, "dataset": dataset, "teacher": teacher, "kind": kind}
            common["method"] = BASELINES.get(method, method)
            note = f"Wants checkpoints/pretrained/{dataset}_{teacher}.pth."
            flags = f"--student {student}" + settings(method, dataset, teacher, student)
            if method in INITIAL_BANK:
                bank = f"checkpoints/{method}/{dataset}_{teacher}_initBank"
                first = f"{method}/{method}_{dataset}_initBank_{short(teacher)}.sh"
                yield (
                    first,
                    HEAD.format(
                        **common,
                        what=f"initial image bank of {teacher} ({INITIAL_BANK[method]:,} images)",
                        note=f"Wants checkpoints/pretrained/{dataset}_{teacher}.pth; makes {bank}/bank.",
                        published="",
                        flags=f"--stages {'generate' if method in GENERATED else 'synthesize'} --save_dir {bank}"
                        + (f" \\\n {more}" if (more := settings(method, dataset, teacher, table=BANK_FLAGS)) else ""),
                    ),
                )
                note = f"First: bash scripts/{first}"
                flags += f" --init_bank {bank}/bank"
            if method in BASELINES:  # not where the method itself keeps its runs
                flags += f" \\\n  --save_dir checkpoints/{method}/{dataset}_{teacher}_{student}_seed{{seed}}"
            yield (
                f"{method}/{method}_{dataset}_{short(teacher)}_{short(student)}.sh",
                HEAD.format(
                    **common,
                    what=f"{teacher} -> {student}",
                    note=note,
                    published=published(method, dataset, (teacher, student)),
                    flags=flags,
                ),
            )


def scripts() -> dict[str, str]:
    """{path below scripts/: text} of every generated script."""
    return dict(pair for method, paper in METHODS.items() for pair in of_method(method, paper))


if __name__ == "__main__":
    for name, text in scripts().items():
        path = ROOT / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    print(f"{len(scripts())} scripts")
