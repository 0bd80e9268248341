"""Pictures of any size for a network that takes squares: windows that overlap, and from logits of patches to the class of every pixel.

Windows have the size that the network was trained on. So every encoder can be used, positions are not interpolated, and an exported program
of this one size computes what was scored. Left out: what the network is, and how a picture is resized (`transforms`).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_STRIDE = 2 / 3  # of a window: 341 of 512 pixels in the published evaluations of BEiT and DINOv2 on ADE20K
_CLASSES_AT_ONCE = 8  # many classes at every pixel of a large photograph would be gigabytes


def starts(length: int, side: int) -> list[int]:
    """Where windows of `side` pixels begin along `length` pixels: a stride apart, but the last one, which ends where the picture does."""
    stride = max(1, int(side * _STRIDE))
    return [min(number * stride, length - side) for number in range(1 + math.ceil((length - side) / stride))]


def whole_logits(picture: Tensor, logits: Callable[[Tensor], Tensor], *, batch_size: int = 32) -> Tensor:
    """Float[K h w]: logits of every pixel, their mean where windows overlap. Windows are squares whose side is the picture's short side.

    Args:
        picture: Float[C h w], normalised.
        logits: the network, Float[B C side side] to the logits of patches, Float[B K *grid].
        batch_size: number of windows that it sees at once.
    """
    height, width = picture.shape[1:]
    side = min(height, width)
    places = [(top, left) for top in starts(height, side) for left in starts(width, side)]
    summed, count = torch.zeros(0), picture.new_zeros(height, width)
    for first in range(0, len(places), batch_size):
        some = places[first : first + batch_size]
        windows = torch.stack([picture[:, top : top + side, left : left + side] for top, left in some])  # [B C side side]
        found = upsampled(logits(windows).float(), (side, side))  # [B K side side]
        summed = found.new_zeros(found.shape[1], height, width) if first == 0 else summed
        for (top, left), window in zip(some, found, strict=True):
            summed[:, top : top + side, left : left + side] += window
            count[top : top + side, left : left + side] += 1
    return summed / count


def upsampled(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Float[B K *size]: logits of patches, Float[B K h w], at pixels, bilinear."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def classes_at(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Int[*size]: the class with the largest of Float[K h w] after they are upsampled to `size`; the first one of equal ones."""
    best, found = logits.new_full(size, -math.inf), torch.zeros(size, dtype=torch.int64, device=logits.device)
    for first in range(0, len(logits), _CLASSES_AT_ONCE):
        values, places = upsampled(logits[None, first : first + _CLASSES_AT_ONCE], size)[0].max(dim=0)
        better = values > best
        best, found = torch.where(better, values, best), torch.where(better, places + first, found)
    return found
