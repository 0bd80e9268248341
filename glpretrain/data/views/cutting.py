"""Cutting the views of items out of their pictures, in workers: where from, how they are turned, and strong augmentation before it.

Left out: what keys views have, and their sizes (`multicrop`); colours, which the device changes.
"""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from glpretrain.core import keys as rng
from glpretrain.core.frames import crop_frames
from glpretrain.core.types import Item
from glpretrain.data.views.randaugment import draw, rand_augment
from glpretrain.data.views.resample import crop, crop_labels, oriented, pixel_boxes, random_boxes
from glpretrain.data.views.spec import ViewSpec
from glpretrain.data.views.stain import quarter_turns

_BOX, _TURN = 0, 5  # purposes that the key of a view is folded with; those between are `multicrop`'s


class Cuts(NamedTuple):
    """Where V views of B items are cut from, and how they are turned."""

    boxes: list[list[list[int]]]  # [V B 4]  left, top, right and bottom in pixels
    flips: list[list[bool]]  # [V B]
    turns: list[list[int]]  # [V B]  quarter turns, after the flip
    frames: Tensor  # Float[V B 2 3]

    def of(self, views: slice) -> "Cuts":
        return Cuts(self.boxes[views], self.flips[views], self.turns[views], self.frames[views])


def drawn_cuts(items: Sequence[Item], *, specs: Sequence[ViewSpec], keys: Tensor) -> Cuts:
    """The cuts of V views, each with its own settings, for keys Int[V B]."""
    sizes = torch.tensor([item.values.shape[:0:-1] for item in items])  # [B 2]  width and height
    aspect = sizes[:, 0].double() / sizes[:, 1]
    settings = torch.tensor([[*spec.scale, *spec.ratio, spec.flip] for spec in specs], dtype=torch.float64)
    smallest, largest, narrowest, widest, flip = settings[:, None, :, None].unbind(2)  # each [V 1 1]
    box_keys = rng.fold_in(keys, _BOX)
    drawn = random_boxes(box_keys, aspect=aspect, scale=(smallest, largest), ratio=(narrowest, widest), flip=flip)  # [V B 5]
    pixels = pixel_boxes(drawn[..., :4], sizes=sizes)
    flips = drawn[..., 4] > 0.5
    turns = torch.zeros_like(flips, dtype=torch.int64)
    if any(spec.turn_prob > 0 for spec in specs):
        turns = quarter_turns(rng.fold_in(keys, _TURN), prob=torch.tensor([[spec.turn_prob] for spec in specs]))
    frames = crop_frames((pixels.double() / sizes.repeat(1, 2)).float(), flip=flips, turns=turns)
    return Cuts(pixels.tolist(), flips.tolist(), turns.tolist(), frames)


def cut_views(
    items: Sequence[Item], *, specs: Sequence[ViewSpec], keys: Tensor, strong: Tensor, cuts: Cuts, mean: Sequence[float]
) -> Tensor:
    """UInt8[B V C h w]; views that are strong, Bool[V B], are cut from pictures after RandAugment by keys Int[V B]."""
    drawn = [None if spec.strong is None else draw(of_view, strong=spec.strong) for spec, of_view in zip(specs, keys, strict=True)]
    is_strong = strong.tolist()
    views = torch.empty(len(items), len(specs), len(mean), *specs[0].shape, dtype=torch.uint8)
    for (b, item), (v, spec) in product(enumerate(items), enumerate(specs)):
        picture, flip, operations = item.values, cuts.flips[v][b], drawn[v]
        if operations is not None and is_strong[v][b]:
            chosen, magnitudes, negative = (values[b] for values in operations)
            picture = rand_augment(picture, operations=chosen, magnitudes=magnitudes, negative=negative, flipped=flip, mean=mean)
        view = crop(picture, box=cuts.boxes[v][b], size=spec.shape, interpolation=spec.interpolation)
        views[b, v] = oriented(view, flip=flip, turns=cuts.turns[v][b])
    return views


def cut_regions(items: Sequence[Item], *, size: tuple[int, int], cuts: Cuts) -> Tensor:
    """Int[B V h w]: the region maps of items that all have one, cut as their views."""
    maps = [item.regions for item in items if item.regions is not None]
    cut = [
        oriented(crop_labels(one, box=boxes[b], size=size), flip=flips[b], turns=turns[b])
        for b, one in enumerate(maps)
        for boxes, flips, turns in zip(cuts.boxes, cuts.flips, cuts.turns, strict=True)
    ]
    return torch.stack(cut).unflatten(0, (len(items), -1))
