"""Pretrained models of a hub or a directory: how they are named, loaded, and refused in one line."""

import errno
import socket
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from engine.runtime.errors import UserError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def diffusion_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """That of ``--diffusion_dtype``; None: half precision on a GPU, else single."""
    return DTYPES[name or ("fp16" if device.type == "cuda" else "fp32")]


def prior_name(model_id: str, revision: str | None = None) -> str:
    """``"<model id>[@revision]"`` for the results table; the last part of a local directory or file, without revision."""
    path = Path(model_id)
    if path.suffix == ".safetensors":
        return path.stem
    return path.resolve().name if path.is_dir() else f"{model_id}@{revision}" if revision else model_id


def notice_missing_network() -> None:
    """Tells the hub's client to keep to its cache where the hub's name does not resolve: five retries cost 23 s otherwise."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():  # a proxy resolves names itself
        return
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


@contextmanager
def hub_errors(model_id: str, revision: str | None, flag: str) -> Iterator[None]:
    """Turns what a hub or a model directory can refuse into one line that says how to get the model.

    Args:
        model_id: a hub id, or a directory.
        revision: of the hub id.
        flag: the flag that takes the id, e.g. ``"--diffusion_model"``.
    Raises:
        UserError: within the block, the model was not found, not reachable or not complete.
    """
    from httpx import HTTPError

    if not Path(model_id).is_dir():
        notice_missing_network()
    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        if Path(model_id).is_dir():
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"{flag} {model_id}: this directory is no whole model of the wanted kind ({reason})") from error
        at = f" --revision {revision}" if revision else ""
        raise UserError(
            f"{flag} {model_id}: neither a directory here nor a model that could be had from the hub "
            f"({type(error).__name__}); where there is a network, run 'hf download {model_id}{at} --local-dir DIR' "
            f"(older: huggingface-cli download), then give {flag} DIR"
        ) from error


def quiet_libraries() -> None:
    """No bars and no advice from diffusers and transformers, which speak at every batch; hub downloads keep their bar."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # of one library, for another's sake
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def pipeline_config(model_id: str, revision: str | None, kinds: Iterable[str], flag: str = "--diffusion_model") -> dict:
    """The configuration of a pretrained pipeline, for which no weights are fetched; see ``load_pipeline``.

    Args:
        kinds: names of the pipelines that will do.
    Raises:
        UserError: the model cannot be had, or is of another kind.
    """
    import diffusers

    quiet_libraries()
    revision = None if Path(model_id).is_dir() else revision
    with hub_errors(model_id, revision, flag):
        config = diffusers.DiffusionPipeline.load_config(model_id, revision=revision)
    found = config.get("_class_name")
    if found not in kinds:
        raise UserError(f"{flag} {model_id} holds a {found or 'model without pipeline'}; wanted: {' or '.join(kinds)}")
    return config


def load_pipeline(
    model_id: str,
    revision: str | None,
    cls: str | dict[str, str],
    dtype: torch.dtype,
    device: torch.device | str,
    flag: str = "--diffusion_model",
) -> Any:
    """A pretrained diffusers pipeline, quiet and ready to sample.

    The safety checker is left out: the images are variations of 32-pixel inversions, made to train a network and shown to
    nobody, and what it does on a false alarm is to put a black image in the transfer set without a word. So is the
    invisible watermark, which would be trained on.

    Args:
        model_id: hub id, or a directory written by ``save_pretrained``.
        revision: branch, tag or commit on the hub; of no meaning for a directory.
        cls: name in ``diffusers`` of the wanted pipeline, or {found: loaded} where several kinds of model can be loaded.
        flag: the flag that takes the id, for the errors.
    Raises:
        UserError: the model cannot be had, or is of another kind. The kind is checked before any weights are fetched.
    """
    import diffusers

    kinds = {cls: cls} if isinstance(cls, str) else cls
    revision = None if Path(model_id).is_dir() else revision
    config = pipeline_config(model_id, revision, kinds, flag)
    found = config["_class_name"]
    no_checker = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in config else {}
    with hub_errors(model_id, revision, flag):
        pipeline = getattr(diffusers, kinds[found]).from_pretrained(model_id, revision=revision, dtype=dtype, **no_checker)
    if getattr(pipeline, "watermark", None) is not None:
        pipeline.watermark = None
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "vae", None) is not None:
        pipeline.vae.enable_slicing()  # decoding is where the memory goes; a slice is one image
    return pipeline.to(device)
