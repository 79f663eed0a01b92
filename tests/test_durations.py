"""Durations in each unit, their canonical spelling, cadences, and the plan of a run."""

import pytest

from vit_jax import config, durations
from vit_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", 0),
        ("0 epochs", 0),
        ("7 steps", 7),
        ("1 step", 1),
        ("2.5 epochs", 250),
        ("6400 examples", 100),
        ("10%", 200),
        ("1 example", 1),  # rounded up to a step
    ],
)
def test_duration_in_steps(text, steps):
    c = config.defaults()
    c.batch_size, c.steps = 64, 2000
    assert durations.Plan(c, 6400).in_steps(text) == steps


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("5epochs", "5 epochs"),
        (" 1  epochs ", "1 epoch"),
        ("10_000 examples", "10000 examples"),
        ("0.5 epoch", "0.5 epochs"),
        ("15 %", "15%"),
        ("0.00005 epochs", "5e-05 epochs"),
        ("  ", ""),
    ],
)
def test_duration_has_a_canonical_spelling(text, canonical):
    assert durations.canonical(text) == canonical
    assert durations.canonical(canonical) == canonical


@pytest.mark.parametrize("text", ["5", "epochs", "-5 steps", "5 weeks", "1.2.3 steps", "nan steps"])
def test_text_without_number_and_unit_is_rejected(text):
    with pytest.raises(ValueError):
        durations.parse(text)


def test_cadence():
    assert [step for step in range(1, 11) if durations.Every(4)(step)] == [4, 8]
    assert [step for step in range(1, 11) if durations.Every(4, last=10)(step)] == [4, 8, 10]
    assert not any(durations.Every(0)(step) for step in range(11))


@pytest.fixture
def make_plan():
    """A plan for 90 examples in batches of 16: six steps per epoch, the last of 10 examples."""

    def make(**fields):
        c = config.defaults()
        c.batch_size = 16
        for name, value in fields.items():
            config.set_field(c, name, value)
        return durations.Plan(c, 90)

    return make


def test_plan_counts_in_steps(make_plan):
    plan = make_plan(epochs=3, **{"optim.warmup": "1 epoch", "augment.mix_off_last": "50%"})
    assert (plan.steps_per_epoch, plan.total_steps) == (6, 18)
    assert (plan.warmup_steps, plan.mix_steps) == (6, 9)
    assert make_plan(epochs=0.5).total_steps == 3
    assert make_plan(epochs=3, steps=8).total_steps == 8


def test_plan_caps_warmup_and_mixing_at_the_run(make_plan):
    plan = make_plan(steps=2, **{"optim.warmup": "4 epochs", "augment.mix_off_last": "2 epochs"})
    assert (plan.warmup_steps, plan.mix_steps) == (2, 0)


def test_plan_evaluates_and_saves_at_the_last_step_too(make_plan):
    plan = make_plan(steps=8, eval_every="3 steps", save_every="", keep_every="1 epoch")
    steps = range(1, 9)
    assert [s for s in steps if plan.evaluate(s)] == [3, 6, 8]
    assert [s for s in steps if plan.save(s)] == [8]
    assert [s for s in steps if plan.keep(s)] == [6]


def test_plan_counts_epochs_and_images(make_plan):
    plan = make_plan(steps=20)
    assert [plan.epoch(s) for s in (1, 6, 7, 20)] == [(1, 1), (1, 6), (2, 1), (4, 2)]
    assert [s for s in range(1, 21) if plan.ends_epoch(s)] == [6, 12, 18, 20]
    assert [plan.images(s) for s in (0, 5, 6, 7)] == [0, 80, 90, 106]


def test_run_of_more_steps_than_devices_count_is_rejected(make_plan):
    message = r"config.epochs=1e\+09 makes 6,000,000,000 steps: at most 2,147,483,647 are allowed"
    with pytest.raises(UserError, match=message):
        make_plan(epochs=1e9)
    assert make_plan(epochs=1e9, steps=2**31 - 1).total_steps == 2**31 - 1
