"""Clouds of points that a program holds (arrays, tensors, paths) as the tensors that sources give of files."""

from pathlib import Path

import numpy as np
from torch import Tensor

from glpretrain.core.listing import expanded
from glpretrain.data.sources.points.clouds import cloud_item, read_points

_ON_A_MESH = 2048  # points, as many as `PointFolder` samples


def clouds(held: object) -> list[object]:
    """The single clouds in a list, or in an array or a tensor with an axis for them."""
    if isinstance(held, list | tuple):
        return list(held)
    return list(held) if isinstance(held, np.ndarray | Tensor) and held.ndim == 3 else [held]


def cloud_values(held: object, *, channels: int) -> Tensor:
    """One cloud as Float[P 3], in the unit sphere as `PointFolder` gives it.

    Args:
        held: the path of a file of points or a mesh; an array or a tensor [P 3+].
        channels: number of coordinates, which is 3.

    Raises:
        ValueError: it is something else, or some coordinates are not finite.
    """
    if isinstance(held, str | Path):
        points = read_points(expanded(held), num_points=_ON_A_MESH)
    elif isinstance(held, np.ndarray | Tensor):
        points = held.detach().cpu().numpy() if isinstance(held, Tensor) else held
    else:
        raise ValueError(f"transform: {type(held).__name__} given; accepted: path, array (P 3), tensor (P 3), or a list of these")
    return cloud_item(points, name="transform", label=-1, normalise=True).values
