"""Errors and exit codes: the exception for mistakes that the user can correct, and the wrapper of every entry point."""

import difflib
import errno
import importlib
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

EXIT_USER_ERROR = 2
PATIENCE = 5  # seconds; see ``follow``


class UserError(Exception):
    """A mistake that the user can correct. The message is one line: what was found, what was expected, what to do."""


class Terminated(BaseException):
    """Raised on SIGTERM. All files on disk are complete, and the same command resumes the run."""


def one_line(text: str) -> str:
    """Returns a message as one printable line; a line break in a file name, for example, becomes ``a\\nb``."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: Exception) -> str:
    """Returns the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def reason_of(error: Exception) -> str:
    """Returns the first line of an error's message, or the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def same_command() -> str:
    """Returns the words for the command that resumes a stopped run. With ``--redo`` it would begin again."""
    redo = any(word.partition("=")[0] == "--redo" for word in sys.argv[1:])
    return "the same command again" + " without --redo" * redo


def is_disk_full(error: Exception) -> bool:
    """Whether an error means that a file could not be written for lack of space."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory could not be allocated, on a GPU or on the host."""
    # "overflow" of a tensor's size; "ALLOC_FAILED" of cuBLAS and cuDNN
    words = ("out of memory", "can't allocate memory", "not enough memory", "overflow", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def explain_os_error(error: OSError) -> UserError:
    """Returns a one-line UserError for an error of the file system (full disk, no permission, not a directory)."""
    if error.errno is None:  # of Pillow, for a damaged image; its message names the file or the damage
        return UserError(f"{reason_of(error)}; restore the file from a copy, or give another")
    name = error.filename or "a file"
    if is_disk_full(error):
        return UserError(
            f"no space left while writing {name}; files written so far are complete: free some space, then run "
            f"{same_command()}"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        if os.path.exists(name) and not os.access(name, os.R_OK):
            return UserError(f"cannot read {name} ({error.strerror}); make it readable, for example with chmod u+r")
        return UserError(f"cannot write to {name} ({error.strerror}); make it writable, or give another place")
    return UserError(f"{error.strerror or error}: {name}")


def explain_unicode_error(error: UnicodeError) -> UserError:
    """Returns a one-line UserError for a file that is not text, or for a name that cannot be written as text."""
    if isinstance(error, UnicodeDecodeError):
        return UserError(
            f"a file is not {error.encoding} text (byte {error.start}: {error.reason}); give it in UTF-8, or leave it out"
        )
    name = f" '{error.object[:200]}'" if isinstance(error, UnicodeEncodeError) else ""
    return UserError(f"the name or text{name} is not valid UTF-8 ({reason_of(error)}); rename it")


def launched_rank() -> int:
    """Returns the rank of this process among those that a launcher started; 0 for the main process or without a launcher.

    Raises:
        UserError: the launcher's variables are not whole numbers.
    """
    size, rank = (os.environ.get(name, default) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    try:
        return int(rank) if int(size) > 1 else 0
    except ValueError:
        raise UserError(
            f"the environment has WORLD_SIZE '{size}' and RANK '{rank}', whole numbers wanted; unset them, or start with torchrun"
        ) from None


def follow(main: Callable[[], None]) -> None:
    """Runs ``main`` in a process other than the main one.

    If it fails, the main process usually has the same error and reports it, or has failed first. In both cases the launcher
    ends this process. The error is therefore raised only after some seconds, and only if this process is still running.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    try:
        main()
    except Exception:
        time.sleep(PATIENCE)
        raise


def end_process(code: int) -> NoReturn:
    """Ends this process with an exit code. With several processes, the interpreter is not finalized.

    A gloo thread may hold the last reference to a Python tensor, even after ``destroy_process_group``. If the reference is
    dropped while the interpreter is finalized, the process ends by abort() (SIGABRT).
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a closed pipe
            stream.flush()
    os._exit(code)


def explain(error: Exception) -> str | None:
    """Returns the message for an error that the user can correct; None for a bug in this program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return str(explain_os_error(error))
    if isinstance(error, UnicodeError):
        return str(explain_unicode_error(error))
    if is_out_of_memory(error):
        advice = "files written so far are complete: give a smaller batch, bank or image size, and run again"
        return f"not enough memory ({str(error).partition(chr(10))[0][:200]}); {advice}"
    if isinstance(error, RuntimeError) and re.search("(closed|reset) by peer", str(error)):
        return (
            f"process {launched_rank()} lost the connection to another process; see the last line of that process for the "
            "cause"
        )
    return None


def quiet_on_os_errors(args: threading.ExceptHookArgs) -> None:
    """Thread exception hook without tracebacks for OSErrors, for example of TensorBoard's writer on a full disk."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def run_command(main: Callable[[], None], leave: Callable[[], None] = lambda: None) -> None:
    """Runs ``main`` and ends the process. This is the wrapper of every entry point.

    A UserError, a file system error, a text that is not UTF-8 or a lack of memory is one line on stderr and exit code 2.
    SIGINT gives exit code 130, SIGTERM 143. If the reader of stdout has stopped, the process ends without a message, with
    exit code 141.

    Args:
        main: function to run.
        leave: function called after ``main`` if it succeeds.
    """

    def on_sigterm(signum, frame):
        raise Terminated

    def command():
        main()
        leave()

    signal.signal(signal.SIGTERM, on_sigterm)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # a shell ignores SIGINT for commands started with "&"
        signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.excepthook = quiet_on_os_errors
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as in "2>&-"
            setattr(sys, name, open(os.devnull, "w"))
    try:
        follow(command) if launched_rank() else command()
        end_process(0)
    except (KeyboardInterrupt, Terminated) as stop:
        print(f"\nstopped; all files are complete: to resume, run {same_command()}", file=sys.stderr)
        end_process(143 if isinstance(stop, Terminated) else 130)
    except BrokenPipeError:  # the reader of the output has stopped, as in "... | head"
        end_process(141)
    except Exception as error:
        if message := explain(error):
            print(one_line(f"error: {message}"), file=sys.stderr)
            end_process(EXIT_USER_ERROR)
        traceback.print_exc()
        end_process(1)


# Tables of names, like those of ``registry.py``: finding an entry, and importing the object that it names.


def lookup(table: dict[str, Any], name: str, kind: str) -> Any:
    """Returns the entry ``name`` of a table.

    Args:
        table: {name: entry}.
        name: name to look up.
        kind: kind of the entry, for the error message, for example "dataset".
    Raises:
        UserError: there is no such entry; the message lists all names, after the most similar ones.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"unknown {kind} '{name}'; {hint}known: {', '.join(sorted(table))}")


def resolve(path: str) -> Any:
    """Imports and returns the object with the path ``"package.module:attribute"``."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
