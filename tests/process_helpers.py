"""Starts the processes of a run over loopback."""

import os
import pathlib
import socket
import subprocess
import sys

import jax

from vit_jax import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(c, workdir, **constants):
    """The train command with the config `c`, under other constants of parallel.processes."""
    recipe = config_lib.from_file(ROOT / "configs" / "cifar10_vit.py")
    names = [d.split(":")[0] for d in config_lib.difference(c, recipe)]
    overrides = [f"--config.{n}={config_lib.get_field(c, n)}" for n in names]
    changes = "; ".join(f"p.{name} = {value}" for name, value in constants.items())
    code = f"from vit_jax.parallel import processes as p; {changes}\n"
    code += "import runpy; runpy.run_module('vit_jax.main', run_name='__main__', alter_sys=True)"
    program = ["-c", code] if constants else ["-m", "vit_jax.main"]
    arguments = ["--config", "configs/cifar10_vit.py", "--workdir", str(workdir)]
    return [sys.executable, *program, *arguments, *overrides]


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


def finish(processes, timeout=120):
    """[(exit code, stdout, stderr)]; none is left running."""
    try:
        output = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, *o) for p, o in zip(processes, output, strict=True)]
