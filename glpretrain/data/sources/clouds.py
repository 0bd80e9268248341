"""Clouds of points as items: what every source of them offers, and any number of points brought to one."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from glpretrain.core.clouds import in_unit_sphere
from glpretrain.data.sources.base import Item, Source


class PointSource(Source):
    """A source whose items are clouds: `image` is Float[P 3], masks are Int[P]."""

    @property
    def modality(self) -> Literal["points"]:
        return "points"


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
