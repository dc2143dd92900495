"""SHA-256 checksums of a run's files, in a list beside the files, so that damaged and lost files are detected.

A folder with a ``sha256.txt`` has, for every file matching ``SUMMED`` that is written into it, a line as ``sha256sum``
writes it. The line is written before the file. Thus the present file is always on the list, even if the writer is killed. A
file that was written several times has a line for each of its contents, and any of them is valid. Lines are only appended. A
line with a checksum of zeros means that the file was deleted on purpose. A file without a line, from an earlier version or
added by a user, is not checked.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from engine.runtime.errors import UserError

LIST = "sha256.txt"
SUMMED = re.compile(r".+\.(pth|safetensors)|(manifest|result|confusion)\.json")  # names of the files that are read again
DELETED = "0" * 64  # instead of a digest: the file was deleted on purpose
LINE = re.compile(r"([0-9a-f]{64})  (.+)\n")

_lists: dict[Path, tuple[tuple, dict[str, set[str]]]] = {}  # {folder: (state of the list on disk, {name: digests})}
_checked: set[tuple] = set()  # states on disk of files that this process has checked or written


def keep(folder: Path) -> None:
    """Starts a list of checksums in a folder, which is created if missing. An existing list is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LIST).touch()


def listed(folder: Path) -> dict[str, set[str]]:
    """Returns {name: digests of all contents that the file has had}; {} for a folder without a list."""
    file = folder / LIST
    try:
        state = _state(file)
    except OSError:
        return {}
    if _lists.get(folder, (None,))[0] != state:
        found: dict[str, set[str]] = {}
        for digest, name in LINE.findall(file.read_text(errors="replace")):
            _enter(found, digest, name)
        _lists[folder] = state, found
    return _lists[folder][1]


def note(path: Path, temporary: Path) -> None:
    """Adds the digest of ``temporary`` to the folder's list, if any. Call it before renaming the file to ``path``."""
    if not SUMMED.fullmatch(path.name) or not (path.parent / LIST).is_file():
        return
    digest = digest_of(temporary)
    if digest not in listed(path.parent).get(path.name, ()):
        _append(path.parent, digest, [path.name])
    _checked.add((str(path), *_state(temporary)))


def forget(files: Iterable[Path]) -> None:
    """Records on the lists of their folders that files were deleted on purpose."""
    by_folder: dict[Path, list[str]] = {}
    for file in files:
        if file.name in listed(file.parent):
            by_folder.setdefault(file.parent, []).append(file.name)
    for folder, names in by_folder.items():
        _append(folder, DELETED, names)


def check(path: Path) -> None:
    """Compares a file with the list of its folder. Each process checks a file once, and again if it changes.

    Raises:
        UserError: the file is on the list, but its contents are not.
        OSError: the file cannot be read.
    """
    path = Path(path)
    digests = listed(path.parent).get(path.name)
    if digests and (state := (str(path), *_state(path))) not in _checked:
        if digest_of(path) not in digests:
            raise UserError(
                f"{path} is damaged: its SHA-256 is not the one in {path.parent / LIST}; restore it from a copy, or make it again"
            )
        _checked.add(state)


def require(path: Path, digest: str | None) -> None:
    """Raises a UserError unless a file has this digest; None: unknown, no check."""
    if digest and (state := (str(path), *_state(path))) not in _checked:
        if digest_of(path) != digest:
            raise UserError(
                f"{path} has changed since its run wrote it: its SHA-256 differs; restore it from a copy, or train again "
                "with --redo"
            )
        _checked.add(state)


def missing(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Returns the files found by ``matching`` that do not exist."""
    return [file for file in matching(folder, patterns) if not file.exists()]


def present(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Returns the files found by ``matching`` that exist."""
    return [file for file in matching(folder, patterns) if file.exists()]


def matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Returns the listed files of a folder and its subfolders that match a pattern ("student.pth", "bank/distill-*")."""
    places = [((folder / pattern).parent, Path(pattern).name) for pattern in patterns]
    return [parent / known for parent, name in places for known in listed(parent) if fnmatch(known, name)]


def _append(folder: Path, digest: str, names: list[str]) -> None:
    known = listed(folder)
    with open(folder / LIST, "r+b") as opened:
        torn = opened.seek(0, os.SEEK_END) and (opened.seek(-1, os.SEEK_END), opened.read(1))[1] != b"\n"  # by a kill
        opened.write(b"\n" * bool(torn) + "".join(f"{digest}  {name}\n" for name in names).encode())
        opened.flush()
        os.fsync(opened.fileno())
    for name in names:
        _enter(known, digest, name)
    _lists[folder] = _state(folder / LIST), known


def _enter(known: dict[str, set[str]], digest: str, name: str) -> None:
    if digest == DELETED:
        known.pop(name, None)
    else:
        known.setdefault(name, set()).add(digest)


def _state(file: Path) -> tuple[int, int, int]:
    state = file.stat()
    return state.st_ino, state.st_mtime_ns, state.st_size


def digest_of(file: Path) -> str:
    """Returns the SHA-256 of a file in hex digits."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
