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

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from glpretrain.core.clouds import squared_distances
from glpretrain.data.sources.base import Source
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.figures import shown_positions
from glpretrain.evaluate.patches.prompt_segmentation import THRESHOLDS, ObjectScore, PromptSegmentation, calibration_images
from glpretrain.evaluate.patches.similarity import PairSample, pair_sample
from glpretrain.evaluate.pixels import Pixels
from glpretrain.evaluate.points.tokens import at_points, cells, clouds_figure, point_tokens


class PointPrompts(PromptSegmentation):
    """How well the similarity to one token of a part segments the part; scores and choices as of `PromptSegmentation`.

    Args:
        masked: clouds with instances: which part of the shape each point lies on.
        image_size: points of a cloud; None for the card's.
        layer: block whose features are taken; negative numbers count from the last.
        min_patches: parts with fewer tokens inside are left out; clouds have few.
        max_prompts: parts with more tokens inside are prompted with this many, evenly spaced.
        calibration_share: share of the clouds that choose the threshold.
        batch_size: clouds at a time.
        bf16: encode under bfloat16 autocast.
    """

    def __init__(
        self,
        masked: Source | Pixels,
        *,
        image_size: int | None = None,
        layer: int = -1,
        min_patches: int = 2,
        max_prompts: int = 64,
        calibration_share: float = 0.25,
        batch_size: int = 64,
        bf16: bool = False,
    ) -> None:
        super().__init__(
            masked,
            image_size=image_size,
            layer=layer,
            min_patches=min_patches,
            max_prompts=max_prompts,
            calibration_share=calibration_share,
            batch_size=batch_size,
            bf16=bf16,
        )

    def _measure(self, encoder: Encoder, cache: FeatureCache | None) -> tuple[list[ObjectScore], list[PairSample]]:
        objects: list[ObjectScore] = []
        pairs: list[PairSample] = []
        for batch, patches, centres in point_tokens(encoder, self.masked, options=self._options(cache)):
            if batch.instances is None:
                raise ValueError(f"source {self.masked.source.name!r}: an item among {batch.index.tolist()} has no mask")
            tokens = functional.normalize(patches, dim=-1)
            for position, index in enumerate(batch.index.tolist()):
                classes = None if batch.semantic is None else batch.semantic[position]
                place = batch.images[position], centres[position]
                found, sample = self._score_cloud(tokens[position], *place, batch.instances[position], classes, index)
                objects += found
                pairs += sample
        return objects, pairs

    def _score_cloud(
        self, tokens: Tensor, points: Tensor, centres: Tensor, instances: Tensor, classes: Tensor | None, index: int
    ) -> tuple[list[ObjectScore], list[PairSample]]:
        """Every part of one cloud that is large enough, and a sample of its pairs of tokens if there is any."""
        similarity = tokens @ tokens.T  # [N N]
        cell = cells(points[None], centres[None])[0]  # [P]
        known = instances >= 0  # [P]
        objects: list[ObjectScore] = []
        insides: list[Tensor] = []
        for identity in instances[instances > 0].unique().tolist():
            part = instances == identity  # [P]
            inside = share_of_cells(part, cell, count=len(centres)) >= 0.5  # [N]
            prompts = inside.nonzero()[:, 0]  # [M]
            if len(prompts) < self.min_patches:
                continue
            insides.append(inside)
            if len(prompts) > self.max_prompts:
                prompts = prompts[torch.arange(self.max_prompts) * len(prompts) // self.max_prompts]
            queries = torch.cat([prompts, cell[careful_click(points, part)][None]])  # [M+1]
            maps = at_points(similarity[:, queries][None], points=points[None], centres=centres[None])[0].T  # [M+1 P]
            iou = point_iou(maps[:, known], part[known])  # [M+1 T]
            label = -1 if classes is None else int(classes[part].mode().values)
            objects.append(ObjectScore(index, label, iou[:-1].mean(dim=0), iou[-1]))
        if not insides:
            return [], []
        usable = share_of_cells(known, cell, count=len(centres)) > 0.5
        return objects, pair_sample(similarity, torch.stack(insides), usable=usable, index=index)

    def _prompts_figure(self, encoder: Encoder, cache: FeatureCache | None, objects: list[ObjectScore], *, threshold: float) -> Figure:
        """The largest part of a few of the clouds that were scored."""
        scored = sorted({score.image for score in objects} - calibration_images(self.masked, share=self.calibration_share))
        wanted = {scored[position] for position in shown_positions(len(scored))}
        clouds, clicks = [], []
        rows: dict[str, list[Tensor]] = {"cosine with the prompt": [], f"above {threshold:.2f}": [], "truth": []}
        for batch, patches, centres in point_tokens(encoder, self.masked, options=self._options(cache)):
            for position, index in enumerate(batch.index.tolist()):
                if index not in wanted:
                    continue
                points, instances = batch.images[position], batch.instances[position]
                part = instances == instances[instances > 0].mode().values
                click = careful_click(points, part)
                tokens = functional.normalize(patches[position], dim=-1)  # [N D]
                prompt = tokens[cells(points[None], centres[position : position + 1])[0, click]]
                cosine = at_points((tokens @ prompt)[None, :, None], points=points[None], centres=centres[position : position + 1])[0, :, 0]
                clouds.append(points)
                clicks.append(points[click])
                low, high = cosine.min(), cosine.max()
                shown = ((cosine - low) / (high - low).clamp_min(1e-6), (cosine > threshold).float(), part.float())
                for row, colours in zip(rows.values(), shown, strict=True):
                    row.append(colours)
        return clouds_figure(clouds, rows=rows, marks=clicks)


def share_of_cells(inside: Tensor, cell: Tensor, *, count: int) -> Tensor:
    """Share of the points of each cell that are inside.

    Args:
        inside: Bool[P].
        cell: Int[P], from range(count).
        count: N.

    Returns:
        Float[N]; 0 for a cell without points.
    """
    sums = torch.zeros(count).index_add_(0, cell, inside.float())
    return sums / cell.bincount(minlength=count).clamp(min=1)


def careful_click(points: Tensor, part: Tensor) -> int:
    """The point of a part that is farthest from all others of the shape; the one nearest to the mean place where there are none.

    Args:
        points: Float[P 3].
        part: Bool[P], not empty.
    """
    own = part.nonzero()[:, 0]
    if part.all():
        return int((points - points.mean(dim=0)).square().sum(dim=1).argmin())
    return int(own[squared_distances(points[part], points[~part]).amin(dim=1).argmax()])


def point_iou(similarity: Tensor, part: Tensor, *, thresholds: Sequence[float] | Tensor = THRESHOLDS) -> Tensor:
    """IoU of `similarity > threshold` with a part, for every threshold.

    Args:
        similarity: Float[M P].
        part: Bool[P], not empty.
        thresholds: T.

    Returns:
        Float[M T].
    """
    above = similarity.unsqueeze(-1) > torch.as_tensor(thresholds)  # [M P T]
    intersection = (above & part[:, None]).sum(dim=1)
    return intersection / (above & ~part[:, None]).sum(dim=1).add(part.sum())
