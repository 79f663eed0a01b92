"""JAX's backend: compilation cache, deterministic programs, and checks of the devices."""

import os
import re

import jax
from jax._src import xla_bridge

from vit_jax.errors import UserError, expand_home

# Deterministic algorithms only, chosen without timing candidates (autotuning).
_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
_NVIDIA_DRIVER = "/dev/nvidiactl"  # exists on a machine, or in a container, that has an NVIDIA GPU


def enable_compilation_cache() -> None:
    """Caches compiled programs on disk, to shorten later startups."""
    if not jax.config.jax_compilation_cache_dir:  # pyrefly: ignore[missing-attribute]
        cache = expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "vit_jax" / "xla"))


def require_determinism() -> None:
    """Makes XLA's GPU programs bit-identical from run to run. Call it before JAX's backend starts.

    Raises UserError if the backend has already started without the flag. On a CPU, programs are
    deterministic without it.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    if _DETERMINISTIC in flags:
        return
    if xla_bridge.backends_are_initialized():
        raise UserError(
            "config.deterministic=true must be set before JAX starts, but JAX has already started: "
            f"set the environment variable XLA_FLAGS={_DETERMINISTIC}, and restart Python"
        )
    os.environ["XLA_FLAGS"] = " ".join([*flags, _DETERMINISTIC])


def require_fused_attention(device: jax.Device) -> None:
    """Raises UserError if a device cannot run cuDNN's fused attention."""
    capability = getattr(device, "compute_capability", "")
    if not re.fullmatch(r"\d+\.\d+", capability) or float(capability) < 8:
        raise UserError(
            "config.model.attention=cudnn needs NVIDIA GPUs of compute capability 8.0 or higher "
            f"(Ampere), not {device.device_kind}: use model.attention=xla"
        )


def start_backend() -> None:
    """Starts JAX with the compilation cache.

    Raises UserError if JAX cannot start, or falls back to the CPU despite an NVIDIA GPU.
    JAX_PLATFORMS=cpu chooses the CPU, and an empty CUDA_VISIBLE_DEVICES hides the GPUs.
    """
    enable_compilation_cache()
    try:
        backend = jax.default_backend()
    except RuntimeError as e:  # a platform that JAX_PLATFORMS requires does not start
        raise UserError(f"JAX cannot start: {e}") from e
    chosen = jax.config.jax_platforms  # pyrefly: ignore[missing-attribute]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if backend != "cpu" or chosen or hidden or not os.path.exists(_NVIDIA_DRIVER):
        return
    try:
        jax.devices("cuda")
    except RuntimeError as e:
        raise UserError(
            f"this machine has an NVIDIA GPU, but JAX did not start CUDA ({e}): install "
            "'jax[cuda13]' (driver 580 or newer) or 'jax[cuda12]' (driver 525 or newer), which "
            "launch.sh does with CUDA=13 or CUDA=12; or set JAX_PLATFORMS=cpu to run on the CPU"
        ) from e
