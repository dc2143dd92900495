"""SHA-256 of what a run writes, in a list beside the files: a flipped bit or a lost file is noticed, not taken.

A folder with a ``sha256.txt`` keeps, for every file of ``SUMMED`` that is written into it, a line as ``sha256sum`` writes it.
The line comes before the file, so that whenever the writer is killed the file that is there is on the list; a file has as
many lines as contents, and any of them is right. The list is only added to; a line of zeros stands for a deleted file.
A file without a line, of an earlier version or put there by its user, is taken as it is.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from engine.runtime.errors import UserError

LIST = "sha256.txt"
SUMMED = re.compile(r".+\.(pth|safetensors)|(manifest|result|confusion)\.json")  # what is read again
DELETED = "0" * 64  # in place of a digest: the file was deleted on purpose
LINE = re.compile(r"([0-9a-f]{64})  (.+)\n")

_lists: dict[Path, tuple[tuple, dict[str, set[str]]]] = {}  # folder -> (the list's state on disk, {name: digests})
_checked: set[tuple] = set()  # states on disk of files that were found to be right, or written, by this process


def keep(folder: Path) -> None:
    """From now on a folder, made if it is missing, has such a list."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LIST).touch()


def listed(folder: Path) -> dict[str, set[str]]:
    """{name: the digests of its contents so far}; {} without a list."""
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
    """Before ``temporary`` becomes ``path``: its digest goes on the folder's list, if there is one."""
    if not SUMMED.fullmatch(path.name) or not (path.parent / LIST).is_file():
        return
    digest = digest_of(temporary)
    if digest not in listed(path.parent).get(path.name, ()):
        _append(path.parent, digest, [path.name])
    _checked.add((str(path), *_state(temporary)))


def forget(files: Iterable[Path]) -> None:
    """Takes files that were deleted on purpose off their lists."""
    by_folder: dict[Path, list[str]] = {}
    for file in files:
        if file.name in listed(file.parent):
            by_folder.setdefault(file.parent, []).append(file.name)
    for folder, names in by_folder.items():
        _append(folder, DELETED, names)


def check(path: Path) -> None:
    """Compares a file with its folder's list, once a process unless it changes.

    Raises:
        UserError: it is on the list with other contents.
        OSError: it cannot be read.
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
    """Raises a UserError unless a file has this digest; None: that is not known."""
    if digest and (state := (str(path), *_state(path))) not in _checked:
        if digest_of(path) != digest:
            raise UserError(
                f"{path} is not what its run has written: its SHA-256 is another; restore it, or train again with --redo"
            )
        _checked.add(state)


def missing(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Files that ``matching`` finds, and that are gone."""
    return [file for file in matching(folder, patterns) if not file.exists()]


def present(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Files that ``matching`` finds, and that are there."""
    return [file for file in matching(folder, patterns) if file.exists()]


def matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Files on the lists of a folder and of those in it that match a pattern ("student.pth", "bank/distill-*")."""
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
    """The SHA-256 of a file in hex digits."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
