"""Non-finite losses: reported with the batch and the last good checkpoint, or skipped."""

import json
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vit_jax import augment
from vit_jax.errors import Stopped, UserError
from vit_jax.experiment import make_experiment
from vit_jax.parallel.preemption import StopSignal
from vit_jax.train import train
from vit_jax.workdir import read_lines, saved_steps


@pytest.fixture
def poisoned(tiny_config, tmp_path, monkeypatch):
    """A config for 31 images, one of them white, with its loss multiplied by `factor`."""
    rng, folder = np.random.default_rng(0), tmp_path / "data"
    for split, count in (("train", 15), ("test", 5)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 200, (8, 8, 3), dtype=np.uint8))
                image.save(folder / split / name / f"{i}.png")
    Image.new("RGB", (8, 8), (255, 255, 255)).save(folder / "train" / "a" / "white.png")
    c = tiny_config
    c.data.name = f"folder:{folder}"
    c.batch_size, c.epochs, c.log_every, c.optim.peak_lr = 4, 3, "2 steps", 1e-4
    c.save_every, c.tensorboard = "1 step", False
    make_augment = augment.make_augment

    def poison(factor):
        def make(*args, **options):
            augment_fn = make_augment(*args, **options)

            def poisoned_fn(key, batch, **rest):
                images, labels = augment_fn(key, batch, **rest)
                white = (batch["image"] == 255).all((1, 2, 3)) & batch["mask"]
                return images, jnp.where(white[:, None], factor * labels, labels)

            return poisoned_fn

        monkeypatch.setattr(augment, "make_augment", make)
        return c

    return poison


def white_steps(c):
    """The steps, one per epoch, whose batch contains the white image."""
    experiment = make_experiment(c)
    batches = {s: experiment.stored_batch(s, c.seed) for s in range(1, 25)}
    return [s for s, b in batches.items() if (b["image"] == 255).all((1, 2, 3)).any()]


def test_non_finite_weights_are_not_saved(tiny_config, tmp_path):
    """The loss of the step is finite, but its update is not."""
    c = tiny_config
    c.optim.schedule, c.optim.peak_lr = "constant", 1e39  # infinite in float32
    c.save_every, c.tensorboard = "1 step", False
    with pytest.raises(
        UserError, match=r"weights are not finite at step 1 of seed 0; last good checkpoint: none"
    ):
        train(c, tmp_path / "run")
    assert not saved_steps(tmp_path / "run" / "checkpoints")
    assert (tmp_path / "run" / "bad_batch_1.npz").exists()


def test_nan_names_the_last_good_checkpoint_and_stores_the_batch(poisoned, tmp_path):
    c = poisoned(jnp.nan)
    first, *_ = white_steps(c)
    assert first > 2
    message = rf"the loss is nan .* at step {first} of seed 0; last good .*/{first - 1}; "
    with pytest.raises(UserError, match=message):
        train(c, tmp_path / "run")
    assert saved_steps(tmp_path / "run" / "checkpoints")[-1] == first - 1
    batch = np.load(tmp_path / "run" / f"bad_batch_{first}.npz")
    (row,) = np.flatnonzero((batch["image"] == 255).all((1, 2, 3)))
    split = make_experiment(c).train
    assert (split.images[batch["index"][row]] == 255).all()
    np.testing.assert_array_equal(batch["label"], split.labels[batch["index"]])
    # When bad steps are skipped, the same workdir resumes and completes.
    c.on_bad_loss = "skip"
    result = train(c, tmp_path / "run")
    assert result["steps"] == 24 and np.isfinite(result["train_loss"])


def test_skipped_steps_are_excluded_from_the_means(poisoned, tmp_path):
    c = poisoned(jnp.nan)
    c.on_bad_loss, c.optim.ema_decay, c.log_every = "skip", 0.9, "1 step"
    train(c, tmp_path)
    # Strict JSON does not allow NaN.
    text = (tmp_path / "metrics.jsonl").read_text()
    lines = [json.loads(x, parse_constant=pytest.fail) for x in text.splitlines()]
    losses = {p["step"]: p.get("train/loss") for p in lines if "train/lr" in p}
    bad = white_steps(c)
    assert [step for step, loss in losses.items() if loss is None] == bad
    for epoch, line in enumerate(p for p in lines if "epoch/loss" in p):
        good = [losses[s] for s in range(8 * epoch + 1, 8 * epoch + 9) if s not in bad]
        assert line["epoch/loss"] == pytest.approx(np.mean(good), rel=1e-6)
    skipped = [p["train/skipped"] for p in lines if "train/skipped" in p]
    assert max(skipped) == 1 and skipped[0] == 0


def test_skipped_step_is_excluded_if_the_resumed_run_skips_no_more(poisoned, tmp_path, monkeypatch):
    c = poisoned(jnp.nan)
    c.on_bad_loss, c.log_every = "skip", "1 step"
    first, second, *_ = white_steps(c)
    assert first < 8  # the epoch goes on after it

    def reached(self, step):
        self.signal = signal.SIGTERM if step == first else None
        return step == first

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(StopSignal, "reached", reached)
        train(c, tmp_path)
    c.on_bad_loss = "stop"
    with pytest.raises(UserError, match=f"nan at step {second} "):
        train(c, tmp_path)
    values = [v for _, v in read_lines(tmp_path / "metrics.jsonl")]
    losses = [v["train/loss"] for v in values if "train/loss" in v and v["step"] <= 8]
    (mean,) = (v["epoch/loss"] for v in values if "epoch/loss" in v)
    assert len(losses) == 7 and mean == pytest.approx(np.mean(losses), rel=1e-6)


def test_run_with_only_bad_steps_ends(tiny_config, tmp_path):
    tiny_config.optim.peak_lr, tiny_config.on_bad_loss = 1e30, "skip"
    tiny_config.log_every = "4 steps"
    with pytest.raises(UserError, match="at step"):
        train(tiny_config, tmp_path)
