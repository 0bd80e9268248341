"""Confusion of true and predicted classes of pixels, and the scores that are computed from it: mIoU, accuracy, IoU of each class.

Counts are summed over all images before anything is divided, as is usual in semantic segmentation. A class that no pixel of the images
shows has no IoU and is left out of the mean; pixels that are predicted to show it still count as errors. How a class is predicted is left
out.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from glpretrain.evaluate.base import Score
from glpretrain.evaluate.metrics.intervals import bootstrap_interval, interval_score


def confusion(truth: Tensor, predicted: Tensor, *, num_classes: int, num_predicted: int) -> Tensor:
    """Int[B C P]: number of pixels of each true class by predicted class, image by image.

    Args:
        truth: Int[B H W], true classes, -1 where a pixel does not count.
        predicted: Int[B H W], predicted classes or clusters.
        num_classes: number of classes C.
        num_predicted: number of predicted classes or clusters P.
    """
    image = torch.arange(len(truth))[:, None, None]
    cell = (image * num_classes + truth) * num_predicted + predicted  # [B H W]
    counts = cell[truth >= 0].bincount(minlength=len(truth) * num_classes * num_predicted)
    return counts.unflatten(0, (len(truth), num_classes, num_predicted))


def areas(counts: Tensor) -> Tensor:
    """Float64[*S 3 C]: what the scores need of a confusion, Int[*S C C]: correct, true and predicted pixels of each class."""
    return torch.stack([counts.diagonal(dim1=-2, dim2=-1), counts.sum(dim=-1), counts.sum(dim=-2)], dim=-2).double()


def class_iou(summed: Tensor) -> Tensor:
    """Intersection over union per class, Float64[*S 3 C] to Float64[*S C]; NaN for a class without a true pixel."""
    right, true, predicted = summed.unbind(dim=-2)
    return torch.where(true > 0, right / (true + predicted - right), torch.nan)


def mean_iou(summed: Tensor) -> Tensor:
    """Mean over the classes with a true pixel, Float64[*S 3 C] to Float64[*S]."""
    return class_iou(summed).nanmean(dim=-1)


def pixel_accuracy(summed: Tensor) -> Tensor:
    """Share of correct pixels, Float64[*S 3 C] to Float64[*S]."""
    return summed[..., 0, :].sum(dim=-1) / summed[..., 1, :].sum(dim=-1)


def segmentation_scores(per_image: Tensor, *, classes: Sequence[str]) -> dict[str, Score]:
    """`miou`, `accuracy` and `iou_<class>` in percent; intervals by bootstrap over images, since pixels of one image are not independent.

    Args:
        per_image: Float64[B 3 C], `areas` of each image.
        classes: names of the classes.

    Returns:
        The scores; n counts images with a true pixel, for `iou_<class>` those that show the class.

    Raises:
        ValueError: no image has a pixel that counts.
    """
    per_image = per_image[per_image[:, 1].sum(dim=-1) > 0]
    if len(per_image) == 0:
        raise ValueError("no image has a pixel with a class; at least one is needed")
    summed, count = per_image.sum(dim=0), len(per_image)
    scores = {
        "miou": interval_score(100 * mean_iou(summed).item(), 100 * bootstrap_interval(mean_iou, per_image), count=count),
        "accuracy": interval_score(100 * pixel_accuracy(summed).item(), 100 * bootstrap_interval(pixel_accuracy, per_image), count=count),
    }
    for number, name in enumerate(classes):
        of_class = per_image[:, :, number : number + 1]
        showing = int((of_class[:, 1] > 0).sum())
        if showing:
            # With one image that shows the class, draws would only tell how often other classes are taken for it.
            interval = bootstrap_interval(mean_iou, of_class) if showing > 1 else math.inf
            scores[f"iou_{name}"] = interval_score(100 * mean_iou(of_class.sum(dim=0)).item(), 100 * interval, count=showing)
    return scores
