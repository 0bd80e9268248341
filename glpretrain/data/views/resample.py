"""Crop, antialiased resize and flip in one step: two batched matrix products with weights built per sample from its box.

The weights are those of torch's `interpolate(antialias=True)` on the cut-out crop, so nothing outside the box leaks in.
"""

import math
from typing import Literal

import torch
from torch import Tensor


def _bilinear(distance: Tensor) -> Tensor:
    return (1.0 - distance).clamp_min_(0.0)


def _bicubic(distance: Tensor) -> Tensor:
    # Keys' cubic with a = -0.5: torch takes it with antialiasing (PIL always), and a = -0.75 without.
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    outer = distance.clamp_max(2.0)
    far = ((-0.5 * outer + 2.5) * outer - 4.0) * outer + 2.0
    return torch.where(distance < 1.0, near, far)


def _centres(start: Tensor, end: Tensor, *, source: int, size: int, flip: Tensor | None) -> Tensor:
    """Float[B size]: where each output pixel's centre lies, in source pixels."""
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
    """Resampling matrices along one axis.

    Args:
        start: Float[B], where the crop begins, as a share of the axis.
        end: Float[B], where it ends.
        source: pixels of the input axis.
        size: pixels of the output axis.
        interpolation: kernel.
        flip: Float[B], 1 where the output runs backwards.

    Returns:
        Float[B size source], rows sum to 1.
    """
    reach = 2.0 if interpolation == "bicubic" else 1.0
    stretch = ((end - start) * (source / size)).clamp_min(1.0).view(-1, 1, 1)  # widens the kernel when shrinking
    centres = _centres(start, end, source=source, size=size, flip=flip).unsqueeze(-1)  # [B size 1]
    # Few pixels of a row are not 0: only those are computed. A crop is at most the whole axis, which bounds their number.
    taps = math.floor(2.0 * reach * max(source / size, 1.0)) + 2
    first_tap = torch.floor(centres - reach * stretch)
    pixel = first_tap + torch.arange(taps, device=start.device, dtype=torch.float32)  # [B size taps]
    distance = ((pixel + 0.5 - centres) / stretch).abs_()
    weights = _bicubic(distance) if interpolation == "bicubic" else _bilinear(distance)
    # A box on a pixel edge comes out of float32 a little beside it; it must not take in the neighbour.
    first = torch.floor(source * start + 1e-3).view(-1, 1, 1)
    last = torch.ceil(source * end - 1e-3).view(-1, 1, 1)
    weights = weights.mul_((pixel >= first) & (pixel < last))
    weights = weights.div_(weights.sum(dim=-1, keepdim=True))
    # With a margin on both sides every tap has a place of its own; those outside the source are 0 and cut off again.
    dense = weights.new_zeros(len(start), size, source + 2 * taps)
    dense.scatter_(2, pixel.to(torch.int64) + taps, weights)
    return dense[:, :, taps:-taps]


def separable(images: Tensor, *, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply one matrix along the height and one along the width of every item.

    Args:
        images: Float[B C H W].
        rows: Float[B h H].
        columns: Float[B w W].

    Returns:
        Float[B C h w].
    """
    B, C, H, W = images.shape
    across = torch.bmm(images.reshape(B, C * H, W), columns.transpose(1, 2)).unflatten(1, (C, H))  # [B C H w]
    return torch.matmul(rows.unsqueeze(1), across)  # [B C h w]


def crop(images: Tensor, *, boxes: Tensor, size: tuple[int, int], interpolation: Literal["bilinear", "bicubic"]) -> Tensor:
    """Crop, resize and flip; quarter turns are left to `stain.turn`. Bicubic may overshoot the range of the input, as torch's does.

    Args:
        images: Float[B C H W].
        boxes: Float[B 5].
        size: height and width of the result.
        interpolation: kernel.

    Returns:
        Float[B C h w].
    """
    x0, y0, x1, y1, orientation = boxes.unbind(-1)
    flip = orientation % 2
    rows = axis_weights(y0, y1, source=images.shape[-2], size=size[0], interpolation=interpolation)
    columns = axis_weights(x0, x1, source=images.shape[-1], size=size[1], interpolation=interpolation, flip=flip)
    return separable(images, rows=rows, columns=columns)


def crop_nearest(labels: Tensor, *, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The same crop of a map of labels: every output pixel takes the label under its centre.

    Args:
        labels: Int[B H W].
        boxes: Float[B 5].
        size: height and width of the result.

    Returns:
        Int[B h w].
    """
    B, H, W = labels.shape
    x0, y0, x1, y1, orientation = boxes.unbind(-1)
    flip = orientation % 2
    rows = _centres(y0, y1, source=H, size=size[0], flip=None).to(torch.int64).clamp_(0, H - 1)
    columns = _centres(x0, x1, source=W, size=size[1], flip=flip).to(torch.int64).clamp_(0, W - 1)
    item = torch.arange(B, device=labels.device).view(B, 1, 1)
    return labels[item, rows.unsqueeze(2), columns.unsqueeze(1)]  # [B h w]
