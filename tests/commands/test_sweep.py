"""The sweep command: searches, table, resuming, sharing; its runs never read the test split."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import optuna
import pytest

from vit_jax.commands import sweep
from vit_jax.errors import UserError

ROOT, PYTHON = pathlib.Path(__file__).parents[2], sys.executable
SPLIT = ["--config.data.train_split=train[:60]", "--config.data.val_split=train[60:]"]
# Stands for a run: its accuracy at steps 1 to 3 is its learning rate. It waits for a
# file "go", or forever at 0.25.
RUN = """\
#!{python}
import json, os, pathlib, signal, sys, time
workdir = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
prefix = "--config.optim.peak_lr="
accuracy = float(([a.removeprefix(prefix) for a in sys.argv if a.startswith(prefix)] or ["0.5"])[0])
with open(workdir / "metrics.jsonl", "a") as file:
    for step in (1, 2, 3):
        print(json.dumps({{"step": step, "val/accuracy": accuracy}}), file=file, flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
(workdir / f"started_{{os.getpid()}}").touch()
while accuracy == 0.25 or not (workdir.parent / "go").exists():
    time.sleep(0.02)
result = {{"val_accuracy": accuracy, "val_loss": 1, "train_loss": 1, "images_per_second": 10}}
(workdir / "result.json").write_text(json.dumps(result))
"""


def test_settings_are_lists_or_ranges():
    space = sweep.parse_settings(["a=1,2", "b=x", "data.mean=(0.5,0.5),(0.4,0.4)"], ranges=False)
    assert space["a"].choices == ("1", "2") and space["b"].choices == ("x",)
    assert space["data.mean"].choices == ("(0.5,0.5)", "(0.4,0.4)")
    space = sweep.parse_settings(["a=1e-4..1e-2", "b=0..0.5", "c=1,2"], ranges=True)
    assert (space["a"].low, space["a"].high, space["a"].log) == (1e-4, 1e-2, True)
    assert not space["b"].log and space["c"].choices == ("1", "2")
    for wrong in ("a", "a=", "a=1..2"):
        with pytest.raises(UserError, match=r"use FIELD=VALUE,VALUE,\.\.\.; a range needs"):
            sweep.parse_settings([wrong], ranges=False)
    space = sweep.parse_settings(["model.depth=1..4"], ranges=True)
    assert sweep.changes({"model.depth": space["model.depth"].high}) == ["model.depth=4"]
    with pytest.raises(UserError, match=r"--set a=2\.\.1: "):
        sweep.parse_settings(["a=2..1"], ranges=True)
    with pytest.raises(UserError, match="--set a=2: a is set twice"):
        sweep.parse_settings(["a=1", "a=2"], ranges=False)


def test_grid_has_every_combination():
    assert sweep.grid({"a": "12", "b": "x"}) == [{"a": "1", "b": "x"}, {"a": "2", "b": "x"}]


def test_sweep_trains_resumes_and_ranks_by_validation_accuracy(tiny_folder, tmp_path, capsys):
    command = [
        *("--config", "cifar10_vit", "--set", "optim.peak_lr=0.01,0.0"),
        *("--workdir", str(tmp_path), f"--config.data.name=folder:{tiny_folder}"),
        *("--config.batch_size=16", "--config.steps=12", "--config.tensorboard=false"),
        *("--config.model.width=16", "--config.model.depth=1", "--config.model.num_heads=2"),
    ]
    with pytest.raises(UserError, match="has no validation split"):
        sweep.main(command)

    for _ in range(2):  # the second time, every run is already complete
        sweep.main([*command, *SPLIT])
        rows = capsys.readouterr().out.splitlines()[-2:]
        assert [row.split("|")[1].strip() for row in rows] == ["0.01", "0.0"]
    assert (tmp_path / "table.md").read_text().splitlines()[-2:] == rows
    for folder in tmp_path.glob("optim*"):
        assert "test_accuracy" not in json.loads((folder / "result.json").read_text())
        assert "test/" not in (folder / "metrics.jsonl").read_text()

    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(UserError, match=r"contains another sweep .*: use another --workdir"):
        sweep.main([*command, *SPLIT, "--config.seed=1"])


@pytest.mark.usefixtures("without_plot")
def test_failed_run_is_last_in_the_table_and_trained_again(make_command, tmp_path, capsys):
    command = make_command("--set", "optim.peak_lr=0.3,0.2")
    workdir = tmp_path / "sweep"
    (workdir / "optim.peak_lr=0.3").mkdir(parents=True)
    (workdir / "optim.peak_lr=0.3" / "result.json").mkdir()  # cannot be written
    (workdir / "go").touch()
    with pytest.raises(UserError, match=r"1 of 2 runs failed: see .*peak_lr=0.3/log.txt"):
        sweep.main(command)
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert "20.00%" in rows[0] and "failed" in rows[1]
    (workdir / "optim.peak_lr=0.3" / "result.json").rmdir()
    sweep.main(command)
    assert "30.00%" in capsys.readouterr().out.splitlines()[-2]


def test_table_keeps_a_run_whose_folder_was_deleted(tmp_path):
    trial = optuna.trial.create_trial(value=0.625)
    assert "62.50%" in sweep.table([], [(trial, tmp_path / "deleted")])[-1]


def test_every_run_is_checked_before_the_first_starts(tmp_path):
    command = ["--config", "cifar10_vit", "--workdir", str(tmp_path / "sweep")]
    command += SPLIT
    with pytest.raises(UserError, match="num_heads"):
        sweep.main([*command, "--set", "model.num_heads=8,7"])
    tpe = [*command, "--search", "tpe", "--runs", "3", "--set", "model.num_heads=4..9"]
    with pytest.raises(UserError, match="num_heads"):
        sweep.main(tpe)
    with pytest.raises(UserError, match="unknown argument --stepz"):
        sweep.main([*command, "--set", "seed=0,1", "--stepz", "3"])
    assert not (tmp_path / "sweep").exists()


@pytest.fixture
def make_command(tmp_path, monkeypatch):
    """make_command(*arguments) of a sweep whose runs are RUN."""
    run = tmp_path / "run.py"
    run.write_text(RUN.format(python=PYTHON))
    run.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(run))
    fixed = ["--config", "cifar10_vit", "--workdir", str(tmp_path / "sweep"), *SPLIT]
    return lambda *arguments: [*fixed, *arguments]


@pytest.fixture
def without_plot(monkeypatch):
    """Sweeps in this process do not draw study.png, which takes longer than their stand-in runs."""
    monkeypatch.setattr(sweep, "draw", lambda study, path: None)


@pytest.fixture
def start(tmp_path):
    """start(command) a sweep in a process of its own, as the console script does."""
    children = []

    def start(command):
        code = (
            "import signal, sys\n"
            "from vit_jax.commands import sweep\n"
            "from vit_jax.errors import run_command\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"sys.executable = {str(tmp_path / 'run.py')!r}\n"
            f"run_command(sweep.main, {command})\n"
        )
        children.append(
            subprocess.Popen(
                [PYTHON, "-c", code],
                cwd=ROOT,
                start_new_session=True,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        return children[-1]

    yield start
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


def wait_for(pattern, folder, count=1):
    """Waits until `count` paths match, and returns them."""
    deadline = time.monotonic() + 120
    while len(found := sorted(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline, pattern
        time.sleep(0.02)
    return found


def test_one_field_at_a_time(make_command, tmp_path, capsys):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "go").touch()
    sweep.main(make_command("--search", "one", "--set", "optim.peak_lr=0.3,0.7", "seed=1"))
    rows = capsys.readouterr().out.splitlines()[-4:]
    changes = [row.split("|")[1].strip() for row in rows]
    assert changes == ["optim.peak_lr=0.7", "", "seed=1", "optim.peak_lr=0.3"]
    assert "seed=1" in (tmp_path / "sweep" / "table.md").read_text()


def test_tpe_counts_and_prunes_its_runs(make_command, tmp_path, capsys):
    tpe = ["--search", "tpe", "--set", "optim.peak_lr=0.25..0.6"]
    with pytest.raises(UserError, match="--search tpe needs --runs N"):
        sweep.main(make_command(*tpe))
    workdir = tmp_path / "sweep"
    workdir.mkdir()
    (workdir / "go").touch()
    sweep.main(make_command(*tpe, "--runs", "5"))
    assert len(list(workdir.glob("*/result.json"))) == 5
    storage = f"sqlite:///{workdir / 'study.db'}"
    study = sweep.optuna.load_study(study_name="sweep", storage=storage)
    assert len(study.trials) == 5 and 0.25 < study.best_value <= 0.6
    study.enqueue_trial({"optim.peak_lr": 0.25})  # below the median; it would never end
    sweep.main(make_command(*tpe, "--runs", "6"))
    assert "| pruned at step " in capsys.readouterr().out.splitlines()[-1]
    assert study.trials[-1].state.name == "PRUNED" and len(study.trials) == 6


@pytest.mark.usefixtures("without_plot")
def test_trial_of_a_process_killed_before_it_had_values_is_ignored(make_command, tmp_path):
    workdir = tmp_path / "sweep"
    workdir.mkdir()
    (workdir / "go").touch()
    command = make_command("--search", "tpe", "--set", "optim.peak_lr=0.3..0.6", "--runs")
    sweep.main([*command, "1"])
    storage = f"sqlite:///{workdir / 'study.db'}"
    study = sweep.optuna.load_study(study_name="sweep", storage=storage)
    study.ask()
    sweep.main([*command, "2"])
    assert len(list(workdir.glob("*/result.json"))) == 2
    assert [t.state.name for t in study.trials] == ["COMPLETE", "RUNNING", "COMPLETE"]


@pytest.mark.usefixtures("without_plot")
def test_tpe_ends_if_it_repeats_values(make_command, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "go").touch()
    command = make_command("--search", "tpe", "--runs", "4", "--set", "seed=0,1")
    sweep.main(command)
    sweep.main(command)
    assert len(list((tmp_path / "sweep").glob("*/started_*"))) == 4


@pytest.mark.usefixtures("without_plot")
def test_killed_sweep_resumes_its_run(make_command, start, tmp_path, capsys):
    command = make_command("--set", "optim.peak_lr=0.2,0.3")
    child = start(command)
    wait_for("optim.peak_lr=0.2/started_*", tmp_path / "sweep")
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    (tmp_path / "sweep" / "go").touch()
    sweep.main(command)
    assert len(list((tmp_path / "sweep").glob("optim.peak_lr=0.2/started_*"))) == 2
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split("|")[1].strip() for row in rows] == ["0.3", "0.2"]


@pytest.mark.usefixtures("without_plot")
def test_run_that_outlives_its_sweep_is_not_started_again(make_command, start, tmp_path, capsys):
    command = make_command("--set", "optim.peak_lr=0.25,0.3")
    child = start(command)
    (started,) = wait_for("optim.peak_lr=0.25/started_*", tmp_path / "sweep")
    os.kill(child.pid, signal.SIGKILL)  # the sweep alone
    child.wait()
    try:
        (tmp_path / "sweep" / "go").touch()
        sweep.main(command)
    finally:
        os.kill(int(started.name.removeprefix("started_")), signal.SIGKILL)
    assert list(started.parent.glob("started_*")) == [started]
    rows = [row.split("|")[2].strip() for row in capsys.readouterr().out.splitlines()[-2:]]
    assert rows[0] == "30.00%" and rows[1].startswith("running")


def test_two_processes_share_the_runs(make_command, start, tmp_path):
    command = make_command("--set", "optim.peak_lr=0.1,0.2,0.3,0.4")
    children = [start(command) for _ in range(2)]
    wait_for("*/started_*", tmp_path / "sweep", count=2)
    (tmp_path / "sweep" / "go").touch()
    for child in children:
        child.communicate(timeout=120)
        assert child.returncode == 0
    started = [path.parent.name for path in (tmp_path / "sweep").glob("*/started_*")]
    assert sorted(started) == [f"optim.peak_lr=0.{i}" for i in (1, 2, 3, 4)]
    assert (tmp_path / "sweep" / "table.md").read_text().count("%") == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_waits_until_the_running_run_has_saved(make_command, start, tmp_path, number):
    command = make_command("--set", "optim.peak_lr=0.2,0.3")
    (tmp_path / "run.py").write_text(  # stands for a run that needs a second to save
        f"#!/bin/sh\ncd {tmp_path}\ntrap 'sleep 1; touch saved; exit 1' INT TERM\ntouch started\n"
        "while :; do sleep 0.1; done\n"
    )
    child = start(command)
    wait_for("started", tmp_path)
    if number == signal.SIGINT:  # a terminal sends it to both processes
        os.killpg(child.pid, number)
    else:
        child.terminate()
    child.communicate(timeout=60)
    assert child.returncode == 128 + number
    assert (tmp_path / "saved").exists()
    assert [path.name for path in (tmp_path / "sweep").glob("*/")] == ["optim.peak_lr=0.2"]
