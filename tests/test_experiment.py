"""Experiments built from configs: their description, and invalid configs."""

import sys

import numpy as np
import pytest
from PIL import Image

from vit_jax.errors import UserError
from vit_jax.experiment import describe, description_lines, make_experiment


def test_description_lists_every_part(make_tiny_config, tmp_path):
    c = make_tiny_config(depth=2)
    text = "\n".join(description_lines(describe(make_experiment(c), tmp_path)))
    for part in (
        "model: ViT, patch 4, width 16, depth 2, 2 heads, MLP 32",
        "parameters",
        "GFLOP per image",
        "global batch 16, 16 per device",
        "weights and optimizer state replicated; 0.1 MB per device of 0.1 MB; data",
        "18 of batch 16, 6 per epoch (3 epochs; the last batch of an epoch has 10)",
        "adamw, constant 0.01",
        "(all of them)",
        "augmentation: none",
        "train: 90, test: 30 images, 3 classes",
        "seed: 0\n",
        str(tmp_path),
    ):
        assert part in text
    c.optim.decay, c.accumulate_steps = "kernels", 2
    c.augment.crop, c.augment.flip, c.num_seeds = "pad", "random", 2
    c.model.remat = True
    experiment = make_experiment(c)
    lines = describe(experiment, tmp_path)
    assert "(not on bias, cls_token, pos_embed, scale)" in lines["optimizer"]
    assert f"of {experiment.num_params:,} parameters" in lines["optimizer"]
    assert lines["devices"].endswith("2 microbatches, activations recomputed")
    assert lines["augmentation"] == "crop=pad, flip=random"
    assert lines["seed"] == "0, 1"


def test_description_is_a_table_on_a_terminal(monkeypatch):
    description = {"seed": "0", "optimizer": "word " * 20, "data": "/a-" + "long" * 30}
    assert description_lines(description)[0] == "seed: 0"  # in a log
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    lines = "\n".join(description_lines(description)).splitlines()
    assert lines[0] == "seed       0"
    assert lines[1] == "optimizer  " + "word " * 9 + "word" and lines[2][:15] == " " * 11 + "word"
    assert lines[-1].split() == ["data", description["data"]]  # a path is not broken
    assert {line[9:11] for line in lines} == {"  "}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 91}, "batch_size=91 is larger than the 90 examples"),
        ({"model.patch_size": 3}, "8x8"),
        ({"data.mean": (0.5,), "data.std": (0.5,)}, "has length 1"),
        ({"augment.crop": "pad", "augment.crop_padding": 8}, "crop_padding"),
        ({"mesh.fsdp": 3}, "must equal the device count, 1"),
        ({"data.val_split": "test+train[80:]"}, r"val_split=.* overlaps train_split=train: hold"),
        ({"data.val_split": "test"}, "test_split=test overlaps val_split=test"),
        ({"data.test_split": "train[:9]"}, r"test_split=train\[:9\] overlaps train_split=train"),
    ],
)
def test_config_that_does_not_fit_data_or_devices_is_rejected(tiny_config, changes, message):
    for name, value in changes.items():
        *groups, field = name.split(".")
        group = tiny_config[groups[0]] if groups else tiny_config
        group[field] = value
    with pytest.raises(UserError, match=message) as error:
        make_experiment(tiny_config)
    assert "\n" not in str(error.value)


def test_splits_of_different_sizes_are_rejected(tiny_config, tmp_path):
    for split, size in (("train", 8), ("test", 12)):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (size, size)).save(tmp_path / split / "a" / "image.png")
    tiny_config.data.name, tiny_config.batch_size = f"folder:{tmp_path}", 1
    with pytest.raises(UserError, match=r"\(8, 8, 3\) for training and \(12, 12, 3\) in the test"):
        make_experiment(tiny_config)


def test_unusable_image_in_a_folder_is_named(tiny_config, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / "a" / "good.png")
    (tmp_path / "train" / "a" / "bad.png").write_bytes(b"not an image")
    tiny_config.data.name = f"folder:{tmp_path}"
    with pytest.raises(UserError, match=r"bad\.png"):
        make_experiment(tiny_config)


def test_stored_batch_equals_the_batch_of_the_step(tiny_config):
    tiny_config.seed, tiny_config.num_seeds = 3, 2
    experiment = make_experiment(tiny_config)
    for step, inputs in experiment.batches(after=5):
        if step in (6, 8):  # the last step of epoch 1, with 10 examples; epoch 2
            split, order = inputs
            for i, seed in enumerate((3, 4)):
                rows = np.asarray(order)[i, (step - 1) % 6]
                stored = experiment.stored_batch(step, seed)
                np.testing.assert_array_equal(stored["index"], rows[rows >= 0])
                np.testing.assert_array_equal(stored["image"], split["image"][stored["index"]])
                np.testing.assert_array_equal(stored["label"], split["label"][stored["index"]])
