"""Random erasing: a rectangle of a view becomes noise in every pixel and channel, with the bounds and distribution of timm.

The noise is standard normal. It replaces values in [0, 1] *before* they are normalised, as in Mugs (its data loader erases and its
prefetcher normalises), so the encoder sees noise with mean (0 - mean) / std and standard deviation 1 / std; timm's own training loader
erases after normalising. kornia's random erasing is not used: it draws from torch's generator and fills a rectangle with one value.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from glpretrain.core import keys as rng
from glpretrain.data.views.changes import Change
from glpretrain.data.views.spec import ViewSpec

AREA = (0.02, 1 / 3)  # as shares of the view
ASPECT = (0.3, 1 / 0.3)  # height / width
_TRIES = 10
_RECTANGLE, _NOISE = range(2)
_BITS = 24  # bits of a uniform number


def rectangles(keys: Tensor, *, size: tuple[float | Tensor, float | Tensor], prob: float | Tensor) -> Tensor:
    """Int[B 4] for keys Int[B]: top, left, bottom, right of what is erased, the last two exclusive; all 0 where nothing is erased.

    A try draws an area U(.02, 1/3) of the view and a ratio exp(U(log .3, log 1/.3)) of height to width, rounded to pixels. The first of ten
    tries that is smaller than the view is placed uniformly. If none is smaller, nothing is erased.

    Args:
        keys: Int[B].
        size: height and width of the views; each, and `prob`, is a number or Float[B 1].
        prob: probability that a rectangle of a view is erased.
    """
    H, W = size
    draws = rng.uniform(rng.fold_in(keys, _RECTANGLE), 2 * _TRIES + 3)
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


def _noise(keys: Tensor, *, count: int) -> Tensor:
    """Float[B count], standard normal.

    It uses both halves of a random number and both results of Box-Muller. A view holds 150,000 values, and this costs a quarter of
    `keys.normal`.
    """
    numbers = rng.bits(keys, -(-count // 2))
    first, second = ((numbers >> shift) & ((1 << _BITS) - 1) for shift in (64 - _BITS, 64 - 2 * _BITS))
    radius = torch.sqrt(-2.0 * torch.log1p(first.to(torch.float32) * -(2.0**-_BITS)))
    angle = second.to(torch.float32) * (2.0 * torch.pi * 2.0**-_BITS)
    return torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)[..., :count]


def draw_erasing(specs: Sequence[ViewSpec], *, keys: Tensor, selected: Tensor) -> list[Change]:
    """Which of the selected views, Bool[V B], lose a rectangle, by the settings of V views and keys Int[V B]; and the keys of the noise."""
    settings = torch.tensor([[*spec.shape, 0.0 if spec.strong is None else spec.strong.erase_prob] for spec in specs])
    height, width, prob = settings.repeat_interleave(keys.shape[1], dim=0).split(1, dim=1)  # each [(V B) 1]
    box = rectangles(keys.flatten(), size=(height, width), prob=prob).unflatten(0, keys.shape)  # [V B 4]
    integers = torch.cat((box, rng.fold_in(keys, _NOISE).unsqueeze(-1)), dim=-1)
    return [Change.where("erase", selected & (integers[..., 2] > 0), integers=integers)]


def erase(images: Tensor, *, boxes: Tensor, keys: Tensor) -> Tensor:
    """Float[B C H W] with noise, drawn from keys Int[B], in a rectangle of each, Int[B 4]; the noise may lie outside [0, 1]."""
    H, W = images.shape[-2:]
    top, left, bottom, right = boxes.view(-1, 4, 1, 1).unbind(1)  # each [B 1 1]
    row = torch.arange(H, device=images.device).view(H, 1)
    column = torch.arange(W, device=images.device)
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)  # [B H W]
    noise = _noise(keys, count=images[0].numel()).view_as(images)
    return torch.where(inside.unsqueeze(1), noise, images)
