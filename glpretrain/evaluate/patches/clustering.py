"""Unsupervised segmentation: k-means on patches, clusters named after classes by the best one-to-one matching.

As PiCIE (Cho et al., CVPR 2021) and STEGO (Hamilton et al., ICLR 2022) score: as many clusters as classes, L2-normalised patches,
clusters matched by the Hungarian algorithm on the confusion of all evaluated pixels. Matching on the images that are scored is the
usual protocol, and all that is learned from their masks. Unlike there, the clusters are found on these images too, for want of
training images. Patch distances are upsampled bilinearly, which gives the nearest centre of bilinearly upsampled features.
Conditional random fields and training of any kind are left out on purpose.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional

from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, require_positive
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.items import DecodedItems, Sources
from glpretrain.evaluate.metrics.confusion import areas, confusion, segmentation_scores
from glpretrain.evaluate.patches.segmentation import TokenSample, best_class, image_patches, predicted_figure, taken
from glpretrain.evaluate.rows import Rows

_SUBSET_SEED = 80


@dataclass(frozen=True, kw_only=True)
class ClusterSegmentation(Evaluator):
    """Segmentation of `masked` by k-means on patches: `miou` over the classes that occur, `accuracy` of pixels, `iou_<class>`.

    With `num_overclusters` also `miou_over` and `accuracy_over`: that many clusters, each named after the class that most of its
    pixels show. They use the masks more and are not comparable with the others.

    Args:
        num_overclusters: a number of clusters that is larger than that of the classes, or None.
        num_starts: runs of k-means from different starts (k-means++); the one with the smallest distances is kept.
        max_patches: k-means is fitted on at most so many patches, a fixed pseudo-random subset; every patch is then assigned.
    """

    headlines = ("miou", "accuracy")
    scored = "masked"
    needs = ("masked",)
    truth = "mask_classes"
    unused = ("crop",)
    modality = "image"

    num_overclusters: int | None = None
    num_starts: int = 3
    max_patches: int = 50_000

    def validate(self) -> None:
        require_positive("num_starts", self.num_starts)
        require_positive("max_patches", self.max_patches)

    def check_items(self, sources: Sources) -> None:
        num_classes = len(sources["masked"].source.mask_classes)
        if self.num_overclusters is not None and self.num_overclusters <= num_classes:
            raise ValueError(f"num_overclusters: {self.num_overclusters}; accepted: more than {num_classes}, the classes, or None")

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        items = sources["masked"]
        classes = items.source.mask_classes
        counts = self._count(encoder, items, self._centres(encoder, items, len(classes), cache), cache)
        order = matched(counts.total())
        scores = segmentation_scores(counts.areas(lambda part: part[:, :, order]), classes=classes)
        if self.num_overclusters is not None:
            counts = self._count(encoder, items, self._centres(encoder, items, self.num_overclusters, cache), cache)
            votes = functional.one_hot(counts.total().argmax(dim=0), len(classes))  # [P C]
            over = segmentation_scores(counts.areas(lambda part: part @ votes), classes=classes)
            scores |= {f"{name}_over": over[name] for name in ("miou", "accuracy")}
        return Result(scores, chosen={})

    def draw(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> dict[str, Figure]:
        """`classes`: a few images, their masks and the matched clusters."""
        items = sources["masked"]
        centres = self._centres(encoder, items, len(items.source.mask_classes), cache)
        centres = centres[matched(self._count(encoder, items, centres, cache).total())]
        grid = self.features.image_grid(encoder)

        def predict(patches: Tensor, size: Sequence[int]) -> Tensor:
            return _nearest(patches, centres, grid=grid, size=size)

        return {"classes": predicted_figure(encoder, items, predict, features=self.features, cache=cache)}

    def _centres(self, encoder: Encoder, items: DecodedItems, num_clusters: int, cache: FeatureCache | None) -> Tensor:
        """Float[P D]: the centres of k-means."""
        height, width = self.features.image_grid(encoder)
        sample = TokenSample(items, num_tokens=height * width, at_most=self.max_patches, seed=_SUBSET_SEED)
        rows = Rows(len(sample.items) * sample.of_item)
        for batch, patches in image_patches(encoder, sample.items, features=self.features, cache=cache):
            rows.add(functional.normalize(taken(patches, sample.places(batch.index)), dim=-1).flatten(0, 1))
        (points,) = rows.tensors(1)
        if len(points) < num_clusters:
            raise ValueError(
                f"masked: {len(points)} patches are fewer than {num_clusters} clusters; give more images or a larger features.size"
            )
        means = KMeans(num_clusters, n_init=self.num_starts, random_state=0)  # pyright: ignore[reportArgumentType] - guessed from its default
        return torch.from_numpy(means.fit(points.numpy()).cluster_centers_)

    def _count(self, encoder: Encoder, items: DecodedItems, centres: Tensor, cache: FeatureCache | None) -> "Counts":
        """Pixels of each class in each cluster, image by image."""
        num_classes, grid = len(items.source.mask_classes), self.features.image_grid(encoder)
        parts: list[Tensor] = []
        for batch, patches in image_patches(encoder, items, features=self.features, cache=cache):
            truth = batch.class_masks()
            predicted = _nearest(patches, centres, grid=grid, size=truth.shape[1:])
            parts.append(confusion(truth, predicted, num_classes=num_classes, num_predicted=len(centres)).to_sparse())
        return Counts(parts)


class Counts(NamedTuple):
    """Confusions of classes and clusters, image by image. They are sparse: an image shows few of many classes."""

    parts: list[Tensor]  # Int[B C P], sparse, of each batch

    def total(self) -> Tensor:
        """Int[C P]: of all images."""
        return torch.stack([torch.sparse.sum(part, dim=0).to_dense() for part in self.parts]).sum(dim=0)

    def areas(self, named: Callable[[Tensor], Tensor]) -> Tensor:
        """Float64[B 3 C], what scores need, once clusters have got the names of classes.

        Args:
            named: function of Int[B C P] to the confusion of classes, Int[B C C].
        """
        return torch.cat([areas(named(part.to_dense())) for part in self.parts])


def matched(counts: Tensor) -> Tensor:
    """The cluster of each class under the one-to-one matching with the most pixels on its diagonal, Int[C C] to Int[C]."""
    return torch.from_numpy(linear_sum_assignment(counts.numpy(), maximize=True)[1])


def _nearest(patches: Tensor, centres: Tensor, *, grid: tuple[int, int], size: Sequence[int]) -> Tensor:
    """Int[B H W]: the nearest of Float[P D] to Float[B N D], upsampled."""
    # The squared distance without the length of the patch, which is the same for every centre.
    scores = 2 * functional.normalize(patches, dim=-1) @ centres.T - (centres**2).sum(dim=-1)  # [B N P]
    return best_class(scores, grid=grid, size=size)
