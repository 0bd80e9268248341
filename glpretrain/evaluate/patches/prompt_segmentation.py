"""Zero-shot prompt segmentation: one patch of an object is the prompt, the patches similar to it are the segment.

The idea is that of MMC ("Masked Momentum Contrastive Learning for Zero-shot Semantic Understanding", arXiv 2308.11448); the
details below are not established by its abstract and are ours:

- features: patches after the final norm (or `features.tokens`), L2-normalised; images and masks are stretched to the evaluation size;
- a patch is inside an object when at least half of its pixels are; objects with fewer than `min_patches` inside are left out;
- prompt: every inside patch in turn, scores averaged ("a random click"), or the patch under the maximum of the mask's distance
  transform, the picture's border counting as an edge ("a careful click");
- the cosine map is upsampled bilinearly to pixels, the segment is where it exceeds the threshold, the score is its IoU;
- threshold: one for every encoder (fixed), one per encoder chosen on held-out images (calibrated; the fair column, since a fixed
  one mostly measures how anisotropic the features are), or the best per object (oracle, an upper bound);
- intra: cosines of two patches inside one object; inter: of one inside and one not inside it, in the same image;
- centred: the same once more after the mean patch of the images that calibrate, whose masks play no part in it, was taken away from
  every patch. A direction that all patches share fills a cosine without telling patches apart, so no threshold fits all images.

Prompts of several patches and any training are left out on purpose. `points.prompts` carries this over to clouds of points.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from glpretrain.core import keys
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, require_positive, require_share
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.figures import prompts_figure, shown_positions
from glpretrain.evaluate.items import DecodedItems, Sources
from glpretrain.evaluate.metrics.intervals import mean_of_scores, mean_score
from glpretrain.evaluate.patches.segmentation import image_patches
from glpretrain.evaluate.patches.similarity import PairSample, max_pairs, pair_sample, pair_scores, similarity_figure
from glpretrain.evaluate.reading import ItemBatch

# Thresholds are n / 100, so that 0 and 0.5 are exactly those numbers. Steps of 0.05 would be too coarse for an encoder whose
# similarities all lie between 0.8 and 1, as those of many trained ones do.
_FIRST, _LAST, _PER_UNIT = -20, 99, 100
THRESHOLDS = torch.arange(_FIRST, _LAST + 1) / _PER_UNIT  # Float[T]  -0.2, -0.19, ..., 0.99
_FIXED = 50 - _FIRST  # index of 0.5, the threshold common to all encoders
_SPLIT_SEED = 40


class ObjectScore(NamedTuple):
    """IoU of one object at every threshold."""

    image: int  # dataset index
    label: int  # index into the source's `mask_classes`, -1 where it has none
    any_patch: Tensor  # Float[T]  mean over prompts
    centre: Tensor  # Float[T]


class Places(Protocol):
    """Where the tokens of one item are among its inputs (pixels or points); masks are Bool[*inputs]."""

    def shares(self, mask: Tensor) -> Tensor:
        """Float[N]: the share of each token's inputs that the mask covers."""
        ...

    def click(self, mask: Tensor) -> int:
        """The token of the careful click on a mask, which is not empty."""
        ...

    def iou(self, similarity: Tensor, queries: Tensor, mask: Tensor, *, known: Tensor) -> Tensor:
        """Float[M T]: IoU of the segment of each prompt with a mask, for all of `THRESHOLDS`.

        Args:
            similarity: Float[N N], cosines of all tokens.
            queries: Int[M], the prompts.
            mask: the mask, not empty.
            known: inputs that count.
        """
        ...


class Measured(NamedTuple):
    """What the items show, with the tokens as they are or centred."""

    objects: list[ObjectScore]  # of every object that is large enough
    pairs: list[PairSample]  # of every item with such an object


class Prompted(NamedTuple):
    """One item of a picture."""

    item: Tensor  # as the source gives it, at the evaluation size
    truth: Tensor  # Bool[*inputs]  its largest object
    tokens: Tensor  # Float[N D]  of length one
    places: Places


@dataclass(frozen=True, kw_only=True)
class Prompts(Evaluator):
    """What prompt segmentation of images and of clouds shares; not used by itself.

    Args:
        min_patches: objects with fewer patches inside are left out.
        max_prompts: objects with more patches inside are prompted with this many, evenly spaced.
        calibration_share: share of the items that choose the threshold.
    """

    headlines = ("miou", "auc")
    scored = "masked"
    needs = ("masked",)
    truth = "masks"
    unused = ("crop",)

    min_patches: int = 4
    max_prompts: int = 64
    calibration_share: float = 0.25

    def validate(self) -> None:
        require_share("calibration_share", self.calibration_share)
        require_positive("min_patches", self.min_patches)
        require_positive("max_prompts", self.max_prompts)

    @abstractmethod
    def placed(
        self, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None
    ) -> Iterator[tuple[ItemBatch, Tensor, Sequence[Places]]]:
        """Batches with tokens of length one, Float[B N D], and where they are in each item."""

    @abstractmethod
    def figure(self, shown: Sequence[Prompted], *, threshold: float) -> Figure:
        """Careful clicks, the similarity to them and the segments."""

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        items = sources["masked"]
        (objects, pairs), centred = self.measure(encoder, items, cache, centres=(None, self.mean_token(encoder, items, cache)))
        scores, chosen, left_out = self._summary(objects, items)
        if pairs:
            scores |= pair_scores(pairs)
        else:
            reason = "no image has both an object and patches outside it; intra- and inter-object similarity need them"
            left_out = {**left_out, **dict.fromkeys(("intra", "inter", "ovl", "auc"), reason)}
        found = self._summary(centred.objects, items)
        more = {**found.scores, **(pair_scores(centred.pairs) if centred.pairs else {})}
        scores |= {f"{name}_centred": more[name] for name in ("miou", "ovl", "auc") if name in more}
        chosen = {**chosen, **({"threshold_centred": found.chosen["threshold"]} if found.chosen else {})}
        if not scores:
            raise ValueError("; ".join(dict.fromkeys(left_out.values())))
        return Result(scores, chosen, left_out)

    def draw(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> dict[str, Figure]:
        """`similarity`: distributions of cosines within and across objects; `prompts`: careful clicks at the calibrated threshold.

        Prompts are those of the largest object of a few of the items that were scored.
        """
        items = sources["masked"]
        ((objects, pairs),) = self.measure(encoder, items, cache)
        figures = {"similarity": similarity_figure(pairs)} if pairs else {}
        chosen = self._summary(objects, items).chosen
        if not chosen:
            return figures
        scored = sorted({score.image for score in objects} - calibration_images(items, share=self.calibration_share))
        wanted = {scored[position] for position in shown_positions(len(scored))}
        shown: list[Prompted] = []
        for batch, tokens, places in self.placed(encoder, items, cache):
            for position in batch.positions_of(wanted):
                instances = batch.instance_masks()[position]
                truth = instances == instances[instances > 0].mode().values
                shown.append(Prompted(batch.items[position], truth, tokens[position], places[position]))
        return {**figures, "prompts": self.figure(shown, threshold=chosen["threshold_centre"])}

    def mean_token(self, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None) -> Tensor:
        """Float[D]: mean of the tokens of the items that calibrate, each of length one; masks are not looked at."""
        total, count = torch.zeros(()), 0
        for _, tokens, _ in self.placed(encoder, items.some(calibration_images(items, share=self.calibration_share)), cache):
            total, count = total + tokens.sum(dim=(0, 1), dtype=torch.float64), count + tokens.shape[0] * tokens.shape[1]
        return (total / max(count, 1)).float()

    def measure(
        self, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None, *, centres: Sequence[Tensor | None] = (None,)
    ) -> list[Measured]:
        """The scores of objects and a sample of pairs of patches, once for every centre, Float[D], that is taken away from the tokens."""
        measured = [Measured([], []) for _ in centres]
        for batch, tokens, places in self.placed(encoder, items, cache):
            masks = batch.instance_masks()
            for position, index in enumerate(batch.index.tolist()):
                classes = None if batch.semantic is None else batch.semantic[position]
                for (objects, pairs), centre in zip(measured, centres, strict=True):
                    own = tokens[position] if centre is None else functional.normalize(tokens[position] - centre, dim=-1)
                    one = own, masks[position], classes, index, places[position]
                    found, sample = self._score_item(*one, max_pairs=max_pairs(len(items)))
                    objects.extend(found)
                    pairs.extend(sample)
        return measured

    def _score_item(
        self, tokens: Tensor, instances: Tensor, classes: Tensor | None, index: int, places: Places, *, max_pairs: int
    ) -> tuple[list[ObjectScore], list[PairSample]]:
        similarity = tokens @ tokens.T  # [N N]
        known = instances >= 0
        objects: list[ObjectScore] = []
        insides: list[Tensor] = []
        for identity in instances[instances > 0].unique().tolist():
            mask = instances == identity
            inside = places.shares(mask) >= 0.5  # [N]
            prompts = inside.nonzero()[:, 0]  # [M]
            if len(prompts) < self.min_patches:
                continue
            insides.append(inside)
            if len(prompts) > self.max_prompts:
                prompts = prompts[torch.arange(self.max_prompts) * len(prompts) // self.max_prompts]
            queries = torch.cat([prompts, torch.tensor([places.click(mask)])])  # [M+1]
            iou = places.iou(similarity, queries, mask, known=known)  # [M+1 T]
            label = -1 if classes is None else int(classes[mask].mode().values)
            objects.append(ObjectScore(index, label, iou[:-1].mean(dim=0), iou[-1].clone()))
        if not insides:
            return [], []
        usable = places.shares(known) > 0.5  # [N]
        return objects, pair_sample(similarity, torch.stack(insides), usable=usable, index=index, at_most=max_pairs)

    def _summary(self, objects: list[ObjectScore], items: DecodedItems) -> Result:
        """Thresholds of the objects that calibrate, and with these the scores of the others."""
        calibration = calibration_images(items, share=self.calibration_share)
        chosen = [score for score in objects if score.image in calibration]
        scored = [score for score in objects if score.image not in calibration]
        if not chosen or not scored:
            reason = (
                f"source {items.name!r}: {len(chosen)} objects to calibrate on and {len(scored)} to score, of at least "
                f"{self.min_patches} patches each; both must be at least 1: "
                "give more images, a larger features.size or a smaller min_patches"
            )
            return Result({}, {}, dict.fromkeys(("miou", "miou_centre", "miou_fixed", "miou_oracle"), reason))
        any_patch, centre = (torch.stack(values) for values in zip(*((one.any_patch, one.centre) for one in scored), strict=True))  # [O T]
        best = int(torch.stack([score.any_patch for score in chosen]).mean(dim=0).argmax())
        best_centre = int(torch.stack([score.centre for score in chosen]).mean(dim=0).argmax())
        per_object = {
            "miou": any_patch[:, best],
            "miou_centre": centre[:, best_centre],
            "miou_fixed": any_patch[:, _FIXED],
            "miou_oracle": any_patch.amax(dim=1),
        }
        images = torch.tensor([score.image for score in scored])  # objects of one image resemble each other
        scores = {name: mean_score(values, images) for name, values in per_object.items()}
        labels = torch.tensor([score.label for score in scored])
        of_class = {name: labels == number for number, name in enumerate(items.source.mask_classes)}
        by_class = {f"iou_{name}": mean_score(any_patch[its, best], images[its]) for name, its in of_class.items() if its.any()}
        if by_class:
            # Classes are few and fixed: the interval is that of the mean of their means.
            scores |= {"miou_classes": mean_of_scores(list(by_class.values()), count=len(scored)), **by_class}
        return Result(scores, {"threshold": THRESHOLDS[best].item(), "threshold_centre": THRESHOLDS[best_centre].item()})


class GridPlaces(NamedTuple):
    """Patches of an image."""

    grid: tuple[int, int]

    def shares(self, mask: Tensor) -> Tensor:
        """See `Places`; the mask is Bool[H W]."""
        return occupancy(mask, self.grid).flatten()

    def click(self, mask: Tensor) -> int:
        """The patch under the pixel that is farthest from what is not in the mask."""
        return centre_patch(mask, self.grid)

    def iou(self, similarity: Tensor, queries: Tensor, mask: Tensor, *, known: Tensor) -> Tensor:
        """See `Places`."""
        return iou_at_thresholds(similarity[queries].unflatten(1, self.grid), mask, known=known)


@dataclass(frozen=True, kw_only=True)
class PromptSegmentation(Prompts):
    """How well the similarity to one patch of an object of `masked` segments it, and how similarities within and across objects overlap.

    Scores in percent, means over the objects of the images that did not calibrate: `miou` (calibrated threshold, every inside
    patch), `miou_centre` (calibrated for it, careful click), `miou_fixed` and `miou_oracle` (every inside patch); where the source
    names what its masks show, also `miou_classes`, the mean over classes, and `iou_<class>`, all as `miou`. Over all images:
    `intra` and `inter` (mean cosines), `ovl` (overlap of their histograms), `auc` (P(intra > inter)). `miou_centred`, `ovl_centred` and
    `auc_centred` are those of centred patches. Chosen: `threshold`, `threshold_centre` and `threshold_centred`, the calibrated ones.
    Settings are those of `Prompts`.
    """

    num_axes = 2  # images, and sounds as cells of time and frequency

    def placed(
        self, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None
    ) -> Iterator[tuple[ItemBatch, Tensor, Sequence[Places]]]:
        """See `Prompts`."""
        places = GridPlaces(self.features.image_grid(encoder))
        for batch, patches in image_patches(encoder, items, features=self.features, cache=cache):
            yield batch, functional.normalize(patches, dim=-1), [places] * len(patches)

    def figure(self, shown: Sequence[Prompted], *, threshold: float) -> Figure:
        """See `Prompts`."""
        prompts, maps = [], []
        for _, truth, tokens, places in shown:
            assert isinstance(places, GridPlaces)
            prompt, (rows, columns) = places.click(truth), places.grid
            row, column = divmod(prompt, columns)
            prompts.append(((row + 0.5) * truth.shape[0] / rows, (column + 0.5) * truth.shape[1] / columns))
            maps.append(upsampled((tokens @ tokens[prompt])[None].unflatten(1, places.grid), truth.shape)[0])
        images, truths = [one.item for one in shown], [one.truth for one in shown]
        return prompts_figure(images, prompts=prompts, similarity=maps, threshold=threshold, truths=truths)


def calibration_images(items: DecodedItems, *, share: float) -> set[int]:
    """Dataset indices of the images that choose a threshold: a fixed pseudo-random share, and never those that are scored."""
    order = keys.permutation(torch.tensor(_SPLIT_SEED), len(items)).tolist()
    return {items.indices[position] for position in order[: math.ceil(share * len(order))]}


def occupancy(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Float[*grid]: the share of each patch that the mask, Bool[H W], covers."""
    return functional.adaptive_avg_pool2d(mask.float()[None], grid)[0]


def centre_patch(mask: Tensor, grid: tuple[int, int]) -> int:
    """The patch under the pixel of Bool[H W] that is farthest from what is not in the mask, the picture's border included."""
    distance = np.asarray(ndimage.distance_transform_edt(functional.pad(mask, (1, 1, 1, 1)).numpy()))[1:-1, 1:-1]
    row, column = divmod(int(distance.argmax()), mask.shape[1])
    return (row * grid[0] // mask.shape[0]) * grid[1] + column * grid[1] // mask.shape[1]


def upsampled(similarity: Tensor, size: Sequence[int]) -> Tensor:
    """Float[M *grid] to Float[M *size], bilinearly between the patches' centres."""
    return functional.interpolate(similarity[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def iou_at_thresholds(similarity: Tensor, mask: Tensor, *, known: Tensor) -> Tensor:
    """Float[M T]: IoU of `upsampled similarity > threshold` with the mask, for all of `THRESHOLDS` at once.

    One histogram of the similarity inside the mask and one outside hold every threshold's counts: exact, in one pass over the pixels.

    Args:
        similarity: Float[M *grid], a map of cosines per prompt.
        mask: Bool[H W], the object, not empty.
        known: Bool[H W], pixels that count.
    """
    num_maps = len(similarity)
    maps = upsampled(similarity, mask.shape)  # [M H W]
    # Bin n holds the similarities that exceed the first n thresholds: ceil(20 s) counts the n / 20 below s.
    num_bins = len(THRESHOLDS) + 1
    bins = maps.mul_(_PER_UNIT).ceil_().clamp_(_FIRST, _LAST + 1).sub_(_FIRST)  # [M H W]
    bins += (torch.where(mask, 1, 0) + torch.where(known, 0, 2)) * num_bins  # three histograms: outside, inside, ignored
    bins += (torch.arange(num_maps) * (3 * num_bins))[:, None, None]
    counts = bins.long().flatten().bincount(minlength=num_maps * 3 * num_bins).unflatten(0, (num_maps, 3, num_bins))
    above = counts[:, :2, 1:].flip(-1).cumsum(-1).flip(-1)  # [M 2 T]
    false_positive, intersection = above.unbind(dim=1)
    return intersection / (mask.sum() + false_positive)
