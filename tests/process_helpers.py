"""Starts the processes of a run over loopback."""

import os
import socket
import subprocess

from runs import ROOT


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


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
        }
        own |= {k: v[i] for k, v in environment.items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(arguments, cwd=ROOT, env=os.environ | own, **pipes))
    return processes


def finish(processes, timeout=120):
    """[(exit code, stdout, stderr)]; none is left running."""
    try:
        output = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, *o) for p, o in zip(processes, output, strict=True)]
