"""Several seeds in one program: the axis of seeds, their losses, and their workdirs."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import lines, train_shared

import vit_jax
from vit_jax import config as config_lib
from vit_jax import seeds
from vit_jax.experiment import make_experiment
from vit_jax.parallel.mesh import make_mesh
from vit_jax.workdir import saved_steps
from vit_jax.workdir.checkpoints import Checkpoints


def config_of(num_seeds):
    c = config_lib.defaults()
    c.num_seeds = num_seeds
    return c


def test_one_seed_has_no_seed_axis():
    def fn(x, y):
        return x + y

    one, tree, shape = config_of(1), {"a": np.arange(3)}, jax.ShapeDtypeStruct((3,), np.int32)
    assert seeds.vmap_seeds(fn, one, (0, None)) is fn
    assert seeds.stack([tree]) is tree
    assert seeds.unstack(tree, one) == [tree]
    assert seeds.unstack_shapes({"a": shape}, one) == {"a": shape}


def test_several_seeds_have_a_leading_axis():
    two = config_of(2)
    added = seeds.vmap_seeds(lambda x, y: x + y, two, (0, None))(jnp.array([1, 2]), 10)
    np.testing.assert_array_equal(added, [11, 12])
    trees = [{"a": np.arange(3) + i} for i in range(2)]
    stacked = seeds.stack(trees)
    np.testing.assert_array_equal(stacked["a"], [[0, 1, 2], [1, 2, 3]])
    jax.tree.map(np.testing.assert_array_equal, seeds.unstack(stacked, two), trees)
    shapes = seeds.unstack_shapes({"a": jax.ShapeDtypeStruct((2, 3), np.int32)}, two)
    assert shapes["a"].shape == (3,) and shapes["a"].dtype == np.int32


def test_seed_axis_is_replicated():
    mesh = make_mesh(1, 1)
    shapes = {"a": jax.ShapeDtypeStruct((2, 64, 128), np.float32)}
    assert seeds.state_sharding(mesh, shapes, config_of(2))["a"].spec[:1] == (None,)


@pytest.fixture(scope="module")
def finished(make_tiny_config, tiny_run, tmp_path_factory):
    """(config, workdir, result) of a run of two seeds that saved once. Do not write to it."""
    c = make_tiny_config(depth=2)
    c.seed, c.num_seeds, c.steps, c.log_every = 5, 2, 2, "1 step"
    c.init_from, c.tensorboard = str(tiny_run), False
    workdir = tmp_path_factory.mktemp("seeds") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        return c, workdir, train_shared(c, workdir)


def test_each_seed_has_its_own_workdir(finished):
    _, workdir, result = finished
    for i, seed in enumerate((5, 6)):
        own = json.loads((workdir / f"seed_{seed}" / "result.json").read_text())
        assert own["seed"] == seed and own["test_loss"] == result["test_loss_of_each_seed"][i]
        config = vit_jax.load(workdir / f"seed_{seed}").config
        assert (config.seed, config.num_seeds) == (seed, 1)
        assert [p["step"] for p in lines(workdir / f"seed_{seed}", "train/")] == [1, 2]
    assert not (workdir / "checkpoints").exists() and not (workdir / "metrics.jsonl").exists()


def test_result_has_mean_and_standard_deviation(finished, capsys):
    c, workdir, result = finished
    for name in ("train_loss", "test_loss", "test_accuracy"):
        each = result[f"{name}_of_each_seed"]
        assert result[name] == pytest.approx(np.mean(each)) and len(each) == 2
        assert result[f"{name}_std"] == pytest.approx(np.std(each, ddof=1))
    assert result["train_loss_std"] > 0 and result["seed"] == [5, 6]
    assert json.loads((workdir / "result.json").read_text()) == result
    assert train_shared(c, workdir) == result
    assert "(mean of 2 seeds, standard deviation" in capsys.readouterr().out


def test_run_killed_between_the_saves_of_two_seeds_repeats_the_step(finished, tmp_path, capsys):
    """At the first save, the folder of one seed is not yet a checkpoint of the run."""
    c, workdir, result = finished
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "seed_6" / "checkpoints" / "2")
    (tmp_path / "run" / "result.json").unlink()
    again = train_shared(c, tmp_path / "run")  # from the initial weights of c.init_from
    assert "Resuming" not in capsys.readouterr().out
    for name in ("train_loss_of_each_seed", "test_loss_of_each_seed"):
        assert again[name] == result[name]
    assert lines(tmp_path / "run" / "seed_5") == lines(workdir / "seed_5")


def test_several_seeds_resume_from_the_newest_common_step(finished, tmp_path, capsys, monkeypatch):
    c = config_lib.from_dict(finished[0].to_dict())
    c.init_from, c.steps, c.save_every = "", 3, "1 step"
    save, complete = Checkpoints.save, []

    def recorded(self, step, *args):
        complete.append(
            (step, [saved_steps(tmp_path / "run" / f"seed_{i}/checkpoints") for i in (5, 6)])
        )
        save(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", recorded)
        whole = train_shared(c, tmp_path / "run")
    # Every seed has saved a step before any seed begins to save the next.
    assert all(seed[-1:] == [step - 1] for step, seeds in complete if step > 1 for seed in seeds)
    shutil.rmtree(tmp_path / "run" / "seed_6" / "checkpoints" / "3")
    (tmp_path / "run" / "result.json").unlink()
    before = lines(tmp_path / "run" / "seed_5")
    again = train_shared(c, tmp_path / "run")
    assert "Resuming from step 2 of 3" in capsys.readouterr().out
    assert again["test_loss_of_each_seed"] == whole["test_loss_of_each_seed"]
    assert lines(tmp_path / "run" / "seed_5") == before


def losses(experiment, num_steps):
    """float32[num_steps] or [num_steps, S]."""
    state, values = experiment.init(), []
    for _, inputs in experiment.batches():
        state, metrics = experiment.train_step(state, *inputs)
        values.append(jax.device_get(metrics["loss"]))
        if len(values) == num_steps:
            return np.stack(values)


@pytest.mark.usefixtures("optimized")  # until the end of the module
def test_several_seeds_have_the_same_losses_as_separate_runs(tiny_config):
    c = tiny_config
    c.seed, c.num_seeds, c.augment.flip, c.optim.peak_lr = 5, 2, "random", 1e-4
    together = losses(make_experiment(c), 7)  # into the second epoch
    c.num_seeds, train_step = 1, None
    for i, c.seed in enumerate((5, 6)):
        experiment = make_experiment(c)
        experiment.train_step = train_step = train_step or experiment.train_step  # compiled once
        alone = losses(experiment, 7)
        assert alone.shape == (7,)
        np.testing.assert_allclose(together[:, i], alone, rtol=0, atol=2.4e-7)
