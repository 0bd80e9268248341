"""Intra- and inter-object similarity: how two distributions of cosines between patches differ, as numbers and as a plot.

Features and masks are left out on purpose; `prompt_segmentation` brings those.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from glpretrain.core import keys
from glpretrain.evaluate.base import Score
from glpretrain.evaluate.figures import curves_figure
from glpretrain.evaluate.metrics.intervals import bootstrap_interval, interval_score, mean_interval

NUM_BINS = 200  # on [-1, 1]
_MAX_PAIRS, _ALL_PAIRS = 2000, 1 << 22  # of each kind per image, and of all images together
_AT_ONCE = 1 << 18  # values that are looked up among the others at once
_PAIR_SEED = 50


class PairSample(NamedTuple):
    """Cosines of pairs of patches of one image."""

    intra: Tensor  # Float[M]
    inter: Tensor  # Float[M]


def max_pairs(num_items: int) -> int:
    """Number of pairs of either kind that are taken of an image, at most, where there are so many images."""
    return min(_MAX_PAIRS, max(1, _ALL_PAIRS // num_items))


def pair_sample(similarity: Tensor, insides: Tensor, *, usable: Tensor, index: int, at_most: int) -> list[PairSample]:
    """Some pairs of either kind: one sample, or none where a kind has no pair.

    Args:
        similarity: Float[N N], cosines of all patches of an image.
        insides: Bool[M N], the patches inside each of M objects.
        usable: Bool[N], patches that may be the outer one of an inter pair.
        index: dataset index, from which the key of the draw is made.
        at_most: number of pairs of either kind at most.
    """
    within = [similarity[inside][:, inside] for inside in insides]
    intra = torch.cat([square[torch.ones_like(square, dtype=torch.bool).triu(1)] for square in within])  # each pair once, none with itself
    inter = torch.cat([similarity[inside][:, ~inside & usable].flatten() for inside in insides])
    if len(intra) == 0 or len(inter) == 0:
        return []
    key = keys.item_keys(seed=_PAIR_SEED, epoch=0, index=torch.tensor(index))
    return [PairSample(_thinned(intra, at_most, keys.fold_in(key, 0)), _thinned(inter, at_most, keys.fold_in(key, 1)))]


def _thinned(values: Tensor, at_most: int, key: Tensor) -> Tensor:
    # With replacement: a permutation of every pair of a fine grid would cost more than the encoder.
    return values if len(values) <= at_most else values[keys.integers(key, 0, len(values), at_most)]


def pair_scores(samples: list[PairSample]) -> dict[str, Score]:
    """`intra` and `inter` (mean cosines), `ovl` and `auc` (percent) of at least one sample, with intervals over images."""
    intra = torch.cat([sample.intra for sample in samples])
    inter = torch.cat([sample.inter for sample in samples])
    histograms = torch.stack([torch.stack([histogram(sample.intra), histogram(sample.inter)]) for sample in samples])  # [B 2 bins]
    count = len(samples)
    overlap_interval = bootstrap_interval(lambda drawn: overlap(drawn[:, 0], drawn[:, 1]), histograms)
    auc_interval = bootstrap_interval(lambda drawn: histogram_auc(drawn[:, 0], drawn[:, 1]), histograms)
    return {
        "intra": mean_cosine([sample.intra for sample in samples]),
        "inter": mean_cosine([sample.inter for sample in samples]),
        "ovl": interval_score(100 * overlap(histogram(intra), histogram(inter)).item(), 100 * overlap_interval, count=count),
        "auc": interval_score(100 * auc(intra, inter), 100 * auc_interval, count=count),
    }


def mean_cosine(of_images: Sequence[Tensor]) -> Score:
    """Mean of all cosines, Float[M] for each image, with the interval of the images' own means."""
    half_width = mean_interval(torch.stack([values.mean() for values in of_images]))
    total = torch.stack([values.sum(dtype=torch.float64) for values in of_images]).sum().item()
    return interval_score(total / sum(map(len, of_images)), half_width, count=len(of_images), bounds=(-1.0, 1.0))


def similarity_figure(samples: list[PairSample]) -> Figure:
    """The two distributions over each other, their overlap shaded."""
    densities = [histogram(torch.cat(part)) for part in zip(*samples, strict=True)]
    intra, inter = (density / density.sum() * NUM_BINS / 2 for density in densities)
    centres = (torch.arange(NUM_BINS) + 0.5) * (2 / NUM_BINS) - 1
    scores = pair_scores(samples)
    title = f"AUC {scores['auc'].value:.1f} %, {len(samples)} images"
    figure, axis = curves_figure(title, x="cosine of two patches", y="density")
    for density, colour, name in ((intra, "#0072b2", "same object (intra)"), (inter, "#d55e00", "inside and outside (inter)")):
        axis.step(centres, density, where="mid", color=colour, linewidth=1.4, label=name)
    axis.fill_between(centres, torch.minimum(intra, inter), step="mid", color="0.75", label=f"overlap {scores['ovl'].value:.1f} %")
    shown = centres[(intra + inter) > 0]
    axis.set_xlim(shown.min().item() - 0.02, shown.max().item() + 0.02)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8)
    return figure


def histogram(values: Tensor) -> Tensor:
    """Counts of cosines on 200 bins of [-1, 1]; rounding beyond the ends goes to the last bins. Float[200]."""
    return values.clamp(-1, 1).histc(NUM_BINS, min=-1, max=1)


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Shared area of two histograms, each scaled to sum to 1: 1 for equal ones, 0 for disjoint ones. Float[*S 200] to Float[*S]."""
    return torch.minimum(first / first.sum(-1, keepdim=True), second / second.sum(-1, keepdim=True)).sum(-1)


def histogram_auc(positive: Tensor, negative: Tensor) -> Tensor:
    """`auc` of binned values, those of one bin being ties. Float[*S 200] to Float[*S]."""
    below = negative.cumsum(-1) - negative / 2
    return (positive * below).sum(-1) / (positive.sum(-1) * negative.sum(-1))


def auc(positive: Tensor, negative: Tensor) -> float:
    """P(positive > negative) + P(equal) / 2, exact, of values Float[M] of the one kind and Float[N] of the other."""
    ordered = torch.from_numpy(np.sort(negative.numpy()))  # torch's sort makes positions too, which take twice the memory of the values
    total = 0
    for part in positive.split(_AT_ONCE):
        total += int(sum(torch.searchsorted(ordered, part, right=right).sum() for right in (False, True)))
    return total / (2 * len(positive) * len(negative))
