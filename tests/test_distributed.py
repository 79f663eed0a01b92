"""Several processes over loopback: the same training as one, and an end that speaks."""

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
from vit_jax import distributed
from vit_jax.distributed import Place, find_place
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


def start(commands, *, devices=1, **environment):
    """One process a command, numbered in order; `environment` overrides, a list one a process."""
    port = free_port()
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


def test_killed_on_two_processes_it_goes_on_on_one_and_on_four(small, tmp_path):
    small.steps, small.save_every = 40, "10 steps"
    small.optim.peak_lr = 1e-4
    train(small, tmp_path / "never")
    small.mesh.fsdp = 4
    processes = start([command(small, tmp_path / "one")] * 2, devices=2)
    deadline = time.monotonic() + 100
    while not list((tmp_path / "one").glob("checkpoints/[1-9]0")) and time.monotonic() < deadline:
        assert processes[1].poll() is None, processes[1].stderr.read()
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    ends(processes)
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
    """The one line that each process ended with, exit code 2."""
    began = time.monotonic()
    told = ends(processes, timeout)
    assert time.monotonic() - began < 60
    for code, _, stderr in told:
        assert code == 2, stderr
    return [[x for x in stderr.splitlines() if x.startswith("error: ")] for _, _, stderr in told]


def test_hosts_with_different_configs(small, tmp_path):
    first = command(small, tmp_path / "w")
    for lines in refusals(start([first, [*first, "--config.seed=1"]])):
        (line,) = lines
        assert "config.seed: 1, not 0" in line and "process 1" in line
    assert not (tmp_path / "w").exists()


def test_hosts_with_different_data(small, tiny_folder, tmp_path):
    """Each process sees the same path with other images in it, as two hosts' own disks may have."""
    a, b = tmp_path / "a", tmp_path / "b"

    shutil.copytree(tiny_folder, a / "tiny")
    shutil.copytree(tiny_folder, b / "tiny")
    shutil.copy(b / "tiny" / "train" / "red" / "0.png", b / "tiny" / "train" / "red" / "1.png")
    small.data.name = "folder:~/tiny"
    processes = start([command(small, tmp_path / "w")] * 2, HOME=[str(a), str(b)])
    for lines in refusals(processes):
        (line,) = lines
        assert "the data of the train split" in line


def test_two_processes_of_one_number(small, tmp_path):
    processes = start([command(small, tmp_path / "w")] * 3, PROCESS_ID=["0", "1", "1"])
    for lines in refusals(processes):
        (line,) = lines
        assert "two processes have PROCESS_ID=1" in line


@pytest.mark.parametrize(
    ("ids", "says"),
    [("01", "process 2 of 3 did not come"), ("12", "found no process 0 at 127.0.0.1")],
)
def test_a_missing_process(small, tmp_path, ids, says):
    assert distributed._GATHER_SECONDS < distributed._ANSWER_SECONDS < 60
    code = "import runpy; from vit_jax import distributed as d; "
    code += "d._GATHER_SECONDS, d._ANSWER_SECONDS = 5, 8; "
    code += "runpy.run_module('vit_jax.main', run_name='__main__', alter_sys=True)"
    arguments = [sys.executable, "-c", code, *command(small, tmp_path / "w")[3:]]
    for lines in refusals(start([arguments] * 2, PROCESS_ID=ids, NUM_PROCESSES="33")):
        (line,) = lines
        assert says in line


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_is_heard_of(small, tmp_path, victim):
    small.steps, small.save_every = 100_000, ""
    processes = start([command(small, tmp_path / "w")] * 2)
    path, deadline = tmp_path / "w" / "metrics.jsonl", time.monotonic() + 100
    try:
        while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
            assert processes[1 - victim].poll() is None, processes[1 - victim].stderr.read()
            time.sleep(0.1)
    finally:
        processes[victim].send_signal(signal.SIGKILL)
    code, _, stderr = ends(processes, timeout=60)[1 - victim]
    assert f"error: process {victim} on" in stderr, stderr
    assert code == 2


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"COORDINATOR": "a:1", "NUM_PROCESSES": "1", "PROCESS_ID": "0"}, None),
        (
            {"COORDINATOR": "a:1", "NUM_PROCESSES": "2", "PROCESS_ID": "1"},
            Place("a:1", 2, 1, None),
        ),
        (
            {
                "SLURM_JOB_ID": "4100", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "3",
                "SLURM_PROCID": "2", "SLURM_STEP_NODELIST": "gpu[07-09,12]-ib,cpu1",
                "SLURM_STEP_NUM_NODES": "3", "SLURM_LOCALID": "0",
            },
            Place("gpu07-ib:61445", 3, 2, None),
        ),
        (
            {
                "SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1",
                "SLURM_STEP_NODELIST": "a,b", "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1",
                "CUDA_VISIBLE_DEVICES": "0,1",
            },
            Place("a:61441", 4, 1, [1]),
        ),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script
    ],
)  # fmt: skip
def test_place_among_the_processes(environment, place):
    assert find_place(environment) == place


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"COORDINATOR": "a:1"}, "without NUM_PROCESSES, PROCESS_ID"),
        ({"COORDINATOR": "a:1", "NUM_PROCESSES": "2", "PROCESS_ID": "2"}, "from 0 to 1"),
        ({"COORDINATOR": "a:1", "NUM_PROCESSES": "2", "PROCESS_ID": "x"}, "whole numbers"),
        ({"COORDINATOR": "a", "NUM_PROCESSES": "2", "PROCESS_ID": "0"}, "host:port"),
    ],
)
def test_wrong_places(environment, says):
    with pytest.raises(UserError, match=says):
        find_place(environment)
