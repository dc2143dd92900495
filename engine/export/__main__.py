"""The command ``python -m engine.export``: a run's student as a folder that needs this project no more.

python -m engine.export RUN OUT                          model.safetensors, config.json, README.md, network.py
python -m engine.export RUN OUT --onnx                   and model.onnx, checked against PyTorch
python -m engine.export RUN OUT --push_to_hub ORG/NAME   and all of it to the Hugging Face hub
"""

from pathlib import Path

from engine.export.folder import write_folder
from engine.export.hub import check_name, push
from engine.networks.trained import open_trained, weights_of_run
from engine.runtime.errors import UserError, run_command
from engine.runtime.files import atomic_folder, read_json, require_new
from engine.runtime.flags import Parser
from registry import MODELS


def main() -> None:
    parser = Parser(
        prog="python -m engine.export", description="A run's student as a folder that needs this project no more."
    )
    parser.add_argument("run", type=Path, help="run folder of datafree_kd.py or train_scratch.py")
    parser.add_argument("out", type=Path, help="new or empty folder")
    parser.add_argument(
        "--onnx", action="store_true", help="model.onnx too: images in [0, 1] in, logits out, any batch size"
    )
    parser.add_argument("--arch", metavar="NAME", help="the student's network, where its code is not of this project")
    parser.add_argument("--push_to_hub", metavar="ORG/NAME", help="upload the folder to this repository of the hub")
    args = parser.parse_args()
    require_new(args.out)
    if args.push_to_hub:
        check_name(args.push_to_hub)
    weights_of_run(args.run)
    student = open_trained(MODELS, str(args.run), arch=args.arch)
    if missing := [key for key in ("image_size", "mean", "std") if key not in student.about]:
        raise UserError(f"{student.origin} does not say its {' and '.join(missing)}; give a run of this version")
    with atomic_folder(args.out) as unfinished:
        write_folder(unfinished, MODELS, student, read_json(args.run / "result.json"))
        if args.onnx:
            from engine.export.onnx_file import images_of_run, write_onnx

            images, what = images_of_run(args.run, student.about["image_size"])
            difference = write_onnx(unfinished / "model.onnx", student, images)
            print(f"model.onnx: logits differ from PyTorch's by at most {difference:.2g} on {len(images)} images ({what})")
    print(f"{args.run} -> {args.out}: {', '.join(sorted(file.name for file in args.out.iterdir()))}")
    if args.push_to_hub:
        print(f"{args.out} -> {push(args.out, args.push_to_hub)}")


if __name__ == "__main__":
    run_command(main)
