"""Mean average precision: how well scores rank the items of each label above all others."""

import torch
from torch import Tensor

from glpretrain.evaluate.base import Score
from glpretrain.evaluate.metrics.intervals import drawn_counts, interval_score, spread_interval
from glpretrain.evaluate.metrics.roc import Detections, average_precision


def mean_average_precision(scores: Tensor, truth: Tensor, groups: Tensor | None = None) -> Score:
    """The mean over the labels that items have of `average_precision`, in percent; the interval by bootstrap over items or groups.

    Args:
        scores: Float[B K], higher where a label is more probable.
        truth: Bool[B K], which labels the items have.
        groups: Int[B], which items belong together; None where all are independent.

    Raises:
        ValueError: no item has a label.
    """
    shown = truth.any(dim=0).nonzero()[:, 0].tolist()
    if not shown:
        raise ValueError(f"mAP: none of {len(truth)} items has a label; at least one is needed")
    numbers = torch.arange(len(scores)) if groups is None else groups.unique(return_inverse=True)[1]
    found = [Detections(scores[:, label], truth[:, label], numbers) for label in shown]
    value = torch.stack([average_precision(one, torch.ones(1, len(scores))) for one in found]).mean()
    drawn: list[Tensor] = []
    for counts in drawn_counts(int(numbers.max()) + 1, spread_over=len(scores)):
        weights = counts[:, numbers]  # [R B]
        drawn.append(torch.stack([average_precision(one, weights) for one in found]).nanmean(dim=0))
    return interval_score(100 * value.item(), 100 * spread_interval(torch.cat(drawn)), count=len(scores))
