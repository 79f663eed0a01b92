"""The processes of a run, from environment variables."""

import pytest

from vit_jax.errors import UserError
from vit_jax.parallel.processes import Processes


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
        (  # srun --gpus-per-task=1: each task sees only its own GPU
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
def test_invalid_variables(environment, says):
    with pytest.raises(UserError, match=says):
        Processes.find(environment)
