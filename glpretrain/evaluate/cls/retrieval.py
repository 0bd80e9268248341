"""Retrieval by the cosine of `cls`: is what lies nearest of the same class?

Definitions, those of metric learning: recall@k is the share of queries with at least one item of their class among the k nearest
(not the share of the relevant items that are among them), and mAP the mean over queries of the average precision over the whole
gallery. Items at equal distance enter the average precision together, as in scikit-learn, so that the order of the gallery does not
count and features that have collapsed score the share of their class. Left out on purpose: re-ranking and query expansion.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from glpretrain.core import keys
from glpretrain.data.sources.base import Source, Subset
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, Score
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.cls.knn import labelled_pair
from glpretrain.evaluate.features import encode, evaluation_shape
from glpretrain.evaluate.metrics.intervals import mean_interval, rate_interval
from glpretrain.evaluate.pixels import Pixels

_TABLE_CELLS = 1 << 22  # of queries x gallery at a time
_ORDER_SEED, _SHOWN_SEED = 90, 91
_SHOWN_QUERIES, _SHOWN_NEIGHBOURS = 6, 5
_RIGHT, _WRONG = "#009e73", "#d55e00"


class LocatedFeatures(NamedTuple):
    """Rows that know their item."""

    cls: Tensor  # Float[B D]  of length one
    labels: Tensor  # Int[B]
    index: Tensor  # Int[B]  dataset index


class Ranking(NamedTuple):
    """How the gallery lies around each query."""

    average_precision: Tensor  # Float[B]  in [0, 1], NaN without a relevant item
    first_hit: Tensor  # Int[B]  rank from 1 of the nearest relevant item, 0 without one
    nearest: Tensor  # Int[B M]  positions in the gallery of the nearest, nearest first


class Retrieval(Evaluator):
    """`map` and `recall<k>`, over the queries that have an item of their class in the gallery; intervals take the gallery as given.

    Args:
        test: queries.
        train: gallery; None searches among the other items of `test`.
        k: numbers of neighbours for the recall.
        image_size: side of the square, or height and width; None for the card's item shape.
        layer: block whose features are taken; negative numbers count from the last.
        batch_size: items at a time.
        bf16: encode under bfloat16 autocast.
    """

    headlines = ("map", "recall1")

    def __init__(
        self,
        test: Source | Pixels,
        train: Source | Pixels | None = None,
        *,
        k: Sequence[int] = (1, 5, 10),
        image_size: int | Sequence[int] | None = None,
        layer: int = -1,
        batch_size: int = 64,
        bf16: bool = False,
    ) -> None:
        gallery, self.test = labelled_pair(test if train is None else train, test)
        self.train = None if train is None else gallery
        largest = len(gallery) if self.train is not None else len(gallery) - 1
        if 1 not in k or min(k) < 1 or max(k) > largest:
            raise ValueError(f"k: {list(k)}; accepted: 1 and other numbers up to {largest}, the items that are searched")
        self.k = tuple(k)
        self.image_size, self.layer, self.batch_size, self.bf16 = image_size, layer, batch_size, bf16

    @property
    def scored(self) -> Pixels:
        return self.test

    def run(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> Result:
        queries, gallery = self._features(encoder, cache)
        found = rank(queries, gallery, leave_one_out=self.train is None)
        there = found.first_hit > 0
        if not there.any():
            raise ValueError(f"source {self.test.source.name!r}: no query has an item of its class in the gallery")
        count = int(there.sum())
        precision = found.average_precision[there]
        scores = {"map": Score(100 * precision.mean().item(), 100 * mean_interval(precision), count)}
        for k in self.k:
            rate = (found.first_hit[there] <= k).float().mean().item()
            scores[f"recall{k}"] = Score(100 * rate, 100 * rate_interval(rate, count=count), count)
        return Result(scores, chosen={})

    def pictures(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> dict[str, Figure]:
        """`neighbours`: a few queries, each with its nearest items, framed in green where the class is the same and in red otherwise."""
        queries, gallery = self._features(encoder, cache)
        shown = keys.permutation(torch.tensor(_SHOWN_SEED), len(queries.labels))[:_SHOWN_QUERIES]
        queries = LocatedFeatures(*(part[shown] for part in queries))
        nearest = rank(queries, gallery, leave_one_out=self.train is None, num_nearest=_SHOWN_NEIGHBOURS).nearest  # [B M]
        if encoder.card.modality != "image":
            return {}
        shape = evaluation_shape(encoder, self.image_size)
        searched = self.test if self.train is None else self.train
        pictures = _pictures(self.test, queries.index, shape)
        others = _pictures(searched, gallery.index[nearest.flatten()], shape).unflatten(0, nearest.shape)
        classes = self.test.source.classes
        figure = Figure(figsize=(1.1 * (nearest.shape[1] + 1), 1.25 * len(shown)), layout="constrained")
        grid = figure.subplots(len(shown), nearest.shape[1] + 1, squeeze=False)
        for row, label in enumerate(queries.labels.tolist()):
            _show(grid[row, 0], pictures[row], title=f"query: {classes[label]}", colour="0.2")
            for column, other in enumerate(gallery.labels[nearest[row]].tolist()):
                colour = _RIGHT if other == label else _WRONG
                _show(grid[row, column + 1], others[row, column], title=classes[other], colour=colour)
        return {"neighbours": figure}

    def _features(self, encoder: Encoder, cache: FeatureCache | None) -> tuple[LocatedFeatures, LocatedFeatures]:
        """Queries and gallery, the gallery in a fixed pseudo-random order: items at equal distance lie in no order of classes."""
        options = {"image_size": self.image_size, "layer": self.layer, "batch_size": self.batch_size, "bf16": self.bf16, "cache": cache}
        queries = _located(encoder, self.test, **options)
        gallery = queries if self.train is None else _located(encoder, self.train, **options)
        order = keys.permutation(torch.tensor(_ORDER_SEED), len(gallery.labels))
        return queries, LocatedFeatures(*(part[order] for part in gallery))


def _located(encoder: Encoder, pixels: Pixels, **options: object) -> LocatedFeatures:
    rows: list[LocatedFeatures] = []
    for batch, output in encode(encoder, pixels, fit="crop", patches=False, **options):
        there = batch.labels >= 0
        rows.append(LocatedFeatures(functional.normalize(output.cls[there], dim=1), batch.labels[there], batch.index[there]))
    features = LocatedFeatures(*(torch.cat(part) for part in zip(*rows, strict=True)))
    if len(features.labels) == 0:
        raise ValueError(f"source {pixels.source.name!r}: no item has a label; this evaluator needs labels")
    if not features.cls.isfinite().all():
        raise ValueError(f"source {pixels.source.name!r}: the encoder's cls features are not finite; nothing can be scored on them")
    return features


def _pictures(pixels: Pixels, index: Tensor, shape: Sequence[int]) -> Tensor:
    """UInt8[B C H W]: the items with these dataset indices as the encoder sees them."""
    some = Pixels(Subset(pixels.source, indices=index.tolist()))
    return torch.cat([batch.images for batch in some.batches(shape, fit="crop", batch_size=len(index))])


def rank(queries: LocatedFeatures, gallery: LocatedFeatures, *, leave_one_out: bool, num_nearest: int = 0) -> Ranking:
    """Order the gallery around every query, a bounded number of cosines at a time.

    Args:
        queries: rows of length one.
        gallery: rows of length one; of items at equal distance the earlier is nearer.
        leave_one_out: the queries are in the gallery; each is searched for among the others.
        num_nearest: how many of the nearest to name; fewer where the gallery is smaller.

    Returns:
        One entry per query.
    """
    parts: list[Ranking] = []
    per_chunk = max(1, _TABLE_CELLS // len(gallery.labels))
    columns = torch.arange(len(gallery.labels))
    for cls, labels, index in zip(*(part.split(per_chunk) for part in queries), strict=True):
        similarity = cls @ gallery.cls.T  # [B J]
        if leave_one_out:
            similarity.masked_fill_(gallery.index == index[:, None], -torch.inf)
        similarity, position = similarity.sort(dim=1, descending=True, stable=True)
        there = similarity > -torch.inf
        relevant = (gallery.labels[position] == labels[:, None]) & there
        # Precision where the run of equal cosines that an item is in has ended.
        ends = functional.pad(similarity[:, :-1] != similarity[:, 1:], (0, 1), value=True)
        end = torch.where(ends, columns, len(columns)).flip(1).cummin(dim=1).values.flip(1)
        precision = relevant.cumsum(dim=1).gather(1, end) / (end + 1)
        count = relevant.sum(dim=1)
        average = (precision * relevant).sum(dim=1) / count  # 0 / 0 is NaN
        first = torch.where(count > 0, relevant.int().argmax(dim=1) + 1, 0)
        num_there = int(there.sum(dim=1).min())
        parts.append(Ranking(average, first, position[:, : min(num_nearest, num_there)]))
    return Ranking(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _show(axis: Axes, image: Tensor, *, title: str, colour: str) -> None:
    """UInt8[C H W] in a frame; the first channel where there are not three."""
    axis.imshow((image if len(image) == 3 else image[:1].expand(3, -1, -1)).permute(1, 2, 0).numpy())
    axis.set_title(title, fontsize=6, pad=2)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=2.5)
