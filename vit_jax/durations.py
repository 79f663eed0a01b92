"""Durations with the unit in the value: "500 steps", "5 epochs", "10000 examples", "15%"."""

import dataclasses
import math
import re

from ml_collections import ConfigDict

_PATTERN = re.compile(r"\s*([0-9.][0-9._]*)\s*(step|epoch|example|%)s?\s*")


def parse(text: str) -> tuple[float, str] | None:
    """Returns (value, unit), or None for an empty string, which means never.

    Raises ValueError unless it is a number with a unit: steps, epochs, examples, or %.
    """
    if not text.strip():
        return None
    match = _PATTERN.fullmatch(text)
    if not match:
        raise ValueError(text)
    unit = match[2] if match[2] == "%" else f"{match[2]}s"
    return float(match[1]), unit


def canonical(text: str) -> str:
    """Returns a duration as configs store it: "5epochs" becomes "5 epochs"."""
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


@dataclasses.dataclass(frozen=True)
class Plan:
    """The durations of a run in steps. The last batch of an epoch may be smaller."""

    num_examples: int
    batch_size: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    mix_steps: int  # mixup and CutMix apply up to this step
    log: Every
    evaluate: Every
    save: Every
    keep: Every

    @classmethod
    def make(cls, config: ConfigDict, num_examples: int) -> "Plan":
        """The plan of a config. Warmup and the part without mixing are capped at the run."""
        steps_per_epoch = math.ceil(num_examples / config.batch_size)
        total_steps = config.steps or max(1, round(config.epochs * steps_per_epoch))

        def steps(text):
            return in_steps(
                text,
                steps_per_epoch=steps_per_epoch,
                batch_size=config.batch_size,
                total_steps=total_steps,
            )

        return cls(
            num_examples=num_examples,
            batch_size=config.batch_size,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            warmup_steps=min(steps(config.optim.warmup), total_steps),
            mix_steps=max(total_steps - steps(config.augment.mix_off_last), 0),
            log=Every(steps(config.log_every)),
            evaluate=Every(steps(config.eval_every), last=total_steps),
            save=Every(steps(config.save_every), last=total_steps),
            keep=Every(steps(config.keep_every)),
        )

    def epoch(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a step, all counted from 1."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        return epoch + 1, index + 1

    def ends_epoch(self, step: int) -> bool:
        """Whether a step is the last of its epoch or of the run."""
        return step % self.steps_per_epoch == 0 or step == self.total_steps

    def shows_images(self, step: int) -> bool:
        """Whether to record a step's images: the first step of epochs 1, 2, 4, 8, ..."""
        epoch, index = self.epoch(step)
        return index == 1 and epoch & (epoch - 1) == 0

    def images(self, step: int) -> int:
        """Training images up to and including a step."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.num_examples + steps * self.batch_size
