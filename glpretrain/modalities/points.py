"""Clouds of points: Float[P 3], coordinates as they are."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from glpretrain.core import keys
from glpretrain.core.clouds import farthest_points, nearest_points, take
from glpretrain.core.types import EncoderCard, Item
from glpretrain.modalities.base import Fit, Modality, Size
from glpretrain.modalities.image import DIMMED

_SUBSET = 0x5AB5  # what the key of a subset of points is folded with
_PICTURE_SIDE, _PICTURE_REACH = 96, 1.5  # pixels, and the coordinate at the edge of a picture


class Points(Modality):
    """Clouds of points in three dimensions."""

    name = "points"
    axes = ("P", "3")
    num_coordinates = 3
    channel_axis = -1
    embedded_source = "glpretrain.data.Solids"
    embedded_size = "num_points"
    own_sources = ("glpretrain.data.PointArrays", "glpretrain.data.PointFolder")
    held = ("glpretrain.data.sources.points.held.clouds", "glpretrain.data.sources.points.held.cloud_values")
    masked_source = "glpretrain.data.PointArrays"
    default_evaluators: ClassVar[dict[str, str]] = {
        "knn": "glpretrain.evaluate.KNN",
        "svm": "glpretrain.evaluate.LinearSVM",
        "prompt": "glpretrain.evaluate.PointPrompts",
    }
    page = "glpretrain.report.write_cloud_report"

    def item_shape(self, card: EncoderCard, size: Size | None) -> tuple[int, ...]:
        """(points, 3); the size is their number."""
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(f"size: {size} given; the size of a cloud is its number of points; give one positive number")
        return (card.item_shape[0] if size is None else size, 3)

    def resize(self, item: Item, shape: Sequence[int], *, fit: Fit) -> Item:
        """A fixed pseudo-random part of the points, or all of them repeated, whether cropped or stretched."""
        if fit == "inner_crop":
            raise ValueError("features.crop: inner given; a cloud has no border that could be cut off; leave it out")
        if item.values.dim() != 2:
            raise ValueError(f"an item of shape {tuple(item.values.shape)} is no cloud; the encoder needs clouds of points (P 3)")
        return with_count(item, shape[0])

    def normalise(self, items: Tensor, card: EncoderCard) -> Tensor:
        """Coordinates are taken as they are."""
        return items

    def inputs_of_tokens(self, tokens: Tensor, views: Tensor, *, grid: tuple[int, ...]) -> Tensor:
        """Every point belongs to the token whose centre is the nearest."""
        (count,) = grid
        centres = take(views, farthest_points(views, count=count))
        return tokens.gather(1, nearest_points(views, centres, count=1).squeeze(2))  # [B P]

    def pictures(self, views: Tensor, *, card: EncoderCard, dimmed: Tensor | None = None) -> Tensor:
        """Clouds seen along their second axis, the third one up, on black ground; nearer points are brighter."""
        points, size, reach = views.float().cpu(), _PICTURE_SIDE, _PICTURE_REACH
        shade = 0.4 + 0.6 * ((reach - points[..., 1]) / (2 * reach)).clamp(0, 1)  # [B P]
        if dimmed is not None:
            shade = torch.where(dimmed.cpu(), DIMMED * shade, shade)
        column = ((points[..., 0] / reach + 1) / 2 * size).long().clamp(0, size - 1)
        row = ((1 - points[..., 2] / reach) / 2 * size).long().clamp(0, size - 1)
        picture = torch.zeros(len(points), size * size).scatter_reduce(1, row * size + column, shade, "amax")
        return picture.unflatten(1, (size, size)).unsqueeze(-1).expand(-1, -1, -1, 3)

    def describe_size(self, card: EncoderCard) -> str:
        """The number of points."""
        return f"{card.item_shape[0]} points"


def with_count(item: Item, count: int) -> Item:
    """A cloud with exactly `count` points: a fixed pseudo-random part of them, or all of them repeated."""
    num_points = len(item.values)
    if num_points == count:
        return item
    order = torch.arange(num_points)
    if count < num_points:
        order = keys.permutation(keys.fold_in(torch.tensor(num_points), _SUBSET), num_points)
    chosen = order[torch.arange(count) % num_points]
    instances, semantic = (None if mask is None else mask[chosen] for mask in (item.instances, item.semantic))
    return item._replace(values=item.values[chosen], instances=instances, semantic=semantic)
