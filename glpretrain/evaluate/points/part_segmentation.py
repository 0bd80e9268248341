"""Part segmentation on frozen tokens of clouds: one linear layer says which part every point lies on.

Protocol: as `linear_segmentation` for images. The layer is fitted on tokens, each with the shares of the parts among the points
nearest to its centre as soft target; its logits are carried to points by inverse squared distances to the nearest three centres.
Learning rate and L2 strength are chosen on held-out training clouds. `miou` is over parts, all points of all clouds counted before
anything is divided; `instance_miou` is ShapeNetPart's: a cloud may only be given the parts that training clouds of its class show, and
its score is the mean over these, a part that is neither there nor predicted counting 1.

Left out on purpose: fine-tuning, features of several blocks and the segmentation heads of published part-segmentation results, which
are not comparable with these numbers.
"""

import itertools
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor

from glpretrain.core import keys
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Result
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.figures import class_colours, shown_positions
from glpretrain.evaluate.metrics.confusion import areas, confusion, mean_iou, segmentation_scores
from glpretrain.evaluate.patches.linear_segmentation import LinearSegmentation
from glpretrain.evaluate.patches.prompt_segmentation import mean_score
from glpretrain.evaluate.pixels import PixelBatch, Pixels
from glpretrain.evaluate.points.tokens import at_points, cells, clouds_figure, part_colours, point_tokens

_SPLIT_SEED = 110
_MIN_STD = 1e-6  # a collapsed feature is not blown up beyond this
_Clouds = list[tuple[PixelBatch, Tensor, Tensor]]  # batches with tokens Float[B N D] and centres Float[B N 3]
_Head = Callable[[Tensor], Tensor]  # Float[B N D] to Float[B N C]


class PartSegmentation(LinearSegmentation):
    """Parts by a linear layer on tokens: `miou`, `instance_miou`, `accuracy` of points, `iou_<part>`; chosen: `learning_rate` and `l2`.

    Arguments as of `LinearSegmentation`: `masked_train` and `masked` are clouds with parts, `image_size` is the number of their points.
    """

    headlines = ("miou", "instance_miou")

    def run(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> Result:
        train = self._clouds(encoder, self.masked_train, cache)
        head, (learning_rate, l2) = self._fitted_to(train)
        allowed = parts_of_classes(train, num_classes=len(self.masked.source.classes), num_parts=self.num_parts)
        per_cloud: list[Tensor] = []
        of_instances: list[Tensor] = []
        for batch, tokens, centres in self._clouds(encoder, self.masked, cache):
            logits = at_points(head(tokens), points=batch.images, centres=centres)  # [B P C]
            per_cloud.append(self._areas(batch.semantic, logits))
            labelled = batch.labels >= 0
            if labelled.any() and len(allowed):
                of_instances.append(instance_iou(logits[labelled], batch.semantic[labelled], allowed=allowed[batch.labels[labelled]]))
        scores = segmentation_scores(torch.cat(per_cloud), classes=self.masked.source.mask_classes)
        if not of_instances:
            raise ValueError(f"masked: source {self.masked.name!r} has no labels; instance_miou needs the class of every cloud")
        scores["instance_miou"] = mean_score(torch.cat(of_instances))
        return Result(scores, {"learning_rate": learning_rate, "l2": l2})

    def pictures(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> dict[str, Figure]:
        """`parts`: a few scored clouds, their parts and the prediction."""
        head, _ = self._fitted_to(self._clouds(encoder, self.masked_train, cache))
        chosen = shown_positions(len(self.masked))
        colours = class_colours(self.num_parts)
        shown: list[Tensor] = []
        rows: dict[str, list[Tensor]] = {"truth": [], "prediction": []}
        seen = 0
        for batch, tokens, centres in self._clouds(encoder, self.masked, cache):
            here = [position - seen for position in chosen if seen <= position < seen + len(tokens)]
            seen += len(tokens)
            predicted = at_points(head(tokens), points=batch.images, centres=centres).argmax(dim=-1)  # [B P]
            shown += batch.images[here]
            rows["truth"] += [part_colours(parts, colours=colours) for parts in batch.semantic[here]]
            rows["prediction"] += [part_colours(parts, colours=colours) for parts in predicted[here]]
        return {"parts": clouds_figure(shown, rows=rows)}

    @property
    def num_parts(self) -> int:
        """C."""
        return len(self.masked.source.mask_classes)

    def _clouds(self, encoder: Encoder, pixels: Pixels, cache: FeatureCache | None) -> _Clouds:
        clouds = list(point_tokens(encoder, pixels, options=self._options(cache)))
        for batch, _, _ in clouds:
            if batch.semantic is None:
                raise ValueError(f"source {pixels.source.name!r}: an item among {batch.index.tolist()} has no mask of classes")
        return clouds

    def _fitted_to(self, train: _Clouds) -> tuple[_Head, tuple[float, float]]:
        """The layer, and the learning rate and L2 strength behind it."""
        features = torch.cat([tokens for _, tokens, _ in train])  # [B N D]
        shares = torch.cat([part_shares(batch, centres, num_parts=self.num_parts) for batch, _, centres in train])  # [B N C]
        mean, std = features.mean(dim=(0, 1)), features.std(dim=(0, 1)).clamp_min(_MIN_STD)
        features = (features - mean) / std
        candidates = list(itertools.product(self.learning_rates, self.l2))
        chosen = candidates[0]
        if len(candidates) > 1:
            order = keys.permutation(torch.tensor(_SPLIT_SEED), len(features))
            num_held_out = round(self.held_out_ratio * len(order))
            if num_held_out in (0, len(order)):
                raise ValueError(f"masked_train: {len(order)} clouds are too few to choose among {len(candidates)} candidates; give one")
            held_out, fitted = order[:num_held_out], order[num_held_out:]
            heads = self._heads(features[fitted], shares[fitted], candidates)
            points, truth, centres = (
                torch.cat(parts)[held_out] for parts in zip(*((b.images, b.semantic, c) for b, _, c in train), strict=True)
            )
            rates = []
            for weight, bias in zip(*heads, strict=True):
                logits = at_points(features[held_out] @ weight + bias, points=points, centres=centres)
                rates.append(mean_iou(self._areas(truth, logits).sum(dim=0)).item())
            chosen = candidates[rates.index(max(rates))]
        (weight,), (bias,) = self._heads(features, shares, [chosen])
        return lambda tokens: (tokens - mean) / std @ weight + bias, chosen

    def _areas(self, truth: Tensor, logits: Tensor) -> Tensor:
        """Int[B P] and Float[B P C] to Float64[B 3 C]."""
        predicted = logits.argmax(dim=-1)[:, None]  # [B 1 P]
        return areas(confusion(truth[:, None], predicted, num_classes=self.num_parts, num_predicted=self.num_parts))


def part_shares(batch: PixelBatch, centres: Tensor, *, num_parts: int) -> Tensor:
    """Share of each cell's points that lie on each part; what is to be ignored is missing from the sum of 1. Float[B N C]."""
    num_items, num_tokens, _ = centres.shape
    cell = cells(batch.images, centres) + num_tokens * torch.arange(num_items)[:, None]  # [B P]
    known = batch.semantic >= 0
    counts = (cell * num_parts + batch.semantic)[known].bincount(minlength=num_items * num_tokens * num_parts)
    sizes = cell.flatten().bincount(minlength=num_items * num_tokens).clamp(min=1)
    return (counts.unflatten(0, (-1, num_parts)) / sizes[:, None]).float().unflatten(0, (num_items, num_tokens))


def parts_of_classes(clouds: _Clouds, *, num_classes: int, num_parts: int) -> Tensor:
    """Bool[classes C]: which parts clouds of each class show."""
    shown = torch.zeros(num_classes, num_parts, dtype=torch.bool)
    for batch, _, _ in clouds:
        known = (batch.semantic >= 0) & (batch.labels >= 0)[:, None]
        shown[batch.labels[:, None].expand_as(batch.semantic)[known], batch.semantic[known]] = True
    return shown


def instance_iou(logits: Tensor, truth: Tensor, *, allowed: Tensor) -> Tensor:
    """ShapeNetPart's score of each cloud: mean over the parts of its class, 1 for one that is neither there nor predicted.

    Args:
        logits: Float[B P C].
        truth: Int[B P], -1 where a point does not count.
        allowed: Bool[B C], the parts of the cloud's class.

    Returns:
        Float[B]; clouds whose class has no part are left out.
    """
    some = allowed.any(dim=1)
    logits, truth, allowed = logits[some], truth[some], allowed[some]
    num_parts = allowed.shape[1]
    predicted = logits.masked_fill(~allowed[:, None], -torch.inf).argmax(dim=-1)  # [B P]
    counts = areas(confusion(truth[:, None], predicted[:, None], num_classes=num_parts, num_predicted=num_parts))  # [B 3 C]
    right, true, called = counts.unbind(dim=1)
    union = true + called - right
    iou = torch.where(union > 0, right / union.clamp(min=1), 1.0)  # [B C]
    return ((iou * allowed).sum(dim=1) / allowed.sum(dim=1)).float()
