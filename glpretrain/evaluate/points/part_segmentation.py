"""Part segmentation on frozen tokens of clouds: one linear layer says which part every point lies on.

Protocol: as `linear_segmentation` for images. The layer is fitted on tokens, each with the shares of the parts among the points
nearest to its centre as soft target; its logits are carried to points by inverse squared distances to the nearest three centres.
Learning rate and L2 strength are chosen on held-out training clouds. `miou` is over parts, all points of all clouds counted before
anything is divided; `instance_miou` is ShapeNetPart's: a cloud may only be given the parts that training clouds of its class show, and
its score is the mean over these, a part that is neither there nor predicted counting 1.

Fine-tuning, features of several blocks and the segmentation heads of published results, which are not comparable with these numbers, are
left out on purpose.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Result
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.figures import class_colours, shown_positions
from glpretrain.evaluate.items import DecodedItems, Sources
from glpretrain.evaluate.metrics.confusion import areas, confusion, mean_iou, segmentation_scores
from glpretrain.evaluate.metrics.intervals import mean_score
from glpretrain.evaluate.patches.linear_segmentation import Layer, LinearLayer, Taught
from glpretrain.evaluate.points.tokens import at_points, cells, clouds_figure, part_colours, point_tokens
from glpretrain.evaluate.reading import ItemBatch


@dataclass(frozen=True, kw_only=True)
class PartSegmentation(LinearLayer):
    """Parts by a linear layer on tokens: `miou`, `instance_miou`, `accuracy` of points, `iou_<part>`; chosen: `learning_rate` and `l2`.

    `masked_train` and `masked` are clouds with parts. Settings are those of `LinearLayer`.
    """

    headlines = ("miou", "instance_miou")
    modality = "points"
    split_seed = 110

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        items = sources["masked"]
        parts = items.source.mask_classes
        layer, chosen = self._layer(encoder, sources["masked_train"], cache)
        clouds = sources["masked_train"].batches(self.features.shape(encoder), resize="stretch", batch_size=self.features.batch_size)
        allowed = parts_of_classes(clouds, num_classes=max(len(sources[role].source.classes) for role in self.needs), num_parts=len(parts))
        per_cloud: list[Tensor] = []
        of_instances: list[Tensor] = []
        for batch, tokens, centres in point_tokens(encoder, items, features=self.features, cache=cache):
            logits, truth = at_points(layer(tokens), points=batch.items, centres=centres), batch.class_masks()  # [B P C], [B P]
            per_cloud.append(point_areas(truth, logits))
            labelled = batch.labels >= 0
            if labelled.any() and len(allowed):
                of_instances.append(instance_iou(logits[labelled], truth[labelled], allowed=allowed[batch.labels[labelled]]))
        scores = segmentation_scores(torch.cat(per_cloud), classes=parts)
        instances = torch.cat(of_instances) if of_instances else torch.empty(0)
        if len(instances):
            return Result(scores | {"instance_miou": mean_score(instances)}, chosen)
        reason = f"masked: source {items.name!r} has no cloud of a class whose parts masked_train shows; instance_miou needs the class"
        return Result(scores, chosen, {"instance_miou": reason})

    def draw(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> dict[str, Figure]:
        """`parts`: a few scored clouds, their parts and the prediction."""
        items, num_parts = sources["masked"], len(sources["masked"].source.mask_classes)
        layer, _ = self._layer(encoder, sources["masked_train"], cache)
        wanted = {items.indices[position] for position in shown_positions(len(items))}
        colours = class_colours(num_parts)
        shown: list[Tensor] = []
        rows: dict[str, list[Tensor]] = {"truth": [], "prediction": []}
        for batch, tokens, centres in point_tokens(encoder, items, features=self.features, cache=cache):
            predicted = at_points(layer(tokens), points=batch.items, centres=centres).argmax(dim=-1)  # [B P]
            for position in batch.positions_of(wanted):
                shown.append(batch.items[position])
                for row, parts in zip(rows.values(), (batch.class_masks(), predicted), strict=True):
                    row.append(part_colours(parts[position], colours=colours))
        return {"parts": clouds_figure(shown, rows=rows)}

    def _layer(self, encoder: Encoder, train: DecodedItems, cache: FeatureCache | None) -> tuple[Layer, dict[str, float]]:
        """The layer, and the learning rate and L2 strength behind it."""
        num_parts = len(train.source.mask_classes)

        def batches(items: DecodedItems) -> Iterator[Taught]:
            for batch, tokens, centres in point_tokens(encoder, items, features=self.features, cache=cache):
                shares, truth = part_shares(batch, centres, num_parts=num_parts), (batch.items, centres, batch.class_masks())
                yield Taught(batch.index, tokens, shares, truth)

        def rate(layer: Layer, queries: Tensor, truth: tuple[Tensor, ...]) -> float:
            points, centres, parts = truth
            return mean_iou(point_areas(parts, at_points(layer(queries), points=points, centres=centres)).sum(dim=0)).item()

        num_tokens = math.prod(encoder.grid(self.features.shape(encoder)))
        return self.fitted(batches, train, num_tokens=num_tokens, device=torch.device("cpu"), rate=rate)


def point_areas(truth: Tensor, logits: Tensor) -> Tensor:
    """`areas` of points: Int[B P] and Float[B P C] to Float64[B 3 C]."""
    num_parts = logits.shape[2]
    return areas(confusion(truth[:, None], logits.argmax(dim=-1)[:, None], num_classes=num_parts, num_predicted=num_parts))


def part_shares(batch: ItemBatch, centres: Tensor, *, num_parts: int) -> Tensor:
    """Float[B N C]: the share of each cell's points that lie on each part; the sum is below 1 where points are to be ignored."""
    num_items, num_tokens, _ = centres.shape
    semantic = batch.class_masks()
    cell = cells(batch.items, centres) + num_tokens * torch.arange(num_items)[:, None]  # [B P]
    known = semantic >= 0
    counts = (cell * num_parts + semantic)[known].bincount(minlength=num_items * num_tokens * num_parts)
    sizes = cell.flatten().bincount(minlength=num_items * num_tokens).clamp(min=1)
    return (counts.unflatten(0, (-1, num_parts)) / sizes[:, None]).float().unflatten(0, (num_items, num_tokens))


def parts_of_classes(clouds: Iterable[ItemBatch], *, num_classes: int, num_parts: int) -> Tensor:
    """Bool[classes C]: which parts clouds of each class show."""
    shown = torch.zeros(num_classes, num_parts, dtype=torch.bool)
    for batch in clouds:
        semantic = batch.class_masks()
        known = (semantic >= 0) & (batch.labels >= 0)[:, None]
        shown[batch.labels[:, None].expand_as(semantic)[known], semantic[known]] = True
    return shown


def instance_iou(logits: Tensor, truth: Tensor, *, allowed: Tensor) -> Tensor:
    """Float[B]: ShapeNetPart's score, the mean over the parts of a cloud's class, 1 for one that is neither there nor predicted.

    Clouds whose class has no part are left out.

    Args:
        logits: Float[B P C], scores of the parts for each point.
        truth: Int[B P], true parts, -1 where a point does not count.
        allowed: Bool[B C], the parts of the cloud's class.
    """
    some = allowed.any(dim=1)
    logits, truth, allowed = logits[some], truth[some], allowed[some]
    right, true, called = point_areas(truth, logits.masked_fill(~allowed[:, None], -torch.inf)).unbind(dim=1)  # [B C] each
    union = true + called - right
    iou = torch.where(union > 0, right / union.clamp(min=1), 1.0)  # [B C]
    return ((iou * allowed).sum(dim=1) / allowed.sum(dim=1)).float()
