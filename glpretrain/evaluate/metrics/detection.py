"""The scores of a detector of two classes as tables show them: in percent, with intervals, of items and of what they belong to.

The statistics themselves are in `roc`.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from glpretrain.evaluate.base import Score
from glpretrain.evaluate.metrics.intervals import drawn_counts, interval_score, spread_interval
from glpretrain.evaluate.metrics.roc import Detections, auc, eer, hter


def detection_scores(found: Detections, thresholds: Mapping[str, float]) -> dict[str, Score]:
    """`auc`, `eer` and `hter` of one set, in percent; `video_auc` and so on where items belong together.

    Args:
        found: items of both classes.
        thresholds: `threshold` and, where items belong together, `video_threshold`, at which `hter` is taken; without them it is left out.
    """
    scores: dict[str, Score] = {}
    for level, one in {"": found, "video_": found.averaged()}.items() if found.has_groups else {"": found}.items():
        scores[f"{level}auc"] = detection_score(auc, one)
        scores[f"{level}eer"] = detection_score(eer, one)
        threshold = thresholds.get(f"{level}threshold")
        if threshold is not None:
            scores[f"{level}hter"] = detection_score(lambda drawn, weights, at=threshold: hter(drawn, weights, threshold=at), one)
    return scores


def detection_score(statistic: Callable[[Detections, Tensor], Tensor], found: Detections) -> Score:
    """In percent, of items of both classes, with the interval that drawing groups with replacement gives."""
    count = int(found.groups.max()) + 1
    value = statistic(found, torch.ones(1, len(found.scores))).item()
    values = [statistic(found, counts[:, found.groups]) for counts in drawn_counts(count, spread_over=len(found.groups))]
    interval = spread_interval(torch.cat(values))
    return interval_score(100.0 * value, 100.0 * interval, count=count)
