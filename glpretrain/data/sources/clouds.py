"""Clouds of points as items: what every source of them offers, and any number of points brought to one."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from glpretrain.core import keys
from glpretrain.core.clouds import in_unit_sphere
from glpretrain.data.sources.base import Item, Source

_SUBSET = 0x5AB5  # what the key of a subset of points is folded with


class PointSource(Source):
    """A source whose items are clouds: `image` is Float[P 3], masks are Int[P]."""

    @property
    def modality(self) -> Literal["points"]:
        return "points"


def with_count(item: Item, count: int) -> Item:
    """The item with exactly so many points: a fixed pseudo-random part of them, or all of them again and again.

    Args:
        item: a cloud.
        count: points wanted.
    """
    num_points = len(item.image)
    if num_points == count:
        return item
    order = torch.arange(num_points)
    if count < num_points:
        order = keys.permutation(keys.fold_in(torch.tensor(num_points), _SUBSET), num_points)
    chosen = order[torch.arange(count) % num_points]
    instances, semantic = (None if mask is None else mask[chosen] for mask in (item.instances, item.semantic))
    return item._replace(image=item.image[chosen], instances=instances, semantic=semantic)


def cloud_item(
    points: np.ndarray | Tensor, *, label: int, normalise: bool, instances: Tensor | None = None, semantic: Tensor | None = None
) -> Item:
    """An item of a cloud.

    Args:
        points: Float[P 3+]; columns behind the third (normals, colours) are left out.
        label: class, or -1.
        normalise: move it to its mean and scale it into the unit sphere.
        instances: Int[P].
        semantic: Int[P].
    """
    cloud = torch.as_tensor(points)[:, :3].to(torch.float32).contiguous()
    return Item(in_unit_sphere(cloud) if normalise else cloud, label, instances, None, semantic)
