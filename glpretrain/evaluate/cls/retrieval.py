"""Retrieval by the cosine of `cls`: is what lies nearest of the same class?

Definitions, those of metric learning: recall@k is the share of queries with at least one item of their class among the k nearest
(not the share of the relevant items that are among them), and mAP the mean over queries of the average precision over the whole
gallery. Items at equal distance enter the average precision together, as in scikit-learn, so that the order of the gallery does not
count and features that have collapsed score the share of their class. Re-ranking and query expansion are left out on purpose.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from glpretrain import modalities
from glpretrain.core import keys
from glpretrain.data.sources.base import Subset
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, Score
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.encoding import device_of
from glpretrain.evaluate.features import Features
from glpretrain.evaluate.items import DecodedItems, Sources
from glpretrain.evaluate.metrics.intervals import mean_score, rate_score
from glpretrain.evaluate.probes import require_two_classes
from glpretrain.evaluate.progress import tracked
from glpretrain.evaluate.rows import LabelledFeatures, Rows, labelled_rows

_TABLE_CELLS = 1 << 22  # of queries x gallery at a time
_ORDER_SEED, _SHOWN_SEED = 90, 91
_SHOWN_QUERIES, _SHOWN_NEIGHBOURS = 6, 5
_CPU = torch.device("cpu")
_TRIED = 32  # queries, and two hundred times as many items, that tell how long all will take
_RIGHT, _WRONG = "#009e73", "#d55e00"


class Ranking(NamedTuple):
    """How the gallery lies around each query."""

    average_precision: Tensor  # Float[B]  in [0, 1], NaN without a relevant item
    first_hit: Tensor  # Int[B]  rank from 1 of the nearest relevant item, 0 without one
    nearest: Tensor  # Int[B M]  positions in the gallery of the nearest, nearest first


@dataclass(frozen=True, kw_only=True)
class Retrieval(Evaluator):
    """`map` and `recall<k>`, over the queries that have an item of their class in the gallery; intervals take the gallery as given.

    Queries are the items of `test`. The gallery is `train`; where there is no `train`, the other items of `test`.

    Args:
        k: numbers of neighbours for the recall.
    """

    headlines = ("map", "recall1")
    scored = "test"
    needs = ("test",)
    takes = ("train",)
    truth = "classes"

    k: Sequence[int] = (1, 5, 10)

    def validate(self) -> None:
        if 1 not in self.k or min(self.k) < 1:
            raise ValueError(f"k: {list(self.k)}; accepted: 1 and other positive numbers")

    def comparing_seconds(self, dim: int, counts: Mapping[str, int], device: torch.device) -> float:
        """See `Evaluator`."""
        searched = counts.get("train", counts["test"])
        count = min(200 * _TRIED, searched)
        rows = LabelledFeatures(keys.normal(torch.tensor(_ORDER_SEED), count, dim), torch.arange(count) % 2, torch.arange(count))
        start = time.perf_counter()
        rank(rows.at(torch.arange(min(_TRIED, count))), rows, leave_one_out=True, device=device)
        return (time.perf_counter() - start) / (min(_TRIED, count) * count) * searched * counts["test"]

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        queries, gallery = self._rows(encoder, sources, cache)
        require_two_classes(gallery.labels, sources["train" if "train" in sources else "test"])
        found = rank(queries, gallery, leave_one_out="train" not in sources, device=device_of(encoder))
        there = found.first_hit > 0
        if not there.any():
            raise ValueError(f"source {sources['test'].name!r}: no query has an item of its class in the gallery")
        largest = len(gallery.labels) - (0 if "train" in sources else 1)
        reason = f"k: {list(self.k)}; accepted: 1 and other numbers up to {largest}, the items that are searched"
        groups = None if queries.groups is None else queries.groups[there]
        scores: dict[str, Score] = {"map": mean_score(found.average_precision[there], groups)}
        scores |= {f"recall{k}": rate_score((found.first_hit[there] <= k).float(), groups) for k in self.k if k <= largest}
        return Result(scores, {}, {f"recall{k}": reason for k in self.k if k > largest})

    def draw(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> dict[str, Figure]:
        """`neighbours`: a few queries, each with its nearest items, framed in green where the class is the same and in red otherwise."""
        queries, gallery = self._rows(encoder, sources, cache)
        queries = queries.at(keys.permutation(torch.tensor(_SHOWN_SEED), len(queries.labels))[:_SHOWN_QUERIES])
        nearest = rank(queries, gallery, leave_one_out="train" not in sources, num_nearest=_SHOWN_NEIGHBOURS).nearest  # [B M]
        searched = sources["train" if "train" in sources else "test"]
        pictures = _pictures(sources["test"], queries.index, self.features, encoder)
        others = _pictures(searched, gallery.index[nearest.flatten()], self.features, encoder).unflatten(0, nearest.shape)
        classes = searched.source.classes
        figure = Figure(figsize=(1.1 * (nearest.shape[1] + 1), 1.25 * len(pictures)), layout="constrained")
        grid = figure.subplots(len(pictures), nearest.shape[1] + 1, squeeze=False)
        for row, label in enumerate(queries.labels.tolist()):
            _show(grid[row, 0], pictures[row], title=f"query: {classes[int(label)]}", colour="0.2")
            for column, other in enumerate(gallery.labels[nearest[row]].tolist()):
                colour = _RIGHT if other == label else _WRONG
                _show(grid[row, column + 1], others[row, column], title=classes[int(other)], colour=colour)
        return {"neighbours": figure}

    def _rows(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> tuple[LabelledFeatures, LabelledFeatures]:
        """Queries and gallery, rows of length one; the gallery in a fixed pseudo-random order, so that ties follow no order of classes."""
        queries = self._normalised(encoder, sources["test"], cache)
        gallery = self._normalised(encoder, sources["train"], cache) if "train" in sources else queries
        return queries, gallery.at(keys.permutation(torch.tensor(_ORDER_SEED), len(gallery.labels)))

    def _normalised(self, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None) -> LabelledFeatures:
        batches = self.features.encode(encoder, items, resize=self.features.cropping, patches="none", cache=cache)
        return labelled_rows(batches, lambda output: functional.normalize(output.cls, dim=1), items=items)


def _pictures(items: DecodedItems, index: Tensor, features: Features, encoder: Encoder) -> Tensor:
    """Float[B h w 3]: the items with these dataset indices as the encoder sees them."""
    card, modality, some = encoder.card, modalities.get(encoder.card.modality), DecodedItems(Subset(items.source, indices=index.tolist()))
    batches = some.batches(features.shape(encoder), resize=features.cropping, batch_size=len(index))
    return torch.cat([modality.pictures(modality.normalise(batch.items, card), card=card) for batch in batches])


def rank(
    queries: LabelledFeatures, gallery: LabelledFeatures, *, leave_one_out: bool, num_nearest: int = 0, device: torch.device = _CPU
) -> Ranking:
    """Order the gallery around every query, a bounded number of cosines at a time.

    Args:
        queries: the items that are searched for, rows of length one.
        gallery: the items that are searched, rows of length one; of items at equal distance the earlier is nearer.
        leave_one_out: the queries are in the gallery; each is searched for among the others.
        num_nearest: how many of the nearest to name; fewer where the gallery is smaller.
        device: where cosines are computed; the gallery has to fit there.

    Returns:
        One entry per query, on the CPU.
    """
    parts = Rows(len(queries.labels))
    per_chunk = max(1, _TABLE_CELLS // len(gallery.labels))
    columns, num_searched = torch.arange(len(gallery.labels), device=device), len(gallery.labels) - int(leave_one_out)
    gallery = gallery.to(device)
    chunks = torch.arange(len(queries.labels)).split(per_chunk)
    for positions in tracked(chunks, total=len(chunks), description="searching"):
        part = queries.at(positions).to(device)
        similarity = part.cls @ gallery.cls.T  # [B J]
        if leave_one_out:
            similarity.masked_fill_(gallery.index == part.index[:, None], -torch.inf)
        similarity, position = similarity.sort(dim=1, descending=True, stable=True)
        there = similarity > -torch.inf
        relevant = (gallery.labels[position] == part.labels[:, None]) & there
        # Precision where the run of equal cosines that an item is in has ended.
        ends = functional.pad(similarity[:, :-1] != similarity[:, 1:], (0, 1), value=True)
        end = torch.where(ends, columns, len(columns)).flip(1).cummin(dim=1).values.flip(1)
        precision = relevant.cumsum(dim=1).gather(1, end) / (end + 1)
        count = relevant.sum(dim=1)
        average = (precision * relevant).sum(dim=1) / count  # 0 / 0 is NaN
        first = torch.where(count > 0, relevant.int().argmax(dim=1) + 1, 0)
        parts.add(average.cpu(), first.cpu(), position[:, : min(num_nearest, num_searched)].cpu())
    return Ranking(*parts.tensors(3))


def _show(axis: Axes, picture: Tensor, *, title: str, colour: str) -> None:
    """Float[h w 3] in a frame."""
    axis.imshow(picture.numpy())
    axis.set_title(title, fontsize=6, pad=2)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=2.5)
