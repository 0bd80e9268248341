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
from typing import NamedTuple

import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from glpretrain import keys
from glpretrain.data.base import Source
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, mean_interval
from glpretrain.evaluate.features import Pixels, encode, evaluation_shape
from glpretrain.evaluate.similarity import PairSample, pair_sample, pair_scores

# Thresholds are n / 100, so that 0 and 0.5 are exactly those numbers. Steps of 0.05 would be too coarse for an encoder whose
# similarities all lie between 0.8 and 1, as those of many trained ones do.
_FIRST, _LAST, _PER_UNIT = -20, 99, 100
THRESHOLDS = torch.arange(_FIRST, _LAST + 1) / _PER_UNIT  # Float[T]  -0.2, -0.19, ..., 0.99
_FIXED = 50 - _FIRST  # index of 0.5, the threshold common to all encoders
_SPLIT_SEED = 40


class ObjectScore(NamedTuple):
    """IoU of one object at every threshold."""

    image: int  # dataset index
    any_patch: Tensor  # Float[T]  mean over prompts
    centre: Tensor  # Float[T]


class PromptSegmentation(Evaluator):
    """How well the similarity to one patch of an object segments it, and how similarities within and across objects overlap.

    Scores in percent, means over the objects of the images that did not calibrate: `miou` (calibrated threshold, every inside
    patch), `miou_centre` (calibrated for it, careful click), `miou_fixed` and `miou_oracle` (every inside patch). Over all images:
    `intra` and `inter` (mean cosines), `ovl` (overlap of their histograms), `auc` (P(intra > inter)). Also `threshold`, the
    calibrated one, and `objects`, how many were scored.

    Args:
        source: images with instance masks.
        image_size: side of the square; None for the card's item shape.
        max_images: more than this many are cut to a fixed subset; None for all.
        min_patches: objects with fewer patches inside are left out.
        max_prompts: objects with more patches inside are prompted with this many, evenly spaced.
        calibration_share: share of the images that choose the threshold.
        batch_size: images at a time.
        bf16: encode under bfloat16 autocast.
    """

    def __init__(
        self,
        source: Source | Pixels,
        *,
        image_size: int | None = None,
        max_images: int | None = None,
        min_patches: int = 4,
        max_prompts: int = 64,
        calibration_share: float = 0.25,
        batch_size: int = 64,
        bf16: bool = False,
    ) -> None:
        if isinstance(source, Pixels) and max_images is not None:
            raise ValueError(f"max_images: {max_images}; accepted: None where the source is decoded already")
        self.pixels = source if isinstance(source, Pixels) else Pixels(source, max_items=max_images)
        if not self.pixels.source.has_masks:
            raise ValueError(f"source {self.pixels.source.name!r} has no masks; prompt segmentation needs them")
        if not 0 < calibration_share < 1:
            raise ValueError(f"calibration_share: {calibration_share}; accepted: between 0 and 1")
        if min_patches < 1 or max_prompts < 1:
            raise ValueError(f"min_patches: {min_patches}, max_prompts: {max_prompts}; accepted: positive numbers")
        self.min_patches, self.max_prompts, self.calibration_share = min_patches, max_prompts, calibration_share
        self.image_size, self.batch_size, self.bf16 = image_size, batch_size, bf16

    @property
    def name(self) -> str:
        return "prompt"

    def run(self, encoder: Encoder) -> dict[str, float]:
        height, width = encoder.grid(evaluation_shape(encoder, self.image_size))
        objects: list[ObjectScore] = []
        pairs: list[PairSample] = []
        batches = encode(encoder, self.pixels, fit="stretch", image_size=self.image_size, batch_size=self.batch_size, bf16=self.bf16)
        for batch, output in batches:
            if batch.instances is None:
                raise ValueError(f"source {self.pixels.source.name!r}: an item among {batch.index.tolist()} has no mask")
            patches = functional.normalize(output.patches, dim=-1).cpu()  # [B N D]
            if patches.shape[1] != height * width:
                raise ValueError(f"encoder {encoder.card.encoder!r}: {patches.shape[1]} patches; its grid has {height} x {width}")
            if not patches.isfinite().all():
                raise ValueError(f"source {self.pixels.source.name!r}: the encoder's patch features are not finite")
            for tokens, instances, index in zip(patches, batch.instances, batch.index.tolist(), strict=True):
                found, sample = self._score_image(tokens, instances, index, (height, width))
                objects += found
                pairs += sample
        return {**self._summary(objects), **pair_scores(pairs)}

    def _score_image(
        self, patches: Tensor, instances: Tensor, index: int, grid: tuple[int, int]
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
            objects.append(ObjectScore(index, iou[:-1].mean(dim=0), iou[-1]))
        if not insides:
            return [], []
        usable = (occupancy(known, grid) > 0.5).flatten()  # [N]
        return objects, pair_sample(similarity, torch.stack(insides), usable=usable, index=index)

    def _summary(self, objects: list[ObjectScore]) -> dict[str, float]:
        order = keys.permutation(torch.tensor(_SPLIT_SEED), len(self.pixels)).tolist()
        num_calibration = math.ceil(self.calibration_share * len(order))
        calibration = {self.pixels.indices[position] for position in order[:num_calibration]}
        chosen = [score for score in objects if score.image in calibration]
        scored = [score for score in objects if score.image not in calibration]
        if not chosen or not scored:
            raise ValueError(
                f"source {self.pixels.source.name!r}: {len(chosen)} objects to calibrate on and {len(scored)} to score, of at least "
                f"{self.min_patches} patches each; both must be at least 1: give more images, a larger image_size or a smaller min_patches"
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
        scores: dict[str, float] = {}
        for name, values in per_object.items():
            scores[name] = 100 * values.mean().item()
            scores[f"{name}_ci"] = 100 * mean_interval(values)
        return {**scores, "threshold": THRESHOLDS[best].item(), "objects": float(len(scored))}


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
    maps = functional.interpolate(similarity[:, None], size=mask.shape, mode="bilinear", align_corners=False)[:, 0]  # [M H W]
    # Bin n holds the similarities that exceed the first n thresholds: ceil(20 s) counts the n / 20 below s.
    num_bins = len(THRESHOLDS) + 1
    bins = maps.mul_(_PER_UNIT).ceil_().clamp_(_FIRST, _LAST + 1).sub_(_FIRST)  # [M H W]
    bins += (torch.where(mask, 1, 0) + torch.where(known, 0, 2)) * num_bins  # three histograms: outside, inside, ignored
    bins += (torch.arange(num_maps) * (3 * num_bins))[:, None, None]
    counts = bins.long().flatten().bincount(minlength=num_maps * 3 * num_bins).unflatten(0, (num_maps, 3, num_bins))
    above = counts[:, :2, 1:].flip(-1).cumsum(-1).flip(-1)  # [M 2 T]
    false_positive, intersection = above.unbind(dim=1)
    return intersection / (mask.sum() + false_positive)
