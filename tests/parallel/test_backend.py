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
    backend.start_backend()  # the tests set JAX_PLATFORMS=cpu
    chosen = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    try:
        with pytest.raises(UserError, match="an NVIDIA GPU"):
            backend.start_backend()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hides the GPU
        backend.start_backend()
    finally:
        jax.config.update("jax_platforms", chosen)


def test_deterministic_run_compiles_with_the_flag(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={tmp_path}")  # writes each program's options
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    arguments = [f"--config.data.name=folder:{tiny_folder}", "--config.batch_size=16"]
    arguments += ["--config.model.depth=1", "--config.deterministic=true", "--dry_run"]
    command = [sys.executable, "-m", "vit_jax.main", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (options,) = tmp_path.glob("*jit_train_step.debug_options")
    assert "xla_gpu_deterministic_ops: true" in options.read_text()
    assert "deterministic programs on a GPU" in done.stdout


def test_determinism_cannot_be_required_after_the_backend_has_started(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    jax.devices()
    with pytest.raises(UserError, match=r"JAX has already started: set .* XLA_FLAGS=--xla_gpu"):
        backend.require_determinism()
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    backend.require_determinism()  # the process was started with it
