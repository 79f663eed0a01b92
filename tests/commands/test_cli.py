"""The command line: the list of commands, their help, and unknown commands."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from vit_jax import __main__ as cli
from vit_jax import config, main

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = ("train", "evaluate", "predict", "probe", "report", "demo", "export", "sweep")
COMMANDS += ("describe", "benchmark", "completion")


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


def test_config_without_a_value_lists_the_recipes(capsys):
    with pytest.raises(SystemExit) as end:
        main.parse(["--config", "--config.seed=1"])
    lines = capsys.readouterr().out.splitlines()
    assert not end.value.code and max(map(len, lines)) <= 110
    recipes = {re.split(r" {2,}", line)[0]: re.split(r" {2,}", line)[1:] for line in lines}
    assert set(recipes) == {path.stem for path in config.CONFIGS.glob("*.py")}
    rows = dict(re.findall(r"^\| `(\w+)` (.*)$", (ROOT / "docs/recipes.md").read_text(), re.M))
    for name, (purpose, result) in recipes.items():
        docstring = ast.get_docstring(ast.parse((config.CONFIGS / f"{name}.py").read_text()))
        assert docstring.startswith(f"{purpose}.\n")
        accuracy = re.match(r"[\d.]+%(?= in \d+ (min|h) on )", result)
        assert bool(re.search(r"^Not measured\. ?", docstring, re.M)) == (not accuracy), name
        assert accuracy or result == "not measured"
        # As in the table of recipes.
        assert re.findall(r"measured: ([\d.]+%)", rows[name]) == ([accuracy[0]] if accuracy else [])


def test_recipe_without_a_docstring_is_listed(tmp_path):
    (tmp_path / "mine.py").write_text("def get_config(): pass\n")
    (tmp_path / "torn.py").write_text("def get_config(:\n")
    lines = [line.split() for line in main.recipe_list(tmp_path)]
    assert lines == [["mine", "not", "measured"], ["torn", "not", "measured"]]


@pytest.fixture(scope="module")
def script():
    """The completion script."""
    return run("completion").stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vit-jax ev", ["evaluate"]),
        ("vit-jax train --w", ["--workdir"]),
        ("vit-jax train --config shapes", ["shapes10_vit"]),
        ("vit-jax describe --config.optim.b", ["--config.optim.b1", "--config.optim.b2"]),
        ("vit-jax train --workdir sh", []),  # bash then completes files
        ("vit-jax report --w", []),
    ],
)
def test_bash_completes_commands_options_recipes_and_fields(script, line, expected):
    words = line.split()
    script += f"COMP_WORDS=({line}) COMP_CWORD={len(words) - 1}\n"
    script += f"_vit_jax vit-jax {words[-1]} {words[-2]}; echo ${{COMPREPLY[@]}}"
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == expected and found.stderr == ""


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
    assert lines["sharding"].endswith("; data 0.0 MB on each device")
    assert {"compute", "memory"} <= set(lines)
    monkeypatch.setattr(sys, "argv", ["vit-jax", "describe", "--steps", "3"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "unknown argument --steps: use --config" in capsys.readouterr().err
