"""A value as a pure function of training progress, so that neither resuming nor another epoch length changes it."""

import math
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up from `warmup_start` to `base`, then a curve from `base` to `end`, where it stays.

    After the warm-up it equals DINO's `cosine_scheduler` (utils.py) exactly. For the warm-up, DINO divides by the number of warm-up steps
    minus one (linspace with both ends) and MAE by their number (util/lr_sched.py); ours is MAE's.

    Args:
        base: value at the end of the warm-up.
        end: value at progress 1; None stands for `base`.
        warmup: length of the warm-up as a share of the run, in [0, 1).
        warmup_start: value at progress 0 when there is a warm-up.
        shape: shape of the curve from `base` to `end`; `step` stays at `warmup_start` and jumps to `base` where the warm-up ends.
        per: number of items in a step that `base` is meant for; `for_batch` turns it into that of a run's own batch. `end` and
            `warmup_start` stay as they are (DINO main_dino.py, MAE main_pretrain.py). None: the values are used as they are.
        scaling: how `base` grows with the batch: in proportion (DINO, MAE) or with its square root (DINOv2 utils/config.py).
        length: length of the curve from `base` to `end` as a share of the run; None is what the warm-up leaves of it.

    Raises:
        ValueError: a value is not finite, `warmup` is outside [0, 1), `length` is longer than what is left, `per` is below 1, or a setting
            would be ignored.
    """

    base: float
    end: float | None = None
    warmup: float = 0.0
    warmup_start: float = 0.0
    shape: Literal["cosine", "linear", "constant", "step"] = "cosine"
    per: int | None = None
    scaling: Literal["linear", "sqrt"] = "linear"
    length: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("base", self.base), ("end", self.end), ("warmup_start", self.warmup_start)):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"Schedule: {name}={value} given; accepted: finite numbers")
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"Schedule: warmup={self.warmup} given; it is a share of the run in [0, 1)")
        if self.shape in ("constant", "step") and self.end not in (None, self.base):
            raise ValueError(f"Schedule: shape {self.shape!r} would ignore end={self.end}; leave it out or choose cosine or linear")
        if self.length is not None and self.end in (None, self.base):
            raise ValueError(f"Schedule: length={self.length} would be ignored: there is no curve; give another end, or leave it out")
        if self.length is not None and not 0.0 < self.length <= 1.0 - self.warmup:
            raise ValueError(f"Schedule: length={self.length} given; accepted: above 0 and at most what warmup={self.warmup} leaves")
        if self.per is not None and self.per < 1:
            raise ValueError(f"Schedule: per={self.per} given; it is a number of items, at least 1")
        if self.per is None and self.scaling != "linear":
            raise ValueError(f"Schedule: scaling {self.scaling!r} would be ignored without per; give per, or leave scaling out")

    def for_batch(self, num_items: int) -> "Schedule":
        """The schedule with `base` for steps of `num_items`, without a rule; itself if it has none."""
        if self.per is None:
            return self
        ratio = num_items / self.per
        return replace(self, base=self.base * (math.sqrt(ratio) if self.scaling == "sqrt" else ratio), per=None, scaling="linear")

    def require(self, name: str, *, positive: bool = False, most: float = math.inf, scales: bool = False) -> None:
        """Refuse a schedule that leaves its range anywhere.

        Args:
            name: what the schedule is for, in messages.
            positive: whether 0 is out of range too.
            most: largest value.
            scales: whether it may depend on the batch.

        Raises:
            ValueError: a value is below 0, is 0 where that is out of range, or is above `most`; or the schedule must not have `per`.
        """
        if self.per is not None and not scales:
            raise ValueError(f"{name}: per={self.per} given; only optimization.lr depends on the batch: leave per out")
        reached = {"base": self.base} if self.end is None else {"base": self.base, "end": self.end}
        if self.warmup > 0.0 and not (positive and self.warmup_start == 0.0 and self.shape != "step"):
            reached["warmup_start"] = self.warmup_start
        for part, value in reached.items():
            if value < 0.0 or value > most or (positive and value == 0.0):
                accepted = f"values {'above 0' if positive else 'from 0 on'}" if math.isinf(most) else f"values from 0 to {most:g}"
                raise ValueError(f"{name}: {part} is {value}; accepted: {accepted}")

    def __call__(self, progress: float) -> float:
        """Value at `progress`, the number of optimizer steps done divided by all of them, in [0, 1]."""
        assert self.per is None, "for_batch comes first"
        if progress < self.warmup:
            if self.shape == "step":
                return self.warmup_start
            return self.warmup_start + (self.base - self.warmup_start) * progress / self.warmup
        end = self.base if self.end is None else self.end
        after = min(1.0, (progress - self.warmup) / (self.length or 1.0 - self.warmup))
        if self.shape in ("constant", "step"):
            return self.base
        if self.shape == "linear":
            return self.base + (end - self.base) * after
        return end + 0.5 * (self.base - end) * (1.0 + math.cos(math.pi * after))
