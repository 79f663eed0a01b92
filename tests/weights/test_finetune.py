"""Fine-tuning: the head, the grid, resuming, and weights that do not fit.

tests/parity compares the torch methods of resizing positions.
"""

import json
import shutil

import jax
import numpy as np
import pytest
from scipy import ndimage
from small_models import GOOGLE, random_model, same_bits

import vit_jax
from vit_jax import config as config_lib
from vit_jax import main
from vit_jax.errors import UserError, run_command
from vit_jax.experiment import describe, make_experiment
from vit_jax.model import check_image_shape, init_params, make_model, num_tokens
from vit_jax.train import train
from vit_jax.weights import layouts, start_from
from vit_jax.weights.finetune import resize_positions

PIXELS = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.fixture
def small_google_file(tmp_path):
    """A .npz with Google's names, and the parameters in it with ours."""

    def make(**fields):
        _, params = random_model(**GOOGLE, **fields)
        path = tmp_path / "google.npz"
        np.savez(path, **layouts.from_params(params, layouts.GOOGLE, num_heads=3))
        return path, params

    return make


def test_start_from_keeps_what_fits_and_replaces_the_rest(small_google_file):
    path, params = small_google_file(pre_logits=16)
    vit, _ = random_model(num_classes=3, **GOOGLE)
    loaded = vit_jax.load_weights(path)
    got, notes = start_from(loaded, vit, (16, 24, 3), ["a", "b", "c"], **PIXELS)
    assert not got["head"]["kernel"].any() and got["head"]["kernel"].shape == (24, 3)
    assert "pre_logits" not in got and got["pos_embed"].shape == (1, 25, 24)
    assert same_bits(got["block_1"], params["block_1"])
    assert notes == [
        "a new head of zeros for 3 classes (the weights have 5 classes)",
        "position embeddings resized from 3x3 to 4x6 patches (zoom)",
    ]
    vit, _ = random_model(num_classes=3, pre_logits=16, **GOOGLE)  # keeps that layer
    got, _ = start_from(loaded, vit, (12, 12, 3), ["a", "b", "c"], **PIXELS)
    assert same_bits(got["pre_logits"], params["pre_logits"])
    vit, _ = random_model(pre_logits=16, **GOOGLE)
    assert start_from(loaded, vit, (12, 12, 3), list("abcde"), **PIXELS)[1] == []
    other = {"mean": (0.49, 0.48, 0.45), "std": (0.25, 0.24, 0.26)}
    loaded = loaded._replace(preprocessing=other)
    assert start_from(loaded, vit, (12, 12, 3), list("abcde"), **other)[1] == []
    (note,) = start_from(loaded, vit, (12, 12, 3), list("abcde"), **PIXELS)[1]
    assert note.startswith("trained with config.data.mean=(0.49, 0.48, 0.45) and std=(0.25")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 48}, r"block_0/attn/qkv/kernel has shape \(24, 72\), expected \(48, 144\)"),
        ({"width": 48}, "set --config.model.width=24"),
        ({"depth": 1}, "unused block_1/.*--config.model.depth=2"),
        ({"depth": 3}, "missing block_2/.*--config.model.depth=2"),
        ({"gelu": "exact"}, "set --config.model.gelu=tanh"),
        (
            {"norm_eps": 1e-5, "num_heads": 4},
            "set --config.model.norm_eps=1e-06 --config.model.num_heads=3",
        ),
        ({"pool": "gap"}, "unused cls_token.*--config.model.pool=cls"),
        ({"layer_scale": 0.1}, "missing block_0/layer_scale1"),
    ],
)
def test_another_architecture_is_rejected_with_advice(small_google_file, fields, message):
    path, _ = small_google_file()
    vit, _ = random_model(**GOOGLE | fields)
    with pytest.raises(UserError, match=message) as error:
        start_from(vit_jax.load_weights(path), vit, (12, 12, 3), list("abcde"), **PIXELS)
    assert str(path) in str(error.value)


@pytest.fixture
def google_file(tiny_config, tmp_path):
    """Random weights of the tiny model in Google's format: 7 classes, a grid of 3x3 patches."""
    tiny_config.model.gelu, tiny_config.model.norm_eps = "tanh", 1e-6
    vit = make_model(tiny_config.model, num_classes=7)
    shapes = jax.eval_shape(lambda key: init_params(vit, key, (12, 12, 3)), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)
    path = tmp_path / "google.npz"
    np.savez(path, **layouts.from_params(params, layouts.GOOGLE, num_heads=2))
    return path


def initial_params(experiment):
    """The initial parameters of an experiment, on the host."""
    return jax.device_get(experiment.init().params)


def test_same_classes_keep_the_head(tiny_config, tiny_run):
    tiny_config.init_from, tiny_config.model.depth = str(tiny_run), 2
    experiment = make_experiment(tiny_config)
    assert same_bits(initial_params(experiment), vit_jax.load(tiny_run).params)
    assert experiment.initial_weights == (f"{tiny_run} (vit_jax)",)
    assert experiment.evaluate(experiment.init().params, "test")["accuracy"] > 0.9


def test_other_classes_of_the_same_number_replace_the_head(tiny_config, tiny_run, tiny_folder):
    renamed = tiny_folder.parent / "renamed"
    shutil.copytree(tiny_folder, renamed, dirs_exist_ok=True)
    for split in ("train", "test"):
        if (renamed / split / "red").exists():
            (renamed / split / "red").rename(renamed / split / "crimson")
    tiny_config.data.name, tiny_config.init_from = f"folder:{renamed}", str(tiny_run)
    tiny_config.model.depth = 2
    params = initial_params(make_experiment(tiny_config))
    old = vit_jax.load(tiny_run).params
    assert not params["head"]["kernel"].any() and same_bits(params["block_1"], old["block_1"])


def test_run_from_a_google_file(tiny_config, google_file, tmp_path, capsys):
    c = tiny_config
    c.init_from, c.model.image_size, c.steps = str(google_file), 16, 6
    c.save_every = "3 steps"
    train(c, tmp_path / "run")
    printed = capsys.readouterr().out
    assert f"initial weights: {google_file} (google), a new head of zeros for 3 classes" in printed
    assert "position embeddings resized from 3x3 to 4x4 patches (zoom)" in printed
    assert "17 tokens of 8x8x3 images resized to 16x16" in printed
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["init_from"] == str(google_file)
    params = vit_jax.load(tmp_path / "run").params

    # Killed after step 3, it resumes bit for bit and no longer needs the file.
    google_file.unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    (tmp_path / "run" / "result.json").unlink()
    train(c, tmp_path / "run")
    assert "Resuming from step 3" in capsys.readouterr().out
    assert same_bits(vit_jax.load(tmp_path / "run").params, params)


def test_several_seeds_start_from_the_same_weights(tiny_config, google_file):
    tiny_config.init_from, tiny_config.num_seeds = str(google_file), 2
    tiny_config.optim.ema_decay = 0.9
    tiny_config.seed = 3
    state = make_experiment(tiny_config).init()
    np.testing.assert_array_equal(state.seed, [3, 4])
    for leaf in jax.tree.leaves((state.params, state.ema_params)):
        np.testing.assert_array_equal(leaf[0], leaf[1])


def test_several_seeds_resume_without_the_initial_weights(
    tiny_config, google_file, tmp_path, capsys
):
    c = tiny_config
    c.init_from, c.num_seeds, c.steps = str(google_file), 2, 4
    c.save_every = "2 steps"
    complete = train(c, tmp_path / "run")
    google_file.unlink()
    (tmp_path / "run" / "result.json").unlink()
    for seed in (0, 1):
        shutil.rmtree(tmp_path / "run" / f"seed_{seed}" / "checkpoints" / "4")
        (tmp_path / "run" / f"seed_{seed}" / "result.json").unlink()
    again = train(c, tmp_path / "run")
    assert "Resuming from step 2" in capsys.readouterr().out
    assert again["test_loss_of_each_seed"] == complete["test_loss_of_each_seed"]


def test_weights_that_do_not_fit_are_rejected_before_any_write(tiny_config, google_file, tmp_path):
    wrong = {
        "no.npz": ("init_from", "no.npz does not exist"),
        "exact": (
            "model.gelu",
            "google.npz does not fit.*set --config.model.gelu=tanh",
        ),
        "24": (
            "model.width",
            r"google.npz.*qkv/kernel has shape \(16, 48\), expected \(24, 72\).*width=16",
        ),
    }
    tiny_config.init_from = str(google_file)
    for value, (field, message) in wrong.items():
        c = config_lib.from_dict(tiny_config.to_dict())
        config_lib.set_field(c, field, value)
        with pytest.raises(UserError, match=message) as error:
            train(c, tmp_path / "run")
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_model_of_another_resolution_resizes_images(tiny_config):
    images = np.random.default_rng(0).normal(size=(2, 8, 6, 3)).astype(np.float32)
    tiny_config.model.image_size = 16
    vit = make_model(tiny_config.model, num_classes=3)
    params = vit.init(jax.random.key(0), images)["params"]
    assert num_tokens(vit, (8, 6, 3)) == params["pos_embed"].shape[1] == 17
    big = jax.image.resize(images, (2, 16, 16, 3), "bilinear")
    expected = vit.clone(image_size=0).apply({"params": params}, big)
    np.testing.assert_array_equal(vit.apply({"params": params}, images), expected)
    with pytest.raises(UserError, match="images of 18x18 pixels"):
        check_image_shape(vit.clone(image_size=18), (8, 8, 3))


def test_random_initial_weights_are_not_described(tiny_config, tmp_path):
    assert "initial weights" not in describe(make_experiment(tiny_config), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.npz", None, "gone.npz does not exist"),
        ("torn.npz", b"PK\x03\x04 and no more", "torn.npz"),
        ("words.safetensors", b"these are no weights", "words.safetensors"),
    ],
)
def test_train_command_rejects_bad_weights(tiny_folder, tmp_path, name, content, message, capsys):
    if content:
        (tmp_path / name).write_bytes(content)
    arguments = ["--config", "cifar10_vit", "--workdir", str(tmp_path / "w")]
    arguments += [f"--config.data.name=folder:{tiny_folder}"]
    arguments += [f"--config.init_from={tmp_path / name}"]
    with pytest.raises(SystemExit) as end:
        run_command(main.main, arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: ") and message in line
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("grid", "new"), [((14, 14), (24, 24)), ((4, 7), (9, 3)), ((8, 8), (3, 5)), ((1, 4), (3, 1))]
)
def test_zoom_equals_scipy(grid, new):
    table = np.random.default_rng(0).normal(size=(1, 1 + grid[0] * grid[1], 6)).astype(np.float32)
    got = resize_positions(table, grid, new, "zoom")
    factors = (new[0] / grid[0], new[1] / grid[1], 1)
    expected = ndimage.zoom(table[0, 1:].reshape(*grid, 6), factors, order=1)
    np.testing.assert_allclose(got[0, 1:].reshape(*new, 6), expected, atol=1e-5)
    assert (got[:, :1] == table[:, :1]).all()


def test_resizing_to_the_same_grid_changes_nothing():
    table = np.random.default_rng(0).normal(size=(1, 12, 4)).astype(np.float32)
    for method in ("zoom", "bicubic", "bilinear"):
        got = resize_positions(table, (3, 4), (3, 4), method)
        np.testing.assert_array_equal(got, table)
