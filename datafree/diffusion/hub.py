"""Loads pretrained models from the Hugging Face hub or a directory, names them, and reports errors in one line."""

import socket
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from engine.runtime.errors import UserError, is_disk_full, reason_of

FLAG = "--diffusion_model"  # flag that takes the id of a pipeline
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def diffusion_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype that ``--diffusion_dtype`` names; without a name fp16 on a GPU and fp32 on the CPU."""
    return DTYPES[name or ("fp16" if device.type == "cuda" else "fp32")]


def prior_name(model_id: str, revision: str | None = None) -> str:
    """Name of a model in the results table.

    It is ``"<model id>[@revision]"`` for a hub id, and the last part of the path, without a revision, for a local directory
    or ``.safetensors`` file.
    """
    path = Path(model_id)
    if path.suffix == ".safetensors":
        return path.stem
    return path.resolve().name if path.is_dir() else f"{model_id}@{revision}" if revision else model_id


def notice_missing_network() -> None:
    """Restricts the hub's client to its cache if the hub's host name does not resolve; five retries would take 23 s."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():  # a proxy resolves names itself
        return
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


@contextmanager
def hub_errors(model_id: str, revision: str | None, flag: str) -> Iterator[None]:
    """Turns errors of a hub or a model directory inside the block into one line that says how to get the model.

    Args:
        model_id: hub id or directory.
        revision: branch, tag or commit of the hub id.
        flag: flag that takes the id, for example ``"--diffusion_model"``.
    Raises:
        UserError: the model was not found, could not be reached or is not complete.
    """
    from httpx import HTTPError

    if not Path(model_id).is_dir():
        notice_missing_network()
    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        if is_disk_full(error):
            raise
        if Path(model_id).is_dir():
            raise UserError(
                f"{flag} {model_id}: this directory is not a complete model of the required kind ({reason_of(error)}); give "
                "another one"
            ) from error
        at = f" --revision {revision}" if revision else ""
        raise UserError(
            f"{flag} {model_id}: there is no such directory, and no such model could be downloaded from the hub "
            f"({type(error).__name__}); on a machine with a network, run 'hf download {model_id}{at} --local-dir DIR' "
            f"(older versions: huggingface-cli download), then give {flag} DIR"
        ) from error


def check_model_type(model_id: str, types: Iterable[str], wanted: str, flag: str) -> None:
    """Checks from its configuration alone that a model of transformers exists and is of the right kind.

    Args:
        types: accepted types, as named in the configuration.
        wanted: the right kind, in words.
        flag: flag that takes the id, for example ``"--text_model"``.
    Raises:
        UserError: the model is missing or of another kind.
    """
    from transformers import AutoConfig

    quiet_libraries()
    with hub_errors(model_id, None, flag):
        found = AutoConfig.from_pretrained(model_id).model_type
    if found not in types:
        raise UserError(f"{flag} {model_id} is a model of type {found}, {wanted} wanted")


def quiet_libraries() -> None:
    """Turns off the progress bars and hints that diffusers and transformers print; hub downloads keep their bar."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # one library's warning about another
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def pipeline_config(model_id: str, revision: str | None, kinds: Iterable[str]) -> dict:
    """The configuration of a pretrained pipeline; no weights are downloaded. See ``load_pipeline``.

    Args:
        kinds: accepted names of pipeline classes.
    Raises:
        UserError: the model cannot be loaded, or is of another kind.
    """
    import diffusers

    quiet_libraries()
    revision = None if Path(model_id).is_dir() else revision
    with hub_errors(model_id, revision, FLAG):
        config = diffusers.DiffusionPipeline.load_config(model_id, revision=revision)
    found = config.get("_class_name")
    if found not in kinds:
        raise UserError(f"{FLAG} {model_id} is a {found or 'model without a pipeline'}, {' or '.join(kinds)} wanted")
    return config


def load_pipeline(
    model_id: str, revision: str | None, cls: str | dict[str, str], dtype: torch.dtype, device: torch.device | str
) -> Any:
    """A pretrained diffusers pipeline without progress bars, ready for sampling.

    The pipeline has no safety checker. Its images only train a network and are not shown to people. On a false alarm the
    checker would put a black image into the transfer set without a message. The invisible watermark is left out, too, since
    the student would be trained on it.

    Args:
        model_id: hub id, or a directory written by ``save_pretrained``.
        revision: branch, tag or commit on the hub; ignored for a directory.
        cls: class name of the pipeline in ``diffusers``. If several kinds of model are accepted, a dict from the class name
            in the model's configuration to the class that is loaded.
        dtype: dtype of the weights.
    Raises:
        UserError: the model cannot be loaded, or is of another kind. The kind is checked before any weights are downloaded.
    """
    import diffusers

    kinds = {cls: cls} if isinstance(cls, str) else cls
    revision = None if Path(model_id).is_dir() else revision
    config = pipeline_config(model_id, revision, kinds)
    found = config["_class_name"]
    no_checker = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in config else {}
    with hub_errors(model_id, revision, FLAG):
        pipeline = getattr(diffusers, kinds[found]).from_pretrained(model_id, revision=revision, dtype=dtype, **no_checker)
    if getattr(pipeline, "watermark", None) is not None:
        pipeline.watermark = None
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "vae", None) is not None:
        pipeline.vae.enable_slicing()  # decodes one image at a time, since decoding takes the most memory
    return pipeline.to(device)
