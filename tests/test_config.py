"""Recipes, overrides, durations, and their one-line errors."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib

import pytest

from vit_jax import config
from vit_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def test_notebook_recipe_matches_the_notebook():
    c = config.from_file(ROOT / "configs" / "cifar10_vit.py")
    assert (c.batch_size, c.epochs, c.data.name) == (64, 20, "cifar10")
    m = c.model
    assert (m.width, m.depth, m.num_heads, m.mlp_dim, m.patch_size) == (256, 6, 8, 1024, 4)
    assert (m.pool, m.weight_init, m.norm_eps, m.dtype) == ("cls", "pytorch", 1e-5, "float32")
    o = c.optim
    assert (o.name, o.peak_lr, o.weight_decay, o.decay) == ("adamw", 3e-4, 1e-4, "all")
    assert (o.b1, o.b2, o.eps, o.schedule) == (0.9, 0.999, 1e-8, "constant")
    assert o.label_smoothing == o.ema_decay == o.grad_clip_norm == m.dropout == m.drop_path == 0
    assert c.augment.crop == c.augment.flip == c.augment.policy == "none"
    assert c.augment.mixup_alpha == c.augment.cutmix_alpha == c.augment.erasing_prob == 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid_and_documented(path):
    config.validate(config.from_file(path))
    text = path.read_text()
    assert text.startswith('"""') and f"--config configs/{path.name}" in text


def test_json_round_trip_keeps_every_field():
    c = config.defaults()
    c.model.width, c.data.mean = 128, (0.1, 0.2, 0.3)
    again = config.from_dict(json.loads(json.dumps(c.to_dict())))
    assert config.difference(c, again) == []
    assert again.data.mean == (0.1, 0.2, 0.3)
    again.model.width = 64
    assert config.difference(c, again) == ["model.width: 128, was 64"]
    assert config.difference(c, again, ignore=("model.width",)) == []


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", "3", 3),
        ("optim.peak_lr", "1e-2", 0.01),
        ("epochs", "5", 5.0),
        ("model.qk_norm", "true", True),
        ("model.qk_norm", "False", False),
        ("data.mean", "(0.1, 0.2, 0.3)", (0.1, 0.2, 0.3)),
        ("data.mean", "[1, 2]", (1.0, 2.0)),
        ("data.mean", "0.5", (0.5,)),
        ("data.name", "folder:/x", "folder:/x"),
        ("optim.warmup", "5epochs", "5 epochs"),
        ("save_every", "", ""),
    ],
)
def test_overrides_are_converted_to_the_type_of_their_field(name, text, value):
    c = config.defaults()
    config.set_field(c, name, text)
    assert c[name] == value and type(c[name]) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("sed", "3", "did you mean seed?"),
        ("optim.lr", "3", "did you mean optim.peak_lr?"),
        ("learning_rate", "3", "did you mean optim.peak_lr?"),
        ("model.wdth", "3", "did you mean model.width?"),
        ("modl.width", "3", "did you mean model.width?"),
        ("model", "3", "unknown config field model"),
        ("seed", "1.5", "config.seed takes an integer; got '1.5'"),
        ("seed", "x", "takes an integer"),
        ("epochs", "many", "takes a number"),
        ("model.qk_norm", "maybe", "true or false"),
        ("data.mean", "hi", "a tuple of numbers"),
        ("data.mean", "()", "a tuple of numbers"),
        ("data.mean", "('a', 'b')", "a tuple of numbers"),
        ("save_every", "5", "its unit (steps, epochs, examples, %)"),
        ("optim.warmup", "5 weeks", "its unit (steps, epochs, examples, %)"),
        ("checkpoint_every_steps", "10", "write --config.save_every='10 steps'"),
        ("warmup_epochs", 2, "write --config.optim.warmup='2 epochs'"),
        ("optim.warmup_steps", 9, "write --config.optim.warmup='9 steps'"),
        ("augment.mix_off_last_percent", 15, "write --config.augment.mix_off_last='15%'"),
    ],
)
def test_invalid_overrides_are_rejected(name, text, says):
    with pytest.raises(UserError) as e:
        config.set_field(config.defaults(), name, text)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_epochs_and_size_replace_what_a_recipe_sets_instead():
    c = config.from_file("cifar10_vit_cpu")
    c.steps = 500
    config.override(c, ["--config.epochs=10", "--config.model.size=S"], "")
    assert c.steps == 0
    assert config.model_shape(c.model)["width"] == 384
    c.steps = 500
    command = "--config.epochs=10 --config.steps=3 --config.model.depth=2 --config.model.size Ti"
    config.override(c, command.split(), "")
    assert c.steps == 3
    assert config.model_shape(c.model)["depth"] == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.num_heads": 7}, "num_heads=7 does not divide config.model.width=256"),
        ({"model.pool": "clss"}, "must be one of cls, gap, map; got 'clss' (did you mean cls?)"),
        ({"model.position_bias": "gaussian"}, "needs a model.pool without a class token"),
        ({"model.token_shift": True}, "needs a model.pool without a class token"),
        ({"model.size": "XL"}, "must be one of notebook, Ti, S, B, L"),
        ({"optim.name": "adam"}, "did you mean adamw?"),
        ({"optim.schedule": "cosin"}, "did you mean cosine?"),
        ({"batch_size": 0}, "config.batch_size must be at least 1 and below 2147483648; got 0"),
        ({"epochs": 0.0}, "config.epochs must be above 0"),
        ({"epochs": float("nan")}, "config.epochs must be above 0"),
        ({"model.drop_path": 1.0}, "at least 0 and below 1"),
        ({"optim.peak_lr": -1.0}, "config.optim.peak_lr must be at least 0"),
        ({"data.std": (0.5, 0.0, 0.5)}, "config.data.std must be above 0"),
        ({"model.stem": "conv", "model.patch_size": 6}, "power of 2"),
        ({"model.num_heads": 5, "model.size": "S"}, "does not divide config.model.width=384"),
        ({"batch_size": 2, "accumulate_steps": 3}, "at least config.accumulate_steps=3"),
        ({"optim.weight_decay": float("inf")}, "config.optim.weight_decay must be at least 0"),
        ({"augment.crop_scale": (0.5, 0.1)}, "(smallest, largest)"),
        ({"augment.policy": "randaug"}, "randaugment"),
        ({"augment.policy": "randaugmnt"}, "did you mean randaugment?"),
        ({"augment.crop": "center"}, "one of none, pad, resized"),
        ({"augment.erasing_prob": -0.5}, "erasing_prob must be at least 0 and at most 1"),
        ({"augment.mix_prob": 1.5}, "at most 1"),
        ({"augment.erasing_prob": float("nan")}, "at least 0 and at most 1"),
        ({"augment.crop_scale": (0.1, 2.0)}, "between 0 and 1"),
        ({"augment.crop_padding": -1}, "at least 1"),
        ({"stop_after": "3 epochs"}, "config.stop_after needs a config.data.val_split"),
        ({"epochs": 1e308}, "config.epochs must be above 0 and below 2147483648"),
        ({"steps": 10**30}, "config.steps must be at least 0 and below 2147483648; got 1000"),
        ({"eval_batch_size": 10**400}, "config.eval_batch_size must be at least 1 and below"),
        ({"augment.randaugment_magnitude": 11.0}, "at most 10"),
        ({"augment.mixup_alpha": 1.0, "batch_size": 1}, "mixes pairs of images"),
        ({"augment.cutmix_alpha": 1.0, "batch_size": 1}, "mixes pairs of images"),
        (
            {"seed": 2**31 - 1, "num_seeds": 2},
            "plus config.num_seeds=2 must be at most 2147483648",
        ),
    ],
)
def test_values_out_of_range_are_rejected(changes, says):
    c = config.defaults()
    for name, value in changes.items():
        config.set_field(c, name, value)
    with pytest.raises(UserError) as e:
        config.validate(c)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_duration_set_in_python_is_checked():
    c = config.defaults()
    c.log_every = "often"
    with pytest.raises(UserError, match=r"config.log_every takes a number with its unit"):
        config.validate(c)


def test_explicit_model_field_overrides_the_size():
    c = config.defaults()
    c.model.size, c.model.depth = "S", 2
    expected = {"width": 384, "depth": 2, "num_heads": 6, "mlp_dim": 1536}
    assert config.model_shape(c.model) == expected


def test_help_lists_every_field_once():
    text = "\n".join(config.field_help())
    for name in config.FIELDS:
        assert text.count(f"--config.{name}=") == 1


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "get_config"),
        ("def get_config(): raise KeyError('')", "KeyError"),
        ("def get_config(): return 3", "must return a ConfigDict"),
        (
            "from vit_jax.config import defaults\n"
            "def get_config():\n    c = defaults()\n    c.sed = 1\n    return c",
            "recipe.py, line 4, fails: no field or function sed (did you mean seed?)",
        ),
        (
            "from vit_jax.config import defaults\n"
            "def get_config():\n    c = defaults()\n    c.checkpoint_every_steps = 1\n    return c",
            "write --config.save_every='N steps'",
        ),
        (
            "from ml_collections import ConfigDict\n"
            "def get_config():\n    return ConfigDict({'sede': 1})",
            "did you mean seed?",
        ),
        ("import math\ndef get_config():\n    return math.foo", "no field or function foo"),
    ],
)
def test_invalid_recipe_files_are_rejected(tmp_path, source, says):
    path = tmp_path / "recipe.py"
    path.write_text(source)
    with pytest.raises(UserError) as e:
        config.from_file(path)
    assert says in str(e.value)


def test_recipe_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10_vit").mkdir()  # a directory with that name does not shadow it
    assert config.recipe_path("cifar10_vit").samefile(ROOT / "configs" / "cifar10_vit.py")
    assert config.from_file("cifar10_vit").optim.peak_lr == 3e-4
    (tmp_path / "cifar10_vit").rmdir()
    (tmp_path / "cifar10_vit").touch()  # but a file does
    assert config.recipe_path("cifar10_vit") == pathlib.Path("cifar10_vit")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cifar10_vitt", "cifar10_vitt does not exist (did you mean cifar10_vit?): pass"),
        ("configs/cifar10_vitt.py", "does not exist (did you mean cifar10_vit?): pass"),
        ("none.py", "none.py does not exist: pass the path of a Python file, or one of cifar100_"),
        (".", "the config file . is a directory"),
    ],
)
def test_unknown_recipe_suggests_the_nearest(name, says):
    with pytest.raises(UserError) as e:
        config.from_file(name)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_missing_file_in_a_recipe_is_not_a_missing_recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text("open('/none')")
    with pytest.raises(UserError, match=r"recipe.py, line 1, fails: FileNotFoundError: .*/none"):
        config.from_file(path)


def test_wheel_finds_its_recipes_next_to_an_unrelated_configs_package(tmp_path):
    # The layout of a wheel (see pyproject.toml) in a site-packages with another `configs`.
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = wheel["tool"]["hatch"]["build"]["targets"]["wheel"]
    site, ignore = tmp_path / "site-packages", shutil.ignore_patterns("__pycache__")
    for source, target in {"vit_jax": "vit_jax", **wheel["force-include"]}.items():
        shutil.copytree(ROOT / source, site / target, ignore=ignore)
    (site / "configs").mkdir()
    code = "from vit_jax import config as c; print(c.__file__)"
    code += "\nfor name in ('cifar10_vit', c.DEFAULT_RECIPE): print(c.recipe_path(name))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    names = ("config.py", "configs/cifar10_vit.py", "configs/shapes10_vit.py")
    assert done.stdout.split() == [str(site / "vit_jax" / name) for name in names]
