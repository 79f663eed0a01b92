"""Inconsistent processes end with one line each, or report which process is missing."""

import contextlib
import shutil
import signal
import socket
import sys
import time

from process_helpers import finish, free_port, start
from runs import command

# The variables by which JAX joins two processes; "01" is "0" in process 0 and "1" in process 1.
SLURM = {
    "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "01", "SLURM_LOCALID": "01",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "01", "OMPI_COMM_WORLD_LOCAL_RANK": "01",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
# Joins the other processes as a command does, without importing what a command needs.
JOIN = """
from vit_jax.parallel import processes as p
p._JOIN_SECONDS = 3
with p.joined():
    pass
"""


def launched(launcher):
    """The environment of two processes that a launcher starts, as `start` takes it."""
    of_each = {k: v if v == "01" else [v] * 2 for k, v in launcher.items()}
    of_each |= {k: ["", ""] for k in ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID")}
    return of_each | {"JAX_COORDINATOR_PORT": [str(free_port())] * 2}


def refusals(processes, timeout=90):
    """The error lines of processes, all of which must exit with code 2."""
    began = time.monotonic()
    ended = finish(processes, timeout)
    assert time.monotonic() - began < 60
    for code, _, stderr in ended:
        assert code == 2, stderr
        assert "Traceback" not in stderr
    return [[x for x in stderr.splitlines() if x.startswith("error: ")] for _, _, stderr in ended]


def test_hosts_with_different_configs_and_numbers_of_processes(small, tmp_path):
    """Foreign connections to the coordinator's port, idle or not, do not disturb the processes."""
    port, first, strangers = free_port(), command(small, tmp_path / "w"), []
    commands = [first, [*first, "--config.seed=1"]]
    processes = start(commands, port=port, NUM_PROCESSES=["2", "3"])
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
        assert "NUM_PROCESSES: '3', not '2'" in line
    assert not (tmp_path / "w").exists()
    for stranger in strangers:
        stranger.close()


def test_hosts_with_different_data(small, tiny_folder, tmp_path):
    """Each process sees other images under the same path, like two hosts with their own disks.

    They can report the difference only if SLURM's variables let them join.
    """
    a, b = tmp_path / "a", tmp_path / "b"
    shutil.copytree(tiny_folder, a / "tiny")
    shutil.copytree(tiny_folder, b / "tiny")
    shutil.copy(b / "tiny" / "train" / "red" / "0.png", b / "tiny" / "train" / "red" / "1.png")
    small.data.name = "folder:~/tiny"
    environment = launched(SLURM) | {"HOME": [str(a), str(b)]}
    processes = start([command(small, tmp_path / "w")] * 2, **environment)
    for lines in refusals(processes):
        (line,) = lines
        assert "process 1" in line and "the data of the train split" in line


def test_different_numbers_of_devices(small, tmp_path):
    """They can report the difference only if Open MPI's variables let them join."""
    flags = [f"--xla_force_host_platform_device_count={n}" for n in (1, 2)]
    environment = launched(OPEN_MPI) | {"XLA_FLAGS": flags}
    for lines in refusals(start([command(small, tmp_path / "w")] * 2, **environment)):
        (line,) = lines
        assert "process 1 has 2 devices, but process 0 has 1" in line


def test_error_of_one_process_ends_all(small, tiny_folder, tmp_path):
    """Only process 1 has an error in its data, and only process 0 one in the workdir."""
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


def test_missing_or_duplicate_process():
    """Each process prints which processes it waits for, where, and how long; JAX then ends it."""
    waiting = [sys.executable, "-c", JOIN]
    runs = [
        (ids, start([waiting] * len(ids), PROCESS_ID=ids, NUM_PROCESSES="3" * len(ids)))
        for ids in ("12", "011")  # 0 is missing; 2 is missing and 1 is duplicated
    ]
    for ids, processes in runs:
        for index, (code, _, stderr) in zip(ids, finish(processes, timeout=60), strict=True):
            assert code == -signal.SIGABRT, stderr
            (line,) = [x for x in stderr.splitlines() if x.startswith("Joining: ")]
            assert f"process {index} of 3 (numbered from 0) at 127.0.0.1:" in line
            assert "waiting up to 3 s for the others" in line
