"""Exceptions that end a command with one line, an exit code, and no traceback."""

import contextlib
import errno
import pathlib
import sys
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """Invalid input: one line with the value given, the values allowed, and the fix."""


class Stopped(Exception):
    """A run stopped early by a signal, with its state saved."""

    def __init__(self, signal_number: int) -> None:
        self.code = 128 + signal_number  # 143 for SIGTERM, 130 for SIGINT, as shells count


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_UNUSABLE_PATH = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
# The errno values of a failed write.
WRITE_FAILURES = (*_DISK_FULL, errno.EACCES, errno.ENOENT, errno.EIO, errno.ESTALE)


def expand_home(path: str | pathlib.Path) -> pathlib.Path:
    """Expands a leading `~` of `path`. Raises UserError if no home directory is known."""
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as e:
        raise UserError(f"{path}: this user has no home directory; set HOME") from e


def run_command(main: Callable[..., Any], *args: Any) -> Any:
    """Calls `main`, and reports expected errors in one line on stderr, without a traceback.

    The exit code is 2 after a UserError, a full disk, or a path without permission, 130 after
    Ctrl-C, 141 if stdout is closed early, and `Stopped.code` after a signal has stopped a run.
    """
    # Paths need not be UTF-8: their bytes pass through unchanged.
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape")
    try:
        return main(*args)
    except UserError as e:
        message, code = str(e), 2
    except Stopped as e:
        sys.exit(e.code)
    except BrokenPipeError:  # of stdout, for example by head
        message, code = "the reader of the output has closed it", 141
    except OSError as e:
        if e.errno not in _DISK_FULL and not (e.errno in _UNUSABLE_PATH and e.filename):
            raise
        message, code = f"{e.strerror}: {e.filename or 'free some space on the output disk'}", 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    with contextlib.suppress(BrokenPipeError):  # stderr may be closed too
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.unraisablehook = lambda _: None  # silences libraries at exit
    sys.exit(code)
