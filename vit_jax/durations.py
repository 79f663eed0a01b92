"""Durations with the unit in the value: "500 steps", "5 epochs", "10000 examples", "15%"."""

import dataclasses
import math
import re

from ml_collections import ConfigDict

from vit_jax.errors import UserError

KIND = 'a number with its unit (steps, epochs, examples, %), such as "5 epochs" or "15%"'
# The exponent is how `repr`, in `canonical`, writes a small number.
_PATTERN = re.compile(r"\s*([0-9.][0-9._]*(?:e-[0-9]+)?)\s*(step|epoch|example|%)s?\s*")


def parse(text: str) -> tuple[float, str]:
    """Returns (value, unit): "step", "epoch", "example", or "%". Empty is (0, "step"): never.

    Raises ValueError for other text.
    """
    if not text.strip():
        return 0.0, "step"
    match = _PATTERN.fullmatch(text)
    if not match:
        raise ValueError(text)
    return float(match[1]), match[2]


def canonical(text: str) -> str:
    """Returns a duration as configs store it: "5epochs" becomes "5 epochs"."""
    if not text.strip():
        return ""
    value, unit = parse(text)
    number = f"{value:.0f}" if value.is_integer() else repr(value)
    if unit == "%":
        return f"{number}%"
    return f"{number} {unit}" if value == 1 else f"{number} {unit}s"


@dataclasses.dataclass(frozen=True)
class Every:
    """A cadence: every multiple of `steps` (0: none) and, if given, the step `last`."""

    steps: int
    last: int | None = None

    def __call__(self, step: int) -> bool:
        return step == self.last or (self.steps > 0 and step % self.steps == 0)


class Plan:
    """The durations of a run in steps. The last batch of an epoch may be smaller."""

    def __init__(self, config: ConfigDict, num_examples: int) -> None:
        self.num_examples, self.batch_size = num_examples, config.batch_size
        self.steps_per_epoch = math.ceil(num_examples / config.batch_size)
        self.total_steps = config.steps or max(1, round(config.epochs * self.steps_per_epoch))
        if self.total_steps >= 2**31:  # the step is an int32
            raise UserError(
                f"config.epochs={config.epochs:g} makes {self.total_steps:,} steps: at most "
                f"{2**31 - 1:,} are allowed; reduce epochs, or set config.steps"
            )
        self.warmup_steps = min(self.in_steps(config.optim.warmup), self.total_steps)
        # Mixup and CutMix apply up to this step.
        self.mix_steps = max(self.total_steps - self.in_steps(config.augment.mix_off_last), 0)
        self.ends_epoch = Every(self.steps_per_epoch, last=self.total_steps)
        self.log = Every(self.in_steps(config.log_every))
        self.evaluate = Every(self.in_steps(config.eval_every), last=self.total_steps)
        self.stop_after = self.in_steps(config.stop_after)  # 0: never
        self.save = Every(self.in_steps(config.save_every), last=self.total_steps)
        self.keep = Every(self.in_steps(config.keep_every))

    def in_steps(self, text: str) -> int:
        """Returns a duration in optimizer steps, at least 1; 0 if it is empty or zero."""
        value, unit = parse(text)
        per_unit = {"step": 1, "epoch": self.steps_per_epoch, "example": 1 / self.batch_size}
        per_unit["%"] = self.total_steps / 100
        return max(1, round(value * per_unit[unit])) if value else 0

    def epoch(self, step: int) -> tuple[int, int]:
        """Returns (epoch, step within it) of a step, all counted from 1."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        return epoch + 1, index + 1

    def images(self, step: int) -> int:
        """Returns the number of training images up to and including a step."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.num_examples + steps * self.batch_size
