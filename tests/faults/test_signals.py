"""A signal stops a run after it finishes the step and saves; a second one exits immediately."""

import json
import signal
import socket
import time

import pytest
from runs import assert_same, command, command_after, content, finish, start, train_shared

from vit_jax.errors import Stopped
from vit_jax.workdir import saved_steps
from vit_jax.workdir.checkpoints import Checkpoints
from vit_jax.workdir.files import find_corruption


@pytest.fixture
def long(tiny_config):
    """A run of several minutes that saves only at the end, with a small model."""
    c = tiny_config
    c.epochs, c.log_every, c.save_every = 300, "1 step", ""
    c.optim.peak_lr, c.tensorboard = 1e-4, False
    return c


def steps_logged(workdir):
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for_steps(processes, workdir, steps=5):
    deadline = time.monotonic() + 100
    while steps_logged(workdir) < steps and time.monotonic() < deadline:
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    assert steps_logged(workdir) >= steps


def test_interrupt_saves_and_exits_with_its_own_code(long, tmp_path):
    process = start(command(long, tmp_path))
    wait_for_steps([process], tmp_path)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    code, output = finish(process, timeout=60)
    assert code == 130, output
    assert time.monotonic() - began < 30
    (step,) = saved_steps(tmp_path / "checkpoints")
    assert f"SIGINT: saved step {step:,} of 1,800" in output.splitlines()[-1]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == step


SIGNAL_AT_STEP_2 = """
import os, signal
from vit_jax.workdir.metrics import JsonLines
write = JsonLines.write
def write_and_stop(self, step, scalars):
    write(self, step, scalars)
    if step == 2: os.kill(os.getpid(), signal.SIGTERM)
JsonLines.write = write_and_stop"""


def test_stopped_run_ends_like_the_uninterrupted_run(long, tmp_path):
    """Stopped in the middle of an epoch, at a step that the recipe does not save."""
    long.epochs = 2  # of 6 steps
    train_shared(long, tmp_path / "whole")
    # The process signals itself during the third step.
    code, output = finish(start(command_after(SIGNAL_AT_STEP_2, long, tmp_path / "stopped")))
    assert code == 143, output
    assert saved_steps(tmp_path / "stopped" / "checkpoints") in ([3], [4])
    train_shared(long, tmp_path / "stopped")
    a, b = content(tmp_path / "stopped"), content(tmp_path / "whole")
    last = [{k: v for k, v in arrays.items() if k[0] == 12} for _, arrays in (a, b)]
    assert_same((a[0]["lines"], last[0]), (b[0]["lines"], last[1]))


SAVE_HANGS = """
import time
from vit_jax.workdir.checkpoints import Checkpoints
Checkpoints.save = lambda *_, **__: time.sleep(60)"""


def test_second_signal_exits_immediately(long, tmp_path):
    process = start(command_after(SAVE_HANGS, long, tmp_path))
    wait_for_steps([process], tmp_path)
    process.send_signal(signal.SIGTERM)
    while "a second signal exits immediately" not in (line := process.stdout.readline()):
        assert line  # the process has not ended
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, _ = finish(process, timeout=30)
    assert code == -signal.SIGTERM  # which a shell reports as 143
    assert time.monotonic() - began < 5


def test_signal_during_the_last_save_is_not_lost(long, tmp_path, monkeypatch, capsys):
    long.steps = 2
    save, wait, saved = Checkpoints.save, Checkpoints.wait, []

    def save_and_record(self, step, *arguments, **options):
        save(self, step, *arguments, **options)
        saved.append(step)

    def signal_and_wait(self):
        if saved == [2]:
            saved.clear()
            signal.raise_signal(signal.SIGTERM)
        wait(self)

    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        patch.setattr(Checkpoints, "save", save_and_record)
        patch.setattr(Checkpoints, "wait", signal_and_wait)
        train_shared(long, tmp_path)
    assert stopped.value.code == 143
    assert "SIGTERM: saved step 2 of 2; rerun" in capsys.readouterr().out
    assert not (tmp_path / "result.json").exists()
    assert train_shared(long, tmp_path)["steps"] == 2


def test_two_processes_save_the_same_step(long, tmp_path):
    """One of them receives the signal; both save one checkpoint together and exit."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        coordinator = {"COORDINATOR": f"127.0.0.1:{s.getsockname()[1]}", "NUM_PROCESSES": "2"}
    processes = [start(command(long, tmp_path), PROCESS_ID=str(i), **coordinator) for i in range(2)]
    try:
        wait_for_steps(processes, tmp_path)
        processes[1].send_signal(signal.SIGINT)
        began = time.monotonic()
        ends = [finish(process, timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert time.monotonic() - began < 30
    (code, output), (other, other_output) = ends
    assert (code, other) == (143, 130), output + other_output
    (step,) = saved_steps(tmp_path / "checkpoints")
    assert find_corruption(tmp_path / "checkpoints" / str(step)) is None
    assert f"SIGTERM: saved step {step:,} of 1,800" in output
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step
