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
        ValueError: `warmup` is outside [0, 1), or the shape would ignore `end`.
    """

    base: float
    end: float | None = None
    warmup: float = 0.0
    warmup_start: float = 0.0
    shape: Literal["cosine", "linear", "constant", "step"] = "cosine"

    def __post_init__(self) -> None:
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"Schedule: warmup={self.warmup} given; it is a share of the run in [0, 1)")
        if self.shape in ("constant", "step") and self.end not in (None, self.base):
            raise ValueError(f"Schedule: shape {self.shape!r} would ignore end={self.end}; leave it out or choose cosine or linear")

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
