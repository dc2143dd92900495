"""Writes scripts/<method>/*.sh from the tables below; run it after changing them. A test checks that all are up to date.

python scripts/make_scripts.py
"""

from pathlib import Path

ROOT = Path(__file__).parent
DATASETS = ("cifar10", "cifar100", "tiny_imagenet")
PAIRS = (
    ("resnet34", "resnet18"),
    ("vgg11", "resnet18"),
    ("wrn40_2", "wrn16_1"),
    ("wrn40_2", "wrn40_1"),
    ("wrn40_2", "wrn16_2"),
)
METHODS = {
    "csd": "CSD, ICME 2023 (arXiv 2307.04542)",
    "dda": "DDA, ACM MM 2024 (arXiv 2410.17606)",
}

HEAD = """#!/usr/bin/env bash
# {paper}: {dataset}, {what}; published settings.
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


def scripts() -> dict[str, str]:
    """{path below scripts/: text} of every generated script."""
    made = {}
    for method, paper in METHODS.items():
        for dataset in DATASETS:
            for teacher in dict.fromkeys(teacher for teacher, _ in PAIRS):
                bank = f"checkpoints/{method}/{dataset}_{teacher}_initBank"
                first = f"{method}/{method}_{dataset}_initBank_{short(teacher)}.sh"
                made[first] = HEAD.format(
                    paper=paper, method=method, dataset=dataset, teacher=teacher,
                    what=f"initial image bank of {teacher} (80,000 images)",
                    note=f"Wants checkpoints/pretrained/{dataset}_{teacher}.pth; makes {bank}/bank.",
                    flags=f"--stages synthesize --save_dir {bank}",
                )  # fmt: skip
                for student in [student for of, student in PAIRS if of == teacher]:
                    made[f"{method}/{method}_{dataset}_{short(teacher)}_{short(student)}.sh"] = HEAD.format(
                        paper=paper, method=method, dataset=dataset, teacher=teacher,
                        what=f"{teacher} -> {student}",
                        note=f"First: bash scripts/{first}",
                        flags=f"--student {student} --init_bank {bank}/bank",
                    )  # fmt: skip
    return made


if __name__ == "__main__":
    for name, text in scripts().items():
        path = ROOT / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    print(f"{len(scripts())} scripts")
