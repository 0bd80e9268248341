"""Parts: the part of every point of a cloud, by tokens of several blocks that are carried to the points; the whole backbone learns too.

The category of a cloud, such as chair, is given to the network, as in ShapeNetPart's protocol, and a point gets one of the parts that
training clouds of the category show.
Reference code: Pang-Yatian/Point-MAE at 7445a68 (segmentation/models/pt.py, segmentation/main.py, segmentation/dataset.py).
Known differences: the optimizer moves once in a step (there twice, the first time with gradients that are not clipped); the parts of a
category are those of its training clouds, not a table; test clouds have a fixed part of their points, not points drawn anew.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glpretrain.core.batch import Batch
from glpretrain.core.clouds import farthest_points, in_unit_sphere, interpolation, take
from glpretrain.core.distributed import SyncedBatchNorm, all_reduce_max
from glpretrain.core.types import EncoderCard, Item
from glpretrain.data.own import SourceSpec, masked_spec
from glpretrain.data.sources.base import Source, UnreadableItemError
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.layers import features_of_layers, layer_number
from glpretrain.encoders.points import PointTransformer
from glpretrain.evaluate import PartSegmentation
from glpretrain.evaluate.base import Evaluator, Score
from glpretrain.evaluate.metrics.intervals import mean_of_scores, mean_score
from glpretrain.evaluate.points.part_segmentation import instance_iou
from glpretrain.finetune.base import FineTune, Head, for_tuning
from glpretrain.finetune.cloud_transform import CloudTransform
from glpretrain.finetune.clouds import PointViews, check_moves, moved
from glpretrain.modalities.points import with_count
from glpretrain.training.branch import Branch

IGNORED = -1  # part of a point that counts nowhere
_CATEGORY_DIM = 64
_SAID = ("instance_miou", "category_miou", "point_accuracy")


class PartViews(PointViews):
    """Points of each training cloud that are drawn with replacement, scaled and shifted; a fixed part of the points of each test cloud.

    A view is Float[P 4], coordinates and the number of the cloud's category; its target is Int[1+P], the category and the parts.

    Args:
        size: number of points; None is that of the clouds that the backbone was trained on.
        scale: smallest and largest factor, one for all axes.
        translation: largest shift along every axis.
        normalise: whether a cloud is centred at its mean and scaled into the unit sphere.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        size: int | None = None,
        *,
        scale: tuple[float, float] = (0.8, 1.25),
        translation: float = 0.1,
        normalise: bool = True,
    ) -> None:
        super().__init__(size)
        check_moves(scale, translation)
        self.scale, self.translation, self.normalise = scale, translation, normalise

    @classmethod
    def own_source(cls, path: str | Path) -> SourceSpec:
        """Clouds with parts."""
        return masked_spec(path, cls.modality)

    def classes_of(self, source: Source) -> list[str]:
        """Names of the parts.

        Raises:
            ValueError: there are fewer than two.
        """
        if len(source.mask_classes) < 2:
            found = "one part" if source.mask_classes else "no parts"
            raise ValueError(f"data: {source.name} has {found}; accepted: an .npz or .h5 with points and parts, of two parts or more")
        return list(source.mask_classes)

    def groups(self, num_channels: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """One global view."""
        return {"global": (1, (self.default_size(), num_channels))}

    def transform(self, card: EncoderCard) -> CloudTransform:
        """Points with the category beside them."""
        return CloudTransform(self.default_size(), self.normalise, has_category=True)

    def read(self, source: Source, index: int) -> Item:
        """A cloud with the part of each point as a fourth column, which memory keeps.

        Raises:
            UnreadableItemError: the item cannot be decoded, or has no parts.
        """
        item = source[index]
        if item.semantic is None:
            raise UnreadableItemError(f"{source.name}: item {index} has no parts")
        points = in_unit_sphere(item.values) if self.normalise else item.values
        values = torch.cat([points, item.semantic[:, None].float()], dim=1)  # [P 4]
        return item._replace(values=values, instances=None, semantic=None)

    def augmented(self, item: Item, *, card: EncoderCard) -> tuple[Tensor, Tensor]:
        """Points that are drawn, Float[P 4], and the category and the parts, Int[1+P]."""
        drawn = item.values[torch.randint(len(item.values), (self.default_size(),))]
        points = moved(drawn[:, :3], scale=self.scale, translation=self.translation, axes=1)
        return self._told(points, drawn[:, 3], item.label)

    def plain(self, item: Item, *, card: EncoderCard) -> tuple[Tensor, Tensor]:
        """A fixed part of the points, Float[P 4], and the category and the parts, Int[1+P]."""
        values = with_count(item, self.default_size()).values
        return self._told(values[:, :3], values[:, 3], item.label)

    @staticmethod
    def _told(points: Tensor, parts: Tensor, label: int) -> tuple[Tensor, Tensor]:
        category = max(label, 0)  # clouds without classes are of one category
        column = torch.full((len(points), 1), float(category))
        return torch.cat([points, column], dim=1), torch.cat([torch.tensor([category]), parts.long()])


class PartHead(Head):
    """Features of some blocks, carried to the points by their three nearest centres, beside what says what the whole cloud is.

    Each point sees its coordinates and its own features, and the maximum and mean over all tokens and the category of the cloud.

    Args:
        embed_dim: width D of the tokens.
        num_classes: number of parts K.
        num_categories: number of categories of the clouds.
        layers: numbers of the blocks.
        hidden_dim: width of what a point gets of its own; the layers behind it have a half and a quarter of it.
        dropout: share of the hidden values that are dropped in training.

    Raises:
        ValueError: a number or share out of range.
    """

    seen: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        *,
        num_categories: int,
        layers: Sequence[int] = (3, 7, 11),
        hidden_dim: int = 1024,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if num_categories < 1 or hidden_dim < 4 or not layers:
            given = f"num_categories={num_categories}, hidden_dim={hidden_dim} and layers={list(layers)}"
            raise ValueError(f"Parts: {given} given; accepted: at least 1, at least 4, and numbers of blocks")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"Parts: dropout={dropout} given; accepted: 0 or more, and less than 1")
        numbers = {"num_categories": num_categories, "layers": list(layers), "hidden_dim": hidden_dim}
        self.settings = {**numbers, "dropout": dropout}
        self.layers, self.num_categories = tuple(layers), num_categories
        width = len(layers) * embed_dim
        category = nn.Linear(num_categories, _CATEGORY_DIM, bias=False)
        self.category = nn.Sequential(category, SyncedBatchNorm(_CATEGORY_DIM), nn.LeakyReLU(0.2))
        self.carried = nn.Sequential(*_layer(3 + width, 4 * embed_dim), *_layer(4 * embed_dim, hidden_dim))
        half, quarter = hidden_dim // 2, hidden_dim // 4
        self.mix = nn.Linear(hidden_dim + 2 * width + _CATEGORY_DIM, half)
        self.parts = nn.Sequential(
            SyncedBatchNorm(half), nn.ReLU(), nn.Dropout(dropout), *_layer(half, quarter), nn.Linear(quarter, num_classes)
        )
        self.register_buffer("seen", torch.zeros(num_categories, num_classes, dtype=torch.bool))  # parts of the categories

    @torch.no_grad()
    def update(self, categories: Tensor, parts: Tensor) -> None:
        """Note which parts Int[B P] training clouds of the categories Int[B] have."""
        known = parts >= 0
        found = torch.zeros_like(self.seen)
        found[categories[:, None].expand_as(parts)[known], parts[known]] = True
        self.seen |= all_reduce_max(found.byte()).bool()

    def logits(self, branch: Branch, items: Tensor, *, keys: Tensor | None) -> Tensor:
        """Float[B K P] of clouds with their category, Float[B P 4]."""
        points, categories = items[..., :3].contiguous(), items[:, 0, 3].long()
        with torch.set_grad_enabled(torch.is_grad_enabled() and branch.trunk_learns):
            outputs = features_of_layers(branch.encoder, points, layers=self.layers, keys=keys)
        tokens = torch.cat([output.patches for output in outputs], dim=2)  # [B N 3D]
        centres = take(points, farthest_points(points, count=tokens.shape[1]))
        return self(tokens, points=points, centres=centres, categories=categories)

    def forward(self, tokens: Tensor, *, points: Tensor, centres: Tensor, categories: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Float[B K P].

        Args:
            tokens: Float[B N 3D], tokens of the blocks side by side.
            points: Float[B P 3].
            centres: Float[B N 3], places of the tokens.
            categories: Int[B].
        """
        index, weight = interpolation(points, centres)
        near = (take(tokens, index) * weight.unsqueeze(3)).sum(dim=2)  # [B P 3D]
        own = self.carried(torch.cat([points, near.to(points.dtype)], dim=2))  # [B P h]
        category = self.category(F.one_hot(categories, self.num_categories).to(tokens.dtype))
        whole = torch.cat([tokens.amax(dim=1), tokens.mean(dim=1), category], dim=1)  # [B 6D+64]
        # The layer on both side by side, without a copy of the whole for every point.
        of_own, of_whole = self.mix.weight.split([own.shape[2], whole.shape[1]], dim=1)
        mixed = F.linear(own, of_own, self.mix.bias) + F.linear(whole, of_whole).unsqueeze(1)
        return self.parts(mixed).transpose(1, 2)


def _layer(inner: int, outer: int) -> list[nn.Module]:
    return [nn.Linear(inner, outer), SyncedBatchNorm(outer), nn.ReLU()]


@runtime_checkable
class Categorised(Protocol):
    """What this task has to know of its data."""

    test: Source


class Parts(FineTune):
    """A network that says which part of an object every point of a cloud belongs to, and starts from a backbone.

    Args:
        encoder: the backbone, a `PointTransformer`.
        classes: names of the parts.
        num_categories: number of categories of the clouds, which are the classes of the data; 1 where they have none.
        layers: numbers of the blocks whose tokens are used; negative numbers count from the last.
        hidden_dim: see `PartHead`.
        dropout: share of the hidden values that are dropped in training.
        drop_path: rate of stochastic depth in the last block; it grows evenly from 0 in the first one.
        **kwargs: arguments of `FineTune`.

    Raises:
        ValueError: a value out of range, or an encoder that the settings do not fit.
    """

    terms = ("parts",)
    task: ClassVar[str] = "parts"
    headline: str = "instance_miou"
    probe: Evaluator = PartSegmentation()

    def __init__(
        self,
        encoder: Encoder,
        classes: Sequence[str],
        *,
        num_categories: int,
        layers: Sequence[int] = (3, 7, 11),
        hidden_dim: int = 1024,
        dropout: float = 0.5,
        drop_path: float = 0.0,
        **kwargs,  # noqa: ANN003
    ) -> None:
        if not isinstance(encoder, PointTransformer):
            raise ValueError(f"Parts: encoder {encoder.card.encoder} given; accepted: PointTransformer")
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"Parts: drop_path={drop_path} given; accepted: 0 or more, and less than 1")
        encoder = for_tuning(encoder, drop_path=drop_path)
        numbers = [layer_number(encoder, layer) for layer in layers]
        head = PartHead(
            encoder.embed_dim, len(classes), num_categories=num_categories, layers=numbers, hidden_dim=hidden_dim, dropout=dropout
        )
        super().__init__(encoder, head, classes=classes, **kwargs)
        if self.optimization.chunk_size is not None:
            chunk = self.optimization.chunk_size
            raise ValueError(f"optimization: chunk_size={chunk} given; Parts takes tokens of several blocks at once: leave it out")

    @property
    def said(self) -> dict[str, Score]:
        """Without those of single categories."""
        return {name: score for name, score in self.found.items() if name in _SAID}

    def setup(self, stage: str) -> None:
        """Compare the number of categories with that of the data.

        Raises:
            ValueError: they differ.
        """
        super().setup(stage)
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]  its stub
        head = self.student.heads["task"]
        assert isinstance(head, PartHead)
        if isinstance(data, Categorised) and max(1, len(data.test.classes)) != head.num_categories:
            count = max(1, len(data.test.classes))
            raise ValueError(
                f"Parts: num_categories={head.num_categories} given, but {data.test.name} has {len(data.test.classes)} classes;"
                f" give --model.init_args.num_categories {count}"
            )

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`parts`: cross-entropy of the points of a cloud, and the mean over them, those that are ignored being 0."""
        assert batch.targets is not None
        head, parts = self.student.heads["task"], batch.targets[:, 1:]
        assert isinstance(head, PartHead)
        head.update(batch.targets[:, 0], parts)
        loss = F.cross_entropy(self.logits(batch).float(), parts, ignore_index=IGNORED, reduction="none")  # [B P]
        return {"parts": loss.mean(dim=1)}

    def outcomes(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Float[B 4]: the category, the mean IoU of its parts, and the numbers of right points and of points that count. A cloud of a
        category that no training cloud has can have any part, and an IoU of 0."""
        categories, parts = targets[:, 0], targets[:, 1:]
        head = self.head
        assert isinstance(head, PartHead)
        allowed = head.seen[categories]
        is_known = allowed.any(dim=1)  # the category has training clouds
        allowed = allowed | ~is_known.unsqueeze(1)
        scores = logits.transpose(1, 2)  # [B P K]
        predicted = scores.masked_fill(~allowed[:, None], -torch.inf).argmax(dim=2)
        counts = torch.stack([(predicted == parts).sum(dim=1), (parts >= 0).sum(dim=1)], dim=1)
        iou = instance_iou(scores, parts, allowed=allowed).to(counts.device) * is_known
        return torch.cat([categories[:, None], iou[:, None], counts], dim=1)

    def scores(self, outcomes: Tensor, groups: Tensor | None) -> dict[str, Score]:
        """`instance_miou`, the mean over clouds of the mean IoU of the parts of their category; `category_miou`, the mean over categories
        of these; `point_accuracy`; and `miou_<category>`, by the number of the category.
        """
        categories, iou, right, counted = outcomes.double().unbind(dim=1)
        numbers = [int(number) for number in categories.unique().tolist()]
        of_category = {}
        for number in numbers:
            own = categories == number
            of_category[f"miou_{number}"] = mean_score(iou[own], None if groups is None else groups[own])
        found = {
            "instance_miou": mean_score(iou, groups),
            "category_miou": mean_of_scores(list(of_category.values()), count=len(iou)),
            "point_accuracy": mean_score(right / counted.clamp(min=1), groups),
        }
        return found | of_category
