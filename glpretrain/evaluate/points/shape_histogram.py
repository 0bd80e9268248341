"""What a shape's distances alone say: the same SVM on D2 histograms, beside every score of an encoder of points.

D2 is the distribution of distances between two random points of a surface (Osada et al., "Shape distributions", ACM Transactions on
Graphics 2002). No encoder is involved; an encoder that scores less has learned less than a ruler.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from glpretrain.data.sources.base import Source
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.cls.knn import labelled_pair
from glpretrain.evaluate.features import LabelledFeatures, fitted_shape
from glpretrain.evaluate.pixels import Pixels
from glpretrain.evaluate.points.linear_svm import Scale, check_svm, svm_result

_LARGEST = 2.0  # distance within a unit sphere


class ShapeHistogram(Evaluator):
    """Accuracy of a linear SVM on D2 histograms: `accuracy`, which is the same for every encoder.

    Args:
        train: clouds that it is fitted on.
        test: clouds that are classified.
        num_bins: of the histogram.
        max_points: of a cloud; all pairs of them count.
        inverse_l2: see `LinearSVM`.
        scale: see `LinearSVM`.
        held_out_ratio: see `LinearSVM`.
        batch_size: clouds at a time.
    """

    headlines = ("accuracy",)

    def __init__(
        self,
        train: Source | Pixels,
        test: Source | Pixels,
        *,
        num_bins: int = 64,
        max_points: int = 512,
        inverse_l2: Sequence[float] = (0.0001, 0.001, 0.01, 0.1, 1.0),
        scale: Scale = "standard",
        held_out_ratio: float = 0.2,
        batch_size: int = 64,
    ) -> None:
        self.train, self.test = labelled_pair(train, test)
        check_svm(inverse_l2=inverse_l2, scale=scale, held_out_ratio=held_out_ratio)
        if num_bins < 2 or max_points < 2:
            raise ValueError(f"num_bins: {num_bins}, max_points: {max_points}; accepted: at least 2")
        self.num_bins, self.max_points = num_bins, max_points
        self.inverse_l2, self.scale, self.held_out_ratio, self.batch_size = tuple(inverse_l2), scale, held_out_ratio, batch_size

    @property
    def scored(self) -> Pixels:
        return self.test

    def run(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> Result:
        if encoder.card.modality != "points":
            raise ValueError(f"encoder {encoder.card.encoder!r} is for {encoder.card.modality}; this evaluator accepts: points")
        shape = fitted_shape(encoder, None)
        train, test = (self._features(pixels, shape) for pixels in (self.train, self.test))
        return svm_result(train, test, inverse_l2=self.inverse_l2, scale=self.scale, held_out_ratio=self.held_out_ratio)

    def _features(self, pixels: Pixels, shape: tuple[int, ...]) -> LabelledFeatures:
        rows: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in pixels.batches(shape, fit="crop", batch_size=self.batch_size):
            labelled = batch.labels >= 0
            rows.append(distance_histograms(batch.images[labelled, : self.max_points], num_bins=self.num_bins))
            labels.append(batch.labels[labelled])
        return LabelledFeatures(torch.cat(rows), torch.cat(labels))


def distance_histograms(points: Tensor, *, num_bins: int) -> Tensor:
    """How distances of all pairs are distributed on [0, 2], the largest there is in a unit sphere.

    Args:
        points: Float[B P 3].
        num_bins: of the histogram.

    Returns:
        Float[B num_bins], rows sum to one.
    """
    first, second = torch.triu_indices(points.shape[1], points.shape[1], offset=1)
    # Cloud by cloud: the pairs of a batch would be gigabytes.
    return torch.stack(
        [torch.histc((cloud[first] - cloud[second]).norm(dim=1).clamp(max=_LARGEST), num_bins, min=0.0, max=_LARGEST) for cloud in points]
    ) / len(first)
