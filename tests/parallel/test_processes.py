"""The processes of a run, from environment variables."""

import jax
import pytest
from jax.experimental import multihost_utils

from vit_jax.errors import UserError
from vit_jax.parallel.processes import find_processes, shared_errors


def test_processes_found_by_three_variables():
    environment = {"COORDINATOR": "a:1", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}
    name, arguments = find_processes(environment | {"SLURM_STEP_NUM_TASKS": "3"})
    assert name == "process 1 of 2 (numbered from 0) at a:1"
    assert arguments.pop("cluster_detection_method") == "deactivate"
    assert list(arguments.values()) == ["a:1", 2, 1]


SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}
ALL_GPUS, OWN_GPU = {"local_device_ids": []}, {}


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, ALL_GPUS),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, OWN_GPU),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2),2"}, OWN_GPU),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1"}, OWN_GPU),
        # srun --gpus-per-task=1: each task sees only its own GPU
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0"}, ALL_GPUS),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, ALL_GPUS),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, OWN_GPU),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "12"}, OWN_GPU),
    ],
)
def test_processes_of_a_launcher_use_all_visible_gpus_or_their_own(environment, arguments):
    """Without local_device_ids, JAX uses the GPU with the process's number on its host."""
    launcher = "SLURM" if "SLURM_PROCID" in environment else "Open MPI"
    expected = f"one of 4 processes started by {launcher}", arguments
    assert find_processes(environment) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"COORDINATOR": "a:1", "NUM_PROCESSES": "1", "PROCESS_ID": "0"},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_one_process(environment):
    assert find_processes(environment) is None


@pytest.mark.parametrize(
    ("coordinator", "count", "index"),
    [
        ("a:1", "", ""),
        ("a:1", "2", "2"),
        ("a:1", "2", "x"),
        ("a", "2", "0"),
        ("a:70000", "2", "0"),
        (":1", "2", "0"),
    ],
)
def test_invalid_variables(coordinator, count, index):
    values = {"COORDINATOR": coordinator, "NUM_PROCESSES": count, "PROCESS_ID": index}
    with pytest.raises(UserError) as e:
        find_processes(values)
    for name, value in values.items():
        assert f"{name}={value or 'unset'}" in str(e.value)
    assert "COORDINATOR to host:port" in str(e.value)
    assert "PROCESS_ID to a whole number from 0 to NUM_PROCESSES - 1" in str(e.value)


def test_lost_process_during_a_check(monkeypatch):
    """jax.jit raises ValueError for it; `joined` waits for JAX's own message on JaxRuntimeError."""

    def process_allgather(array):
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", process_allgather)
    with pytest.raises(jax.errors.JaxRuntimeError, match="closed by peer"), shared_errors():
        pass
