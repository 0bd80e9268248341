"""A value as a pure function of training progress, so that resuming or changing the epoch length cannot move it."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from `warmup_start` to `base`, then `base` to `end` along `shape`.

    Matches DINO's `cosine_scheduler` (utils.py) after the warm-up exactly. In its warm-up DINO divides by one step less than
    the warm-up has (linspace with both ends), MAE by all of them (util/lr_sched.py); we do as MAE.

    Args:
        base: value at the end of the warm-up.
        end: value at progress 1; `base` when left out.
        warmup: share of the run, in [0, 1).
        warmup_start: value at progress 0 when there is a warm-up.
        shape: of the way from `base` to `end`; `step` jumps from `warmup_start` to `base` where the warm-up ends.

    Raises:
        ValueError: `warmup` outside [0, 1), or an `end` that the shape would ignore.
    """

    base: float
    end: float | None = None
    warmup: float = 0.0
    warmup_start: float = 0.0
    shape: Literal["cosine", "linear", "constant", "step"] = "cosine"

    def __post_init__(self) -> None:
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"Schedule: warmup is a share of the run in [0, 1), not {self.warmup}")
        if self.shape in ("constant", "step") and self.end not in (None, self.base):
            raise ValueError(f"Schedule: shape {self.shape!r} would ignore end={self.end}; leave it out or choose cosine or linear")

    def __call__(self, progress: float) -> float:
        """Value at `progress` = optimizer steps done / all of them, in [0, 1]."""
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
