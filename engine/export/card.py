"""The model card of an exported student, from what its run has written down."""

from typing import Any

from engine.networks.trained import Trained

FRONT = """---
license: other  # fill in: the student's; mind the teacher's and the prior's
library_name: {library}
pipeline_tag: image-classification
tags: [image-classification, {tag}]
---
"""
TEXT = """
# {student} for {dataset}

{made}

| | |
|---|---|
{rows}

Images are RGB, {size} x {size} px, in [0, 1]; subtract the mean {mean}, divide by the standard deviation {std}
(model.onnx does both itself). Out come logits of {classes} classes{names}.

{honesty}

## To repeat it

```
{command}
```

at commit {commit} of this project, {versions}.

## Licences

Fill in before you publish: of the student (`license` above), of the teacher ({teacher}), of the data that the teacher was
trained on, of the external prior ({prior}).
"""


def model_card(library: str, student: Trained, result: dict[str, Any]) -> str:
    """README.md of the folder.

    Args:
        library: ``library_name`` of its configuration.
        result: the run's result.json.
    """
    about, scratch = student.about, "teacher_digest" not in result
    names, prior, teacher = about.get("class_names"), result.get("external_prior", "none"), result.get("teacher", "none")
    known = {
        "method": result.get("method"),
        "teacher": None if scratch else f"{teacher}, weights {result['teacher_digest']}",
        "teacher's accuracy": _percent(result.get("teacher_acc1")),
        "external prior": None if scratch else prior,
        "accuracy, last epoch": _percent(result.get("acc1_last")),
        "accuracy, best epoch on the test split": _percent(result.get("acc1_best")),
        "measured on": result.get("dataset_identity"),
        "seed": result.get("seed"),
    }
    made = "Trained on real images." if scratch else "Distilled from a teacher without its training data."
    best = "The best epoch was chosen on the test split itself: compare by the last one. "
    if not scratch and prior != "none":
        best += f"Besides the teacher, a pretrained model was used ({prior}): what it has seen is part of this student. "
    listed = ", ".join(f"{label} {name}" for label, name in enumerate(names[:20])) if names else ""
    more = f", and {len(names) - 20} more in config.json" if names and len(names) > 20 else ""
    mean, std = (", ".join(f"{value:g}" for value in about[key]) for key in ("mean", "std"))
    return FRONT.format(library=library, tag="classifier" if scratch else "data-free-distillation") + TEXT.format(
        student=result.get("student", student.spec),
        dataset=result.get("dataset", "unknown data"),
        made=made,
        rows="\n".join(f"| {name} | {value} |" for name, value in known.items() if value is not None),
        size=about["image_size"],
        mean=mean,
        std=std,
        classes=about["num_classes"],
        names=f": {listed}{more}" if names else ", whose names are not known",
        honesty=best + "One seed alone says little; python -m engine.report gives mean and spread over several.",
        command=result.get("command", "unknown"),
        commit=result.get("commit", "unknown"),
        versions=", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
        or "versions unknown",
        teacher=teacher,
        prior=prior,
    )


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f} %"
