"""Several processes over loopback: the same training as one process, and lost processes."""

import contextlib
import json
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from process_helpers import finish, start
from runs import command, command_after, losses, train_shared

# Shortens the time to detect a lost process.
SOONER = "from vit_jax.parallel import processes as p; p._HEARTBEAT_SECONDS = 5"
# A stand-in for training: two joined processes compute sums together until one is lost. As in
# training, the arrays are large enough for JAX to compute in the background.
WORK = (
    SOONER
    + """
import signal, time
import jax, numpy as np
from vit_jax.parallel import mesh
signal.alarm(200)  # ends the process if it hangs
with p.joined():
    devices = mesh.make_mesh(0, 1)
    x = mesh.to_devices(np.ones((2, 100_000), np.float32), mesh.batch_sharding(devices))
    add = jax.jit(lambda x: x.sum(), out_shardings=mesh.replicated(devices))
    while True:
        print(jax.device_get(add(x)), flush=True)
        time.sleep(0.05)
"""
)


def assert_same_results(workdir, other):
    """Two finished runs have the same test accuracy and, to 1e-5, the same test loss."""
    results = [json.loads((w / "result.json").read_text()) for w in (workdir, other)]
    assert results[0]["test_accuracy"] == results[1]["test_accuracy"]
    assert results[0]["test_loss"] == pytest.approx(results[1]["test_loss"], abs=1e-5)


def test_two_processes_train_like_one(small, tmp_path):
    """Each process shards the parameters over its two devices and decodes half of the images."""
    train_shared(small, tmp_path / "one")
    small.mesh.fsdp, small.data.streaming = 2, True
    processes = start([command(small, tmp_path / "two")] * 2, devices=2)
    for code, _, stderr in (ended := finish(processes)):
        assert code == 0, stderr
    assert "devices: 4 x cpu" in ended[0][1] and "Test Accuracy" in ended[0][1]
    # Only process 0 prints. (Gloo, which transfers arrays between CPUs, prints its peers, in
    # pieces from several threads: such a line may begin anywhere.)
    printed = ended[1][1].splitlines()
    assert [x for x in printed if "Gloo" not in x and "peer ranks" not in x] == []
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(two) == list(one) == list(range(1, 21))
    np.testing.assert_allclose(list(two.values()), list(one.values()), atol=1e-5)
    assert_same_results(tmp_path / "one", tmp_path / "two")


def test_run_killed_on_two_processes_resumes_on_one_and_four(small, tmp_path):
    """The parameters are sharded over the two processes and replicated in the four; all stream."""
    small.steps, small.save_every = 40, "10 steps"
    small.optim.peak_lr = 1e-4
    train_shared(small, tmp_path / "never")
    small.mesh.fsdp, small.data.streaming = 4, True
    processes = start([command_after(SOONER, small, tmp_path / "one")] * 2, devices=2)
    deadline = time.monotonic() + 100
    while not list((tmp_path / "one").glob("checkpoints/[1-9]0")) and time.monotonic() < deadline:
        assert processes[1].poll() is None, processes[1].stderr.read()
        time.sleep(0.01)
    processes[1].kill()
    (code, _, stderr), _ = finish(processes)
    # JAX ends the other process and names the lost one, unless Gloo ends it first, in a collective.
    lost = "(stopped sending heartbeats):\n1\n" in stderr or "gloo::EnforceNotMet" in stderr
    assert code == -signal.SIGABRT and lost, stderr
    assert not (tmp_path / "one" / "result.json").exists()
    shutil.copytree(tmp_path / "one", tmp_path / "four")
    small.mesh.fsdp = 1
    processes = start([command(small, tmp_path / "four")] * 4)
    train_shared(small, tmp_path / "one")
    ended = finish(processes)
    assert [code for code, _, _ in ended] == [0] * 4, ended[0][2]
    assert "Resuming from step" in ended[0][1] and "devices: 4 x cpu" in ended[0][1]
    never = losses(tmp_path / "never")
    for name in ("one", "four"):
        found = losses(tmp_path / name)
        assert list(found) == list(never)
        np.testing.assert_allclose(list(found.values()), list(never.values()), atol=1e-5)
        assert_same_results(tmp_path / "never", tmp_path / name)


@pytest.fixture
def runs():
    """Two runs of two processes each, which compute until one is lost."""
    with contextlib.ExitStack() as stack:
        pairs = [start([[sys.executable, "-c", WORK]] * 2) for _ in range(2)]
        for process in pairs[0] + pairs[1]:
            stack.callback(process.communicate)
            stack.callback(process.kill)  # called before communicate
        yield pairs


def test_lost_process_ends_the_other(runs):
    """Process 0 of one run is killed, and process 1 of the other hangs."""
    lost = [(0, signal.SIGKILL), (1, signal.SIGSTOP)]
    for processes, (victim, number) in zip(runs, lost, strict=True):
        other = processes[1 - victim]
        # Gloo also prints to stdout, possibly on the same line.
        assert any("200000.0" in line for line in other.stdout), other.stderr.read()
        processes[victim].send_signal(number)
        began = time.monotonic()
    for processes, (victim, _) in zip(runs, lost, strict=True):
        other = processes[1 - victim]
        _, stderr = other.communicate(timeout=60)
        assert other.returncode == -signal.SIGABRT, stderr
        assert time.monotonic() - began < 25
        assert "Traceback" not in stderr
        says = "unhealthy (stopped sending heartbeats):\n1\n" if victim else "coordination service"
        assert says in stderr, stderr
