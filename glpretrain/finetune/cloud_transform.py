"""From a cloud of points to what a fine-tuned model takes: the unit sphere, and a fixed number of points that are far from one another.

Left out: pictures (`transforms`), augmentation (`clouds`, `parts`), and what is learned.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from glpretrain.core.clouds import farthest_points
from glpretrain.core.types import Item
from glpretrain.data.sources.points import PointFolder, cloud_item, read_points
from glpretrain.modalities.points import with_count

_ON_A_MESH = 2048  # points, as many as `PointFolder` samples


@dataclass(frozen=True)
class CloudTransform:
    """What is done to a cloud before a fine-tuned model sees it: it is moved into the unit sphere, and points are chosen.

    Args:
        num_points: number of points of what the model takes.
        normalise: whether a cloud is centred at its mean and scaled into the unit sphere.
        has_category: whether the model takes the number of the cloud's category beside every point.
    """

    kind: ClassVar[str] = "cloud"

    num_points: int
    normalise: bool = True
    has_category: bool = False

    def __call__(self, cloud: np.ndarray | Tensor) -> Tensor:
        """Float[num_points 3] of a cloud, Float[P 3+]: farthest point sampling from the first point on, or all points repeated.

        Raises:
            UnreadableItemError: the array is no cloud.
        """
        points = cloud.numpy() if isinstance(cloud, Tensor) else cloud
        return chosen_points(cloud_item(points, name="the cloud", label=-1, normalise=self.normalise), self.num_points).values

    def read(self, path: Path) -> Tensor:
        """Float[num_points 3] of the file of a cloud or of a mesh.

        Raises:
            UnreadableItemError: the file holds no cloud.
        """
        points = read_points(path, num_points=max(_ON_A_MESH, self.num_points))
        return chosen_points(cloud_item(points, name=path, label=-1, normalise=self.normalise), self.num_points).values

    @staticmethod
    def files_in(folder: Path) -> Sequence[Path]:
        """The clouds and meshes below a folder."""
        return PointFolder(folder, split="all").paths

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Points and coordinates of what the model takes."""
        return (self.num_points, 4 if self.has_category else 3)

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "CloudTransform":
        """Inverse of `to_json`.

        Raises:
            ValueError: a field is missing, unknown or of another kind.
        """
        fields = {"num_points", "normalise", "has_category"}
        if values.keys() != fields:
            raise ValueError(f"transform: accepted: an object with {', '.join(sorted(fields))}")
        num_points, *flags = (values[name] for name in ("num_points", "normalise", "has_category"))
        if type(num_points) is not int or num_points < 1 or not all(isinstance(flag, bool) for flag in flags):
            raise ValueError(f"transform: {values} has a value out of range")
        return cls(num_points, *flags)


@torch.no_grad()
def chosen_points(item: Item, count: int) -> Item:
    """A cloud with exactly `count` points: those that are far from one another, in the order of the sampling, or all of them repeated."""
    if len(item.values) <= count:
        return with_count(item, count)
    index = farthest_points(item.values[None, :, :3], count=count)[0]
    return item._replace(values=item.values[index])
