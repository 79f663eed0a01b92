"""Several processes over loopback: the same training as one process, and lost processes."""

import contextlib
import json
import shutil
import signal
import time

import numpy as np
import pytest
from process_helpers import finish, start
from runs import command, command_after, losses, train_shared

# Shortens the time to detect a lost process.
SOONER = "from vit_jax.parallel import processes as p; p._HEARTBEAT_SECONDS = 5"


@pytest.mark.parametrize(("fsdp", "streaming"), [(1, False), (4, True)])
def test_two_processes_train_like_one(small, tmp_path, fsdp, streaming):
    """Two processes of two devices each; streamed, each decodes only its share."""
    train_shared(small, tmp_path / "one")
    small.mesh.fsdp, small.data.streaming = fsdp, streaming
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
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("one", "two")]
    assert results[0]["test_accuracy"] == results[1]["test_accuracy"]
    assert results[0]["test_loss"] == pytest.approx(results[1]["test_loss"], abs=1e-5)


def test_run_killed_on_two_processes_resumes_on_one_and_four(small, tmp_path):
    small.steps, small.save_every = 40, "10 steps"
    small.optim.peak_lr = 1e-4
    train_shared(small, tmp_path / "never")
    small.mesh.fsdp = 4
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
    small.mesh.fsdp = 2
    processes = start([command(small, tmp_path / "four")] * 4)
    small.mesh.fsdp = 1
    train_shared(small, tmp_path / "one")
    ended = finish(processes)
    assert [code for code, _, _ in ended] == [0] * 4, ended[0][2]
    assert "Resuming from step" in ended[0][1] and "devices: 4 x cpu" in ended[0][1]
    never = losses(tmp_path / "never")
    for name in ("one", "four"):
        found = losses(tmp_path / name)
        assert list(found) == list(never)
        np.testing.assert_allclose(list(found.values()), list(never.values()), atol=1e-5)


@pytest.fixture
def runs(small, tmp_path):
    """(workdir, processes) of two runs of two processes, which train until killed."""
    small.steps, small.save_every = 100_000, ""
    with contextlib.ExitStack() as stack:
        pairs = []
        for workdir in (tmp_path / "a", tmp_path / "b"):
            pairs.append((workdir, start([command_after(SOONER, small, workdir)] * 2)))
            for process in pairs[-1][1]:
                stack.callback(process.communicate)
                stack.callback(process.kill)  # called before communicate
        yield pairs


def test_lost_process_ends_the_other(runs):
    """Process 0 of one run is killed, and process 1 of the other hangs."""
    lost = [(0, signal.SIGKILL), (1, signal.SIGSTOP)]
    deadline = time.monotonic() + 100
    for (workdir, processes), (victim, number) in zip(runs, lost, strict=True):
        path, other = workdir / "metrics.jsonl", processes[1 - victim]
        while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
            assert other.poll() is None, other.stderr.read()
            time.sleep(0.1)
        processes[victim].send_signal(number)
        began = time.monotonic()
    for (_, processes), (victim, _) in zip(runs, lost, strict=True):
        other = processes[1 - victim]
        _, stderr = other.communicate(timeout=60)
        assert other.returncode == -signal.SIGABRT, stderr
        assert time.monotonic() - began < 25
        assert "Traceback" not in stderr
        says = "unhealthy (stopped sending heartbeats):\n1\n" if victim else "coordination service"
        assert says in stderr, stderr
