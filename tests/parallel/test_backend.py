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


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi that lists one GPU on PATH."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_unused_gpu_stops_the_command(nvidia_smi, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    command = [sys.executable, "-m", "vit_jax.main", "--workdir", str(tmp_path / "w")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert "GPU 0: NVIDIA H100 80GB HBM3, but JAX did not start CUDA (Unknown backend" in line
    assert "JAX_PLATFORMS=cpu" in line
    assert not (tmp_path / "w").exists()


def test_cpu_can_be_selected_on_a_machine_with_a_gpu(nvidia_smi, monkeypatch):
    backend.check_backend()  # the tests set JAX_PLATFORMS=cpu
    chosen = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    try:
        with pytest.raises(UserError, match="GPU 0"):
            backend.check_backend()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hides the GPU
        backend.check_backend()
    finally:
        jax.config.update("jax_platforms", chosen)
