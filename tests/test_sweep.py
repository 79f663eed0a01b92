"""The sweep: its grid, its table, continuing, and runs that never read the test split."""

import json
import pathlib
import subprocess
import sys

import pytest

from vit_jax import sweep
from vit_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def test_grid_is_every_combination():
    assert sweep.grid(["a=1,2", "b=x"]) == [{"a": "1", "b": "x"}, {"a": "2", "b": "x"}]
    ablation = sweep.grid(["a=1,2", "b=x,y"], one_at_a_time=True)
    assert ablation == [{"a": "1", "b": "x"}, {"a": "1", "b": "y"}, {"a": "2", "b": "x"}]
    brackets = sweep.grid(["data.mean=(0.5,0.5),(0.4,0.4)"])
    assert brackets == [{"data.mean": "(0.5,0.5)"}, {"data.mean": "(0.4,0.4)"}]
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


@pytest.mark.parametrize(
    ("backend", "processes", "own", "expected"),
    [
        ("gpu", "2", None, "false"),
        ("gpu", "2", "true", "true"),
        ("gpu", "1", None, None),
        ("cpu", "2", None, None),
    ],
)
def test_processes_that_share_a_gpu_do_not_reserve_its_memory(
    tmp_path, monkeypatch, backend, processes, own, expected
):
    found = []

    def run(command, *, env=None, **_):
        if "-c" in command:  # the sweep asks for the backend
            return subprocess.CompletedProcess(command, 0, stdout=f"{backend}\n")
        found.append(env.get("XLA_PYTHON_CLIENT_PREALLOCATE"))
        return subprocess.CompletedProcess(command, 1)

    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    monkeypatch.setenv(name, own) if own else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(subprocess, "run", run)
    command = ["sweep", "--config", str(ROOT / "configs" / "cifar10_vit.py")]
    command += ["--set", "seed=0,1", "--workdir", str(tmp_path), "--processes", processes]
    command += ["--config.data.train_split=train[:60]", "--config.data.val_split=train[60:]"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(UserError, match="2 of 2 runs failed"):
        sweep.main()
    assert found == [expected] * 2


def test_a_sweep_runs_continues_and_chooses_on_the_held_out_part(tiny_folder, tmp_path):
    command = [
        *(sys.executable, "-m", "vit_jax.sweep", "--config", "configs/cifar10_vit.py"),
        *("--set", "optim.peak_lr=0.01,0.0", "--workdir", str(tmp_path)),
        f"--config.data.name=folder:{tiny_folder}",
        *("--config.batch_size=16", "--config.steps=12", "--config.tensorboard=false"),
        *("--config.model.width=16", "--config.model.depth=1", "--config.model.num_heads=2"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "holds nothing out to choose by" in done.stderr

    split = ["--config.data.train_split=train[:60]", "--config.data.val_split=train[60:]"]
    for _ in range(2):  # the second time every run is already complete
        done = subprocess.run([*command, *split], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        rows = done.stdout.splitlines()[-2:]
        assert [row.split("|")[1].strip() for row in rows] == ["0.01", "0.0"]
    assert (tmp_path / "table.md").read_text().splitlines()[-2:] == rows
    for folder in tmp_path.glob("optim*"):
        assert "test_accuracy" not in json.loads((folder / "result.json").read_text())
        assert "test/" not in (folder / "metrics.jsonl").read_text()

    # Another recipe in the same folder: the runs refuse, and what lies there is not its result.
    other = [*command, *split, "--config.seed=1", "--set", "optim.peak_lr=0.01"]
    done = subprocess.run(other, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "1 of 1 runs failed" in done.stderr
    assert "failed" in done.stdout.splitlines()[-1] and "%" not in done.stdout
