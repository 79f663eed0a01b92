"""The sweep command: grid, table, resuming, and runs that never read the test split."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from vit_jax.commands import sweep
from vit_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


def test_grid_has_every_combination():
    assert sweep.grid(["a=1,2", "b=x"]) == [{"a": "1", "b": "x"}, {"a": "2", "b": "x"}]
    parentheses = sweep.grid(["data.mean=(0.5,0.5),(0.4,0.4)"])
    assert parentheses == [{"data.mean": "(0.5,0.5)"}, {"data.mean": "(0.4,0.4)"}]
    for wrong in ("a", "a="):
        with pytest.raises(UserError, match="FIELD=VALUE"):
            sweep.grid([wrong])


def test_table_is_sorted_by_validation_accuracy():
    runs = [{"lr": "1"}, {"lr": "2"}, {"lr": "3"}]
    result = {"val_loss": 1.0, "train_loss": 1.0, "images_per_second": 10.0}
    results = [result | {"val_accuracy": 0.5}, None, result | {"val_accuracy": 0.7}]
    lines = sweep.table(runs, results)
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["3", "1", "2"]
    assert "70.00%" in lines[2] and "failed" in lines[4]


def test_sweep_trains_resumes_and_ranks_by_validation_accuracy(tiny_folder, tmp_path, capsys):
    command = [
        *("--config", "cifar10_vit", "--set", "optim.peak_lr=0.01,0.0"),
        *("--workdir", str(tmp_path), f"--config.data.name=folder:{tiny_folder}"),
        *("--config.batch_size=16", "--config.steps=12", "--config.tensorboard=false"),
        *("--config.model.width=16", "--config.model.depth=1", "--config.model.num_heads=2"),
    ]
    with pytest.raises(UserError, match="has no validation split"):
        sweep.main(command)

    split = ["--config.data.train_split=train[:60]", "--config.data.val_split=train[60:]"]
    for _ in range(2):  # the second time, every run is already complete
        sweep.main([*command, *split])
        rows = capsys.readouterr().out.splitlines()[-2:]
        assert [row.split("|")[1].strip() for row in rows] == ["0.01", "0.0"]
    assert (tmp_path / "table.md").read_text().splitlines()[-2:] == rows
    for folder in tmp_path.glob("optim*"):
        assert "test_accuracy" not in json.loads((folder / "result.json").read_text())
        assert "test/" not in (folder / "metrics.jsonl").read_text()

    # Another config in the same directory: its run fails, and the old result is not used for it.
    other = [*command, *split, "--config.seed=1", "--set", "optim.peak_lr=0.01"]
    with pytest.raises(UserError, match="1 of 1 runs failed"):
        sweep.main(other)
    printed = capsys.readouterr().out
    assert "failed" in printed.splitlines()[-1] and "%" not in printed


def test_every_run_is_checked_before_the_first_starts(tmp_path):
    command = ["--config", "cifar10_vit", "--workdir", str(tmp_path / "sweep")]
    command += ["--config.data.train_split=train[:60]", "--config.data.val_split=train[60:]"]
    with pytest.raises(UserError, match="num_heads"):
        sweep.main([*command, "--set", "model.num_heads=8,7"])
    with pytest.raises(UserError, match="unknown argument --stepz"):
        sweep.main([*command, "--set", "seed=0,1", "--stepz", "3"])
    assert not (tmp_path / "sweep").exists()


def test_ctrl_c_waits_until_the_running_run_has_saved(tmp_path):
    run = tmp_path / "run.sh"  # stands for a run: it needs a second to save
    run.write_text(
        f"#!/bin/sh\ncd {tmp_path}\ntrap 'sleep 1; touch saved; exit 130' INT\ntouch started\n"
        "while :; do sleep 0.1; done\n"
    )
    run.chmod(0o755)
    command = ["--config", "cifar10_vit", "--set", "seed=0,1", "--workdir", str(tmp_path / "sweep")]
    command += ["--config.data.train_split=train[:60]", "--config.data.val_split=train[60:]"]
    code = (
        "import signal, sys\n"
        "from vit_jax.commands import sweep\n"
        "from vit_jax.errors import run_command\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.executable = {str(run)!r}\n"
        f"run_command(sweep.main, {command})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    try:
        while not (tmp_path / "started").exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
    assert (tmp_path / "saved").exists()
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["seed=0"]
