"""Run by test_mesh.py in a process with eight virtual devices: trains on meshes over some of
them, reads the compiled programs, and prints one JSON object.

    export XLA_FLAGS=--xla_force_host_platform_device_count=8
    python tests/parallel/eight_devices.py CONFIG.json
"""

import itertools
import json
import pathlib
import sys

import jax

from vit_jax import config as config_lib
from vit_jax.commands.describe.describe import compile_step
from vit_jax.commands.describe.program import Program
from vit_jax.experiment import make_experiment


def losses(experiment, train_step, steps):
    """The loss of each of the first steps."""
    state, found = experiment.init(), []
    for _, inputs in itertools.islice(experiment.batches(), steps):
        with jax.transfer_guard("disallow"):
            state, metrics = train_step(state, *inputs)
        found.append(float(metrics["loss"]))
    return found


def main():
    values = json.loads(pathlib.Path(sys.argv[1]).read_text())
    found = {}
    for job in values["jobs"]:
        config = config_lib.from_dict(values["config"])
        for name, value in job["set"].items():
            config_lib.set_field(config, name, value)
        experiment = make_experiment(config, devices=jax.devices()[: job["devices"]])
        train_step = compile_step(experiment)
        found[job["name"]] = {
            "losses": losses(experiment, train_step, job["steps"]),
            "transfers": Program(train_step.as_text()).transfers(),
            "num_params": experiment.num_params,
            "image_bytes": config.batch_size * experiment.train.images[0].nbytes,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
