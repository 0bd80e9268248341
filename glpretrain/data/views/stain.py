"""What differs between two sections of the same tissue: how strongly each dye took, and which way up the tile was cut.

Dyes add up in optical density, -log of the transmitted light, so they are separated, changed and mixed again there (colour
deconvolution, Ruifrok and Johnston 2001; as an augmentation Tellez et al. 2018). Left out: estimating the dyes of a slide.
"""

import torch
from torch import Tensor

from glpretrain.core import keys as rng

# Optical density of red, green and blue per unit of haematoxylin, eosin and DAB (Ruifrok and Johnston), and the inverse.
_DYES = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
_SEPARATION = tuple(tuple(row) for row in torch.linalg.inv(torch.tensor(_DYES, dtype=torch.float64)).tolist())
_DARKEST = 1e-3  # below one level of 255: black has a finite density
_PROB, _AMOUNTS = range(2)


def restain(images: Tensor, *, gains: Tensor, offsets: Tensor) -> Tensor:
    """Multiply and shift the amount of each dye in every pixel.

    Args:
        images: Float[B 3 H W] in [0, 1].
        gains: Float[B 3], of haematoxylin, eosin, DAB.
        offsets: Float[B 3], in units of the dye.

    Returns:
        Float[B 3 H W] in [0, 1]; the input, to rounding, with gains of 1 and offsets of 0 where no value is below 0.001.
    """
    density = -torch.log(images.clamp(min=_DARKEST))
    # Nine numbers of the host per step: a matrix on the device would have to be copied there and waited for.
    channels = density.unbind(1)  # [B H W] each
    dyes = [sum(channel * _SEPARATION[c][dye] for c, channel in enumerate(channels)) for dye in range(3)]
    dyes = [amount * gains[:, dye, None, None] + offsets[:, dye, None, None] for dye, amount in enumerate(dyes)]
    mixed = torch.stack([sum(amount * _DYES[dye][c] for dye, amount in enumerate(dyes)) for c in range(3)], dim=1)
    return torch.exp(-mixed).clamp_(0.0, 1.0)


def jitter_stain(images: Tensor, *, strength: float, prob: float, keys: Tensor) -> Tensor:
    """Every dye of a selected sample times U(1 - strength, 1 + strength) plus U(-strength, strength).

    Args:
        images: Float[B 3 H W] in [0, 1].
        strength: half the width of both ranges.
        prob: chance that a sample is selected.
        keys: Int[B].

    Returns:
        Float[B 3 H W] in [0, 1]; samples that are not selected come back as they were.
    """
    draws = strength * (2.0 * rng.uniform(rng.fold_in(keys, _AMOUNTS), 2, 3) - 1.0)  # [B 2 3]
    selected = rng.uniform(rng.fold_in(keys, _PROB)) < prob
    changed = restain(images, gains=1.0 + draws[:, 0], offsets=draws[:, 1])
    return torch.where(selected.view(-1, 1, 1, 1), changed, images)


def quarter_turns(keys: Tensor, *, prob: float) -> Tensor:
    """How often each sample is turned by 90 degrees: 1, 2 or 3 with equal chance, together `prob`.

    Args:
        keys: Int[*S].
        prob: chance of any turn.

    Returns:
        Int[*S].
    """
    draws = rng.uniform(keys, 2)
    return torch.where(draws[..., 0] < prob, 1 + torch.floor(3.0 * draws[..., 1]).long(), 0)


def turn(images: Tensor, *, turns: Tensor) -> Tensor:
    """Turn every sample counterclockwise, as `torch.rot90`, without waiting for the device.

    Args:
        images: [B C S S], square.
        turns: Int[B], quarter turns in {0, 1, 2, 3}.

    Returns:
        [B C S S].
    """
    turns = turns.view(-1, 1, 1, 1)
    images = torch.where(turns % 2 == 1, torch.rot90(images, 1, (2, 3)), images)
    return torch.where(turns >= 2, torch.rot90(images, 2, (2, 3)), images)
