"""What the evaluators of points share: tokens with their places, and from scores at centres to scores at points.

Left out: the protocols, each in its own file.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from glpretrain.core.clouds import farthest_points, interpolation, nearest_points, take
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.features import encode, fitted_shape
from glpretrain.evaluate.patches.segmentation import FeatureOptions, checked_patches
from glpretrain.evaluate.pixels import PixelBatch, Pixels

_VIEW = ((0.87, 0.5, 0.0), (-0.25, 0.43, 0.87))  # what is shown to the right and up: from the side and a little from above


def point_tokens(encoder: Encoder, pixels: Pixels, *, options: FeatureOptions) -> Iterator[tuple[PixelBatch, Tensor, Tensor]]:
    """Batches of clouds with their tokens and where these stand.

    Args:
        encoder: of points.
        pixels: the clouds.
        options: number of points, layer and precision.

    Yields:
        A batch, Float[B N D], and the centres, Float[B N 3].

    Raises:
        ValueError: the encoder is not for points, or its features are not finite.
    """
    if encoder.card.modality != "points":
        raise ValueError(f"encoder {encoder.card.encoder!r} is for {encoder.card.modality}; this evaluator accepts: points")
    (count,) = encoder.grid(fitted_shape(encoder, options.image_size))
    for batch, output in encode(encoder, pixels, fit="stretch", **options._asdict()):
        centres = take(batch.images, farthest_points(batch.images, count=count))
        yield batch, checked_patches(output.patches, count=count, encoder=encoder, pixels=pixels), centres


def cells(points: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre of every point: Float[B P 3] and Float[B N 3] to Int[B P]."""
    return nearest_points(points, centres, count=1).squeeze(2)


def at_points(scores: Tensor, *, points: Tensor, centres: Tensor) -> Tensor:
    """Scores at centres carried over to points, as PointNet++ carries features: inverse squared distances to the nearest three.

    Args:
        scores: Float[B N C].
        points: Float[B P 3].
        centres: Float[B N 3].

    Returns:
        Float[B P C].
    """
    index, weight = interpolation(points, centres)  # [B P 3]
    return (take(scores, index) * weight.unsqueeze(-1)).sum(dim=2)


def clouds_figure(clouds: Sequence[Tensor], *, rows: dict[str, Sequence[Tensor]], marks: Sequence[Tensor] = ()) -> Figure:
    """One column per cloud, one row per colouring.

    Args:
        clouds: Float[P 3] each.
        rows: by title, for each cloud Float[P] in [0, 1] or a colour per point, Float[P 3].
        marks: Float[3] each, a place that is marked in the first row.
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
