"""How a command ends: the one exception for mistakes that the user can mend, and the wrapper of every entry point."""

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
PATIENCE = 5  # s; see ``follow``


class UserError(Exception):
    """A mistake that the user can mend. Its message is one line: what was found, what was wanted, what to do."""


class Terminated(BaseException):
    """SIGTERM arrived. Everything on disk is whole: the same command goes on from there."""


def one_line(text: str) -> str:
    """A message whose names may contain anything, as one line that any terminal can show: ``a\\nb`` for a line break."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory could not be had, on a GPU or in this machine."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "overflow")  # torch's, of sizes
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def explain_os_error(error: OSError) -> UserError:
    """One line for what the file system refused (full disk, no permission, not a directory)."""
    name = error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(
            f"no space left while writing {name}; what was written before is whole: free space, then run the same command again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"cannot write to {name} ({error.strerror}); give a writable place with --save_dir")
    return UserError(f"{error.strerror or error}: {name}")


def launched_rank() -> int:
    """This process's number among those that a launcher has started; 0, the main one's, without a launcher."""
    return int(os.environ.get("RANK", 0)) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0


def follow(main: Callable[[], None]) -> None:
    """``main`` of a process that is not the main one, whose launcher ends it when another one fails.

    Mostly the main process has the same error and reports it, or its end caused this one. So wait: the launcher then ends
    this process first. If it does not, the error is this process's own, and is raised.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    try:
        main()
    except Exception:
        time.sleep(PATIENCE)
        raise


def end_process(code: int) -> NoReturn:
    """Ends this process with an exit code; one that a launcher started with others ends without finalizing the interpreter.

    A thread of gloo's may hold the last reference to a tensor made by Python, also after ``destroy_process_group``: dropped
    while the interpreter is finalized, it ends the process by abort() (SIGABRT).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(code)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a closed pipe
            stream.flush()
    os._exit(code)


def explain(error: Exception) -> str | None:
    """What is said of an error that the user can mend; None: it is a mistake of this program's."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return str(explain_os_error(error))
    if is_out_of_memory(error):
        advice = "what was written before is whole: give a smaller batch, bank or image size, and run again"
        return f"not enough memory ({str(error).partition(chr(10))[0][:200]}); {advice}"
    if isinstance(error, RuntimeError) and re.search("(closed|reset) by peer", str(error)):
        return f"process {launched_rank()} has lost another one, which says why in its own last line"
    return None


def quiet_on_os_errors(args: threading.ExceptHookArgs) -> None:
    """Of a thread: what the file system refused it (TensorBoard's on a full disk) is not worth a traceback beside ours."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def run_command(main: Callable[[], None], leave: Callable[[], None] = lambda: None) -> None:
    """Runs ``main``; a UserError or a refused write is one line on stderr and exit code 2, a stop is 130 or 143.

    Args:
        leave: called at the end, if all went well.
    """

    def on_sigterm(signum, frame):
        raise Terminated

    def command():
        main()
        leave()

    signal.signal(signal.SIGTERM, on_sigterm)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # a shell's "&" has it ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.excepthook = quiet_on_os_errors
    rank = launched_rank()
    try:
        follow(command) if rank else command()
        end_process(0)
    except (KeyboardInterrupt, Terminated) as stop:
        print("\nstopped; nothing written is lost: run the same command again to go on", file=sys.stderr)
        end_process(143 if isinstance(stop, Terminated) else 130)
    except Exception as error:
        if message := explain(error):
            print(one_line(f"error: {message}"), file=sys.stderr)
            end_process(EXIT_USER_ERROR)
        traceback.print_exc()
        end_process(1)


# Tables of names, like those of ``registry.py``: finding a row, and importing what it names.


def lookup(table: dict[str, Any], name: str, kind: str) -> Any:
    """The entry ``name`` of a table.

    Raises:
        UserError: there is none; the message lists the nearest names, or all.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"unknown {kind} '{name}'; {hint}known: {', '.join(sorted(table))}")


def resolve(path: str) -> Any:
    """Imports ``"package.module:attribute"``."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
