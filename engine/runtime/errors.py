"""How a command ends: the one exception for mistakes that the user can mend, and the wrapper of every entry point."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable

EXIT_USER_ERROR = 2
PATIENCE = 5  # s; see ``follow``


class UserError(Exception):
    """A mistake that the user can mend. Its message is one line: what was found, what was wanted, what to do."""


class Terminated(BaseException):
    """SIGTERM arrived. Everything on disk is whole: the same command goes on from there."""


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


def run_command(main: Callable[[], None]) -> None:
    """Runs ``main``; a UserError or a refused write is one line on stderr and exit code 2, a stop is 130 or 143."""

    def on_sigterm(signum, frame):
        raise Terminated

    signal.signal(signal.SIGTERM, on_sigterm)
    rank = launched_rank()
    try:
        follow(main) if rank else main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:
        if error.errno is None:
            raise
        print(f"error: {explain_os_error(error)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except RuntimeError as error:
        if "closed by peer" not in str(error) and "reset by peer" not in str(error):
            raise
        print(
            f"error: process {rank} has lost another one, which says why in its own last line", file=sys.stderr, flush=True
        )
        sys.stdout.flush()
        os._exit(EXIT_USER_ERROR)  # gloo's threads, which still wait for the other one, would end an orderly exit by abort()
    except (KeyboardInterrupt, Terminated) as stop:
        print("\nstopped; nothing written is lost: run the same command again to go on", file=sys.stderr)
        sys.exit(143 if isinstance(stop, Terminated) else 130)
