"""scripts/gpu_all.py with and without PyTorch; its commands are not run."""

import json
import pathlib
import runpy
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "scripts" / "gpu_all.py"
RESULT = {"images_per_second": 10.0, "seconds_per_step": {"median": 0.1}, "seconds_per_epoch": 1.0}
RESULT |= {"mfu": None, "rivals": {"PyTorch eager": {"speedup": 1.25}}}
RESULT |= {"environment": {"devices": ["gpu"], "versions": {"jax": "0"}, "commit": None}}
RESULT["environment"]["date"] = "2026-11-24"


@pytest.fixture
def gpu_all(tmp_path, monkeypatch):
    """gpu_all(torch=bool): runs bench_64 with or without PyTorch, and returns the commands."""

    def call(torch):
        commands = []

        def run(command, *, stdout=None, **_):
            if command[1] == "-c":
                error = "" if torch else "Traceback\nModuleNotFoundError: No module named 'torch'\n"
                return subprocess.CompletedProcess(command, int(not torch), "", error)
            stdout.write(json.dumps(RESULT))
            commands.append(command)
            return subprocess.CompletedProcess(command, 0)

        monkeypatch.setattr(subprocess, "run", run)
        arguments = ["--out", str(tmp_path), "--steps", "1", "--only", "bench_64"]
        monkeypatch.setattr(sys, "argv", ["gpu_all.py", *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return commands

    return call


def test_without_pytorch_vit_jax_is_measured_after_a_notice(gpu_all, capsys):
    (command,) = gpu_all(torch=False)
    printed = capsys.readouterr().out
    assert command[1:4] == ["-m", "vit_jax", "benchmark"] and "--against" not in command
    assert "No module named 'torch'" in printed.splitlines()[0]
    assert "| bench_64 | 10 |" in printed and "PyTorch eager: 1.25 times as fast" in printed


def test_comparison_is_measured_once_pytorch_is_installed_and_then_kept(gpu_all):
    assert len(gpu_all(torch=False)) == 1
    assert gpu_all(torch=False) == []
    (command,) = gpu_all(torch=True)
    assert "--against" in command
    assert gpu_all(torch=False) == []  # the comparison includes vit_jax alone
