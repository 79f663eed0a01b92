"""Several processes over loopback: the same training as one process, and what each reports."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from vit_jax import config as config_lib
from vit_jax.distributed import Processes
from vit_jax.errors import UserError
from vit_jax.train import train

ROOT = pathlib.Path(__file__).parents[1]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(c, workdir):
    """The main command that makes the config of `c`."""
    recipe = config_lib.from_file(ROOT / "configs" / "cifar10_vit.py")
    names = [d.split(":")[0] for d in config_lib.difference(c, recipe)]
    overrides = [f"--config.{n}={config_lib.get_field(c, n)}" for n in names]
    base = [sys.executable, "-m", "vit_jax.main", "--config", "configs/cifar10_vit.py"]
    return [*base, "--workdir", str(workdir), *overrides]


def start(commands, *, devices=1, port=None, **environment):
    """One process per command, numbered in order; `environment` lists values, one per process."""
    port = port or free_port()
    processes = []
    for i, arguments in enumerate(commands):
        own = {
            "COORDINATOR": f"127.0.0.1:{port}",
            "NUM_PROCESSES": str(len(commands)),
            "PROCESS_ID": str(i),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        own |= {k: v[i] for k, v in environment.items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(arguments, cwd=ROOT, env=os.environ | own, **pipes))
    return processes


def ends(processes, timeout=120):
    """[(exit code, stdout, stderr)]; none is left running."""
    try:
        told = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, *t) for p, t in zip(processes, told, strict=True)]


def losses(workdir):
    parsed = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {p["step"]: p["train/loss"] for p in parsed if "train/loss" in p}


@pytest.fixture
def small(tiny_config):
    c = tiny_config
    c.steps, c.log_every = 20, "1 step"
    c.model.depth, c.model.mlp_dim = 1, 256  # wide enough for fsdp to split it
    c.model.pool = "gap"  # the one block is computed for all tokens
    c.optim.peak_lr = 1e-3
    c.augment.crop, c.augment.crop_padding, c.augment.flip = "pad", 2, "random"
    c.augment.mixup_alpha = 0.8
    c.tensorboard = False
    return c


@pytest.mark.parametrize(("fsdp", "streaming"), [(1, False), (4, True)])
def test_two_processes_train_as_one(small, tmp_path, fsdp, streaming):
    """Two processes of two devices each; streamed, each decodes only its share."""
    train(small, tmp_path / "one")
    small.mesh.fsdp, small.data.streaming = fsdp, streaming
    whole = start([command(small, tmp_path / "two")] * 2, devices=2)
    for code, _, stderr in (told := ends(whole)):
        assert code == 0, stderr
    assert "devices: 4 x cpu" in told[0][1] and "Test Accuracy" in told[0][1]
    # One of them tells. (Gloo, which carries the arrays between CPUs, prints whom it met, in
    # pieces from several threads: such a line may begin anywhere.)
    assert [x for x in told[1][1].splitlines() if "Gloo" not in x and "peer ranks" not in x] == []
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(two) == list(one) == list(range(1, 21))
    np.testing.assert_allclose(list(two.values()), list(one.values()), atol=1e-5)
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("one", "two")]
    assert results[0]["test_accuracy"] == results[1]["test_accuracy"]
    assert results[0]["test_loss"] == pytest.approx(results[1]["test_loss"], abs=1e-5)


def test_run_killed_on_two_processes_resumes_on_one_and_four(small, tmp_path):
    small.steps, small.save_every = 40, "10 steps"
    small.optim.peak_lr = 1e-4
    train(small, tmp_path / "never")
    small.mesh.fsdp = 4
    processes = start([command(small, tmp_path / "one")] * 2, devices=2)
    deadline = time.monotonic() + 100
    while not list((tmp_path / "one").glob("checkpoints/[1-9]0")) and time.monotonic() < deadline:
        assert processes[1].poll() is None, processes[1].stderr.read()
        time.sleep(0.01)
    processes[1].kill()
    (code, _, stderr), _ = ends(processes)
    # JAX ends the other process and names the lost one.
    assert code == -signal.SIGABRT and "(stopped sending heartbeats):\n1\n" in stderr, stderr
    assert not (tmp_path / "one" / "result.json").exists()
    shutil.copytree(tmp_path / "one", tmp_path / "four")
    small.mesh.fsdp = 1
    train(small, tmp_path / "one")
    small.mesh.fsdp = 2
    told = ends(start([command(small, tmp_path / "four")] * 4))
    assert [code for code, _, _ in told] == [0] * 4, told[0][2]
    assert "Continuing from step" in told[0][1] and "devices: 4 x cpu" in told[0][1]
    never = losses(tmp_path / "never")
    for name in ("one", "four"):
        found = losses(tmp_path / name)
        assert list(found) == list(never)
        np.testing.assert_allclose(list(found.values()), list(never.values()), atol=1e-5)


def refusals(processes, timeout=90):
    """The error lines of processes that all end with exit code 2."""
    began = time.monotonic()
    told = ends(processes, timeout)
    assert time.monotonic() - began < 60
    for code, _, stderr in told:
        assert code == 2, stderr
        assert "Traceback" not in stderr
    return [[x for x in stderr.splitlines() if x.startswith("error: ")] for _, _, stderr in told]


def test_hosts_with_different_configs(small, tmp_path):
    """Foreign connections to the coordinator's port, idle or not, do not disturb the processes."""
    port, first, strangers = free_port(), command(small, tmp_path / "w"), []
    processes = start([first, [*first, "--config.seed=1"]], port=port)
    deadline = time.monotonic() + 30
    while len(strangers) < 4 and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            strangers.append(socket.create_connection(("127.0.0.1", port), timeout=1))
            strangers[0].sendall(b'{"host": "x"}\n')
        time.sleep(0.01)
    assert len(strangers) == 4
    for lines in refusals(processes):
        (line,) = lines
        assert "process 1" in line and "config.seed: 1, not 0" in line
    assert not (tmp_path / "w").exists()
    for stranger in strangers:
        stranger.close()


@pytest.mark.parametrize(
    "launcher",
    [
        {
            "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2",
            "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "01",
            "SLURM_LOCALID": "01",
        },
        {
            "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": "01", "OMPI_COMM_WORLD_LOCAL_RANK": "01",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
        },
    ],
    ids=["SLURM", "Open MPI"],
)  # fmt: skip
def test_processes_of_a_launcher_join(small, tmp_path, launcher):
    """JAX reads the launcher's variables; that both see the difference shows that they joined."""
    first = command(small, tmp_path / "w")
    of_each = {k: v if v == "01" else [v] * 2 for k, v in launcher.items()}
    of_each |= {k: ["", ""] for k in ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID")}
    of_each["JAX_COORDINATOR_PORT"] = [str(free_port())] * 2
    for lines in refusals(start([first, [*first, "--config.seed=1"]], **of_each)):
        (line,) = lines
        assert "config.seed: 1, not 0" in line


def test_hosts_with_different_data(small, tiny_folder, tmp_path):
    """Each process sees other images under the same path, like two hosts with their own disks."""
    a, b = tmp_path / "a", tmp_path / "b"

    shutil.copytree(tiny_folder, a / "tiny")
    shutil.copytree(tiny_folder, b / "tiny")
    shutil.copy(b / "tiny" / "train" / "red" / "0.png", b / "tiny" / "train" / "red" / "1.png")
    small.data.name = "folder:~/tiny"
    processes = start([command(small, tmp_path / "w")] * 2, HOME=[str(a), str(b)])
    for lines in refusals(processes):
        (line,) = lines
        assert "process 1" in line and "the data of the train split" in line


def test_different_numbers_of_processes(small, tmp_path):
    processes = start([command(small, tmp_path / "w")] * 2, NUM_PROCESSES=["2", "3"])
    for lines in refusals(processes):
        (line,) = lines
        assert "process 1" in line and "NUM_PROCESSES: '3', not '2'" in line


def test_different_numbers_of_devices(small, tmp_path):
    flags = [f"--xla_force_host_platform_device_count={n}" for n in (1, 2)]
    for lines in refusals(start([command(small, tmp_path / "w")] * 2, XLA_FLAGS=flags)):
        (line,) = lines
        assert "process 1 has 2 devices and process 0 1" in line


def test_error_of_one_process_ends_all(small, tiny_folder, tmp_path):
    """Only process 1 finds the error in its data, and only process 0 the one in the workdir."""
    shutil.copytree(tiny_folder, tmp_path / "a" / "tiny")
    small.data.name = "folder:~/tiny"
    homes = [str(tmp_path / "a"), str(tmp_path)]
    for lines in refusals(start([command(small, tmp_path / "w")] * 2, HOME=homes)):
        (line,) = lines
        assert "process 1: " in line and str(tmp_path / "tiny") in line
    assert not (tmp_path / "w").exists()
    small.data.name = f"folder:{tiny_folder}"
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "config.json").write_text("[")
    for lines in refusals(start([command(small, tmp_path / "w")] * 2)):
        (line,) = lines
        assert "process 0: " in line and "config.json is not the config of a run" in line


@pytest.mark.parametrize(("ids", "missing"), [("01", 2), ("12", 0), ("011", 2)])
def test_missing_or_duplicate_process(small, tmp_path, ids, missing):
    """Each process says whom it waits for, where and how long; JAX then ends it."""
    code = "import runpy; from vit_jax import distributed as d; d._JOIN_SECONDS = 3; "
    code += "runpy.run_module('vit_jax.main', run_name='__main__', alter_sys=True)"
    arguments = [sys.executable, "-c", code, *command(small, tmp_path / "w")[3:]]
    processes = start([arguments] * len(ids), PROCESS_ID=ids, NUM_PROCESSES="3" * len(ids))
    for index, (code, _, stderr) in zip(ids, ends(processes, timeout=60), strict=True):
        assert code == -signal.SIGABRT, stderr
        (line,) = [x for x in stderr.splitlines() if x.startswith("Joining: ")]
        assert f"process {index} of 3 (numbered from 0) at 127.0.0.1:" in line
        assert "waiting up to 3 s for the others" in line
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_lost_process_ends_the_other(small, tmp_path, victim, number):
    small.steps, small.save_every = 100_000, ""
    processes = start([command(small, tmp_path / "w")] * 2)
    path, deadline = tmp_path / "w" / "metrics.jsonl", time.monotonic() + 100
    other = processes[1 - victim]
    try:
        while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
            assert other.poll() is None, other.stderr.read()
            time.sleep(0.1)
        processes[victim].send_signal(number)
        began = time.monotonic()
        _, stderr = other.communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
        processes[victim].communicate()
    assert other.returncode == -signal.SIGABRT, stderr
    assert time.monotonic() - began < 25
    assert "Traceback" not in stderr
    says = "unhealthy (stopped sending heartbeats):\n1\n" if victim else "coordination service"
    assert says in stderr, stderr


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({}, Processes(1, 0, None)),
        ({"COORDINATOR": "a:1", "NUM_PROCESSES": "1", "PROCESS_ID": "0"}, Processes(1, 0, "a:1")),
        ({"COORDINATOR": "a:1", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}, Processes(2, 1, "a:1")),
        (
            {
                "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2", "SLURM_STEP_NUM_NODES": "3",
                "SLURM_STEP_NODELIST": "gpu[07-09]",
            },
            Processes(3, 2, None, "SLURM on gpu[07-09]", whole_host=True),
        ),
        (
            {
                "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_NUM_NODES": "2",
                "SLURM_STEP_NODELIST": "a,b", "CUDA_VISIBLE_DEVICES": "0,1",
            },
            Processes(4, 1, None, "SLURM on a,b", whole_host=False),
        ),
        (  # srun --gpus-per-task=1: each task sees only its own
            {
                "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_NUM_NODES": "2",
                "SLURM_STEP_NODELIST": "a,b", "CUDA_VISIBLE_DEVICES": "0",
            },
            Processes(4, 1, None, "SLURM on a,b", whole_host=True),
        ),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, Processes(1, 0, None)),
        (
            {
                "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
            },
            Processes(2, 1, None, "Open MPI", whole_host=True),
        ),
    ],
)  # fmt: skip
def test_processes_of_an_environment(environment, processes):
    assert Processes.find(environment) == processes


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"COORDINATOR": "a:1"}, "without NUM_PROCESSES, PROCESS_ID"),
        ({"COORDINATOR": "a:1", "NUM_PROCESSES": "2", "PROCESS_ID": "2"}, "from 0 to 1"),
        ({"COORDINATOR": "a:1", "NUM_PROCESSES": "2", "PROCESS_ID": "x"}, "whole numbers"),
        ({"COORDINATOR": "a", "NUM_PROCESSES": "2", "PROCESS_ID": "0"}, "host:port"),
        ({"COORDINATOR": "a:70000", "NUM_PROCESSES": "2", "PROCESS_ID": "0"}, "host:port"),
    ],
)
def test_wrong_variables(environment, says):
    with pytest.raises(UserError, match=says):
        Processes.find(environment)
