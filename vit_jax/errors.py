"""The exception that means "the input is wrong, not the program", and how commands end on it."""

import errno
import sys


class UserError(Exception):
    """Wrong input: one line that says what was given, what is allowed and what to do."""


def run_command(main, *args):
    """Calls `main`; a UserError, or a full disk, is one line on stderr and exit code 2.

    An interrupt from the keyboard is exit code 130. Neither shows a traceback.
    """
    try:
        return main(*args)
    except UserError as e:
        message, code = str(e), 2
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message, code = f"{e.strerror}: {e.filename or 'make room where the run writes'}", 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.unraisablehook = lambda _: None  # what libraries complain of while the process ends
    sys.exit(code)
