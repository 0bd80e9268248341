"""Views of clouds for classification: points that are far from one another, of which training and voting draw some, scaled and shifted.

The defaults are those of Point-MAE's fine-tuning. Reference code: Pang-Yatian/Point-MAE at 7445a68 (tools/runner_finetune.py,
datasets/data_transforms.py).
Known differences: the points that are drawn from are chosen once, from the first point on, and not again in every epoch from a random one;
a vote draws the same numbers for every cloud; and there is one round of votes, not the best of 299 on the test part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from glpretrain.core.clouds import in_unit_sphere
from glpretrain.core.types import EncoderCard, Item
from glpretrain.data.sources.base import Source
from glpretrain.encoders.base import Encoder, build
from glpretrain.finetune.classification import classes_of
from glpretrain.finetune.cloud_transform import CloudTransform, chosen_points
from glpretrain.finetune.data import TaskViews
from glpretrain.finetune.transforms import drawn_from
from glpretrain.modalities.points import with_count


class PointViews(TaskViews):
    """What views of all tasks on clouds have in common: their size is a number of points."""

    modality: ClassVar[str] = "points"

    @classmethod
    def settings_of(cls, card: EncoderCard) -> dict[str, int]:
        """The number of points."""
        return {"size": card.item_shape[0]}

    @classmethod
    def sized(cls, encoder: Encoder, settings: Mapping[str, int]) -> Encoder:
        """The encoder with a card for clouds of so many points."""
        return with_num_points(encoder, settings["size"])


class CloudViews(PointViews):
    """Some points of each training cloud, scaled along each axis and shifted; points that are far from one another of each test cloud.

    Args:
        size: number of points of a view; None is that of the clouds that the backbone was trained on.
        drawn_from: number of points that those of a view are drawn from, in sizes of a view; they are far from one another. Point-MAE
            draws 1,024 of 1,200, and 2,048 of 2,400.
        scale: smallest and largest factor, drawn for every axis.
        translation: largest shift along every axis.
        votes: number of views, drawn as in training, that vote on each test cloud; their mean logits give `voted_accuracy`. 0 for none.
        normalise: whether a cloud is centred at its mean and scaled into the unit sphere.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        size: int | None = None,
        *,
        drawn_from: float = 1.171875,
        scale: tuple[float, float] = (2 / 3, 3 / 2),
        translation: float = 0.2,
        votes: int = 0,
        normalise: bool = True,
    ) -> None:
        super().__init__(size)
        if not drawn_from >= 1.0:
            raise ValueError(f"views: drawn_from={drawn_from} given; accepted: numbers from 1 on")
        check_moves(scale, translation)
        if votes < 0:
            raise ValueError(f"views: votes={votes} given; accepted: numbers from 0 on")
        self.drawn_from, self.scale, self.translation = drawn_from, scale, translation
        self.votes, self.normalise = votes, normalise

    def classes_of(self, source: Source) -> list[str]:
        """The classes of the source.

        Raises:
            ValueError: there are fewer than two.
        """
        return classes_of(source)

    def groups(self, num_channels: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """One global view."""
        return {"global": (1, (self.default_size(), num_channels))}

    def transform(self, card: EncoderCard) -> CloudTransform:
        """Points that are far from one another."""
        return CloudTransform(self.default_size(), self.normalise)

    def read(self, source: Source, index: int) -> Item:
        """The points that views are drawn from, in the order of farthest point sampling, so that the first ones are a sample too.

        Raises:
            UnreadableItemError: the item cannot be decoded.
        """
        item, size = source[index], self.default_size()
        if self.normalise:
            item = item._replace(values=in_unit_sphere(item.values))
        if len(item.values) < size:
            return with_count(item, size)
        return chosen_points(item, min(len(item.values), round(self.drawn_from * size)))

    def augmented(self, item: Item, *, card: EncoderCard) -> tuple[Tensor, Tensor]:
        """Some of the points, scaled and shifted, Float[P 3], and the class, Int[]."""
        return self._drawn(item.values), torch.tensor(item.label)

    def plain(self, item: Item, *, card: EncoderCard) -> tuple[Tensor, Tensor]:
        """Points that are far from one another, Float[P 3], or with votes Float[1+V P 3], the others drawn; and the class, Int[]."""
        views = [item.values[: self.default_size()]]
        for vote in range(self.votes):
            with drawn_from(torch.tensor(vote)):
                views.append(self._drawn(item.values))
        return torch.stack(views) if self.votes else views[0], torch.tensor(item.label)

    def _drawn(self, points: Tensor) -> Tensor:
        chosen = points[torch.randperm(len(points))[: self.default_size()]]
        return moved(chosen, scale=self.scale, translation=self.translation, axes=3)


def with_num_points(encoder: Encoder, num_points: int) -> Encoder:
    """The encoder, whose weights stay as they are, with a card for clouds of another number of points.

    Raises:
        ValueError: there are fewer points than in a group.
    """
    sized = build(replace(encoder.card, arguments=encoder.card.arguments | {"num_points": num_points}))
    sized.load_backbone_state(encoder.backbone_state())
    return sized.eval()


def check_moves(scale: Sequence[float], translation: float) -> None:
    """Refuse settings of `moved` that are out of range.

    Raises:
        ValueError: one of them is.
    """
    if not 0.0 < scale[0] <= scale[1]:
        raise ValueError(f"views: scale={list(scale)} given; accepted: two numbers above 0, the smaller first")
    if not translation >= 0.0:
        raise ValueError(f"views: translation={translation} given; accepted: numbers from 0 on")


def moved(points: Tensor, *, scale: tuple[float, float], translation: float, axes: int) -> Tensor:
    """Float[P 3], scaled and shifted by numbers that torch's generator draws.

    Args:
        points: Float[P 3].
        scale: smallest and largest factor.
        translation: largest shift along every axis.
        axes: number of factors that are drawn: 3, one for each axis, or 1 for all of them.
    """
    factors = torch.empty(axes).uniform_(*scale)
    return points * factors + torch.empty(3).uniform_(-translation, translation)
