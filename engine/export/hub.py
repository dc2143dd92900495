"""An exported folder on the Hugging Face hub."""

import re
from pathlib import Path

from engine.networks.weights import first_line
from engine.runtime.errors import UserError


def check_name(repository: str) -> None:
    """Raises a UserError unless this is ORG/NAME."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"--push_to_hub {repository}: wanted ORG/NAME")


def push(folder: Path, repository: str) -> str:
    """Uploads a folder to a repository, which is made if it is missing; returns its address.

    Raises:
        UserError: there is no network, or the hub refuses.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Upload a distilled student")
    except Exception as error:  # the hub's own types and those of its HTTP client
        raise UserError(
            f"--push_to_hub {repository}: the hub cannot be written ({first_line(error)}); {folder} is whole: where there is a "
            f"network and a login (hf auth login), run hf upload {repository} {folder}"
        ) from None
    return str(address)
