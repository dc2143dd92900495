"""Atomic file writes. A file is either complete or absent.

Only files of this program are deleted or replaced. Temporary files are recognized by their name pattern, which no other
program uses, and outputs by the names that the stages give them. Nothing is ever deleted through a symbolic link.
"""

import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.runtime import checksums
from engine.runtime.errors import UserError, reason_of

PROJECT = Path(__file__).parents[2]
TEMPORARY = ".datafree_kd.tmp"  # end of the name of every file that is still being written
MARK = ".datafree_kd"  # name of the file in a claimed folder that names its owner
TEMPORARY_NAME = re.compile(rf"\..+\.[a-z0-9_]{{8}}{re.escape(TEMPORARY)}")


def shipped(path: Path | str) -> Path:
    """Returns a default path relative to the current directory if it exists, else the file of that path in this project."""
    path = Path(path)
    return path if path.exists() or not (PROJECT / path).exists() else PROJECT / path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, which is renamed to ``path`` at the end and removed after an error.

    A reader sees either the old file or the complete new one, even if the writer is killed. A link stays a link, and an
    existing file keeps its mode.

    Raises:
        UserError: ``path`` exists, but is no regular file or is read-only.
    """
    path = Path(path)
    target = path.resolve() if path.is_symlink() else path
    mode = _mode(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=TEMPORARY, dir=target.parent)
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        checksums.note(path, temporary)
        os.replace(temporary, target)
    except OSError as error:
        if error.filename is None or str(error.filename).endswith(TEMPORARY):
            error.filename = str(path)
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _mode(file: Path) -> int:
    """Mode of a file that may be replaced; for a new file, the one that the umask gives."""
    if not file.exists():
        return 0o666 & ~_umask()
    if not file.is_file():
        raise UserError(f"{file} is {'a folder' if file.is_dir() else 'not a regular file'}; give the name of a file")
    mode = stat.S_IMODE(file.stat().st_mode)
    if not mode & 0o222 or not os.access(file, os.W_OK):
        raise UserError(f"{file} is read-only, and was not replaced; make it writable (chmod u+w), or give another file")
    return mode


def require_output(flag: str, path: Path, suffixes: tuple[str, ...], fields: tuple[str, ...] = ()) -> None:
    """Checks that a command may write its output to ``path``: a new file, or an existing one of the same kind.

    Args:
        flag: flag that gives the path, for the error message.
        suffixes: suffixes of the files that may be replaced.
        fields: fields that a JSON file must have, so that it may be replaced.
    Raises:
        UserError: the file may not be replaced, or its name is that of a file of the run in that folder.
    """
    if checksums.SUMMED.fullmatch(path.name) and (path.parent / checksums.LIST).is_file():
        raise UserError(f"{flag} {path} is the name of a file of the run in that folder; give another name")
    if path.exists():
        found = json_object(path) if fields else {}
        if path.suffix.lower() not in suffixes or not set(fields) <= found.keys():
            raise UserError(
                f"{flag} {path} exists and was not written by this command; give a new name that ends in {suffixes[0]}"
            )
    _mode(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside ``path``, which is renamed to ``path`` at the end and removed after an error.

    Raises:
        UserError: ``path`` exists and is not an empty folder.
    """
    path = Path(path)
    require_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        require_new(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_new(path: Path) -> None:
    """Raises a UserError unless ``path`` is absent or an empty folder."""
    path = Path(path)
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise UserError(f"{path} exists already and is not an empty folder; give a new folder")


def is_claimed(folder: Path) -> bool:
    """Whether a folder was claimed by ``claim_folder``."""
    return (Path(folder) / MARK).is_file()


def claim_folder(folder: Path, owner: str) -> None:
    """Claims a folder for the files of one owner. The file ``MARK`` in it stores the owner, who may claim it again.

    Raises:
        UserError: the folder holds other files, or those of another owner.
    """
    mark = Path(folder) / MARK
    if not (mark.is_file() and mark.read_text() == owner):
        delete_temporaries(Path(folder))  # a mark whose write was killed
        require_new(Path(folder))
        with atomic_path(mark) as temporary:
            temporary.write_text(owner)


def is_temporary(path: Path) -> bool:
    """Whether this is a temporary file of ``atomic_path``; False for a link."""
    return TEMPORARY_NAME.fullmatch(path.name) is not None and path.is_file() and not path.is_symlink()


def delete_temporaries(folder: Path) -> None:
    """Deletes the temporary files that killed writes left directly in a folder. Does nothing if it is missing or a link."""
    if folder.is_dir() and not folder.is_symlink():
        for file in filter(is_temporary, list(folder.iterdir())):
            file.unlink(missing_ok=True)


def outputs(folder: Path, pattern: str) -> list[Path]:
    """Returns the files that a stage has written, by the pattern of its outputs.

    Args:
        folder: folder that the pattern is relative to.
        pattern: as for ``Path.glob``. In the name of a shard, "bank/distill-*.safetensors", the star stands for the six
            digits of a round, so that a user's ``distill-notes.safetensors`` is none of them.
    """
    return sorted(file for file in folder.glob(pattern.replace("-*.", f"-{'[0-9]' * 6}.")) if not file.is_dir())


def delete_files(folder: Path, patterns: list[str]) -> None:
    """Deletes files of a folder and of its subfolders, and the subfolders that become empty.

    Args:
        folder: folder that the patterns are relative to.
        patterns: patterns as for ``outputs``, for example "student.pth" or "bank/distill-*.safetensors".
    Raises:
        UserError: a file or its folder is a link; nothing is deleted then.
    """
    files = sorted({file for pattern in patterns for file in outputs(folder, pattern)})
    for path in dict.fromkeys(part for file in files for part in (file.parent, file)):
        if path.is_symlink() and path != folder:
            raise UserError(f"{path} is a link, and files behind links are never deleted; remove it by hand")
    for file in files:
        file.unlink()
    checksums.forget(files)
    for parent in {file.parent for file in files} - {folder}:
        if not any(parent.iterdir()):
            parent.rmdir()


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Writes ``value`` as JSON, atomically.

    Raises:
        UserError: a number in it is NaN or infinite; the old file is kept.
    """
    try:
        text = json.dumps(value, indent=indent, allow_nan=False)
    except ValueError as error:
        raise UserError(
            f"{path} was not written, because a number in it is NaN or infinite ({reason_of(error)}); check weights and "
            "normalization"
        ) from None
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n")


def parse_json(text: str) -> Any:
    """Parses a JSON text whose numbers are all finite.

    Raises:
        ValueError: the text is damaged or nested too deeply, or a number is NaN, infinite or has thousands of digits.
    """
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_object(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; {} if the file is missing, damaged or holds anything else."""
    try:
        value = parse_json(file.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:20]} is not finite")
    return value


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        checksums.check(path)
        return parse_json(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON ({error}); delete it, or restore it from a copy") from None
