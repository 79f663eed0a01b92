"""The command line: the list of commands, their help, and unknown commands."""

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from vit_jax import __main__ as cli

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = ("train", "evaluate", "predict", "report", "demo", "export", "sweep", "describe")
COMMANDS += ("benchmark",)


def run(*arguments):
    """Runs python -m vit_jax in its own process."""
    command = [sys.executable, "-m", "vit_jax", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_without_arguments_every_command_is_listed():
    done = run()
    listed = dict(re.findall(r"^  (\w+) +(\S.*)$", done.stdout, re.M))
    assert done.returncode == 0 and tuple(listed) == COMMANDS


def test_unknown_command_prints_one_line_and_exits_with_2():
    done = run("trian")
    assert done.returncode == 2 and done.stdout == ""
    expected = f"error: unknown command trian: use one of {', '.join(COMMANDS)}\n"
    assert done.stderr == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vit-jax", name, "--help"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    usage, _, description = capsys.readouterr().out.partition("\n\n")
    shown = "train" if name == "describe" else name  # describe is train --dry_run
    assert end.value.code == 0 and usage.startswith(f"usage: vit-jax {shown} ")
    assert description[0].isupper()


def test_console_script_is_the_list_of_commands():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"vit-jax": "vit_jax.__main__:main"}


def test_describe_prints_the_run_and_its_program(tiny_folder, monkeypatch, capsys):
    fields = {"data.name": f"folder:{tiny_folder}", "model.depth": 1, "model.width": 8}
    fields |= {"model.num_heads": 2, "batch_size": 16}
    fields = [f"--config.{k}={v}" for k, v in fields.items()]
    monkeypatch.setattr(sys, "argv", ["vit-jax", "describe", "--config", "cifar10_vit", *fields])
    cli.main()
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["model"].startswith("ViT, patch 4, width 8, depth 1")
    assert lines["workdir"] == "workdirs/cifar10_vit"
    assert {"compute", "memory of a step, by the compiler"} <= set(lines)
    monkeypatch.setattr(sys, "argv", ["vit-jax", "describe", "--steps", "3"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "unknown argument --steps: use --config" in capsys.readouterr().err
