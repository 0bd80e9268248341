"""Intra- and inter-object similarity: how two distributions of cosines between patches differ.

Left out on purpose: features and masks; `prompt_segmentation` brings those.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from glpretrain import keys

NUM_BINS = 200  # on [-1, 1]
_MAX_PAIRS = 2000  # of each kind per image
_PAIR_SEED, _BOOTSTRAP_SEED = 50, 60
_NUM_RESAMPLES = 200


class PairSample(NamedTuple):
    """Cosines of pairs of patches of one image."""

    intra: Tensor  # Float[M]
    inter: Tensor  # Float[M]


def pair_sample(similarity: Tensor, insides: Tensor, *, usable: Tensor, index: int) -> list[PairSample]:
    """At most 2,000 pairs of either kind.

    Args:
        similarity: Float[N N].
        insides: Bool[M N], the patches inside each of M objects.
        usable: Bool[N], patches that may be the outer one of an inter pair.
        index: dataset index, the key of the draw.

    Returns:
        One sample, or none where a kind has no pair.
    """
    within = [similarity[inside][:, inside] for inside in insides]
    intra = torch.cat([square[torch.ones_like(square, dtype=torch.bool).triu(1)] for square in within])  # each pair once, none with itself
    inter = torch.cat([similarity[inside][:, ~inside & usable].flatten() for inside in insides])
    if len(intra) == 0 or len(inter) == 0:
        return []
    key = keys.make(seed=_PAIR_SEED, epoch=0, index=torch.tensor(index))
    return [PairSample(_thinned(intra, keys.fold(key, 0)), _thinned(inter, keys.fold(key, 1)))]


def _thinned(values: Tensor, key: Tensor) -> Tensor:
    # With replacement: a permutation of every pair of a fine grid would cost more than the encoder.
    return values if len(values) <= _MAX_PAIRS else values[keys.integers(key, 0, len(values), _MAX_PAIRS)]


def pair_scores(samples: list[PairSample]) -> dict[str, float]:
    """`intra` and `inter` (means), `ovl` and `auc` (percent) with bootstrap intervals over images.

    Raises:
        ValueError: there is no sample.
    """
    if not samples:
        raise ValueError("no image has both an object and patches outside it; intra- and inter-object similarity need them")
    intra = torch.cat([sample.intra for sample in samples])
    inter = torch.cat([sample.inter for sample in samples])
    histograms = torch.stack([torch.stack([histogram(sample.intra), histogram(sample.inter)]) for sample in samples])  # [B 2 bins]
    key = torch.tensor(_BOOTSTRAP_SEED)
    draws = keys.integers(key, 0, len(samples), _NUM_RESAMPLES, len(samples))
    weights = torch.zeros(_NUM_RESAMPLES, len(samples)).scatter_add_(1, draws, torch.ones(draws.shape))
    resampled = torch.einsum("rb,bkn->rkn", weights, histograms)
    return {
        "intra": intra.mean().item(),
        "inter": inter.mean().item(),
        "ovl": 100 * overlap(histogram(intra), histogram(inter)).item(),
        "ovl_ci": 100 * 1.96 * overlap(resampled[:, 0], resampled[:, 1]).std().item(),
        "auc": 100 * auc(intra, inter),
        "auc_ci": 100 * 1.96 * histogram_auc(resampled[:, 0], resampled[:, 1]).std().item(),
    }


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
    """P(positive > negative) + P(equal) / 2, exact.

    Args:
        positive: Float[M].
        negative: Float[N].
    """
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive, right=False)
    not_above = torch.searchsorted(ordered, positive, right=True)
    return (below + not_above).double().mean().item() / (2 * len(negative))
