"""A signal stops a run after its step, saved; a second ends it at once."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import test_distributed
import test_train
from test_kills import content, same

from vit_jax import checkpoint
from vit_jax.train import train


@pytest.fixture
def long(tiny_config):
    """Minutes of steps, saved only at the end, and small enough to compare."""
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


def test_an_interrupt_saves_and_has_its_own_exit_code(long, tmp_path):
    process = test_train.start(long, tmp_path)
    wait_for_steps([process], tmp_path)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert time.monotonic() - began < 30
    (step,) = checkpoint.saved_steps(tmp_path / "checkpoints")
    assert f"SIGINT: saved step {step:,} of 1,800" in output.splitlines()[-1]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == step
    # And it goes on from there.
    process = test_train.start(long, tmp_path)
    wait_for_steps([process], tmp_path, steps=len(lines) + 2)
    process.kill()
    assert f"Continuing from step {step:,}" in process.communicate()[0]


def test_a_stopped_run_ends_as_the_whole_one(long, tmp_path):
    """Stopped in the middle of an epoch, at a step of no meaning to the recipe."""
    long.epochs = 2  # of 6 steps
    train(long, tmp_path / "whole")
    # The signal comes while the third step is under way, by the process's own hand.
    code = "import os, runpy, signal\nimport vit_jax.metrics as m\nwrite = m.Writer.write\n"
    code += "def write_and_stop(self, step, values):\n    write(self, step, values)\n"
    code += "    if step == 2: os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "m.Writer.write = write_and_stop\n"
    code += "runpy.run_module('vit_jax.main', run_name='__main__', alter_sys=True)"
    arguments = test_train.command(long, tmp_path / "stopped")[3:]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=test_train.ROOT, env=test_train.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 143, done.stderr
    assert checkpoint.saved_steps(tmp_path / "stopped" / "checkpoints") in ([3], [4])
    train(long, tmp_path / "stopped")
    a, b = content(tmp_path / "stopped"), content(tmp_path / "whole")
    of_the_last_step = [{k: v for k, v in arrays.items() if k[0] == 12} for _, arrays in (a, b)]
    same((a[0]["lines"], of_the_last_step[0]), (b[0]["lines"], of_the_last_step[1]))


def test_a_second_signal_ends_it_at_once(long, tmp_path):
    code = "import runpy, time\nfrom vit_jax import checkpoint as c\n"
    code += "c.Checkpoints.save = lambda *_, **__: time.sleep(60)\n"  # a save that hangs
    code += "runpy.run_module('vit_jax.main', run_name='__main__', alter_sys=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *test_train.command(long, tmp_path)[3:]],
        cwd=test_train.ROOT, env=test_train.environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_steps([process], tmp_path)
    process.send_signal(signal.SIGTERM)
    os.set_blocking(process.stderr.fileno(), True)
    assert "a second one quits at once" in process.stderr.readline()
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM  # which a shell tells as 143
    assert time.monotonic() - began < 5


def test_two_processes_save_the_same_step(long, tmp_path):
    """One of them gets the signal; both save one checkpoint together and end."""
    processes = test_distributed.start([test_distributed.command(long, tmp_path)] * 2)
    try:
        wait_for_steps(processes, tmp_path)
        processes[1].send_signal(signal.SIGINT)
        began = time.monotonic()
    finally:
        told = test_distributed.ends(processes, timeout=60)
    (code, stdout, stderr), (other, _, other_stderr) = told
    assert time.monotonic() - began < 30
    assert (code, other) == (143, 130), stderr + other_stderr
    (step,) = checkpoint.saved_steps(tmp_path / "checkpoints")
    assert checkpoint.find_corruption(tmp_path / "checkpoints" / str(step)) is None
    assert f"SIGTERM: saved step {step:,} of 1,800" in stdout
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step
