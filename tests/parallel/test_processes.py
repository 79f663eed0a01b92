"""The processes of a run, from environment variables."""

import pytest

from vit_jax.errors import UserError
from vit_jax.parallel.processes import find_processes


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"COORDINATOR": "a:1", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}, "process 1 of 2"),
        ({"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2"}, "one of 3 processes started by SLURM"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "one of 2 processes started by Open MPI"),
    ],
)
def test_several_processes(environment, name):
    found, arguments = find_processes(environment)
    assert found.startswith(name)
    if "COORDINATOR" in environment:
        assert arguments.pop("cluster_detection_method") == "deactivate"
        assert list(arguments.values()) == ["a:1", 2, 1]
    else:
        assert arguments == {"local_device_ids": []}  # a process uses every device that it sees


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
