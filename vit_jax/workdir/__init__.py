"""The files of a run."""

from vit_jax.workdir.checkpoints import newest_intact_step, restore_for_inference, saved_steps
from vit_jax.workdir.files import write_errors, write_json, write_text
from vit_jax.workdir.folder import Workdir, check_free_space, environment, read_config
from vit_jax.workdir.metrics import import_wandb, read_lines
from vit_jax.workdir.progress import BadStep, Throughput, TrainLog, epoch_means, format_duration

__all__ = [
    "BadStep",
    "Throughput",
    "TrainLog",
    "Workdir",
    "check_free_space",
    "environment",
    "epoch_means",
    "format_duration",
    "import_wandb",
    "newest_intact_step",
    "read_config",
    "read_lines",
    "restore_for_inference",
    "saved_steps",
    "write_errors",
    "write_json",
    "write_text",
]
