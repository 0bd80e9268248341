"""Unsupervised segmentation: k-means on patches, clusters named after classes by the best one-to-one matching.

As PiCIE (Cho et al., CVPR 2021) and STEGO (Hamilton et al., ICLR 2022) score: as many clusters as classes, L2-normalised patches,
clusters matched by the Hungarian algorithm on the confusion of all evaluated pixels. Matching on the images that are scored is the
usual protocol, and all that is learned from their masks. Unlike there, the clusters are found on these images too, for want of
training images. Patch distances are upsampled bilinearly, which gives the nearest centre of bilinearly upsampled features.
Left out on purpose: conditional random fields, and training of any kind.
"""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional

from glpretrain.core import keys
from glpretrain.data.sources.base import Source
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.features import evaluation_shape
from glpretrain.evaluate.metrics.confusion import areas, confusion, segmentation_scores
from glpretrain.evaluate.patches.segmentation import FeatureOptions, best_class, class_patches, class_pixels, predicted_figure
from glpretrain.evaluate.pixels import Pixels

_SUBSET_SEED = 80


class ClusterSegmentation(Evaluator):
    """Segmentation by k-means on patches: `miou` over the classes that occur, `accuracy` of pixels, `iou_<class>`.

    With `num_overclusters` also `miou_over` and `accuracy_over`: that many clusters, each named after the class that most of its
    pixels show. They use the masks more and are not comparable with the others.

    Args:
        masked: images with masks of classes.
        num_overclusters: more clusters than classes, or None.
        num_starts: runs of k-means from different starts (k-means++); the one with the smallest distances is kept.
        max_patches: k-means is fitted on at most as many, a fixed pseudo-random subset; every patch is then assigned.
        image_size: side of the square, or height and width; None for the card's item shape.
        layer: block whose features are taken; negative numbers count from the last.
        batch_size: images at a time.
        bf16: encode under bfloat16 autocast.

    Raises:
        ValueError: the masks hold no classes, or a number is out of range.
    """

    headlines = ("miou", "accuracy")

    def __init__(
        self,
        masked: Source | Pixels,
        *,
        num_overclusters: int | None = None,
        num_starts: int = 3,
        max_patches: int = 50_000,
        image_size: int | Sequence[int] | None = None,
        layer: int = -1,
        batch_size: int = 64,
        bf16: bool = False,
    ) -> None:
        self.masked = class_pixels(masked)
        num_classes = len(self.masked.source.mask_classes)
        if num_overclusters is not None and num_overclusters <= num_classes:
            raise ValueError(f"num_overclusters: {num_overclusters}; accepted: more than {num_classes}, the classes, or None")
        if num_starts < 1 or max_patches < 1:
            raise ValueError(f"num_starts: {num_starts}, max_patches: {max_patches}; accepted: positive numbers")
        self.num_overclusters, self.num_starts, self.max_patches = num_overclusters, num_starts, max_patches
        self.image_size, self.layer, self.batch_size, self.bf16 = image_size, layer, batch_size, bf16

    @property
    def scored(self) -> Pixels:
        return self.masked

    def run(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> Result:
        classes, options = self.masked.source.mask_classes, self._options(cache)
        counts = self._count(encoder, self._centres(encoder, len(classes), options), options)  # [B C C]
        scores = segmentation_scores(areas(counts[:, :, matched(counts.sum(dim=0))]), classes=classes)
        if self.num_overclusters is not None:
            counts = self._count(encoder, self._centres(encoder, self.num_overclusters, options), options)  # [B C P]
            votes = functional.one_hot(counts.sum(dim=0).argmax(dim=0), len(classes))  # [P C]
            over = segmentation_scores(areas(counts @ votes), classes=classes)
            scores |= {f"{name}_over": over[name] for name in ("miou", "accuracy")}
        return Result(scores, chosen={})

    def pictures(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> dict[str, Figure]:
        """`classes`: a few images, their masks and the matched clusters."""
        options = self._options(cache)
        centres = self._centres(encoder, len(self.masked.source.mask_classes), options)
        centres = centres[matched(self._count(encoder, centres, options).sum(dim=0))]
        grid = encoder.grid(evaluation_shape(encoder, self.image_size))

        def predict(patches: Tensor, size: tuple[int, int]) -> Tensor:
            return _nearest(patches, centres, grid=grid, size=size)

        return {"classes": predicted_figure(encoder, self.masked, predict, options=options)}

    def _options(self, cache: FeatureCache | None) -> FeatureOptions:
        return FeatureOptions(self.image_size, self.layer, self.batch_size, self.bf16, cache)

    def _centres(self, encoder: Encoder, num_clusters: int, options: FeatureOptions) -> Tensor:
        """Float[P D]: the centres of k-means."""
        height, width = encoder.grid(evaluation_shape(encoder, self.image_size))
        total = len(self.masked) * height * width
        share = min(1.0, self.max_patches / total)
        sample: list[Tensor] = []
        for batch, patches in class_patches(encoder, self.masked, options=options):
            if share < 1:
                drawn = keys.permutation(keys.item_keys(seed=_SUBSET_SEED, epoch=0, index=batch.index), height * width)  # [B N]
                drawn = drawn[:, : max(1, int(share * height * width))]
                patches = patches.gather(1, drawn[..., None].expand(-1, -1, patches.shape[2]))
            sample.append(functional.normalize(patches, dim=-1).flatten(0, 1))
        points = torch.cat(sample)
        if len(points) < num_clusters:
            raise ValueError(
                f"masked: {len(points)} patches are fewer than {num_clusters} clusters; give more images or a larger image_size"
            )
        return torch.from_numpy(KMeans(num_clusters, n_init=self.num_starts, random_state=0).fit(points.numpy()).cluster_centers_)

    def _count(self, encoder: Encoder, centres: Tensor, options: FeatureOptions) -> Tensor:
        """Int[B C P]: pixels of each class in each cluster, image by image."""
        num_classes = len(self.masked.source.mask_classes)
        grid = encoder.grid(evaluation_shape(encoder, self.image_size))
        counts: list[Tensor] = []
        for batch, patches in class_patches(encoder, self.masked, options=options):
            predicted = _nearest(patches, centres, grid=grid, size=batch.semantic.shape[1:])
            counts.append(confusion(batch.semantic, predicted, num_classes=num_classes, num_predicted=len(centres)))
        return torch.cat(counts)


def matched(counts: Tensor) -> Tensor:
    """The cluster of each class under the one-to-one matching with the most pixels on its diagonal, Int[C C] to Int[C]."""
    return torch.from_numpy(linear_sum_assignment(counts.numpy(), maximize=True)[1])


def _nearest(patches: Tensor, centres: Tensor, *, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Int[B H W]: the nearest of Float[P D] to Float[B N D], upsampled."""
    # The squared distance without the length of the patch, which is the same for every centre.
    scores = 2 * functional.normalize(patches, dim=-1) @ centres.T - (centres**2).sum(dim=-1)  # [B N P]
    return best_class(scores, grid=grid, size=size)
