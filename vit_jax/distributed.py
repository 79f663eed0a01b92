"""Joining the processes of one run: who they are, that they agree, and that none is lost unheard.

The arrays travel by JAX's own runtime (`jax.distributed`). That aborts the process, or waits for
minutes, where a peer is missing, has the wrong number or dies; so the processes first meet at a
plain TCP socket on the coordinator's port, compare what they are about to do, and keep that
connection as a line on which each hears when another fails. Process 0 listens, the others connect.
"""

import contextlib
import json
import os
import queue
import re
import socket
import sys
import threading
import time
import traceback
from typing import NamedTuple

import jax

from vit_jax.errors import Stopped, UserError

# Process 0 waits so long for the others, and they for its answer: every host hears in a minute.
_GATHER_SECONDS, _ANSWER_SECONDS = 45, 55


class Place(NamedTuple):
    """Where a process stands among those of its run."""

    coordinator: str  # host:port
    num_processes: int
    process: int
    local_device_ids: list[int] | None  # None: all devices of the host


def find_place(environment):
    """The Place that environment variables give, or None for a process on its own.

    COORDINATOR, NUM_PROCESSES and PROCESS_ID, or those that SLURM's srun sets. Raises UserError
    for values that do not fit together.
    """
    names = ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID")
    given = {name: environment[name] for name in names if environment.get(name)}
    if given and len(given) < 3:
        missing = ", ".join(name for name in names if name not in given)
        raise UserError(f"{', '.join(given)} set without {missing}: set all three, or none")
    if given:
        coordinator, *numbers = (given[name] for name in names)
        if not all(number.isdecimal() for number in numbers):
            raise UserError(
                f"NUM_PROCESSES={numbers[0]} and PROCESS_ID={numbers[1]} must be whole numbers"
            )
        if not re.fullmatch(r".+:\d{1,5}", coordinator):
            raise UserError(f"COORDINATOR must be host:port, got {coordinator}")
        num_processes, process = map(int, numbers)
        if process >= num_processes:
            raise UserError(
                f"PROCESS_ID={process} of NUM_PROCESSES={num_processes}: "
                f"it must be from 0 to {num_processes - 1}"
            )
        return Place(coordinator, num_processes, process, None) if num_processes > 1 else None

    # SLURM_STEP_...: set by srun for the tasks it starts, not for a batch script around it.
    num_processes = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if num_processes == 1 or "SLURM_PROCID" not in environment:
        return None
    name, first, rest = re.match(
        r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", environment["SLURM_STEP_NODELIST"]
    ).groups(default="")
    job = int(environment["SLURM_JOB_ID"]) + int(environment.get("SLURM_STEP_ID", 0))
    port = 61440 + job % 4096  # the same on every host, another for the next job
    ids = None
    one_gpu_seen = "," not in environment.get("CUDA_VISIBLE_DEVICES", ",")
    if num_processes > int(environment["SLURM_STEP_NUM_NODES"]) and not one_gpu_seen:
        ids = [int(environment["SLURM_LOCALID"])]
    return Place(
        f"{name}{first}{rest}:{port}", num_processes, int(environment["SLURM_PROCID"]), ids
    )


@contextlib.contextmanager
def joined(values):
    """Joins the other processes for the length of a `with`, whose value is the Peers, or None.

    `values` is a dict of what must be the same in all, as the fields of the config. Must come
    before anything touches a device. Raises UserError, in every process, when one is missing, has
    a wrong number or other values. Where the body raises, the other processes are told and this
    one ends at once: the runtime's own way out would wait for them.
    """
    place = find_place(os.environ)
    if place is None:
        yield None
        return
    peers = Peers(place)
    try:
        peers.agree(values | {"the version of jax": jax.__version__})
        peers.stop_listening()
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process,
            local_device_ids=place.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=60,
        )
        try:
            yield peers
        except Stopped:  # by all processes after the same step
            _leave(peers)
            raise
        _leave(peers)
    except Stopped:
        raise
    except BaseException as e:
        peers.fail(e)


def _leave(peers):
    peers.close()
    jax.distributed.shutdown()


class Peers:
    """The connections between the processes of a run: process 0 with each of the others."""

    def __init__(self, place):
        self.process, self.num_processes = place.process, place.num_processes
        self._place, self._host = place, socket.gethostname()
        self._closing, self._listener = False, None
        self._lock = threading.Lock()
        self._sockets, self._hosts, self._inboxes = {}, {}, {}
        if self.process == 0:
            self._gather()
        else:
            self._connect()
        for peer in self._sockets:
            threading.Thread(target=self._listen, args=(peer,), daemon=True).start()

    def _gather(self):
        port = self._place.coordinator.rsplit(":", 1)[1]
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        try:
            self._listener = socket.create_server(
                ("", int(port)), family=family, dualstack_ipv6=family == socket.AF_INET6
            )
        except (OSError, OverflowError) as e:
            raise UserError(
                f"process 0 cannot listen on port {port} ({e}): is another process 0 running "
                "there? Else give COORDINATOR another port"
            ) from e
        deadline, problem = time.monotonic() + _GATHER_SECONDS, None
        while len(self._sockets) < self.num_processes - 1 and not problem:
            self._listener.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                came = {0, *self._sockets}
                missing = [str(i) for i in range(self.num_processes) if i not in came]
                problem = (
                    f"process {', '.join(missing)} of {self.num_processes} did not come to "
                    f"{self._place.coordinator} within {_GATHER_SECONDS} s: start one with each "
                    f"PROCESS_ID from 0 to {self.num_processes - 1}"
                )
                break
            hello = _receive_first(connection)
            if hello is None:  # not one of ours
                connection.close()
                continue
            peer, of, peer_host = hello["process"], hello["processes"], hello["host"]
            if of != self.num_processes:
                problem = (
                    f"process {peer} on {peer_host} was started with NUM_PROCESSES={of}, "
                    f"process 0 on {self._host} with {self.num_processes}: make them the same"
                )
            elif peer == 0 or peer in self._sockets:
                other = self._hosts.get(peer, self._host)
                problem = (
                    f"two processes have PROCESS_ID={peer}, on {other} and on {peer_host}: give "
                    f"each one of its own, from 0 to {self.num_processes - 1}"
                )
            key = peer if peer not in self._sockets and peer else f"a second {peer}"
            connection.settimeout(None)
            self._sockets[key], self._hosts[key] = connection, peer_host
            self._inboxes[key] = queue.SimpleQueue()
            self._send(key, {"host": self._host})
        if problem:
            self._closing = True
            for peer in self._sockets:
                self._send(peer, {"failed": problem})
            raise UserError(problem)

    def _connect(self):
        host, port = self._place.coordinator.rsplit(":", 1)
        me = {"process": self.process, "processes": self.num_processes, "host": self._host}
        deadline, reason = time.monotonic() + _ANSWER_SECONDS, "no answer"
        while time.monotonic() < deadline:
            try:
                connection = socket.create_connection((host, int(port)), timeout=3)
                connection.sendall((json.dumps(me) + "\n").encode())
                answer = _receive_first(connection)
            except (OSError, OverflowError) as e:
                answer, reason = None, e.strerror if isinstance(e, OSError) and e.strerror else e
            if answer:
                connection.settimeout(None)
                self._sockets[0], self._hosts[0] = connection, answer["host"]
                self._inboxes[0] = queue.SimpleQueue()
                return
            time.sleep(0.2)
        raise UserError(
            f"process {self.process} found no process 0 at {self._place.coordinator} within "
            f"{_ANSWER_SECONDS} s ({reason}): start one there with PROCESS_ID=0"
        )

    def stop_listening(self):
        """Leaves the coordinator's port to JAX."""
        if self._listener:
            self._listener.close()

    def agree(self, values):
        """Waits for every process to come here; raises UserError in all where values differ.

        `values` is a dict of names, as a reader knows them, to what JSON can hold.
        """
        values = json.loads(json.dumps(values))  # tuples become the lists that peers receive
        if self.process:
            self._send(0, {"values": values})
            answer = self._inboxes[0].get()["answer"]
        else:
            answer = None
            for peer in sorted(self._sockets):
                theirs = self._inboxes[peer].get()["values"]
                names = [k for k in {**values, **theirs} if values.get(k) != theirs.get(k)]
                if names and not answer:
                    told = [f"{k}: {theirs.get(k)!r}, not {values.get(k)!r}" for k in names[:5]]
                    answer = (
                        f"process {peer} on {self._hosts[peer]} differs from process 0 on "
                        f"{self._host} in {'; '.join(told)}: make them the same"
                    )
            self._closing = bool(answer)
            for peer in self._sockets:
                self._send(peer, {"answer": answer})
        if answer:
            self._closing = True
            raise UserError(answer)

    def close(self):
        """Takes leave: from here on another process may end without this one ending too."""
        self._closing = True
        for peer in self._sockets:
            self._send(peer, {"bye": True})

    def fail(self, error):
        """Tells the others that this process fails with an exception, and ends it."""
        if isinstance(error, UserError):
            message, code = str(error), 2
        elif isinstance(error, (KeyboardInterrupt, SystemExit)):
            message, code = "interrupted", 130
        else:
            time.sleep(3)  # where the cause is that another process died, we hear of it now
            traceback.print_exception(error)
            message, code = f"{type(error).__name__}: {''.join(str(error).splitlines()[:1])}", 1
        told_already, self._closing = self._closing, True
        for peer in self._sockets if not told_already else ():
            self._send(peer, {"failed": f"process {self.process} on {self._host}: {message}"})
        self._end(message, code)

    def _end(self, message, code=2):
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if self.process == 0:
            time.sleep(1)  # JAX aborts the others when its service, here, is gone: they go first
        os._exit(code)

    def _send(self, peer, message):
        with self._lock, contextlib.suppress(OSError):
            self._sockets[peer].sendall((json.dumps(message) + "\n").encode())

    def _listen(self, peer):
        """A thread for each connection, from the first message to the last."""
        failed = None
        with contextlib.suppress(OSError), self._sockets[peer].makefile("r") as lines:
            for line in lines:
                message = json.loads(line)
                if "bye" in message:
                    return
                if failed := message.get("failed"):
                    break
                if message.get("answer"):
                    self._closing = True  # before process 0 goes
                self._inboxes[peer].put(message)
        if self._closing:
            return
        self._closing = True
        failed = failed or (
            f"process {peer} on {self._hosts[peer]} has ended, and with it the run: its own output "
            "says why; the same command goes on from the newest checkpoint"
        )
        for other in self._sockets:
            if other != peer:
                self._send(other, {"failed": failed})
        self._end(failed)


def _receive_first(connection):
    """The first line of a connection as JSON, or None where there is none in a few seconds."""
    connection.settimeout(5)
    text = b""
    try:
        while not text.endswith(b"\n") and len(text) < 1000:
            byte = connection.recv(1)  # no more than the line: what follows is another reader's
            if not byte:
                return None
            text += byte
        message = json.loads(text)
        return message if isinstance(message, dict) and "host" in message else None
    except (OSError, ValueError):
        return None
