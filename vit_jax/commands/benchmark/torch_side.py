"""The notebook's training in PyTorch, each variant in a process of its own, without JAX.

written   the notebook's loop, with PIL images transformed one by one
eager     optimized: data on the device, fused AdamW and attention, losses read at the end
compiled  eager with torch.compile, on a GPU with CUDA graphs
"""

import contextlib
import multiprocessing
import sys
import time

from vit_jax import config as config_lib
from vit_jax.errors import UserError

# Fields that must equal the notebook's, except _ARGUMENTS, which its code takes as arguments.
_COMPARED = ("model.", "augment.", "optim.", "num_seeds", "accumulate_steps")
_COMPARED += ("data.mean", "data.std", "data.streaming")
_ARGUMENTS = ("size", "width", "depth", "num_heads", "mlp_dim", "patch_size")
_ARGUMENTS += ("dtype", "matmul_precision")


class TorchSide:
    """Training steps of a variant, for the experiment's model and data."""

    def __init__(self, variant, experiment):
        config, train = experiment.config, experiment.train
        options = {
            "variant": variant,
            "images": train.images,
            "labels": train.labels,
            "arguments": notebook_arguments(experiment),
            "batch_size": config.batch_size,
            "device": "cuda" if experiment.mesh.devices.flat[0].platform == "gpu" else "cpu",
            "bfloat16": config.model.dtype == "bfloat16",
            "tf32": config.model.matmul_precision == "tf32",
        }
        spawn = multiprocessing.get_context("spawn")
        self._pipe, other_end = spawn.Pipe()
        spawn.Process(target=_serve, args=(other_end, config.seed, options), daemon=True).start()
        other_end.close()

    def time_steps(self, n):
        """Returns the seconds that n steps take."""
        try:
            self._pipe.send(n)
            return self._pipe.recv()
        except (EOFError, OSError) as e:
            raise UserError("the PyTorch process failed; its error is above") from e


def _serve(pipe, seed, options):
    """Runs each number of steps received on `pipe` and sends back the seconds, until it closes."""
    import torch

    from vit_jax.commands.benchmark import notebook_torch

    torch.manual_seed(seed)
    losses = notebook_torch.train(**options)
    with contextlib.suppress(EOFError):
        while n := pipe.recv():
            start = time.perf_counter()
            for _ in range(n):
                loss = next(losses)
            float(loss)  # waits for the device
            pipe.send(time.perf_counter() - start)


def start_torch_sides(experiment):
    """Returns {name: TorchSide}. A variant that fails is reported on stderr and omitted.

    Raises UserError if the notebook cannot train with the experiment's config.
    """
    notebook_arguments(experiment)  # raises before the first process starts
    sides = {}
    for variant in ("written", "eager", "compiled"):
        side, name = TorchSide(variant, experiment), f"PyTorch {variant}"
        try:
            side.time_steps(1)
            sides[name] = side
        except UserError as e:
            print(f"{name} is not measured: {e}", file=sys.stderr, flush=True)
    return sides


def notebook_arguments(experiment):
    """Returns the arguments with which the notebook's class builds the experiment's model.

    Raises UserError, with the fields that differ, if the notebook cannot train with this config.
    """
    model, config = experiment.model, config_lib.flat(experiment.config)
    notebook = config_lib.flat(config_lib.from_file("cifar10_vit"))
    notebook |= {f"model.{name}": config[f"model.{name}"] for name in _ARGUMENTS}
    compared = [name for name in config if name.startswith(_COMPARED)]
    differences = [f"{name}={config[name]}" for name in compared if config[name] != notebook[name]]
    if model.mlp_dim != 4 * model.width:
        differences.append(f"model.mlp_dim={model.mlp_dim}")
    if differences:
        raise UserError(
            "--against torch compares with the notebook's model and loop, from which this recipe "
            f"differs ({', '.join(differences)}): use --config cifar10_vit"
        )
    return {
        "img_size": experiment.train.image_shape[0],
        "patch_size": model.patch_size,
        "num_classes": model.num_classes,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.num_heads,
    }
