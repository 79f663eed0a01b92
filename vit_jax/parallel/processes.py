"""Multi-process setup: finding and joining a run's processes, and checking that they agree.

JAX's runtime (`jax.distributed`) connects the processes, transfers the arrays, and detects a lost
process. It ends a process whose peer is missing or lost with SIGABRT (exit code 134) and a message
of its own, so each process prints beforehand which processes it waits for.
"""

import collections
import contextlib
import importlib.util
import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax.errors import Stopped, UserError, run_command

_JOIN_SECONDS, _HEARTBEAT_SECONDS = 60, 10


class Processes(NamedTuple):
    """The processes of a run according to the environment, and this process's index."""

    # None: JAX gets it from the launcher.
    count: int | None  # type: ignore[assignment]
    index: int | None  # type: ignore[assignment]
    coordinator: str | None  # host:port, on which process 0 listens
    launcher: str = ""
    whole_host: bool = True  # this process uses every device that it sees

    @classmethod
    def find(cls, environment: Mapping[str, str]) -> "Processes":
        """Reads COORDINATOR, NUM_PROCESSES, and PROCESS_ID, or the variables of a launcher.

        Launchers are SLURM's srun, Open MPI's mpirun, and indexed Kubernetes jobs. Without any of
        these the run has one process. Raises UserError for inconsistent values.
        """
        names = ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID")
        given = {name: environment[name] for name in names if environment.get(name)}
        if not given:
            return cls._from_launcher(environment)
        if missing := [name for name in names if name not in given]:
            raise UserError(
                f"{', '.join(given)} set without {', '.join(missing)}: set all three or none"
            )
        coordinator, *numbers = given.values()
        if not all(re.fullmatch("[0-9]{1,9}", number) for number in numbers):
            raise UserError(
                f"NUM_PROCESSES={numbers[0]} and PROCESS_ID={numbers[1]} must be whole numbers"
            )
        port = re.fullmatch(r".+:([0-9]{1,5})", coordinator)
        if not port or not 0 < int(port[1]) < 2**16:
            raise UserError(f"COORDINATOR must be host:port, got {coordinator}")
        count, index = map(int, numbers)
        if index >= count:
            raise UserError(
                f"PROCESS_ID={index} with NUM_PROCESSES={count}: it must be from 0 to {count - 1}"
            )
        return cls(count, index, coordinator)

    @classmethod
    def _from_launcher(cls, environment):
        def number(name):
            return int(environment.get(name, 1))

        # srun sets SLURM_STEP_* for the tasks that it starts, not for a batch script.
        if number("SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in environment:
            count, index = number("SLURM_STEP_NUM_TASKS"), number("SLURM_PROCID")
            launcher = f"SLURM on {environment.get('SLURM_STEP_NODELIST', 'its nodes')}"
            alone = count == number("SLURM_STEP_NUM_NODES")
        elif number("OMPI_COMM_WORLD_SIZE") > 1:
            count, index = number("OMPI_COMM_WORLD_SIZE"), number("OMPI_COMM_WORLD_RANK")
            launcher, alone = "Open MPI", number("OMPI_COMM_WORLD_LOCAL_SIZE") == 1
        elif {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys() and (
            importlib.util.find_spec("kubernetes")
        ):
            return cls(None, None, None, "the Kubernetes job")
        else:
            return cls(1, 0, None)
        one_gpu_visible = "," not in environment.get("CUDA_VISIBLE_DEVICES", ",")
        return cls(count, index, None, launcher, alone or one_gpu_visible)

    def __str__(self):
        if self.count is None:
            return f"the processes of {self.launcher}"
        where = self.coordinator or f"process 0 ({self.launcher})"
        return f"process {self.index} of {self.count} (numbered from 0) at {where}"

    def join(self) -> None:
        """Joins the other processes. Must be called before anything uses a device.

        Raises UserError if JAX cannot start. JAX aborts this process if another does not join.
        """
        _report(
            f"Joining: {self}; waiting up to {_JOIN_SECONDS} s for the others. "
            "If one does not join, JAX aborts this process with DEADLINE_EXCEEDED."
        )
        try:
            jax.distributed.initialize(
                self.coordinator,
                self.count,
                self.index,
                cluster_detection_method="deactivate" if self.coordinator else None,
                initialization_timeout=_JOIN_SECONDS,
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            )
        except (RuntimeError, ValueError, OSError) as e:
            raise UserError(
                f"cannot join: {self}: {_first_line(e)}; set COORDINATOR to a free port of process "
                "0's host, and NUM_PROCESSES and PROCESS_ID"
            ) from e
        if self.whole_host:  # otherwise JAX uses only the GPU with the process's local number
            jax.config.update("jax_cuda_visible_devices", "all")


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """A context in which this process has joined the run's other processes, if any.

    Must be entered before anything uses a device. If the body raises in one process, that process
    reports the error and exits immediately, and JAX ends the others when it misses the heartbeat.
    After an error of `check_same` or `shared_errors`, all exit together.
    """
    processes = Processes.find(os.environ)
    if processes.count == 1:
        yield
        return
    processes.join()
    try:
        yield
    except (Stopped, _RaisedInAll):  # raised in every process
        jax.distributed.shutdown()
        raise
    except jax.errors.JaxRuntimeError as e:  # a collective that failed because a process was lost?
        _report(
            f"error: {_first_line(e)}; if another process was lost, JAX names it within "
            f"{_HEARTBEAT_SECONDS} s and aborts: see the output of that process, then rerun the "
            "same command to resume from the newest checkpoint"
        )
        time.sleep(_HEARTBEAT_SECONDS + 5)
        _exit(e)
    except BaseException as e:
        _exit(e)
    jax.distributed.shutdown()


def _report(line):
    print(line, file=sys.stderr, flush=True)


def _exit(error):
    """Reports an error and ends this process: a normal exit would wait for the others."""

    def fail():
        raise error

    try:
        run_command(fail)
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(3)  # JAX aborts the others when process 0 exits: let them report their own error
    os._exit(code)


class _RaisedInAll(UserError):
    """An error that every process raises at the same point."""


def check_same(values: Mapping[str, Any]) -> None:
    """Checks that a dict {name: JSON value} is the same in every process; each must call it.

    Raises UserError, in every process, with the first process that differs from process 0 and the
    values. With one process it does nothing.
    """
    if jax.process_count() == 1:
        return
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        most, fewest = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        raise _RaisedInAll(
            f"process {most} has {counts[most]} devices and process {fewest} {counts[fewest]}: "
            "give every process the same number of devices"
        )
    everyone = [json.loads(text) for text in _gather(json.dumps([socket.gethostname(), values]))]
    first_host, first = everyone[0]
    for index, (host, own) in enumerate(everyone):
        differences = [
            f"{name}: {own.get(name)!r}, not {first.get(name)!r}"
            for name in first | own
            if own.get(name) != first.get(name)
        ]
        if differences:
            raise _RaisedInAll(
                f"process {index} on {host} differs from process 0 on {first_host} in "
                f"{'; '.join(differences[:5])}: make them the same"
            )


@contextlib.contextmanager
def shared_errors() -> Iterator[None]:
    """Reraises a UserError of the body in every process. Every process must enter it.

    Otherwise a process that fails alone leaves the others waiting until JAX ends them. The body
    must not wait for another process.
    """
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


def _gather(text):
    """The text of every process, in order."""
    data = np.frombuffer(f"{text}\n".encode(), np.uint8)
    # process_allgather fetches its result without jax.device_get.
    with jax.transfer_guard("allow"):
        sizes = multihost_utils.process_allgather(np.int32(data.size))
        padded = np.pad(data, (0, sizes.max() - data.size))
        rows = multihost_utils.process_allgather(padded)
    return [row[: size - 1].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
