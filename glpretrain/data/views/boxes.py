"""Where a view lies in its item: random resized crops in the item's true proportions, as boxes in its unit square.

Boxes are continuous, not rounded to pixels: the source was stretched to a square, so its pixels are not the item's own.
"""

import math

import torch
from torch import Tensor

from glpretrain.core import keys as rng

_TRIES = 10


def random_boxes(keys: Tensor, *, aspect: Tensor, scale: tuple[float, float], ratio: tuple[float, float], flip: float) -> Tensor:
    """Crops distributed as torchvision's RandomResizedCrop, with a horizontal flip.

    A try draws an area U(scale) and a ratio exp(U(log ratio)); the first of ten that fits is placed uniformly. If none does,
    the crop is the largest centred one whose ratio is allowed.

    Args:
        keys: Int[*S].
        aspect: Float broadcastable to [*S], true width / height of the item.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width / height.
        flip: probability of a flip.

    Returns:
        Float[*S 5]: x0 y0 x1 y1 in the unit square, flip 0 or 1.
    """
    draws = rng.uniform(keys, 2 * _TRIES + 3)
    area = scale[0] + (scale[1] - scale[0]) * draws[..., :_TRIES]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    crop_ratio = torch.exp(low + (high - low) * draws[..., _TRIES : 2 * _TRIES])
    item_ratio = aspect.to(torch.float32).expand(keys.shape).unsqueeze(-1)
    # In the unit square a crop of true ratio r on an item of ratio a has width / height = r / a.
    width = torch.sqrt(area * crop_ratio / item_ratio)
    height = torch.sqrt(area * item_ratio / crop_ratio)

    allowed = item_ratio.clamp(*ratio)
    width = torch.cat((width, (allowed / item_ratio).clamp_max(1.0)), dim=-1)  # [*S tries+1]
    height = torch.cat((height, (item_ratio / allowed).clamp_max(1.0)), dim=-1)
    fits = (width <= 1.0) & (height <= 1.0)  # the last, the fallback, always does
    first = fits.to(torch.uint8).argmax(dim=-1, keepdim=True)
    width, height = width.gather(-1, first), height.gather(-1, first)  # [*S 1]

    place = torch.where(first < _TRIES, draws[..., 2 * _TRIES : 2 * _TRIES + 2], 0.5)  # [*S 2]
    x0, y0 = place[..., :1] * (1.0 - width), place[..., 1:] * (1.0 - height)
    flipped = (draws[..., 2 * _TRIES + 2 :] < flip).to(x0.dtype)
    x1, y1 = (x0 + width).clamp_max(1.0), (y0 + height).clamp_max(1.0)  # the sum may round up
    return torch.cat((x0, y0, x1, y1, flipped), dim=-1)
