"""Durations in each unit, their one spelling, and cadences."""

import pytest

from vit_jax import durations


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
    counts = {"steps_per_epoch": 100, "batch_size": 64, "total_steps": 2000}
    assert durations.in_steps(text, **counts) == steps


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("5epochs", "5 epochs"),
        (" 1  epochs ", "1 epoch"),
        ("10_000 examples", "10000 examples"),
        ("0.5 epoch", "0.5 epochs"),
        ("15 %", "15%"),
        ("  ", ""),
    ],
)
def test_duration_has_one_spelling(text, canonical):
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
