"""The generative prior of a run that names none."""

import re
from pathlib import Path

from tqdm import tqdm

from datafree.base import Task
from datafree.diffusion.patch_unet import SHIPPED, metadata_of
from engine.runtime.processes import is_main

EMBEDDED = SHIPPED / "glyphs_digits_16.safetensors"
DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def default_prior(task: Task, embedded: Path = EMBEDDED) -> str:
    """The shipped digits prior if it has this dataset's class names and image size, else Stable Diffusion.

    If the dataset may be digits under other class names or at another size, a printed line names the shipped prior.
    """
    if embedded.exists():
        about = metadata_of(embedded)
        if about.get("image_size") == task.info.image_size and about.get("class_names") == list(task.info.class_names or ()):
            return str(embedded)
        if about.get("num_classes") == task.info.num_classes == 10 and are_digits(task.info.class_names) and is_main():
            tqdm.write(
                f"the default --diffusion_model {DEFAULT_MODEL} is used; {embedded} draws printed digits at "
                f"{about.get('image_size')} px: if classes 0 to 9 are digits, give --diffusion_model {embedded}"
            )
    return DEFAULT_MODEL


def are_digits(names: tuple[str, ...] | None) -> bool:
    """Whether ten class names mean 0 to 9 in this order ("3", "digit_3", "three"); True if there are no names."""
    if not names:
        return True
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return all(re.findall(r"\d+", name) == [str(i)] or name.lower() == words[i] for i, name in enumerate(names))
