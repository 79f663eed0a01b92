"""From a workdir back to a model: `model, params, config = vit_jax.load(workdir)`."""

import os
import pathlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vit_jax import checkpoint, config, metrics, model
from vit_jax.errors import UserError


class _Unpacked(NamedTuple):
    model: model.VisionTransformer
    params: Any  # nested dict of float32 numpy arrays
    config: ConfigDict


class Loaded(_Unpacked):
    """What `load` gives: unpacks as (model, params, config), and has as attributes besides:

    class_names: list of str, in the order of the logits.
    preprocessing: {"divide_by": 255, "mean": [...], "std": [...]}, one entry a channel.
    image_shape: [H, W, C] of the images it was trained on.
    step: the checkpoint's.
    """

    def __new__(cls, model, params, config, *, step, saved):
        loaded = super().__new__(cls, model, params, config)
        loaded.step = step
        loaded.class_names = saved["class_names"]
        loaded.preprocessing = saved["preprocessing"]
        loaded.image_shape = saved["image_shape"]
        return loaded


def load(workdir, step="last"):
    """The trained model of a run.

    Args:
      workdir: the run's directory.
      step: a saved step; "last", the newest; or "best", the one of the highest validation accuracy
        in metrics.jsonl, the earliest of several: a run saves and keeps it, whenever it was.
    Returns (model, params, config): `model.apply({"params": params}, images)` maps normalized
      float32[B, H, W, C] images to float32[B, num_classes] logits. `params` are the averaged
      weights where the run keeps an average. Its attributes: see Loaded.
    Raises UserError when there is no such complete checkpoint.
    """
    workdir = pathlib.Path(os.path.expanduser(workdir))
    if step == "best":
        step = _best_step(workdir)
    elif step == "last":
        step = None
    elif step is not None:
        if not str(step).isdigit():
            raise UserError(f"a step is a number, best or last; got {step!r}")
        step = int(step)
    params, saved, step = checkpoint.restore_for_inference(workdir / "checkpoints", step)
    c = config.from_dict(saved["config"])
    config.validate(c)
    vit = model.make_model(c.model, num_classes=len(saved["class_names"]))
    return Loaded(vit, params, c, step=step, saved=saved)


def _best_step(workdir):
    saved = checkpoint.saved_steps(workdir / "checkpoints")
    path, accuracies = workdir / "metrics.jsonl", {}
    try:
        for _, values in metrics.read_lines(path):
            if "val/accuracy" in values and values["step"] in saved:
                accuracies[values["step"]] = float(values["val/accuracy"])
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"cannot read {path}, where the best step is looked up: {e}") from e
    if not accuracies:
        raise UserError(
            f"{path} has no val/accuracy of a saved step ({', '.join(map(str, saved))}): 'best' "
            "needs a run with a config.data.val_split; ask for 'last' or a step"
        )
    return max(sorted(accuracies), key=accuracies.get)
