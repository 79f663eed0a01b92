"""From a workdir back to a model: `model, params, config = vit_jax.load(workdir)`."""

import json
import pathlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vit_jax import checkpoint, config, model
from vit_jax.errors import UserError


class Loaded(NamedTuple):
    """What `load` gives; the first three are what most callers unpack."""

    model: model.VisionTransformer
    params: Any  # nested dict of float32 numpy arrays
    config: ConfigDict


def load(workdir, step=None):
    """The trained model of a run.

    Args:
      workdir: the run's directory.
      step: a saved step; by default the newest.
    Returns (model, params, config): `model.apply({"params": params}, images)` maps normalized
      float32[B, H, W, C] images to float32[B, num_classes] logits. `params` are the averaged
      weights where the run keeps an average.
    Raises UserError when there is no such complete checkpoint.
    """
    params, saved, _ = checkpoint.restore_for_inference(pathlib.Path(workdir) / "checkpoints", step)
    c = config.from_dict(saved["config"])
    return Loaded(model.make_model(c.model, num_classes=len(saved["class_names"])), params, c)


def read_config(workdir):
    """The ConfigDict of a workdir's config.json. Raises UserError where it is not readable."""
    path = pathlib.Path(workdir) / "config.json"
    try:
        return config.from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {workdir} is not the workdir of a run") from None
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {e}") from e
