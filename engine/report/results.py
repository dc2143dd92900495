"""Reads the results of runs, from run folders or from a file with a line a run, and groups them into rows of a table."""

import base64
import io
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from engine.runtime.errors import UserError
from engine.runtime.files import atomic_path, parse_json, read_json
from engine.runtime.flags import Range
from engine.runtime.run import LINE, METRICS, TIMES, read_lines
from engine.runtime.schema import COUNT, SECONDS, SIZE, require

HISTORY = [LINE | {str: {float, None}}]  # lines of metrics, whose further fields are losses
GROUP_BY = ("dataset", "teacher", "student", "method", "external_prior", "student_steps", "bank_images", "variants")
PERCENT = (float, Range(least=0, most=100))
RESULT = {
    "dataset": str, "method": str, "student": str, "seed": int, "seconds": {str: {SECONDS, None}}, "settings?": dict,
    "folder?": str, "command?": str, "commit?": str, "machine?": str, "teacher?": str, "external_prior?": str,
    "acc1_last?": PERCENT, "acc1_best?": PERCENT, "acc1_mean?": PERCENT, "agreement_last?": PERCENT, "agreement_best?": PERCENT,
    "published?": PERCENT, "student_steps?": COUNT, "images?": COUNT, "bank_images?": COUNT, "variants?": COUNT,
    "variants_kept?": COUNT, "synthesis_seconds?": SECONDS, "cpu_seconds?": SECONDS, "bank_teacher_acc1?": PERCENT, "bank_loss_bn?": float,
    "teacher_digest?": str, "teacher_acc1?": PERCENT, "dataset_identity?": str, "versions?": {str: str}, "history?": HISTORY,
    "image_figures?": {"count?": COUNT, str: {float, None}},
}  # fmt: skip
OF_A_METHOD = {"teacher": str, "external_prior": str}  # fields that training on real data does not have
OF_A_LINE = {"folder": str, "history": HISTORY}  # further fields in a file with a line a run
PATHS = ("teacher_ckpt", "init_bank", "init_variants")  # flags whose path may contain the seed; see ``settings``


def collect(places: list[Path]) -> list[dict[str, Any]]:
    """Reads the results of runs, sorted by folder within each place.

    Each result has the fields of result.json and three more. "history" holds the lines of metrics.jsonl with an accuracy or
    an agreement, and the minutes since the start of the run. "folder" is the run folder relative to the given place. "path"
    is where the result was read.

    Args:
        places: run folders or their result.json, folders of run folders, and files that ``write_lines`` wrote.
    Raises:
        UserError: a place does not exist, or there is no result at all.
    """
    results = []
    for place in places:
        if not place.exists():
            raise UserError(f"{place} does not exist; give run folders, folders of them, or a file of result lines")
        place = place.parent if place.name == "result.json" else place
        results += _read_file(place) if place.is_file() else _read_folders(place)
    if not results:
        raise UserError(f"no result.json under {', '.join(map(str, places))}; a run writes it when it is finished")
    return results


def _read_folders(place: Path) -> list[dict[str, Any]]:
    results = []
    for file in sorted(place.rglob("result.json")):
        folder = file.parent.relative_to(place)
        name = str(folder) if folder.parts else place.resolve().name
        history = [line for line in metrics(file.parent) if "acc1" in line or "agreement" in line]
        result = read_json(file)
        result = checked(result | {"history": history} if isinstance(result, dict) else result, str(file))
        results.append({"folder": name} | result | {"path": str(file.parent)})
    return results


def checked(result: Any, what: str, also: dict[str, Any] = {}) -> dict[str, Any]:
    """Checks the result of a run, and drops optional fields that are null, also those of its lines of metrics.

    Args:
        what: name of the result in error messages.
        also: further required fields.
    Raises:
        UserError: a field is missing or has a wrong value.
    """
    advice = "give a run's result.json, or a file that python -m engine.report --lines wrote"
    require(result, RESULT | also, what, advice)
    result = {name: value for name, value in result.items() if value is not None or f"{name}?" not in RESULT}
    if "history" in result:
        result["history"] = [{k: v for k, v in line.items() if v is not None} for line in result["history"]]
    measured = "acc1" if "acc1_last" in result else "agreement"
    of_a_method = {} if result["method"] == "scratch" else OF_A_METHOD
    kept = {"variants_kept": COUNT} if result.get("variants") else {}
    require(result, {f"{measured}_last": PERCENT, f"{measured}_best": PERCENT} | of_a_method | kept, what, advice)
    steps = {"student_steps": int} if of_a_method else {}
    require(result, {"history?": [{measured: PERCENT} | steps]}, what, advice)
    return result


def _read_file(file: Path) -> list[dict[str, Any]]:
    """Reads the results in a file with a line a run.

    Raises:
        UserError: a line is not a result.
    """
    results = []
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
        try:
            result = parse_json(line)
        except ValueError as error:
            raise UserError(
                f"line {number} of {file} is not a result of a run ({error}); give a file that python -m engine.report "
                "--lines wrote"
            ) from None
        result = checked(result, f"line {number} of {file}", OF_A_LINE)
        results.append(result | {"path": f"{file}, {result['folder']}"})
    return results


def write_lines(file: Path, results: list[dict[str, Any]]) -> int:
    """Writes results to a file, one line each, in place of lines of the same folder; returns the file's number of lines.

    Raises:
        UserError: two results have the same folder, or a line of the same folder is of another run.
    """
    known: dict[str, dict[str, Any]] = {}
    for some in (_read_file(file) if file.exists() else [], results):
        names = set()
        for result in some:
            name = result["folder"]
            differs = _difference(known[name], result) if name in known else None
            if differs or name in names:
                raise UserError(
                    f"{result['path']} has the folder name {name}, as {known[name]['path']} has"
                    f"{f', but another {differs}' if differs else ''}; give a folder that contains both runs, so that their "
                    "names differ, or another --lines file"
                )
            known[name] = result
            names.add(name)
    lines = [{k: v for k, v in known[name].items() if k != "path"} for name in sorted(known, key=lambda n: Path(n).parts)]
    with atomic_path(file) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return len(lines)


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Name of a field or of a flag in which two results differ; None: both may be results of the same run.

    Flags that only one of them has are not compared, because the version of the other did not have them.
    """
    flags, others = settings(one), settings(other)
    pairs = [(name, one.get(name), other.get(name)) for name in ("method", "dataset", "teacher", "student", "seed")]
    pairs += [(f"--{name}", flags[name], others[name]) for name in flags if name in others]
    return next((name for name, mine, theirs in pairs if mine != theirs), None)


def group(results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Groups results that differ only in the seed.

    Groups are sorted by dataset, with training on real data first, then by student steps and method. Data and teachers are
    distinguished by their digests, which are among the settings.
    """
    groups: dict[tuple, list] = {}
    for result in results:
        key = *(result.get(name) for name in GROUP_BY), json.dumps(settings(result), sort_keys=True)
        groups.setdefault(key, []).append(result)
    return sorted(
        groups.values(),
        key=lambda g: (g[0]["dataset"], g[0]["method"] != "scratch", g[0].get("student_steps", 0), g[0]["method"]),
    )


def warn_of_repeated_seeds(groups: list[list[dict[str, Any]]]) -> None:
    """Warns on stderr of each seed that a row has more than once: mean and standard deviation count it repeatedly."""
    for runs in groups:
        for seed, count in Counter(run["seed"] for run in runs).items():
            if count > 1:
                places = ", ".join(run["path"] for run in runs if run["seed"] == seed)
                print(
                    f"warning: seed {seed} occurs {count} times in one row ({places}); give only one of these runs",
                    file=sys.stderr,
                )


def settings(result: dict[str, Any]) -> dict[str, Any]:
    """The flags and inputs on which a result depends, without the seed.

    A teacher is identified by its digest and a bank by its path. A path that contains the seed (``{seed}`` or ``seed0``) is
    another for each seed, so ``{seed}`` replaces the number in it. A flag without a value counts as missing, like a flag
    that the version of a run did not have.
    """
    found = {name: value for name, value in result.get("settings", {}).items() if name != "seed" and value is not None}
    return found | {name: path for name in PATHS if (path := path_of_every_seed(result, name))}


def path_of_every_seed(result: dict[str, Any], name: str) -> str | None:
    """Path that the command gave with ``--<name>``, with ``{seed}`` for the run's seed; None if it contains no seed."""
    given = re.search(rf"--{name.replace('_', '[_-]')}[ =](?:'([^']*)'|([^\s']+))", result.get("command", ""))
    path = given[1] or given[2] if given else str(result.get("settings", {}).get(name))
    path = re.sub(rf"(?<=seed){result['seed']}(?!\d)", "{seed}", path)
    return path if "{seed}" in path else None


def published(
    table: dict[str, dict[str, tuple]], pairs: tuple, method: str, dataset: str, teacher: str, student: str, settings: dict
) -> float | None:
    """Accuracy that the paper of a method reports for a pair and dataset (best test epoch); None if it reports none.

    Args:
        table, pairs: ``registry.PUBLISHED`` and ``registry.PAIRS``.
        settings: flags of the run by name; a row of the table may hold only for certain values.
    """
    for name, by_pair in table.get(dataset, {}).items():
        row, *flags = name.split(" --")
        wanted = dict(flag.split() for flag in flags)
        if row == method and all(str(settings.get(k)) == v for k, v in wanted.items()):
            return dict(zip(pairs, by_pair)).get((teacher, student))
    return None


# Contents of a run folder for the page: metrics with times, images, class counts, and teacher against student.


SHOWN, SOURCES, VARIANTS = 30, 8, 4  # images shown of a bank, sources shown with variants, variants shown of a source
PIXELS = 96  # longest side in px of an image in the page
SHEET = 720  # longest side in px of a sheet of images
MOST_CLASSES = 20  # largest number of classes for which a table of all pairs is readable


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl and adds the "minutes" and "cpu_minutes" since the start of the run, if times.jsonl has them."""
    names = {"seconds": "minutes", "cpu_seconds": "cpu_minutes"}
    times = {
        (line["stage"], line["round"]): {names[name]: round(line[name] / 60, 4) for name in names if name in line}
        for line in read_lines(folder / TIMES)
    }
    return [line | times.get((line["stage"], line["round"]), {}) for line in read_lines(folder / METRICS)]


# Flags of a run that describe its dataset, in the order of the arguments of ``dataset_info``.
DATASET_FLAGS = {
    "dataset": str, "data_root": str, "image_size?": SIZE, "domain?": str, "classes?": str, "name?": str,
}  # fmt: skip


def dataset_flags(flags: dict[str, Any]) -> list[Any]:
    """Returns the arguments of ``dataset_info`` after its table, from a run's flags; None where a flag is unset."""
    return [flags.get(name.rstrip("?")) for name in DATASET_FLAGS]


def flags_of(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Returns the flags of a run from its args.json, after a check of those in ``wanted``, a schema."""
    file = folder / "args.json"
    args = read_json(file)
    require(args, {"args": wanted}, str(file))
    return args["args"]


def bank_stages(folder: Path, init_bank: str | None) -> list[tuple[Any, str]]:
    """The (bank, stage) pairs whose images a run's student learnt from: the initial images, then those of its own rounds.

    Args:
        init_bank: the run's --init_bank. Of that bank the student saw the initial images alone, not those of its rounds.
    """
    from engine.data.image_bank import find_bank, open_bank
    from engine.loops.session import INITIAL

    own = folder / "bank"
    initial = find_bank(Path(init_bank)) if init_bank else own
    places = [
        (path, stages) for path, stages in ((initial, INITIAL), (own, ("distill",))) if (path / "manifest.json").exists()
    ]
    banks = [(open_bank(path), stages) for path, stages in places]
    return [(bank, stage) for bank, stages in banks for stage in stages if bank.rounds(stage)]


def pictures(folder: Path) -> dict[str, Any]:
    """Images of a run for the page, as data URIs.

    "bank": [(image, class number)], "variants": [(source, [(image, cosine, kept)])], "counts": number of images per class.
    A run without a bank has only "sheet", a picture of the last images that the student learnt from.
    """
    from engine.data.image_bank import find_bank
    from engine.data.pictures import read_picture

    args = flags_of(folder, {"init_bank?": str, "init_variants?": str}) if (folder / "args.json").exists() else {}
    stages = bank_stages(folder, args.get("init_bank"))
    if not stages:
        sheet = folder / "pictures" / "images.png"
        return {"sheet": _data_uri(read_picture(sheet), SHEET)} if sheet.exists() else {}
    classes, parts = stages[0][0].manifest.num_classes, [bank.read(stage) for bank, stage in stages]
    first = parts[0]  # the initial images, the sources of the variants; if there are none, the rounds' images
    order = first["labels"].argsort(stable=True)
    chosen = order[:: max(1, len(order) // SHOWN)][:SHOWN].tolist()
    shown = [(_data_uri(first["images"][[k]][0]), int(first["labels"][k])) for k in chosen]
    counts = sum(part["labels"].bincount(minlength=classes) for part in parts).tolist()
    place = find_bank(Path(args.get("init_variants") or folder), "variants")
    return {"bank": shown, "counts": counts, "variants": _variants(folder, place, first)}


def _variants(folder: Path, place: Path, sources: dict[str, Any]) -> list[tuple[str, list[tuple[str, float, bool]]]]:
    """Some sources with their variants in ``place``, and whether the run in ``folder`` kept each variant."""
    from engine.data.image_bank import open_bank
    from engine.loops.makers import SCORES
    from engine.runtime.tensors import load_tensors

    decided = sorted(folder.glob("filter_*.safetensors"))
    if not (place / "manifest.json").exists() or not decided:
        return []
    columns = open_bank(place).read("augment")
    filtered = load_tensors(decided[0])
    require(filtered, {name: SCORES[name] for name in ("cosine", "keep")}, str(decided[0]))
    index, total = columns["source_index"], len(sources["labels"])
    if len(filtered["keep"]) != len(index) or int(index.max()) >= total:
        return []
    rows = []
    for source in range(0, total, max(1, total // SOURCES)):
        of_it = (index == source).nonzero().flatten().tolist()[:VARIANTS]
        varied = [
            (_data_uri(columns["images"][[k]][0]), float(filtered["cosine"][k]), bool(filtered["keep"][k])) for k in of_it
        ]
        rows.append((_data_uri(sources["images"][[source]][0]), varied))
    return rows[:SOURCES]


def _data_uri(image, limit: int = PIXELS) -> str:
    """Encodes an image (3, H, W) uint8 as PNG; an image with a side above ``limit`` px is shrunk to that size, as JPEG."""
    from PIL import Image

    picture, data = Image.fromarray(image.permute(1, 2, 0).numpy()), io.BytesIO()
    shrunk = max(picture.size) > limit
    picture.thumbnail((limit, limit))
    picture.save(data, **({"format": "JPEG", "quality": 80} if shrunk else {"format": "PNG", "optimize": True}))
    kind = "jpeg" if shrunk else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def confusion(folder: Path) -> dict[str, Any] | None:
    """Predictions of teacher and student on the test set, from confusion.json; None if there is no such file.

    "agreement": % of the images on which the two agree. "tables": [(name of the rows, (C, C) counts)], only for up to
    ``MOST_CLASSES`` classes. "pairs": the ten most frequent disagreements, (teacher's class, student's class, count).
    """
    file = folder / "confusion.json"
    if not file.exists():
        return None
    found = read_json(file)
    require(found, {"class_names?": [str], "teacher_student": [[COUNT]], "label_student": [[COUNT]]}, str(file))
    counts = found["teacher_student"]
    classes = range(len(counts))
    tables = (counts, found["label_student"])
    square = all(len(table) == len(counts) and all(len(row) == len(counts) for row in table) for table in tables)
    if not square or len(found.get("class_names") or counts) != len(counts) or not sum(map(sum, counts)):
        raise UserError(
            f"{file} does not have two confusion matrices with a row and a column per class; restore it from a copy"
        )
    names = found.get("class_names") or [str(k) for k in classes]
    pairs = sorted(((counts[i][k], i, k) for i in classes for k in classes if i != k and counts[i][k]), reverse=True)[:10]
    tables = [("teacher", counts), ("label", found["label_student"])] if len(counts) <= MOST_CLASSES else []
    return {
        "names": names,
        "agreement": 100 * sum(counts[k][k] for k in classes) / sum(map(sum, counts)),
        "images": sum(map(sum, counts)),
        "tables": tables,
        "pairs": [(names[i], names[k], count) for count, i, k in pairs],
    }
