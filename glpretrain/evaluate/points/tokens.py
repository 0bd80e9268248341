"""What the evaluators of points share: tokens with their places, and from scores at centres to scores at points.

The protocols are left out; each has its own file.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from glpretrain.core.clouds import farthest_points, interpolation, nearest_points, take
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.features import Features
from glpretrain.evaluate.items import DecodedItems
from glpretrain.evaluate.patches.segmentation import checked_patches
from glpretrain.evaluate.reading import ItemBatch

_VIEW = ((0.87, 0.5, 0.0), (-0.25, 0.43, 0.87))  # what is shown to the right and up: from the side and a little from above


def point_tokens(
    encoder: Encoder, items: DecodedItems, *, features: Features, cache: FeatureCache | None
) -> Iterator[tuple[ItemBatch, Tensor, Tensor]]:
    """Batches of clouds with their tokens, Float[B N D], and the centres of these, Float[B N 3]; arguments as in `Features.encode`.

    Raises:
        ValueError: the features are not finite.
    """
    (count,) = encoder.grid(features.shape(encoder))
    for batch, output in features.encode(encoder, items, resize="stretch", cache=cache, is_looked_at=True):
        centres = take(batch.items, farthest_points(batch.items, count=count))
        yield batch, checked_patches(output.patches, batch.index, count=count, encoder=encoder, items=items), centres


def cells(points: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre of every point: Float[B P 3] and Float[B N 3] to Int[B P]."""
    return nearest_points(points, centres, count=1).squeeze(2)


def at_points(scores: Tensor, *, points: Tensor, centres: Tensor) -> Tensor:
    """Float[B P C]: scores of tokens, Float[B N C], carried over from centres, Float[B N 3], to points, Float[B P 3].

    As PointNet++ carries features: by inverse squared distances to the nearest three.
    """
    index, weight = interpolation(points, centres)  # [B P 3]
    return (take(scores, index) * weight.unsqueeze(-1)).sum(dim=2)


def clouds_figure(clouds: Sequence[Tensor], *, rows: Mapping[str, Sequence[Tensor]], marks: Sequence[Tensor] = ()) -> Figure:
    """One column per cloud, one row per colouring.

    Args:
        clouds: the clouds, Float[P 3] each.
        rows: colourings by title, for each cloud Float[P] in [0, 1] or a colour per point, Float[P 3].
        marks: places that are marked in the first row, Float[3] each.
    """
    figure = Figure(figsize=(1.9 * len(clouds), 1.9 * len(rows) + 0.2), layout="constrained")
    axes = figure.subplots(len(rows), len(clouds), squeeze=False)
    view = np.array(_VIEW)
    for row, (title, colourings) in enumerate(rows.items()):
        axes[row, 0].set_title(title, fontsize=8, loc="left")
        for axis, cloud, colours in zip(axes[row], clouds, colourings, strict=True):
            place = cloud.numpy() @ view.T
            order = (cloud.numpy() @ np.cross(view[0], view[1])).argsort()  # the nearest are drawn last
            painted = colours.numpy() if colours.dim() == 2 else colormaps["viridis"](colours.numpy())
            axis.scatter(*place[order].T, c=painted[order], s=3, linewidths=0)
    for axis, mark in zip(axes[0], marks, strict=False):
        axis.scatter(*(view @ mark.numpy()), marker="+", c="#d55e00", s=60)
    for axis in axes.flat:
        axis.set_aspect("equal")
        axis.set_xlim(-1.15, 1.15)
        axis.set_ylim(-1.15, 1.15)
        axis.set_axis_off()
    return figure


def part_colours(parts: Tensor, *, colours: Sequence[tuple[float, float, float]]) -> Tensor:
    """A colour per point, Float[P 3], of Int[P]; black for -1."""
    return torch.tensor([*colours, (0.0, 0.0, 0.0)])[parts]
