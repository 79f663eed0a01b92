"""Several processes: joining them, and checking that they agree.

JAX's runtime (`jax.distributed`) connects the processes and detects a lost one. If a peer is
missing or lost, it ends the process with SIGABRT (exit code 134) and its own message, so each
process first prints its number and how long it waits for the others.
"""

import collections
import contextlib
import importlib.util
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Generator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax.errors import Stopped, UserError, run_command

_JOIN_SECONDS, _HEARTBEAT_SECONDS = 60, 10


def find_processes(environment: Mapping[str, str]) -> tuple[str, dict[str, Any]] | None:
    """Returns (a description, the arguments of jax.distributed.initialize); None for one process.

    Reads COORDINATOR, NUM_PROCESSES, and PROCESS_ID, and raises UserError if they are inconsistent.
    Without them, JAX derives the arguments from a launcher's variables: SLURM's srun, Open
    MPI's mpirun, or an indexed Kubernetes job.
    """
    names = ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID")
    coordinator, count, index = values = [environment.get(name, "") for name in names]
    if not any(values):
        return _find_launcher(environment)
    _, _, port = coordinator.rpartition(":")
    valid = re.fullmatch(r".+:\d{1,5} \d{1,9} \d{1,9}", " ".join(values), re.ASCII)
    if not valid or not 0 < int(port) < 2**16 or int(index) >= int(count):
        given = ", ".join(f"{name}={environment.get(name) or 'unset'}" for name in names)
        raise UserError(
            f"{given}: set COORDINATOR to host:port, NUM_PROCESSES to the number of processes, and "
            "PROCESS_ID to a whole number from 0 to NUM_PROCESSES - 1; or unset all three"
        )
    if count == "1":
        return None
    return f"process {index} of {count} (numbered from 0) at {coordinator}", {
        "coordinator_address": coordinator,
        "num_processes": int(count),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",
    }


def _find_launcher(environment):
    """Returns what `find_processes` returns, from a launcher's variables; None for one process."""
    # srun sets SLURM_STEP_* for the tasks that it starts, not for a batch script.
    for name, total, per_host in (
        ("SLURM", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
        ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ):
        if (count := environment.get(total, "1")) != "1":
            alone = re.fullmatch(r"1(\(x\d+\))?", environment.get(per_host, ""))
            one_gpu = "," not in environment.get("CUDA_VISIBLE_DEVICES", ",")
            # By default, JAX uses only the GPU with the process's number on its host.
            arguments = {"local_device_ids": []} if alone or one_gpu else {}
            return f"one of {count} processes started by {name}", arguments
    if "JOB_COMPLETION_INDEX" in environment and importlib.util.find_spec("kubernetes"):
        return "one of the processes of a Kubernetes job", {}  # JAX uses every GPU of the pod
    return None


@contextlib.contextmanager
def joined() -> Generator[None]:
    """A context in which this process has joined the run's other processes, if any.

    Must be entered before anything uses a device. If the body raises in one process, that process
    reports the error and exits, and JAX ends the others when it misses the heartbeat.
    """
    processes = find_processes(os.environ)
    if processes is None:
        yield
        return
    name, arguments = processes
    print(f"Joining: {name}; waiting up to {_JOIN_SECONDS} s for the others", file=sys.stderr)
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as e:
        raise UserError(
            f"cannot join: {name}: {e}; set COORDINATOR to process 0's host and a free port there, "
            "NUM_PROCESSES to the same number in every process, and PROCESS_ID to a different one"
        ) from e
    try:
        yield
    except (Stopped, _RaisedInAll):
        jax.distributed.shutdown()
        raise
    except BaseException as e:
        if isinstance(e, jax.errors.JaxRuntimeError):
            # Another process may have been lost: wait for JAX to name that process and abort.
            print(f"error: {str(e).splitlines()[0]}", file=sys.stderr)
            time.sleep(_HEARTBEAT_SECONDS + 5)
        _exit(e)
    jax.distributed.shutdown()


def _exit(error):
    """Reports an error and ends this process: a normal exit would wait for the others."""

    def fail():
        raise error

    code = 1
    try:
        run_command(fail)
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    if jax.process_index() == 0:
        time.sleep(3)  # JAX aborts the others when process 0 exits: let them report their own error
    os._exit(code)


class _RaisedInAll(UserError):
    """An error that every process raises at the same point."""


def check_same(values: Mapping[str, Any]) -> None:
    """Raises UserError in every process unless all pass the same {name: JSON value}.

    Also raises it if the processes have different numbers of devices.
    """
    if jax.process_count() == 1:
        return
    devices = collections.Counter(device.process_index for device in jax.devices())
    for index, count in sorted(devices.items()):
        if count != devices[0]:
            raise _RaisedInAll(
                f"process {index} has {count} devices, but process 0 has {devices[0]}: start every "
                "process with the same number of devices"
            )
    first, *others = _gather(values)
    for index, own in enumerate(others, start=1):
        differences = [
            f"{name}: {own.get(name)!r}, not {first.get(name)!r}"
            for name in first | own
            if own.get(name) != first.get(name)
        ]
        if differences:
            raise _RaisedInAll(
                f"process {index} differs from process 0 in {'; '.join(differences[:5])}: make "
                "them the same"
            )


@contextlib.contextmanager
def shared_errors() -> Generator[None]:
    """Raises one process's UserError in every process. The body must not wait for the others."""
    if jax.process_count() == 1:
        yield
        return
    message = ""
    try:
        yield
    except UserError as e:
        message = str(e)
    for index, problem in enumerate(_gather(message)):
        if problem:
            raise _RaisedInAll(f"process {index}: {problem}")


def _gather(value):
    """Returns the JSON value of every process, in order."""
    data = json.dumps(value).encode()
    with jax.transfer_guard("allow"):  # process_allgather fetches without jax.device_get
        try:
            size = multihost_utils.process_allgather(np.int32(len(data))).max()
            padded = np.frombuffer(data.ljust(size), np.uint8)
            rows = multihost_utils.process_allgather(padded)
        except ValueError as e:  # jax.jit raises it, on a CPU, if another process is lost
            raise jax.errors.JaxRuntimeError(str(e)) from e
    return [json.loads(row.tobytes()) for row in rows]
