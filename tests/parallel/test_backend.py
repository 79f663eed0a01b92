"""A GPU that JAX does not use is an error."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from vit_jax.errors import UserError
from vit_jax.parallel import backend

ROOT = pathlib.Path(__file__).parents[2]


# Simulates a GPU: a file that exists takes the place of the driver's.
GPU = "from vit_jax.parallel import backend; backend._NVIDIA_DRIVER = '/dev/null'; import runpy; "
GPU += "runpy.run_module('vit_jax.main', run_name='__main__', alter_sys=True)"


def test_unused_gpu_stops_the_command(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    command = [sys.executable, "-c", GPU, "--workdir", str(tmp_path / "w")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert "an NVIDIA GPU, but JAX did not start CUDA (Unknown backend" in line
    assert "JAX_PLATFORMS=cpu" in line
    assert not (tmp_path / "w").exists()


def test_cpu_can_be_selected_on_a_machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr(backend, "_NVIDIA_DRIVER", os.devnull)
    backend.check_backend()  # the tests set JAX_PLATFORMS=cpu
    chosen = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    try:
        with pytest.raises(UserError, match="an NVIDIA GPU"):
            backend.check_backend()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hides the GPU
        backend.check_backend()
    finally:
        jax.config.update("jax_platforms", chosen)
