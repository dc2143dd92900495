"""A student as an ONNX file that normalizes its images itself, checked against PyTorch."""

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.data.bank import ImageBank, find_bank, read_manifest
from engine.networks.trained import Trained
from engine.runtime.errors import UserError

CHECKED = 64  # images
TOLERANCE = 1e-3  # largest difference of a logit


class Normalizing(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> logits (B, C)."""

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def images_of_run(run: Path, image_size: int) -> tuple[Tensor, str]:
    """``CHECKED`` images (N, 3, H, W) in [0, 1], and what they are: the first of the run's bank, else random pixels."""
    path = find_bank(run)
    if path != run and (path / "manifest.json").is_file():
        images = ImageBank(path, read_manifest(path), create=False).read_all()["images"]
        if len(images) >= CHECKED and images.shape[-1] == image_size:
            return images[:CHECKED].float() / 255, "of the run's bank"
    return torch.rand(CHECKED, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)), "random pixels"


def write_onnx(file: Path, student: Trained, images: Tensor) -> float:
    """Writes the file and returns the largest difference of a logit between onnxruntime and PyTorch.

    Args:
        images: (N, 3, H, W) in [0, 1].
    Raises:
        UserError: a package is missing, the network cannot be written, or the difference is above ``TOLERANCE``.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--onnx needs the package {error.name}; run pip install -r requirements.txt") from None
    model = Normalizing(student.network, student.about["mean"], student.about["std"]).eval()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (images[:2],),
                str(file),
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                external_data=False,
                verbose=False,
            )
            wanted = model(images)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        found = [torch.from_numpy(session.run(None, {"images": part.numpy()})[0]) for part in (images, images[:1])]
    except Exception as error:  # the exporter and the runtime raise types of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{student.spec} cannot be written as ONNX: {reason[:300]}; leave out --onnx") from None
    difference = max(float((part - wanted[: len(part)]).abs().max()) for part in found)
    if not difference <= TOLERANCE:
        raise UserError(
            f"the logits of model.onnx differ from PyTorch's by {difference:.2g}, at most {TOLERANCE:g} wanted; leave out --onnx"
        )
    return difference
