"""What a careful reader wants to know before believing a row."""

from typing import Any

CLOSE = 0.2  # points between best and last that are not worth a word


def cautions(runs: list[dict[str, Any]], lines: list[dict[str, Any]], classes: int | None) -> list[str]:
    """One sentence for each reason to be careful with the runs of one row.

    Args:
        runs: results that differ in the seed alone.
        lines: metrics of the first of them, all stages.
        classes: of its dataset; None: not known.
    """
    first, found = runs[0], []
    if len(runs) == 1:
        found.append(f"One seed ({first['seed']}): nothing is known of the spread. Run more with --seeds.")
    elif len(runs) < 3:
        found.append("Two seeds: the spread is hardly known.")
    above = max(
        run["acc1_best"] - run["acc1_last"] if "acc1_last" in run else 0 for run in runs
    )  # with --no_test there is none
    if above >= CLOSE:
        found.append(
            f"The best epoch on the test set is up to {above:.2f} points above the last. It was chosen on the test set, as "
            "papers do; the last epoch is the result."
        )
    if (prior := first.get("external_prior", "none")) != "none":
        found.append(f"External prior {prior}: these images come from more than the teacher.")
    if (share := first.get("bank_teacher_acc1")) is not None and share < 50:
        found.append(f"The teacher names only {share:.1f} % of the bank's images as their labels say.")
    if str(first.get("commit", "unknown")) == "unknown":
        found.append("The commit of the code is not recorded.")
    elif first["commit"].endswith("+"):
        found.append(f"The code had changes that are in no commit ({first['commit']}).")
    return found + _unmoved(first["history"], lines, classes)


def _unmoved(history: list[dict[str, Any]], lines: list[dict[str, Any]], classes: int | None) -> list[str]:
    """Accuracies and losses that are at the end where they were at the start."""
    found, accuracies = [], [line["acc1"] for line in history if "acc1" in line]
    if classes and accuracies and max(accuracies) < 150 / classes:
        found.append(f"The accuracy never rose above chance ({100 / classes:.3g} %) by more than half.")
    elif len(accuracies) > 2 and max(accuracies) - min(accuracies) < 0.5:
        found.append("The accuracy never moved from its start.")
    for stage in dict.fromkeys(line["stage"] for line in lines):
        of_stage = [line for line in lines if line["stage"] == stage]
        for name in dict.fromkeys(name for line in of_stage for name in line if is_loss(name)):
            values = [line[name] for line in of_stage if name in line]
            if len(values) > 2 and max(values) - min(values) <= 0.01 * max(map(abs, values)):
                found.append(f"{name} of stage {stage} never moved from its start ({values[0]:.3g}).")
    return found


def is_loss(name: str) -> bool:
    """Whether a column of metrics.jsonl is a curve to look at beside the accuracy."""
    return name not in ("stage", "round", "images", "student_steps", "minutes", "acc1", "acc5")


def cautions_of_all(groups: list[list[dict[str, Any]]]) -> list[str]:
    """The same for rows side by side."""
    found, runs = [], [run for group in groups for run in group]
    if any(run["method"] == "scratch" for run in runs):
        found.append('The rows "real data" were trained on the real images: a bound, not a rival.')
    for dataset in dict.fromkeys(run["dataset"] for run in runs):
        digests = {run["teacher_digest"] for run in runs if run["dataset"] == dataset and run.get("teacher_digest")}
        if len(digests) > 1:
            found.append(f"The rows of {dataset} have {len(digests)} different teachers (by their weights).")
    machines = {run.get("machine") for run in runs} - {None}
    if len(machines) > 1:
        found.append(f"The runs were made on different machines ({', '.join(sorted(machines))}): compare no times.")
    if any(run.get("published") for run in runs):
        found.append("Published figures are those of the best epoch on the test set; compare them with ours of the best.")
    if len({len(group) for group in groups}) > 1:
        found.append("The rows have different numbers of seeds.")
    return found
