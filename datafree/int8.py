"""Static int8 quantization of a teacher, calibrated without real data: another use of an image bank.

    python -m datafree.int8 --dataset digits --teacher resnet20 --teacher_ckpt TEACHER --bank RUN --output teacher_int8.onnx

The teacher is exported as an ONNX graph with its normalization. onnxruntime's static quantizer (QDQ, MinMax ranges of the
activations, per-channel weights) is calibrated on images of three kinds: uniform noise, the bank, and the real training set, if
there is one. The number of images is the same for each kind. Weights have 8 bits in one graph and 4 bits in another;
activations have 8 bits. The accuracy of each graph on the test split is one result line.
"""

import argparse
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.data.datasets import dataset_info
from engine.data.image_bank import find_bank, open_bank, read_manifest
from engine.data.splits import load_split
from engine.loops.measures import evaluate
from engine.networks.build import load_teacher, short_name
from engine.report.results import PERCENT
from engine.report.tables import markdown, replace_table, with_markers
from engine.runtime.errors import UserError, run_command
from engine.runtime.files import atomic_path, parse_json
from engine.runtime.flags import Parser, numbers
from engine.runtime.processes import seed_position
from engine.runtime.run import progress
from engine.runtime.schema import COUNT, require
from engine.runtime.tensors import weights_digest
from registry import DATASETS, MODELS

BATCH = 100
BITS = {8: "QInt8", 4: "QInt4"}  # bits of the weights: onnxruntime's name for the type
CLOSE = 1e-3  # largest difference between the logits of PyTorch and of the graph
LINE = {
    "dataset": str, "teacher": str, "teacher_digest": str, "calibration": str, "method?": str, "external_prior?": str, "images": COUNT,
    "test_images": COUNT, "weight_bits": COUNT, "seed": int, "acc1": PERCENT, "acc1_fp32": PERCENT,
}  # fmt: skip
KINDS = ("random noise", "bank", "real images")
KEY = (
    "dataset", "teacher_digest", "calibration", "method", "external_prior", "images", "test_images", "weight_bits", "seed",
)  # fmt: skip


def export_onnx(classifier: torch.nn.Module, file: Path) -> None:
    """Writes a classifier as an ONNX graph: "images" (B, 3, S, S) float32 in [0, 1] -> "logits" (B, C), any B."""
    size = classifier.image_size
    with warnings.catch_warnings():  # about the older exporter, which needs only torch and onnx
        warnings.simplefilter("ignore")
        torch.onnx.export(
            classifier.cpu().eval().to(memory_format=torch.contiguous_format),
            (torch.zeros(2, 3, size, size),),
            str(file),
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )


def quantize(source: Path, target: Path, images: np.ndarray, bits: int) -> None:
    """Writes a quantized copy of an ONNX graph, with activations of 8 bits.

    Args:
        source: file of the graph.
        target: file to write.
        images: images for the calibration of the activation ranges, (N, 3, S, S) float32 in [0, 1].
        bits: bits of the weights, 8 or 4.
    """
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = iter(np.array_split(images, -(-len(images) // BATCH)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    prepared = target.with_suffix(".prepared.onnx")
    quantization.shape_inference.quant_pre_process(str(source), str(prepared))
    quantization.quantize_static(
        str(prepared),
        str(target),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        weight_type=getattr(quantization.QuantType, BITS[bits]),
        calibrate_method=quantization.CalibrationMethod.MinMax,
    )


class Graph:
    """An ONNX graph with the interface that ``evaluate`` needs: images (B, 3, S, S) in [0, 1] -> logits (B, C)."""

    def __init__(self, file: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.session.run(["logits"], {"images": images.contiguous().numpy()})[0])

    def modules(self) -> Iterator[torch.nn.Module]:
        """Yields no modules, because a graph has no training mode."""
        return iter(())

    def eval(self) -> "Graph":
        return self


class Part:
    """A subset of a split, with the interface that ``evaluate`` needs."""

    def __init__(self, split, order: torch.Tensor):
        self.split, self.order, self.num_classes = split, order, split.num_classes

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self.split.batches(batch_size, self.order)


def calibration_images(args: argparse.Namespace, info) -> dict[str, tuple[np.ndarray, dict[str, str]]]:
    """The same number of calibration images of each kind. Real images are left out if they cannot be opened.

    Returns:
        {kind: (images (N, 3, S, S) float32 in [0, 1], further entries of the result line)}.
    """
    bank = open_bank(find_bank(args.bank))
    made, real = bank.read_all()["images"], None
    try:
        real = load_split(info, "train", "cpu")
    except UserError as error:
        print(f"real images are left out of the comparison: {error}")
    count = min(args.images, len(made), len(made if real is None else real))
    if count < 1:
        raise UserError(f"{bank.path} is empty; give a bank with images")
    seed_position(args.seed, "calibration")
    noise = torch.rand(count, 3, info.image_size, info.image_size)
    chosen = torch.randperm(len(made))[:count]
    manifest = bank.manifest
    about = {"method": manifest.method, "external_prior": manifest.external_prior}
    noisy, banked, real_ones = KINDS
    kinds = {noisy: (noise.numpy(), {}), banked: ((made[chosen].float() / 255).numpy(), about)}
    if real is not None:
        pictures, _ = next(real.batches(count, torch.randperm(len(real))[:count]))
        kinds[real_ones] = pictures.contiguous().numpy(), {}
    return kinds


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures all quantized graphs; returns one result line for each kind of calibration images and each number of bits.

    Raises:
        UserError: the bank was made with another teacher, or the graph's logits differ from the teacher's.
    """
    info = dataset_info(DATASETS, args.dataset, args.data_root, args.image_size)
    device = torch.device("cpu")
    teacher = load_teacher(MODELS, args.teacher, info, device, args.teacher_ckpt, args.teacher_mean, args.teacher_std)
    digest, manifest = weights_digest(teacher.network.state_dict()), read_manifest(find_bank(args.bank))
    if manifest.teacher_digest not in (None, digest) or manifest.image_size != info.image_size:
        raise UserError(
            f"{args.bank} was made with the teacher {manifest.teacher} (weights {manifest.teacher_digest}) at "
            f"{manifest.image_size} px, but --teacher has weights {digest} and {info.image_size} px; give a bank of this "
            "teacher and size"
        )
    test = load_split(info, "test", "cpu")
    seed_position(args.seed, "test")
    test = Part(test, torch.randperm(len(test))[: args.test_images])
    common = {"dataset": info.name, "teacher": short_name(args.teacher), "teacher_digest": digest, "seed": args.seed}
    kinds, lines = calibration_images(args, info), []
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "teacher.onnx")
        images, _ = next(test.batches(64))
        with torch.no_grad():
            wanted = teacher(images)
        export_onnx(teacher, whole)
        graph = Graph(whole)
        difference = float((graph(images) - wanted).abs().max())
        print(
            f"{args.teacher} as ONNX: logits of {len(images)} test images differ by at most {difference:.1e} from PyTorch's"
        )
        if difference > CLOSE:
            raise UserError(
                f"the logits of the ONNX graph differ from PyTorch's by {difference:.1e}, at most {CLOSE:g} wanted; give "
                "another --teacher"
            )
        common |= {"acc1_fp32": evaluate(graph, test)["acc1"], "test_images": len(test)}
        bar = progress(len(kinds) * len(BITS), "quantize", "graph")
        for kind, (chosen, about) in kinds.items():
            for bits in BITS:
                target = Path(folder, f"{bits}.onnx")
                quantize(whole, target, chosen, bits)
                found = {"calibration": kind, **about, "images": len(chosen), "weight_bits": bits}
                lines.append(common | found | {"acc1": evaluate(Graph(target), test)["acc1"]})
                if args.output and (kind, bits) == (KINDS[1], 8):
                    with atomic_path(args.output) as temporary:
                        shutil.copyfile(target, temporary)
                bar.update()
        bar.close()
    return lines


def write_lines(file: Path, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds result lines to a file and returns all lines of the file; a line replaces one with the same conditions."""

    def key(line: dict[str, Any]) -> str:
        return json.dumps([line.get(name) for name in KEY])

    known = {key(line): line for line in read_lines(file)} | {key(line): line for line in lines}
    with atomic_path(file) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in known.values()))
    return list(known.values())


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The result lines of a file; an empty list if the file does not exist.

    Raises:
        UserError: a line is not a result line.
    """
    lines = []
    for number, text in enumerate(file.read_text(errors="replace").splitlines() if file.exists() else [], start=1):
        try:
            found = parse_json(text)
        except ValueError:
            found = None
        advice = "give a file that python -m datafree.int8 wrote"
        require(found, LINE, f"line {number} of {file}", advice)
        if found["calibration"] not in KINDS:
            raise UserError(f"line {number} of {file} has another calibration than {', '.join(KINDS)}; {advice}")
        lines.append(found)
    return lines


def rows(lines: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The rows of the table, one for each teacher and number of bits; each kind of calibration images has a column."""
    found: dict[tuple, dict[str, str]] = {}
    for line in lines:
        made = line.get("method", "")
        same = ("dataset", "teacher", "teacher_digest", "images", "test_images", "seed")
        key = *(line[name] for name in same), line["weight_bits"]
        row = found.setdefault(
            key,
            {
                "dataset": line["dataset"],
                "teacher": line["teacher"],
                "float32": f"{line['acc1_fp32']:.2f}",
                "weights": f"{line['weight_bits']} bit",
                **dict.fromkeys(KINDS, ""),
                "images": str(line["images"]),
                "seed": str(line["seed"]),
                "test images": str(line["test_images"]),
            },
        )
        row[line["calibration"]] = f"{line['acc1']:.2f}" + (f" ({made})" if made else "")
    return [found[key] for key in sorted(found, key=lambda k: (k[0] != "digits", *map(str, k[:-1]), -k[-1]))]


def main() -> None:
    parser = Parser(prog="python -m datafree.int8", description="Static int8 quantization, calibrated on an image bank.")
    parser.add_argument(
        "--dataset",
        required=True,
        help="dataset, as in datafree_kd.py; its test split and, if there is one, its training split are opened",
    )
    parser.add_argument("--data_root", default="data", help="folder of the dataset [data]")
    parser.add_argument("--image_size", type=int, least=1, most=4096, help="image size in px; unset: the dataset's own")
    parser.add_argument("--teacher", required=True, help="teacher, a network as in datafree_kd.py")
    parser.add_argument("--teacher_ckpt", help="checkpoint of the teacher; unset: the file that datafree_kd.py would use")
    parser.add_argument(
        "--teacher_mean",
        type=numbers,
        help="r,g,b, mean of the teacher's normalization; unset: that of its checkpoint, else the dataset's",
    )
    parser.add_argument(
        "--teacher_std",
        type=numbers,
        above=0,
        help="r,g,b, std of the teacher's normalization; unset: that of its checkpoint, else the dataset's",
    )
    parser.add_argument("--bank", type=Path, required=True, help="image bank made with this teacher, or its run folder")
    parser.add_argument(
        "--images", type=int, least=1, default=500, help="largest number of calibration images of each kind [500]"
    )
    parser.add_argument("--test_images", type=int, least=1, help="number of random test images to measure on; unset: all")
    parser.add_argument(
        "--seed", type=int, least=0, default=0, help="seed of the noise and of the random choice of images [0]"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.onnx",
        help="write the graph with 8-bit weights, calibrated on the bank: images (B, 3, S, S) in [0, 1] -> logits",
    )
    parser.add_argument("--lines", type=Path, metavar="FILE.jsonl", help="add the results to this file")
    parser.add_argument("--into", type=Path, help="Markdown file whose table 'int8' is rewritten")
    args = parser.parse_args()
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; install requirements.txt") from None
    # Before the measurements, so that these are not lost for a wrong file:
    if args.lines:
        read_lines(args.lines)
    if args.into:
        with_markers(args.into, "int8")
    if args.output and args.output.exists():  # an .onnx file of any origin cannot be told from one of this command
        raise UserError(f"--output {args.output} exists already, a new file wanted; give another name")
    lines = measure(args)
    table = rows(write_lines(args.lines, lines) if args.lines else lines)
    print(markdown(table))
    if args.output:
        print(f"graph with 8-bit weights, calibrated on the bank -> {args.output}")
    if args.into:
        replace_table(args.into, "int8", markdown(table))


if __name__ == "__main__":
    run_command(main)
