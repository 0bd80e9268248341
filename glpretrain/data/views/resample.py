"""Random resized crops of pictures at their own size: their boxes, and the crop with antialiased resize of one picture of bytes.

A box has whole pixels of the picture, as torchvision's have, and the crop is what torchvision computes for this box, bit for bit: both
call torch's `interpolate(antialias=True)` on the pixels inside the box.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from glpretrain.core import keys as rng

_TRIES = 10


def random_boxes(
    keys: Tensor, *, aspect: Tensor, scale: Sequence[float | Tensor], ratio: Sequence[float | Tensor], flip: float | Tensor
) -> Tensor:
    """Crops distributed as torchvision's RandomResizedCrop, with a horizontal flip.

    A try draws an area U(scale) and a ratio exp(U(log ratio)), in the true proportions of the item. The first of ten tries that fits into
    the item is placed uniformly. If none fits, the result is the largest centred crop with an allowed ratio.

    Args:
        keys: Int[*S].
        aspect: Float broadcastable to [*S], width / height of the item.
        scale: smallest and largest share of the area of the item; these and the others are numbers, or Float64 broadcastable to [*S 1].
        ratio: smallest and largest width / height.
        flip: probability of a flip.

    Returns:
        Float64[*S 5]: x0 y0 x1 y1 in the unit square, flip 0 or 1. In double precision, edges that are rounded to pixels are the same on
        every processor, although their exponential functions differ in the last bit.
    """
    draws = rng.uniform(keys, 2 * _TRIES + 3).double()
    area = scale[0] + (scale[1] - scale[0]) * draws[..., :_TRIES]
    low, high = (torch.log(torch.as_tensor(value, dtype=torch.float64)) for value in ratio)
    crop_ratio = torch.exp(low + (high - low) * draws[..., _TRIES : 2 * _TRIES])
    item_ratio = aspect.double().expand(keys.shape).unsqueeze(-1)
    # In the unit square a crop of true ratio r on an item of ratio a has width / height = r / a.
    width = torch.sqrt(area * crop_ratio / item_ratio)
    height = torch.sqrt(area * item_ratio / crop_ratio)

    allowed = item_ratio.clamp(*(torch.as_tensor(value, dtype=torch.float64) for value in ratio))
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


def pixel_boxes(boxes: Tensor, *, sizes: Tensor) -> Tensor:
    """Int[*S 4]: left, top, right and bottom in whole pixels, the last two exclusive, of boxes Float64[*S 4] in the unit square.

    Width and height are rounded as torchvision's are, and are at least one pixel. The sizes, Int broadcastable to [*S 2], are width and
    height of the pictures.
    """
    corner, extent = boxes[..., :2], boxes[..., 2:4] - boxes[..., :2]
    extent = torch.minimum((extent * sizes).round().clamp_min(1.0), sizes)
    corner = torch.minimum((corner * sizes).round(), sizes - extent)
    return torch.cat((corner, corner + extent), dim=-1).long()


def oriented(view: Tensor, *, flip: bool, turns: int) -> Tensor:
    """[*S h w]: a view flipped left to right, and then turned counterclockwise by quarters."""
    view = view.flip(-1) if flip else view
    return torch.rot90(view, turns, (-2, -1)) if turns else view


def crop(picture: Tensor, *, box: Sequence[int], size: tuple[int, int], interpolation: Literal["bilinear", "bicubic"]) -> Tensor:
    """UInt8[C h w]: a picture UInt8[C H W] cut by its box (left, top, right, bottom) in pixels, and resized to (h, w)."""
    left, top, right, bottom = box
    return interpolate(picture[None, :, top:bottom, left:right], size=size, mode=interpolation, antialias=True)[0]


def crop_labels(labels: Tensor, *, box: Sequence[int], size: tuple[int, int]) -> Tensor:
    """[h w]: the same crop of a label map [H W]; every output pixel takes the label at its centre."""
    left, top, right, bottom = box
    rows = top + _centres(bottom - top, size[0])
    columns = left + _centres(right - left, size[1])
    return labels[rows][:, columns]


def _centres(length: int, count: int) -> Tensor:
    """Int[count]: the pixel, of `length`, below the centre of each of `count` equal parts."""
    return (2 * torch.arange(count) + 1) * length // (2 * count)


def reduction(height: int, width: int, *, side: int) -> int:
    """The largest power of two by which both sides can be divided and are still at least `side`."""
    times = min(height, width) // side
    return 1 if times < 2 else 1 << (times.bit_length() - 1)


def reduced(picture: Tensor, *, factor: int) -> Tensor:
    """UInt8[C h w]: a picture UInt8[C H W] at a whole part of its size, without the last pixels that make no whole one."""
    height, width = picture.shape[1] // factor, picture.shape[2] // factor
    whole = picture[None, :, : height * factor, : width * factor]
    return interpolate(whole, size=(height, width), mode="bicubic", antialias=True)[0]
