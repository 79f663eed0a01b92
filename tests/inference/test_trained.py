"""Loading a run's weights, with vit_jax and with orbax, jax, and numpy only."""

import ast
import json
import os
import pathlib
import runpy
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from runs import command, finish, start
from small_models import random_model

import vit_jax
from vit_jax.augment import normalize
from vit_jax.errors import UserError
from vit_jax.train import train

ROOT = pathlib.Path(__file__).parents[2]
ELSEWHERE = ROOT / "docs" / "restore_elsewhere.py"


@pytest.fixture
def workdir(tiny_run, tmp_path):
    """A copy of a run that was validated at steps 4, 8, and 12, without the checkpoint of 4."""
    shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4", ignore_errors=True)
    return tmp_path / "run"


def images(count=5, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def test_load_returns_everything_inference_needs(workdir):
    trained = vit_jax.load(workdir)
    model, params, config = trained
    assert (trained.step, trained.image_shape) == (12, [8, 8, 3])
    assert trained.class_names == ["blue", "green", "red"] and model.num_classes == 3
    assert trained.preprocessing == {"divide_by": 255, "mean": [0.5] * 3, "std": [0.5] * 3}
    assert config is trained.config and params is trained.params


def test_load_accepts_a_step_best_and_last(workdir):
    def rewrite(accuracies):
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        lines = [{**p, "val/accuracy": accuracies[p["step"]]} for p in lines if "val/loss" in p]
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in lines))

    rewrite({4: 0.9, 8: 0.5, 12: 0.4})  # step 4 is better but not saved
    assert [vit_jax.load(workdir, step).step for step in ("best", "last", None, 8, "12")] == [
        8,
        12,
        12,
        8,
        12,
    ]
    rewrite({4: 0.9, 8: 0.5, 12: 0.5})
    assert vit_jax.load(workdir, "best").step == 8
    with pytest.raises(UserError, match="it has 8, 12"):
        vit_jax.load(workdir, 4)
    with pytest.raises(UserError, match="a number, best, or last; got 'newest'"):
        vit_jax.load(workdir, "newest")
    (workdir / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"no val/accuracy for a saved step \(8, 12\)"):
        vit_jax.load(workdir, "best")


@pytest.mark.parametrize("step", ["best", "last"])
def test_run_of_several_seeds_names_its_folders(tmp_path, step):
    (tmp_path / "seed_4" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="a run of several seeds; pass one of seed_4"):
        vit_jax.load(tmp_path, step)


def test_forward_pass_in_docs_matches_the_model(tiny_run, tiny_config, tmp_path):
    """Checks a plain model, and one with all variants that the page covers."""
    variant = {"pool": "gap", "gelu": "tanh", "image_size": 16, "norm_eps": 1e-3}
    tiny_config.model.update(variant)
    tiny_config.steps = 3
    train(tiny_config, tmp_path)
    elsewhere = runpy.run_path(str(ELSEWHERE))
    for workdir, step in ((tiny_run, 12), (tmp_path, 3)):
        restored = elsewhere["restore"](workdir / "checkpoints" / str(step))
        got = elsewhere["predict"](*restored, images())
        model, params, config = vit_jax.load(workdir)
        x = normalize(images(), config.data.mean, config.data.std)
        expected = jax.nn.softmax(model.apply({"params": params}, x))
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_forward_pass_in_docs_has_at_most_40_lines_and_no_vit_jax():
    text = ELSEWHERE.read_text()
    tree = ast.parse(text)
    (predict,) = (n for n in tree.body if getattr(n, "name", "") == "predict")
    assert predict.end_lineno - predict.lineno + 1 <= 40
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    standard = {"json", "pathlib", "re", "sys"}
    assert imported <= standard | {"jax", "jax.numpy", "numpy", "orbax.checkpoint"}


@pytest.mark.parametrize(
    "variant", [{"qk_norm": True}, {"layer_scale": 0.1}, {"position_bias": "gaussian"}], ids=str
)
def test_forward_pass_in_docs_rejects_arrays_that_it_would_ignore(variant):
    _, params = random_model(pool="gap", **variant)
    with pytest.raises(ValueError, match="this model also has block_0/"):
        runpy.run_path(str(ELSEWHERE))["check_plain"](params, variant)


def test_forward_pass_in_docs_rejects_shifted_tokens():
    _, params = random_model(pool="gap")
    check = runpy.run_path(str(ELSEWHERE))["check_plain"]
    check(params, {"token_shift": False})
    with pytest.raises(ValueError, match="this model has a token_shift"):
        check(params, {"token_shift": True})


def test_checkpoint_from_8_devices_predicts_the_same_on_1_and_3(tiny_config, tmp_path):
    """On 3 without vit_jax; scripts/clean_restore.sh does the same in a clean environment."""
    tiny_config.steps, tiny_config.mesh.fsdp, tiny_config.model.width = 2, 2, 64
    tiny_config.optim.ema_decay = 0.5  # then the EMA weights are read
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    code, output = finish(start(command(tiny_config, tmp_path), **flags))
    assert code == 0, output
    assert "devices: 8 x cpu (data 4, fsdp 2)" in output
    model, params, config = vit_jax.load(tmp_path)
    black = normalize(np.zeros((1, 8, 8, 3), np.uint8), config.data.mean, config.data.std)
    expected = jax.nn.softmax(model.apply({"params": params}, black))[0]
    code = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(['vit_jax', 'flax', 'optax', 'ml_collections']))\n"
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
        "import jax; print(jax.device_count())"
    )
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(ELSEWHERE), str(tmp_path / "checkpoints" / "2")],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    *rows, count = done.stdout.splitlines()
    assert int(count) == 3
    np.testing.assert_allclose([float(r.split()[0]) for r in rows], expected, atol=1e-4)
