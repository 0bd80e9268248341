"""Zero-shot prompt segmentation of clouds: one token of a part is the prompt, the points similar to it are the segment.

The protocol is that of `prompt_segmentation` (after MMC), carried over to points:

- features are the tokens after the final norm, L2-normalised; a token belongs to the points nearest to its centre, and is inside a
  part when at least half of these are; parts with fewer than `min_patches` inside are left out;
- prompt: every inside token in turn, scores averaged, or the token of the point that is farthest from all points of other parts
  ("a careful click"; of a shape with one part, from its mean place);
- cosines are carried from centres to points by inverse squared distances to the nearest three; the segment is where they exceed the
  threshold, the score is its IoU over points;
- thresholds, and which items choose them, as there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from glpretrain.core.clouds import squared_distances
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.items import DecodedItems
from glpretrain.evaluate.patches.prompt_segmentation import THRESHOLDS, Places, Prompted, Prompts
from glpretrain.evaluate.points.tokens import at_points, cells, clouds_figure, point_tokens
from glpretrain.evaluate.reading import ItemBatch


class CloudPlaces(NamedTuple):
    """Tokens of a cloud."""

    points: Tensor  # Float[P 3]
    centres: Tensor  # Float[N 3]
    cell: Tensor  # Int[P]  the token that each point belongs to

    def shares(self, mask: Tensor) -> Tensor:
        """See `Places`; the mask is Bool[P]."""
        return share_of_cells(mask, self.cell, count=len(self.centres))

    def click(self, mask: Tensor) -> int:
        """The token of the point that is farthest from all points of other parts."""
        return int(self.cell[careful_click(self.points, mask)])

    def iou(self, similarity: Tensor, queries: Tensor, mask: Tensor, *, known: Tensor) -> Tensor:
        """See `Places`."""
        maps = at_points(similarity[:, queries][None], points=self.points[None], centres=self.centres[None])[0].T  # [M P]
        return point_iou(maps[:, known], mask[known])


@dataclass(frozen=True, kw_only=True)
class PointPrompts(Prompts):
    """How well the similarity to one token of a part segments the part; scores and choices as of `PromptSegmentation`.

    `masked` are clouds with instances: which part of the shape each point lies on.

    Args:
        min_patches: parts with fewer tokens inside are left out; clouds have few tokens.
    """

    modality = "points"

    min_patches: int = 2

    def placed(
        self, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None
    ) -> Iterator[tuple[ItemBatch, Tensor, Sequence[Places]]]:
        """See `Prompts`."""
        for batch, tokens, centres in point_tokens(encoder, items, features=self.features, cache=cache):
            pairs = zip(batch.items, centres, strict=True)
            places = [CloudPlaces(points, own, cells(points[None], own[None])[0]) for points, own in pairs]
            yield batch, functional.normalize(tokens, dim=-1), places

    def figure(self, shown: Sequence[Prompted], *, threshold: float) -> Figure:
        """See `Prompts`."""
        clicks: list[Tensor] = []
        rows: dict[str, list[Tensor]] = {"cosine with the prompt": [], f"above {threshold:.2f}": [], "truth": []}
        for points, part, tokens, places in shown:
            assert isinstance(places, CloudPlaces)
            click = careful_click(points, part)
            prompt = tokens[places.cell[click]]
            cosine = at_points((tokens @ prompt)[None, :, None], points=points[None], centres=places.centres[None])[0, :, 0]
            low, high = cosine.min(), cosine.max()
            clicks.append(points[click])
            colourings = ((cosine - low) / (high - low).clamp_min(1e-6), (cosine > threshold).float(), part.float())
            for row, colours in zip(rows.values(), colourings, strict=True):
                row.append(colours)
        return clouds_figure([one.item for one in shown], rows=rows, marks=clicks)


def share_of_cells(inside: Tensor, cell: Tensor, *, count: int) -> Tensor:
    """Float[N]: the share of the points of each of N cells, Int[P], that are inside, Bool[P]; 0 for a cell without points."""
    sums = torch.zeros(count).index_add_(0, cell, inside.float())
    return sums / cell.bincount(minlength=count).clamp(min=1)


def careful_click(points: Tensor, part: Tensor) -> int:
    """The point of a part that is farthest from all others of the shape; the one nearest to the mean place where there are none.

    The points are Float[P 3]; those of the part, Bool[P], must not be empty.
    """
    own = part.nonzero()[:, 0]
    if part.all():
        return int((points - points.mean(dim=0)).square().sum(dim=1).argmin())
    return int(own[squared_distances(points[part], points[~part]).amin(dim=1).argmax()])


def point_iou(similarity: Tensor, part: Tensor, *, thresholds: Sequence[float] | Tensor = THRESHOLDS) -> Tensor:
    """Float[M T]: IoU of `similarity > threshold` with a part, for every threshold.

    Args:
        similarity: Float[M P], cosines of the points with M prompts.
        part: Bool[P], points of the part, not empty.
        thresholds: T thresholds.
    """
    above = similarity.unsqueeze(-1) > torch.as_tensor(thresholds)  # [M P T]
    intersection = (above & part[:, None]).sum(dim=1)
    return intersection / (above & ~part[:, None]).sum(dim=1).add(part.sum())
