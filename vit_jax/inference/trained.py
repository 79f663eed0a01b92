"""Restores the model of a run: `model, params, config = vit_jax.load(workdir)`."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from vit_jax import config, model
from vit_jax.errors import UserError, expand_home
from vit_jax.workdir import read_lines, restore_for_inference, saved_steps


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model with its weights. Unpacks as (model, params, config)."""

    model: model.VisionTransformer
    params: Any  # nested dict of float32 numpy arrays
    config: ConfigDict
    step: int  # of the checkpoint
    class_names: list[str]  # in the order of the logits
    preprocessing: dict  # {"divide_by": 255, "mean": [...], "std": [...]}, one entry per channel
    image_shape: list[int]  # [H, W, C] of the training images

    def __iter__(self):
        return iter((self.model, self.params, self.config))


def load(workdir, step="last"):
    """Loads the trained model of a run.

    Args:
      workdir: the run's directory.
      step: a saved step; "last", the newest one; or "best", the saved step with the highest
        validation accuracy in metrics.jsonl (the earliest if tied).
    Returns:
      A TrainedModel. `model.apply({"params": params}, images)` maps normalized float32[B, H, W, C]
      images to float32[B, num_classes] logits. `params` are the EMA weights if the run has them.
    Raises UserError if there is no complete checkpoint of this step.
    """
    workdir = expand_home(workdir)
    if step == "best" and (steps := saved_steps(workdir / "checkpoints")):
        step = _best_step(workdir, steps)
    elif step in ("best", "last", None):  # without checkpoints, restoring raises the reason
        step = None
    elif not str(step).isdecimal():
        raise UserError(f"step must be a number, best, or last; got {step!r}")
    else:
        step = int(step)
    params, saved, step = restore_for_inference(workdir / "checkpoints", step)
    try:
        c = config.from_dict(saved["config"])
        config.validate(c)
    except UserError as e:
        raise UserError(f"this code cannot use the config of {workdir}: {e}") from e
    names = saved["class_names"]
    return TrainedModel(
        model=model.make_model(c.model, num_classes=len(names)),
        params=params,
        config=c,
        step=step,
        class_names=names,
        preprocessing=saved["preprocessing"],
        image_shape=saved["image_shape"],
    )


def _best_step(workdir, steps):
    path, accuracies = workdir / "metrics.jsonl", {}
    try:
        for _, values in read_lines(path):
            if "val/accuracy" in values and values["step"] in steps:
                accuracies[values["step"]] = float(values["val/accuracy"])
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"cannot read {path} to find the best step ({e}): use 'last'") from e
    if not accuracies:
        known = ", ".join(map(str, steps))
        raise UserError(
            f"{path} has no val/accuracy for a saved step ({known}): use 'last' or a step; "
            "'best' needs a run with a config.data.val_split"
        )
    return max(sorted(accuracies), key=accuracies.get)
