"""What a run folder has to show: its metrics with their times, its images, the classes of them, teacher against student."""

import base64
import io
from pathlib import Path
from typing import Any

from engine.runtime.errors import UserError
from engine.runtime.files import read_json
from engine.runtime.run import METRICS, TIMES, read_lines
from engine.runtime.schema import COUNT, require

SHOWN, SOURCES, VARIANTS = 30, 8, 4  # images of a bank; sources of variants, and of each so many
PIXELS = 96  # px an image has at most in the page
SHEET = 720  # the same for a whole sheet of them
MOST_CLASSES = 20  # of which a table of all pairs can be read


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, with "minutes" and "cpu_minutes" since the run began where times.jsonl has them."""
    names = {"seconds": "minutes", "cpu_seconds": "cpu_minutes"}
    times = {
        (line["stage"], line["round"]): {names[name]: round(line[name] / 60, 4) for name in names if name in line}
        for line in read_lines(folder / TIMES)
    }
    return [line | times.get((line["stage"], line["round"]), {}) for line in read_lines(folder / METRICS)]


def pictures(folder: Path) -> dict[str, Any]:
    """ "bank": [(image, class number)], "variants": [(source, [(image, cosine, kept)])], "counts": of each class.

    Where there is no bank of its own, "sheet": the last images that the student learnt from. Images are data URIs.
    """
    from engine.data.bank import ImageBank, find_bank, read_manifest
    from engine.loops.session import INITIAL

    args = read_json(folder / "args.json") if (folder / "args.json").exists() else {"args": {}}
    require(args, {"args": {"init_bank?": str, "init_variants?": str}}, str(folder / "args.json"))
    args = args["args"]
    places = [folder / "bank", *([find_bank(Path(args["init_bank"]))] if args.get("init_bank") else [])]
    banks = [ImageBank(p, read_manifest(p), create=False) for p in reversed(places) if (p / "manifest.json").exists()]
    stages = [(bank, stage) for stage in (*INITIAL, "distill") for bank in banks if bank.rounds(stage)]
    parts = [bank.read(stage) for bank, stage in stages]
    if not parts:
        sheet = folder / "pictures" / "images.png"
        return {"sheet": _sheet(sheet)} if sheet.exists() else {}
    classes = banks[0].manifest.num_classes
    first = parts[0]  # the initial images, of which the variants are; the rounds' where there are none
    order = first["labels"].argsort(stable=True)
    chosen = order[:: max(1, len(order) // SHOWN)][:SHOWN].tolist()
    shown = [(_data_uri(first["images"][[k]][0]), int(first["labels"][k])) for k in chosen]
    counts = sum(part["labels"].bincount(minlength=classes) for part in parts).tolist()
    place = find_bank(Path(args.get("init_variants") or folder), "variants")
    return {"bank": shown, "counts": counts, "variants": _variants(folder, place, first)}


def _variants(folder: Path, place: Path, sources: dict[str, Any]) -> list[tuple[str, list[tuple[str, float, bool]]]]:
    """Some sources with their variants in ``place``; the run in ``folder`` has decided which to keep."""
    from engine.data.bank import ImageBank, read_manifest
    from engine.loops.augment import SCORES
    from engine.runtime.files import load_tensors

    decided = sorted(folder.glob("filter_*.safetensors"))
    if not (place / "manifest.json").exists() or not decided:
        return []
    columns = ImageBank(place, read_manifest(place), create=False).read("augment")
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


def _data_uri(image) -> str:
    """(3, H, W) uint8, as PNG; larger ones than ``PIXELS`` shrunk to it, as JPEG."""
    from PIL import Image

    return _encode(Image.fromarray(image.permute(1, 2, 0).numpy()), PIXELS)


def _sheet(file: Path) -> str:
    from PIL import Image

    return _encode(Image.open(file).convert("RGB"), SHEET)


def _encode(picture, limit: int) -> str:
    data = io.BytesIO()
    shrunk = max(picture.size) > limit
    picture.thumbnail((limit, limit))
    picture.save(data, **({"format": "JPEG", "quality": 80} if shrunk else {"format": "PNG", "optimize": True}))
    kind = "jpeg" if shrunk else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def confusion(folder: Path) -> dict[str, Any] | None:
    """Teacher against student on the test set, from confusion.json: "agreement" in %, and what they disagree about.

    "tables": [(who stands in the rows, (C, C) counts)] up to ``MOST_CLASSES``; of more classes "pairs" alone, the ten most
    frequent ones: (the teacher's class, the student's, how often).
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
        raise UserError(f"{file} does not hold two tables of as many rows and columns as classes; restore it from a copy")
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
