"""A value as a pure function of training progress, so that neither resuming nor another epoch length changes it."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up from `warmup_start` to `base`, then a curve from `base` to `end`.

    After the warm-up it equals DINO's `cosine_scheduler` (utils.py) exactly. For the warm-up, DINO divides by the number of warm-up steps
    minus one (linspace with both ends) and MAE by their number (util/lr_sched.py); ours is MAE's.

    Args:
        base: value at the end of the warm-up.
        end: value at progress 1; None stands for `base`.
        warmup: length of the warm-up as a share of the run, in [0, 1).
        warmup_start: value at progress 0 when there is a warm-up.
        shape: shape of the curve from `base` to `end`; `step` stays at `warmup_start` and jumps to `base` where the warm-up ends.

    Raises:
        ValueError: a value is not finite, `warmup` is outside [0, 1), or the shape would ignore `end`.
    """

    base: float
    end: float | None = None
    warmup: float = 0.0
    warmup_start: float = 0.0
    shape: Literal["cosine", "linear", "constant", "step"] = "cosine"

    def __post_init__(self) -> None:
        for name, value in (("base", self.base), ("end", self.end), ("warmup_start", self.warmup_start)):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"Schedule: {name}={value} given; accepted: finite numbers")
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"Schedule: warmup={self.warmup} given; it is a share of the run in [0, 1)")
        if self.shape in ("constant", "step") and self.end not in (None, self.base):
            raise ValueError(f"Schedule: shape {self.shape!r} would ignore end={self.end}; leave it out or choose cosine or linear")

    def require(self, name: str, *, positive: bool = False, most: float = math.inf) -> None:
        """Refuse a schedule that leaves its range anywhere.

        Args:
            name: what the schedule is for, in messages.
            positive: whether 0 is out of range too.
            most: largest value.

        Raises:
            ValueError: a value is below 0, is 0 where that is out of range, or is above `most`.
        """
        reached = {"base": self.base} if self.end is None else {"base": self.base, "end": self.end}
        if self.warmup > 0.0 and not (positive and self.warmup_start == 0.0 and self.shape != "step"):
            reached["warmup_start"] = self.warmup_start
        for part, value in reached.items():
            if value < 0.0 or value > most or (positive and value == 0.0):
                accepted = f"values {'above 0' if positive else 'from 0 on'}" if math.isinf(most) else f"values from 0 to {most:g}"
                raise ValueError(f"{name}: {part} is {value}; accepted: {accepted}")

    def __call__(self, progress: float) -> float:
        """Value at `progress`, the number of optimizer steps done divided by all of them, in [0, 1]."""
        if progress < self.warmup:
            if self.shape == "step":
                return self.warmup_start
            return self.warmup_start + (self.base - self.warmup_start) * progress / self.warmup
        end = self.base if self.end is None else self.end
        after = (progress - self.warmup) / (1.0 - self.warmup)
        if self.shape in ("constant", "step"):
            return self.base
        if self.shape == "linear":
            return self.base + (end - self.base) * after
        return end + 0.5 * (self.base - end) * (1.0 + math.cos(math.pi * after))
