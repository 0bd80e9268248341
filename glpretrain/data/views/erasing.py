"""Random erasing: a rectangle of a view becomes noise, per pixel and channel, with timm's bounds and distribution.

The noise is standard normal and replaces values in [0, 1] *before* they are normalised, as Mugs does it (its data loader erases,
its prefetcher normalises), so that the model sees noise about (0 - mean) / std with deviation 1 / std; timm's own training
loader erases after normalising. Kornia's random erasing draws from torch's generator, fills with one value and has no such noise.
"""

import math

import torch
from torch import Tensor

from glpretrain import keys as rng

AREA = (0.02, 1 / 3)  # share of the view
ASPECT = (0.3, 1 / 0.3)  # height / width
_TRIES = 10
_RECTANGLE, _NOISE = range(2)


def rectangles(keys: Tensor, *, size: tuple[int, int], prob: float) -> Tensor:
    """Which pixels are erased.

    A try draws an area U(.02, 1/3) of the view and a ratio exp(U(log .3, log 1/.3)) of height to width, rounded to pixels; the
    first of ten that is smaller than the view is placed uniformly, and if none is, nothing is erased.

    Args:
        keys: Int[B].
        size: height and width of the views.
        prob: that a view loses a rectangle.

    Returns:
        Int[B 4]: top, left, bottom, right, the last two exclusive; all 0 where nothing is erased.
    """
    H, W = size
    draws = rng.uniform(rng.fold(keys, _RECTANGLE), 2 * _TRIES + 3)
    area = H * W * (AREA[0] + (AREA[1] - AREA[0]) * draws[:, :_TRIES])
    low, high = (math.log(value) for value in ASPECT)
    aspect = torch.exp(low + (high - low) * draws[:, _TRIES : 2 * _TRIES])
    height, width = torch.sqrt(area * aspect).round_(), torch.sqrt(area / aspect).round_()  # [B tries]
    fits = (height < H) & (width < W)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    height, width = height.gather(1, first), width.gather(1, first)  # [B 1]
    place, chance = draws[:, 2 * _TRIES : -1], draws[:, -1:]
    top = torch.floor(place[:, :1] * (H - height + 1.0))
    left = torch.floor(place[:, 1:] * (W - width + 1.0))
    box = torch.cat((top, left, top + height, left + width), dim=1).to(torch.int64)
    return torch.where((chance < prob) & fits.any(dim=1, keepdim=True), box, 0)


def erase(images: Tensor, *, keys: Tensor, box: Tensor) -> Tensor:
    """Fill each item's rectangle with noise of its own.

    Args:
        images: Float[B C H W].
        keys: Int[B].
        box: Int[B 4] from `rectangles`.

    Returns:
        Float[B C H W].
    """
    H, W = images.shape[-2:]
    top, left, bottom, right = box.view(-1, 4, 1, 1).unbind(1)  # each [B 1 1]
    row = torch.arange(H, device=images.device).view(H, 1)
    column = torch.arange(W, device=images.device)
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)  # [B H W]
    noise = rng.normal(rng.fold(keys, _NOISE), *images.shape[1:])
    return torch.where(inside.unsqueeze(1), noise, images)
