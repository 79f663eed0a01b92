"""Exit codes and messages of errors and signals, and a missing home directory."""

import errno
import pwd
import signal
import sys

import jax
import pytest

from vit_jax import config, data, main, weights
from vit_jax.data.source import user_cache
from vit_jax.errors import Stopped, UserError, run_command
from vit_jax.parallel.backend import enable_compilation_cache


def enable_cache():
    """Enables the compilation cache as in a process that has none, and disables it again."""
    configured = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        enable_compilation_cache()
    finally:
        jax.config.update("jax_compilation_cache_dir", configured)


@pytest.mark.parametrize(
    "expand",
    [
        lambda: config.recipe_path("~/recipe.py"),
        lambda: weights.load_weights("~/weights.npz"),
        lambda: data.open_split("folder:~/images", "train"),
        lambda: data.open_split("shapes10", "train"),
        lambda: user_cache("tfds"),
        lambda: main.parse(["--config", "~/recipe.py"]),
        enable_cache,
    ],
)
def test_missing_home_directory_is_an_error(expand, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(uid)  # as for a user without a passwd entry

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(UserError, match="this user has no home directory; set HOME"):
        expand()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("two\nlines"), 2, "error: two lines\n"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "error: No space left on"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, "error: the reader of the output"),
        (Stopped(signal.SIGTERM), 143, ""),
        (Stopped(signal.SIGINT), 130, ""),
    ],
    ids=["user error", "full disk", "Ctrl-C", "closed pipe", "SIGTERM", "SIGINT"],
)
def test_errors_print_one_line_and_set_the_exit_code(error, code, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # restored after the test

    def command():
        raise error

    with pytest.raises(SystemExit) as end:
        run_command(command)
    printed = capsys.readouterr().err
    assert end.value.code == code
    assert printed.startswith(message) and printed.count("\n") == (message != "")


def test_exit_code_of_a_closed_pipe_that_is_also_stderr(monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # restored after the test
    monkeypatch.setattr(sys, "stderr", Closed())
    with pytest.raises(SystemExit) as end:
        run_command(lambda: Closed().write(""))
    assert end.value.code == 141


def test_other_errors_keep_their_traceback():
    def command():
        raise OSError(errno.ECONNREFUSED, "Connection refused")

    with pytest.raises(ConnectionRefusedError):
        run_command(command)
