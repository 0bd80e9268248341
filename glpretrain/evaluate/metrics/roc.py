"""Scores of a detector of two classes: area under the ROC curve, average precision, error rates, each for many weightings at once.

A weighting counts every item as often as it was drawn, so intervals come from drawing videos (or items) with replacement. Where the
scores come from is left out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Detections(NamedTuple):
    """Scores of a detector for items of two classes."""

    scores: Tensor  # Float[B]  higher: more likely positive
    positive: Tensor  # Bool[B]
    groups: Tensor  # Int[B]  number of the video, from 0; number of the item where items are not frames

    @property
    def has_groups(self) -> bool:
        """Whether some items belong together."""
        return int(self.groups.max()) + 1 < len(self.groups)

    def averaged(self) -> "Detections":
        """One score per group, the mean of its items'.

        Raises:
            ValueError: a group has items of both classes.
        """
        count = int(self.groups.max()) + 1
        sizes = torch.bincount(self.groups, minlength=count)
        share = torch.bincount(self.groups, weights=self.positive.double(), minlength=count) / sizes
        if ((share > 0) & (share < 1)).any():
            raise ValueError("video-level scores: a video has items of both classes; every video needs one class")
        means = torch.bincount(self.groups, weights=self.scores.double(), minlength=count) / sizes
        return Detections(means, share > 0.5, torch.arange(count))


def numbered(names: Sequence[str], *, count: int) -> Tensor:
    """Int[B]: names as numbers from 0; without names every item has a number of its own."""
    if not names:
        return torch.arange(count)
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([order[name] for name in names])


def _counts(found: Detections, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Negatives and positives from each distinct score on, Float64[R T], highest score first; the last are those of all items."""
    order = found.scores.argsort(descending=True, stable=True)
    last = torch.ones(len(order), dtype=torch.bool)  # of equal scores
    last[:-1] = found.scores[order].diff() != 0
    ordered, positive = weights[:, order].double(), found.positive[order]
    false, true = ((ordered * chosen).cumsum(dim=1)[:, last] for chosen in (~positive, positive))
    return false, true


def _curve(found: Detections, weights: Tensor) -> tuple[Tensor, Tensor]:
    """False and true positive rates from (0, 0) to (1, 1), Float[R T]: one point per distinct score, highest first."""
    start = torch.zeros(len(weights), 1)
    false, true = (torch.cat([start, counts / counts[:, -1:]], dim=1) for counts in _counts(found, weights))
    return false, true


def auc(found: Detections, weights: Tensor) -> Tensor:
    """Float[R]: area under the curve, NaN where a class is missing.

    Args:
        found: scores and classes of B items.
        weights: Float[R B], how often each item counts.
    """
    false, true = _curve(found, weights)
    return torch.trapezoid(true, false, dim=1)


def average_precision(found: Detections, weights: Tensor) -> Tensor:
    """Float[R]: the mean of the precisions at each distinct score, weighted by the recall that it adds; NaN without a positive item.

    Arguments as in `auc`. As scikit-learn defines it: no interpolation, and equal scores count together.
    """
    false, true = _counts(found, weights)
    precision = true / (true + false).clamp(min=torch.finfo(torch.float64).tiny)
    return (true.diff(dim=1, prepend=torch.zeros(len(weights), 1)) * precision).sum(dim=1) / true[:, -1]


def eer(found: Detections, weights: Tensor) -> Tensor:
    """Error rate at which both error rates are equal, interpolated linearly between points of the curve. Arguments as in `auc`."""
    false, true = _curve(found, weights)
    excess = 1.0 - true - false  # of misses over false alarms: from 1 down to -1
    after = (excess <= 0.0).int().argmax(dim=1, keepdim=True).clamp(min=1)
    before = after - 1
    high, low = excess.gather(1, before), excess.gather(1, after)
    way = torch.where(high > low, high / (high - low), 0.0)
    rate = false.gather(1, before) + way * (false.gather(1, after) - false.gather(1, before))
    return torch.where(excess.isnan().any(dim=1), torch.nan, rate[:, 0])


def hter(found: Detections, weights: Tensor, *, threshold: float) -> Tensor:
    """Mean of two error rates: positives below the threshold, and negatives at or above it. Other arguments as in `auc`."""
    said = found.scores >= threshold
    errors = [(weights[:, chosen].double() * (said != found.positive)[chosen]).sum(dim=1) for chosen in (~found.positive, found.positive)]
    sizes = [weights[:, chosen].double().sum(dim=1) for chosen in (~found.positive, found.positive)]
    return 0.5 * (errors[0] / sizes[0] + errors[1] / sizes[1])


def eer_threshold(found: Detections) -> float:
    """The threshold at which the two error rates differ least, half-way between two scores; items from it on are called positive."""
    levels = found.scores.double().unique()  # ascending
    misses = torch.searchsorted(found.scores[found.positive].double().sort().values, levels) / found.positive.sum()
    alarms = 1.0 - torch.searchsorted(found.scores[~found.positive].double().sort().values, levels) / (~found.positive).sum()
    best = int((misses - alarms).abs().argmin())
    return float(levels[best] if best == 0 else 0.5 * (levels[best] + levels[best - 1]))
