"""The files of a run."""

from vit_jax.workdir.checkpoints import (
    newest_intact_step,
    read_document,
    restore_for_inference,
    saved_steps,
)
from vit_jax.workdir.files import write_errors, write_json, write_text
from vit_jax.workdir.folder import Workdir, environment
from vit_jax.workdir.metrics import import_wandb, read_lines
from vit_jax.workdir.profile import check_steps, trace
from vit_jax.workdir.progress import BadStep, TrainLog, epoch_means, format_duration
