"""One to eight devices, data parallel and fsdp: the same training, and its communication."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from vit_jax import config

ROOT = pathlib.Path(__file__).parents[2]
EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
AUGMENTED = {"augment.crop": "pad", "augment.crop_padding": 2, "augment.flip": "random"}
AUGMENTED |= {"augment.mixup_alpha": 0.8, "augment.cutmix_alpha": 1.0}
MESHES = [(1, 1), (4, 1), (8, 8)]  # (devices, fsdp); device_table.py has more


@pytest.fixture(scope="module")
def found(optimized, tiny_folder, tmp_path_factory):
    """The results of all jobs, from one process with eight devices, since startup is slow."""
    c = config.from_file(ROOT / "configs" / "cifar10_vit.py")
    c.data.name = f"folder:{tiny_folder}"
    c.batch_size = 16
    c.model.patch_size, c.model.width, c.model.depth = 4, 16, 1
    c.model.num_heads, c.model.mlp_dim = 2, 256  # wide enough for fsdp to split it
    c.model.pool = "gap"  # the one block is computed for all tokens
    c.model.position_bias = "gaussian"
    c.model.token_shift = True
    c.optim.peak_lr = 1e-3
    jobs = [
        {"name": f"{n},{fsdp}", "devices": n, "steps": 20, "set": AUGMENTED | {"mesh.fsdp": fsdp}}
        for n, fsdp in MESHES
    ]
    crop_and_flip = {k: v for k, v in AUGMENTED.items() if "mix" not in k}
    levers = AUGMENTED | {"accumulate_steps": 4, "model.remat": True, "mesh.fsdp": 2}
    jobs.append({"name": "accumulated", "devices": 4, "steps": 20, "set": levers})
    for n, parts in ((1, 1), (1, 4), (4, 1)):
        half = AUGMENTED | {"model.dtype": "bfloat16", "accumulate_steps": parts}
        jobs.append({"name": f"bfloat16 {n},{parts}", "devices": n, "steps": 10, "set": half})
    for n, fsdp in ((1, 1), (4, 1), (4, 4)):
        muon = {"optim.name": "muon", "model.depth": 2, "mesh.fsdp": fsdp}
        jobs.append({"name": f"muon {n},{fsdp}", "devices": n, "steps": 10, "set": muon})
    jobs.append({"name": "not mixed", "devices": 4, "steps": 0, "set": crop_and_flip})
    path = tmp_path_factory.mktemp("jobs") / "jobs.json"
    path.write_text(json.dumps({"config": c.to_dict(), "jobs": jobs}))
    done = subprocess.run(
        [sys.executable, str(pathlib.Path(__file__).with_name("eight_devices.py")), str(path)],
        cwd=ROOT, env=os.environ | EIGHT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("devices", "fsdp"), MESHES[1:])
def test_any_mesh_trains_like_one_device(found, devices, fsdp):
    one, several = found["1,1"]["losses"], found[f"{devices},{fsdp}"]["losses"]
    assert len(one) == 20 and one[0] != one[-1]
    np.testing.assert_allclose(several, one, atol=1e-5)


def test_accumulated_and_rematerialized_steps_train_the_same(found):
    """The last batch of an epoch has 10 of 16: a mean of the microbatches' means would differ."""
    one, several = found["1,1"]["losses"], found["accumulated"]["losses"]
    np.testing.assert_allclose(several, one, atol=1e-5)


@pytest.mark.parametrize("name", ["bfloat16 4,1", "bfloat16 1,4"])
def test_bfloat16_on_devices_and_in_microbatches_trains_like_one_device(found, name):
    one, several = found["bfloat16 1,1"]["losses"], found[name]["losses"]
    np.testing.assert_allclose(several, one, atol=1e-5)


@pytest.mark.parametrize("name", ["muon 4,1", "muon 4,4"])
def test_muon_divided_among_devices_trains_like_one_device(found, name):
    """Four devices divide two matrices of each shape."""
    one, several = found["muon 1,1"]["losses"], found[name]["losses"]
    np.testing.assert_allclose(several, one, atol=1e-5)


def test_data_parallel_step_sends_only_the_gradients(found):
    gradients = 4 * found["not mixed"]["num_params"]
    sent = found["not mixed"]["transfers"]
    assert sent.keys() == {"all-reduce"}  # and nothing to the host
    assert gradients <= sent["all-reduce"][1] <= gradients + 256  # and scalars: loss, counts


def test_mixing_sends_single_images_to_neighbors_without_gathering(found):
    sent, gradients = found["4,1"]["transfers"], 4 * found["4,1"]["num_params"]
    assert "all-gather" not in sent and "all-to-all" not in sent
    assert sum(total for _, total, _ in sent.values()) - gradients < found["4,1"]["image_bytes"]
