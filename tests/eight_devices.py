"""Run by test_devices.py in a process with eight virtual devices: trains on meshes over some of
them, reads the compiled programs, and prints one JSON object.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/eight_devices.py CONFIG.json
"""

import json
import pathlib
import sys

import jax

from vit_jax import config as config_lib
from vit_jax.explain import compile_step, traffic
from vit_jax.run import setup


def losses(run, train_step, steps):
    """The loss of each of the first steps."""
    state, inputs, found = run.init(run.put(run.seeds)), run.inputs(0), []
    for _ in range(steps):
        with jax.transfer_guard("disallow"):
            state, metrics = train_step(state, *next(inputs))
        found.append(float(metrics["loss"][0]))
    return found


def main():
    values = json.loads(pathlib.Path(sys.argv[1]).read_text())
    found = {}
    for job in values["jobs"]:
        config = config_lib.from_dict(values["config"])
        for name, value in job["set"].items():
            config_lib.set_field(config, name, value)
        run = setup(config, devices=jax.devices()[: job["devices"]])
        train_step = compile_step(run)
        found[job["name"]] = {
            "losses": losses(run, train_step, job["steps"]),
            "traffic": traffic(train_step.as_text()),
            "num_params": run.num_params,
            "image_bytes": config.batch_size * run.train.images[0].nbytes,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
