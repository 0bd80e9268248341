"""What tests make of pictures and read off views: views of stacked pictures, frames of all groups, and whether a frame flips or turns."""

from collections.abc import Sequence

import torch
from torch import Tensor

from glpretrain.core.types import EncoderCard, Item
from glpretrain.data.views import MultiCrop, Views, ViewSpec
from glpretrain.data.views.changes import Changes, apply_changes
from glpretrain.data.views.colour import draw_colours
from glpretrain.data.views.multicrop import OPERATIONS


def card_of(mean: Sequence[float], std: Sequence[float]) -> EncoderCard:
    """As much of a card as views need."""
    return EncoderCard("none", {}, "image", (len(mean), 8, 8), (8, 8), 5, tuple(mean), tuple(std))


def items_of(images: Sequence[Tensor] | Tensor, regions: Sequence[Tensor] | Tensor | None = None) -> list[Item]:
    """Pictures UInt8[C H W], with region maps Int[H W]."""
    maps = [None] * len(images) if regions is None else regions
    return [Item(image, -1, None, region) for image, region in zip(images, maps, strict=True)]


def views_of(
    crops: MultiCrop,
    *,
    images: Sequence[Tensor] | Tensor,
    keys: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    regions: Sequence[Tensor] | Tensor | None = None,
) -> Views:
    """What a worker and the device make together."""
    card = card_of(mean, std)
    return crops.make(crops.prepare(items_of(images, regions), keys=keys, card=card), changes=crops.draw(keys), keys=keys, card=card)


def augment(images: Tensor, *, spec: ViewSpec, keys: Tensor) -> Tensor:
    """Float[B C H W] after the colour operations that one view draws."""
    changes = draw_colours([spec], keys=keys[None], selected=torch.ones(1, len(keys), dtype=torch.bool))
    return apply_changes(images.clone(), Changes.of(changes).unpacked(), operations=OPERATIONS)


def box_of(frame: Tensor) -> list[float]:
    """x0 y0 x1 y1 in the unit square, of the frame Float[2 3] of a view that was not turned."""
    (height, _, top), (_, width, left) = frame.tolist()
    return [min(left, left + width), top, max(left, left + width), top + height]


def frames_of(views: Views) -> Tensor:
    """Float[V B 2 3] of the global and local views, in this order."""
    return torch.cat([views.groups[name].frame for name in ("global", "local") if name in views.groups])


def flips(frames: Tensor) -> Tensor:
    """Bool[*S]: whether a frame of an image mirrors, which its determinant says whatever it turns."""
    return torch.linalg.det(frames[..., :2]) < 0
