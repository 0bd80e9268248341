"""Augmentations for sections of tissue: the strength of each dye, and quarter turns.

Dyes add up in the optical density, the -log of the transmitted light, so they are separated, changed and mixed there (colour
deconvolution, Ruifrok and Johnston 2001; as an augmentation, Tellez et al. 2018). Left out: estimating the dyes of a slide.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from glpretrain.core import keys as rng
from glpretrain.data.views.changes import Change
from glpretrain.data.views.spec import ViewSpec

# Optical density of red, green and blue per unit of haematoxylin, eosin and DAB (Ruifrok and Johnston), and the inverse.
_DYES = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
_SEPARATION = tuple(tuple(row) for row in torch.linalg.inv(torch.tensor(_DYES, dtype=torch.float64)).tolist())
_DARKEST = 1e-3  # less than one level of 255; it gives black a finite density
_PROB, _AMOUNTS = range(2)


def restain(images: Tensor, *, gains: Tensor, offsets: Tensor) -> Tensor:
    """Float[B 3 H W] in [0, 1]: images with the amount of each dye scaled and shifted in every pixel.

    With gains of 1 and offsets of 0 it is the input up to rounding, where no value is below 0.001.

    Args:
        images: Float[B 3 H W] in [0, 1].
        gains: Float[B 3], factors of haematoxylin, eosin and DAB.
        offsets: Float[B 3], added amounts in units of the dyes.
    """
    density = -torch.log(images.clamp(min=_DARKEST))
    # The nine numbers stay on the host: a matrix would have to be copied to the device, and the copy would wait for it.
    dyes = _mixed(density.unbind(1), weights=_SEPARATION)
    dyes = [amount * gains[:, dye, None, None] + offsets[:, dye, None, None] for dye, amount in enumerate(dyes)]
    return torch.exp(-torch.stack(_mixed(dyes, weights=_DYES), dim=1)).clamp_(0.0, 1.0)


def _mixed(planes: Sequence[Tensor], *, weights: Sequence[Sequence[float]]) -> list[Tensor]:
    """Three sums of three planes [B H W]: plane i enters sum j with weights[i][j]."""
    first, second, third = planes
    return [first * weights[0][j] + second * weights[1][j] + third * weights[2][j] for j in range(3)]


def draw_stain(specs: Sequence[ViewSpec], *, keys: Tensor, selected: Tensor) -> list[Change]:
    """Which of the selected views, Bool[V B], are stained anew, by the settings of V views and keys Int[V B].

    Every dye of such a view is multiplied by U(1 - strength, 1 + strength), and U(-strength, strength) is added.
    """
    strength = torch.tensor([spec.stain for spec in specs]).view(-1, 1, 1)
    prob = torch.tensor([spec.stain_prob if spec.stain > 0 else 0.0 for spec in specs]).unsqueeze(1)
    draws = strength * (2.0 * rng.uniform(rng.fold_in(keys, _AMOUNTS), 6) - 1.0)  # [V B 6]
    draws[..., :3] += 1.0
    return [Change.where("stain", (rng.uniform(rng.fold_in(keys, _PROB)) < prob) & selected, numbers=draws)]


def quarter_turns(keys: Tensor, *, prob: float | Tensor) -> Tensor:
    """Int[*S] for keys Int[*S]: a number of turns by 90 degrees; 1, 2 and 3 are equally likely, with probability `prob` together.

    The probability is a number, or Float broadcastable to [*S].
    """
    draws = rng.uniform(keys, 2)
    return torch.where(draws[..., 0] < prob, 1 + torch.floor(3.0 * draws[..., 1]).long(), 0)
