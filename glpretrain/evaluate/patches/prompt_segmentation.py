"""Zero-shot prompt segmentation: one patch of an object is the prompt, the patches similar to it are the segment.

The idea is that of MMC ("Masked Momentum Contrastive Learning for Zero-shot Semantic Understanding", arXiv 2308.11448); the
details below are not established by its abstract and are ours:

- features are the patches after the final norm, L2-normalised; images and masks are stretched to the evaluation size;
- a patch is inside an object when at least half of its pixels are; objects with fewer than `min_patches` inside are left out;
- prompt: every inside patch in turn, scores averaged ("a random click"), or the patch under the maximum of the mask's distance
  transform, the picture's border counting as an edge ("a careful click");
- the cosine map is upsampled bilinearly to pixels, the segment is where it exceeds the threshold, the score is its IoU;
- threshold: one for every encoder (fixed), one per encoder chosen on held-out images (calibrated; the fair column, since a fixed
  one mostly measures how anisotropic the features are), or the best per object (oracle, an upper bound);
- intra: cosines of two patches inside one object; inter: of one inside and one not inside it, in the same image.

Left out on purpose: prompts of several patches, and any training.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from glpretrain.core import keys
from glpretrain.data.sources.base import Source
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, Score
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.features import encode, evaluation_shape
from glpretrain.evaluate.figures import prompts_figure, shown_positions
from glpretrain.evaluate.metrics.intervals import mean_interval
from glpretrain.evaluate.patches.segmentation import FeatureOptions
from glpretrain.evaluate.patches.similarity import PairSample, pair_sample, pair_scores, similarity_figure
from glpretrain.evaluate.pixels import Pixels

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


class PromptSegmentation(Evaluator):
    """How well the similarity to one patch of an object segments it, and how similarities within and across objects overlap.

    Scores in percent, means over the objects of the images that did not calibrate: `miou` (calibrated threshold, every inside
    patch), `miou_centre` (calibrated for it, careful click), `miou_fixed` and `miou_oracle` (every inside patch); where the source
    names what its masks show, also `miou_classes`, the mean over classes, and `iou_<class>`, all as `miou`. Over all images:
    `intra` and `inter` (mean cosines), `ovl` (overlap of their histograms), `auc` (P(intra > inter)). Chosen: `threshold` and
    `threshold_centre`, the calibrated ones.

    Args:
        masked: images with instance masks.
        image_size: side of the square, or height and width; None for the card's item shape.
        layer: block whose features are taken; negative numbers count from the last.
        min_patches: objects with fewer patches inside are left out.
        max_prompts: objects with more patches inside are prompted with this many, evenly spaced.
        calibration_share: share of the images that choose the threshold.
        batch_size: images at a time.
        bf16: encode under bfloat16 autocast.
    """

    headlines = ("miou", "auc")

    def __init__(
        self,
        masked: Source | Pixels,
        *,
        image_size: int | Sequence[int] | None = None,
        layer: int = -1,
        min_patches: int = 4,
        max_prompts: int = 64,
        calibration_share: float = 0.25,
        batch_size: int = 64,
        bf16: bool = False,
    ) -> None:
        self.masked = masked_pixels(masked)
        if not 0 < calibration_share < 1:
            raise ValueError(f"calibration_share: {calibration_share}; accepted: between 0 and 1")
        if min_patches < 1 or max_prompts < 1:
            raise ValueError(f"min_patches: {min_patches}, max_prompts: {max_prompts}; accepted: positive numbers")
        self.min_patches, self.max_prompts, self.calibration_share = min_patches, max_prompts, calibration_share
        self.image_size, self.layer, self.batch_size, self.bf16 = image_size, layer, batch_size, bf16

    @property
    def scored(self) -> Pixels:
        return self.masked

    def run(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> Result:
        objects, pairs = self._measure(encoder, cache)
        result = self._summary(objects)
        return Result({**result.scores, **pair_scores(pairs)}, result.chosen)

    def pictures(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> dict[str, Figure]:
        """`similarity`: distributions of cosines within and across objects; `prompts`: careful clicks at the calibrated threshold."""
        objects, pairs = self._measure(encoder, cache)
        threshold = self._summary(objects).chosen["threshold_centre"]
        return {"similarity": similarity_figure(pairs), "prompts": self._prompts_figure(encoder, cache, objects, threshold=threshold)}

    def _prompts_figure(self, encoder: Encoder, cache: FeatureCache | None, objects: list[ObjectScore], *, threshold: float) -> Figure:
        """The largest object of a few of the images that were scored."""
        grid = encoder.grid(evaluation_shape(encoder, self.image_size))
        scored = sorted({score.image for score in objects} - calibration_images(self.masked, share=self.calibration_share))
        wanted = {scored[position] for position in shown_positions(len(scored))}
        images, prompts, maps, truths = [], [], [], []
        for batch, output in encode(encoder, self.masked, fit="stretch", **self._options(cache)._asdict()):
            for position, index in enumerate(batch.index.tolist()):
                if index not in wanted:
                    continue
                instances = batch.instances[position]
                truth = instances == instances[instances > 0].mode().values
                prompt = centre_patch(truth, grid)
                patches = functional.normalize(output.patches[position], dim=-1)  # [N D]
                images.append(batch.images[position])
                row, column = divmod(prompt, grid[1])
                prompts.append(((row + 0.5) * truth.shape[0] / grid[0], (column + 0.5) * truth.shape[1] / grid[1]))
                maps.append(upsampled((patches @ patches[prompt])[None].unflatten(1, grid), truth.shape)[0])
                truths.append(truth)
        return prompts_figure(images, prompts=prompts, similarity=maps, threshold=threshold, truths=truths)

    def _measure(self, encoder: Encoder, cache: FeatureCache | None) -> tuple[list[ObjectScore], list[PairSample]]:
        height, width = encoder.grid(evaluation_shape(encoder, self.image_size))
        objects: list[ObjectScore] = []
        pairs: list[PairSample] = []
        for batch, output in encode(encoder, self.masked, fit="stretch", **self._options(cache)._asdict()):
            if batch.instances is None:
                raise ValueError(f"source {self.masked.source.name!r}: an item among {batch.index.tolist()} has no mask")
            patches = functional.normalize(output.patches, dim=-1)  # [B N D]
            if patches.shape[1] != height * width:
                raise ValueError(f"encoder {encoder.card.encoder!r}: {patches.shape[1]} patches; its grid has {height} x {width}")
            if not patches.isfinite().all():
                raise ValueError(f"source {self.masked.source.name!r}: the encoder's patch features are not finite")
            semantic = [None] * len(patches) if batch.semantic is None else batch.semantic
            for tokens, instances, classes, index in zip(patches, batch.instances, semantic, batch.index.tolist(), strict=True):
                found, sample = self._score_image(tokens, instances, classes, index, (height, width))
                objects += found
                pairs += sample
        return objects, pairs

    def _score_image(
        self, patches: Tensor, instances: Tensor, classes: Tensor | None, index: int, grid: tuple[int, int]
    ) -> tuple[list[ObjectScore], list[PairSample]]:
        """Every object of one image that is large enough, and a sample of its pairs of patches if there is any."""
        similarity = patches @ patches.T  # [N N]
        known = instances >= 0  # [H W]
        objects: list[ObjectScore] = []
        insides: list[Tensor] = []
        for identity in instances[instances > 0].unique().tolist():
            mask = instances == identity  # [H W]
            inside = (occupancy(mask, grid) >= 0.5).flatten()  # [N]
            prompts = inside.nonzero()[:, 0]  # [M]
            if len(prompts) < self.min_patches:
                continue
            insides.append(inside)
            if len(prompts) > self.max_prompts:
                prompts = prompts[torch.arange(self.max_prompts) * len(prompts) // self.max_prompts]
            queries = torch.cat([prompts, torch.tensor([centre_patch(mask, grid)])])  # [M+1]
            iou = iou_at_thresholds(similarity[queries].unflatten(1, grid), mask, known=known)  # [M+1 T]
            label = -1 if classes is None else int(classes[mask].mode().values)
            objects.append(ObjectScore(index, label, iou[:-1].mean(dim=0), iou[-1]))
        if not insides:
            return [], []
        usable = (occupancy(known, grid) > 0.5).flatten()  # [N]
        return objects, pair_sample(similarity, torch.stack(insides), usable=usable, index=index)

    def _options(self, cache: FeatureCache | None) -> FeatureOptions:
        return FeatureOptions(self.image_size, self.layer, self.batch_size, self.bf16, cache)

    def _summary(self, objects: list[ObjectScore]) -> Result:
        return prompt_result(objects, masked=self.masked, calibration_share=self.calibration_share, min_patches=self.min_patches)


def prompt_result(objects: list[ObjectScore], *, masked: Pixels, calibration_share: float, min_patches: int) -> Result:
    """Thresholds of the objects that calibrate, and with these the scores of the others.

    Args:
        objects: of all items.
        masked: the items.
        calibration_share: of the items.
        min_patches: that an object has, for the message.

    Raises:
        ValueError: there is no object to calibrate on, or none to score.
    """
    calibration = calibration_images(masked, share=calibration_share)
    chosen = [score for score in objects if score.image in calibration]
    scored = [score for score in objects if score.image not in calibration]
    if not chosen or not scored:
        raise ValueError(
            f"source {masked.source.name!r}: {len(chosen)} objects to calibrate on and {len(scored)} to score, of at least "
            f"{min_patches} patches each; both must be at least 1: give more images, a larger image_size or a smaller min_patches"
        )
    any_patch = torch.stack([score.any_patch for score in scored])  # [O T]
    centre = torch.stack([score.centre for score in scored])  # [O T]
    best = int(torch.stack([score.any_patch for score in chosen]).mean(dim=0).argmax())
    best_centre = int(torch.stack([score.centre for score in chosen]).mean(dim=0).argmax())
    per_object = {
        "miou": any_patch[:, best],
        "miou_centre": centre[:, best_centre],
        "miou_fixed": any_patch[:, _FIXED],
        "miou_oracle": any_patch.amax(dim=1),
    }
    scores = {name: mean_score(values) for name, values in per_object.items()}
    labels = torch.tensor([score.label for score in scored])
    of_class = {name: any_patch[labels == number, best] for number, name in enumerate(masked.source.mask_classes)}
    by_class = {f"iou_{name}": mean_score(values) for name, values in of_class.items() if len(values)}
    if by_class:
        # Classes are few and fixed: the interval is that of the mean of their independent means.
        spread = sum(score.ci**2 for score in by_class.values()) ** 0.5 / len(by_class)
        mean = sum(score.value for score in by_class.values()) / len(by_class)
        scores |= {"miou_classes": Score(mean, spread, len(scored)), **by_class}
    return Result(scores, {"threshold": THRESHOLDS[best].item(), "threshold_centre": THRESHOLDS[best_centre].item()})


def masked_pixels(masked: Source | Pixels) -> Pixels:
    """As `Pixels`.

    Raises:
        ValueError: the source has no masks.
    """
    pixels = Pixels.of(masked)
    if not pixels.source.has_masks:
        raise ValueError(f"source {pixels.source.name!r} has no masks; this evaluator needs them")
    return pixels


def calibration_images(pixels: Pixels, *, share: float) -> set[int]:
    """Dataset indices of the images that choose a threshold: a fixed pseudo-random share, and never those that are scored."""
    order = keys.permutation(torch.tensor(_SPLIT_SEED), len(pixels)).tolist()
    return {pixels.indices[position] for position in order[: math.ceil(share * len(order))]}


def mean_score(values: Tensor) -> Score:
    """Mean of shares in [0, 1], Float[B], in percent."""
    return Score(100 * values.mean().item(), 100 * mean_interval(values), len(values))


def occupancy(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of each patch that the mask covers.

    Args:
        mask: Bool[H W].
        grid: patches along height and width.

    Returns:
        Float[*grid].
    """
    return functional.adaptive_avg_pool2d(mask.float()[None], grid)[0]


def centre_patch(mask: Tensor, grid: tuple[int, int]) -> int:
    """The patch under the pixel of Bool[H W] that is farthest from what is not in the mask, the picture's border included."""
    distance = ndimage.distance_transform_edt(functional.pad(mask, (1, 1, 1, 1)).numpy())[1:-1, 1:-1]
    row, column = divmod(int(distance.argmax()), mask.shape[1])
    return (row * grid[0] // mask.shape[0]) * grid[1] + column * grid[1] // mask.shape[1]


def upsampled(similarity: Tensor, size: Sequence[int]) -> Tensor:
    """Float[M *grid] to Float[M *size], bilinearly between the patches' centres."""
    return functional.interpolate(similarity[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def iou_at_thresholds(similarity: Tensor, mask: Tensor, *, known: Tensor) -> Tensor:
    """IoU of `upsampled similarity > threshold` with the mask, for all of `THRESHOLDS` at once.

    One histogram of the similarity inside the mask and one outside hold every threshold's counts: exact, in one pass over the pixels.

    Args:
        similarity: Float[M *grid], a map per prompt.
        mask: Bool[H W], not empty.
        known: Bool[H W], pixels that count.

    Returns:
        Float[M T].
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
