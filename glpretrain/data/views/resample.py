"""Random resized crops: their boxes, and the crop, antialiased resize and flip in one step.

Boxes lie in the unit square of an item. They are continuous and not rounded to pixels, because a worker has stretched the item to a
square, and so its pixels are not those of the file. A crop is two batched matrix products, with weights that are computed for every item
from its box. The weights are those of torch's `interpolate(antialias=True)` on the crop, so no pixel outside the box has any influence.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from glpretrain.core import keys as rng

_TRIES = 10


def random_boxes(keys: Tensor, *, aspect: Tensor, scale: tuple[float, float], ratio: tuple[float, float], flip: float) -> Tensor:
    """Crops distributed as torchvision's RandomResizedCrop, with a horizontal flip.

    A try draws an area U(scale) and a ratio exp(U(log ratio)), in the true proportions of the item. The first of ten tries that fits into
    the item is placed uniformly. If none fits, the result is the largest centred crop with an allowed ratio.

    Args:
        keys: Int[*S].
        aspect: Float broadcastable to [*S], true width / height of the item.
        scale: smallest and largest share of the area of the item.
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


def _bilinear(distance: Tensor) -> Tensor:
    return (1.0 - distance).clamp_min_(0.0)


def _bicubic(distance: Tensor) -> Tensor:
    # The cubic of Keys with a = -0.5. Torch uses it with antialiasing, and a = -0.75 without; PIL always uses it.
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    outer = distance.clamp_max(2.0)
    far = ((-0.5 * outer + 2.5) * outer - 4.0) * outer + 2.0
    return torch.where(distance < 1.0, near, far)


def _centres(start: Tensor, end: Tensor, *, source: int, size: int, flip: Tensor | None) -> Tensor:
    """Float[B size]: position of the centre of each output pixel, in source pixels."""
    ramp = (torch.arange(size, device=start.device, dtype=torch.float32) + 0.5) / size
    share = ramp.expand(len(start), size)
    if flip is not None:
        share = torch.where(flip.unsqueeze(-1) > 0.5, 1.0 - share, share)
    return source * (start.unsqueeze(-1) + (end - start).unsqueeze(-1) * share)


def axis_weights(
    start: Tensor,
    end: Tensor,
    *,
    source: int,
    size: int,
    interpolation: Literal["bilinear", "bicubic"],
    flip: Tensor | None = None,
) -> Tensor:
    """Float[B size source], rows sum to 1: resampling matrices along one axis.

    Args:
        start: Float[B], start of the crop, as a share of the axis.
        end: Float[B], end of the crop.
        source: number of input pixels along the axis.
        size: number of output pixels along the axis.
        interpolation: interpolation kernel.
        flip: Float[B], 1 where the axis is reversed.
    """
    reach = 2.0 if interpolation == "bicubic" else 1.0
    stretch = ((end - start) * (source / size)).clamp_min(1.0).view(-1, 1, 1)  # widens the kernel where the crop shrinks
    centres = _centres(start, end, source=source, size=size, flip=flip).unsqueeze(-1)  # [B size 1]
    # Only the few weights of a row that are not 0 are computed. A crop is at most the whole axis, which limits their number.
    taps = math.floor(2.0 * reach * max(source / size, 1.0)) + 2
    first_tap = torch.floor(centres - reach * stretch)
    pixel = first_tap + torch.arange(taps, device=start.device, dtype=torch.float32)  # [B size taps]
    distance = ((pixel + 0.5 - centres) / stretch).abs_()
    weights = _bicubic(distance) if interpolation == "bicubic" else _bilinear(distance)
    # In float32, a box that ends at the edge of a pixel ends slightly beside it; the next pixel must not be included.
    first = torch.floor(source * start + 1e-3).view(-1, 1, 1)
    last = torch.ceil(source * end - 1e-3).view(-1, 1, 1)
    weights = weights.mul_((pixel >= first) & (pixel < last))
    weights = weights.div_(weights.sum(dim=-1, keepdim=True))
    # The margin on both sides gives every tap a place of its own; the taps outside the source are 0 and are dropped afterwards.
    dense = weights.new_zeros(len(start), size, source + 2 * taps)
    dense.scatter_(2, pixel.to(torch.int64) + taps, weights)
    return dense[:, :, taps:-taps]


def separable(images: Tensor, *, rows: Tensor, columns: Tensor) -> Tensor:
    """Float[B C h w]: images Float[B C H W] after one matrix along the height, Float[B h H], and one along the width, Float[B w W]."""
    B, C, H, W = images.shape
    across = torch.bmm(images.reshape(B, C * H, W), columns.transpose(1, 2)).unflatten(1, (C, H))  # [B C H w]
    return torch.matmul(rows.unsqueeze(1), across)  # [B C h w]


def crop(images: Tensor, *, boxes: Tensor, size: tuple[int, int], interpolation: Literal["bilinear", "bicubic"]) -> Tensor:
    """Float[B C h w]: crops of Float[B C H W] by boxes Float[B 5], resized to (h, w) and flipped; `stain.turn` does the quarter turns.

    Bicubic interpolation may leave the range of the input, as in torch.
    """
    x0, y0, x1, y1, orientation = boxes.unbind(-1)
    flip = orientation % 2
    rows = axis_weights(y0, y1, source=images.shape[-2], size=size[0], interpolation=interpolation)
    columns = axis_weights(x0, x1, source=images.shape[-1], size=size[1], interpolation=interpolation, flip=flip)
    return separable(images, rows=rows, columns=columns)


def crop_nearest(labels: Tensor, *, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Int[B h w]: the same crop of label maps Int[B H W]; every output pixel takes the label at its centre."""
    B, H, W = labels.shape
    x0, y0, x1, y1, orientation = boxes.unbind(-1)
    flip = orientation % 2
    rows = _centres(y0, y1, source=H, size=size[0], flip=None).to(torch.int64).clamp_(0, H - 1)
    columns = _centres(x0, x1, source=W, size=size[1], flip=flip).to(torch.int64).clamp_(0, W - 1)
    item = torch.arange(B, device=labels.device).view(B, 1, 1)
    return labels[item, rows.unsqueeze(2), columns.unsqueeze(1)]  # [B h w]
