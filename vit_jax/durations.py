"""Durations with the unit in the value: "500 steps", "5 epochs", "10000 examples", "15%"."""

import dataclasses
import re

_PATTERN = re.compile(r"\s*([0-9.][0-9._]*)\s*(step|epoch|example|%)s?\s*")


def parse(text: str) -> tuple[float, str] | None:
    """Returns (value, unit), or None for an empty text, which means never.

    Raises ValueError unless the text is a number with a unit: steps, epochs, examples, or %.
    """
    if not text.strip():
        return None
    match = _PATTERN.fullmatch(text)
    if not match:
        raise ValueError(text)
    unit = match[2] if match[2] == "%" else f"{match[2]}s"
    return float(match[1]), unit


def canonical(text: str) -> str:
    """The one spelling of a duration that configs store: "5epochs" becomes "5 epochs"."""
    if (parsed := parse(text)) is None:
        return ""
    value, unit = parsed
    number = f"{value:.0f}" if value.is_integer() else repr(value)
    if unit == "%":
        return f"{number}%"
    return f"{number} {unit.removesuffix('s') if value == 1 else unit}"


def in_steps(text: str, *, steps_per_epoch: int, batch_size: int, total_steps: int) -> int:
    """The duration in optimizer steps, at least 1; 0 if it is empty or zero."""
    if (parsed := parse(text)) is None or not parsed[0]:
        return 0
    value, unit = parsed
    steps_per_unit = {
        "steps": 1,
        "epochs": steps_per_epoch,
        "examples": 1 / batch_size,
        "%": total_steps / 100,
    }[unit]
    return max(1, round(value * steps_per_unit))


@dataclasses.dataclass(frozen=True)
class Every:
    """A cadence: true at every multiple of `steps` (0: at none) and, if given, at step `last`."""

    steps: int
    last: int | None = None

    def __call__(self, step: int) -> bool:
        return step == self.last or (self.steps > 0 and step % self.steps == 0)
