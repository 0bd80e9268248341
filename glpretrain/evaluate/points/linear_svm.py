"""Linear support vector machine on one vector per item: the usual score of encoders of points.

Protocol: scikit-learn's `LinearSVC` (squared hinge, one class against the rest) on `cls`, or on mean and maximum of the patches side by
side. Published numbers differ in what is done before: POS-BERT scales every vector to length one and leaves C at 1 (`scale: unit`,
`inverse_l2: [1.0]`); Point-BERT and PointGLR take the vectors as they are (`scale: none`). By default the features are standardised
and C is chosen on a held-out part of the training items, so that encoders with features of any scale, untrained ones too, are
compared at their best. Nothing is chosen on the test items, where POS-BERT keeps its best checkpoint by them.

`ShapeHistogram` is the baseline beside every score of an encoder of points: the same machine on D2 histograms, the distribution of
distances between two random points of a surface (Osada et al., "Shape distributions", ACM Transactions on Graphics 2002). No encoder is
involved; an encoder that scores less has learned less than the distances say.
"""

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.nn import functional

from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, require_positive, require_share
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.items import DecodedItems, Sources
from glpretrain.evaluate.metrics.intervals import accuracy
from glpretrain.evaluate.probes import answerable, choose_strength, in_parts, small_products, standardiser
from glpretrain.evaluate.rows import LabelledFeatures, labelled_rows

Scale = Literal["standard", "unit", "none"]
_MAX_ITER = 5000
_LARGEST = 2.0  # distance within a unit sphere


@dataclass(frozen=True, kw_only=True)
class SupportVectors(Evaluator):
    """What a linear SVM on one vector per item shares, whatever the vector is; not used by itself.

    Args:
        inverse_l2: candidates for scikit-learn's C; the best one on a held-out part of `train` is fitted again on all of it.
        scale: what is done to the vectors before: standard (by the training items' mean and deviation), unit (length one) or none.
        held_out_ratio: share of `train` that chooses.
    """

    headlines = ("accuracy",)
    scored = "test"
    needs = ("train", "test")
    truth = "classes"

    inverse_l2: Sequence[float] = (0.0001, 0.001, 0.01, 0.1, 1.0)
    scale: Scale = "standard"
    held_out_ratio: float = 0.2

    def validate(self) -> None:
        require_positive("inverse_l2", self.inverse_l2)
        if self.scale not in ("standard", "unit", "none"):
            raise ValueError(f"scale: {self.scale!r}; accepted: standard, unit, none")
        require_share("held_out_ratio", self.held_out_ratio)

    @abstractmethod
    def vectors(self, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None) -> LabelledFeatures:
        """The vector of every item that has a label."""

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        train, test = (self.vectors(encoder, sources[role], cache) for role in ("train", "test"))
        test, unlike = answerable(train, test, sources)

        def predict(part: LabelledFeatures, queries: Tensor, inverse_l2: float) -> Tensor:
            return svm_predict(part, queries, inverse_l2=inverse_l2, scale=self.scale)

        chosen = choose_strength(train, self.inverse_l2, held_out_ratio=self.held_out_ratio, predict=predict)
        predicted = predict(train, test.cls, chosen)
        return Result({"accuracy": accuracy(predicted, test.labels, test.groups)}, {"inverse_l2": chosen}, unlike)


@dataclass(frozen=True, kw_only=True)
class LinearSVM(SupportVectors):
    """Accuracy on `test` of a linear SVM that is fitted on `train`: `accuracy`; chosen: `inverse_l2`, scikit-learn's C.

    Args:
        pooling: the vector of an item: cls, or mean_max, mean and maximum of the patches side by side.
    """

    pooling: Literal["cls", "mean_max"] = "cls"

    def validate(self) -> None:
        super().validate()
        if self.pooling not in ("cls", "mean_max"):
            raise ValueError(f"pooling: {self.pooling!r}; accepted: cls, mean_max")

    def vectors(self, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None) -> LabelledFeatures:
        """See `SupportVectors`."""
        if self.pooling == "cls":
            return self.features.labelled(encoder, items, cache)
        batches = self.features.encode(encoder, items, resize=self.features.cropping, patches="pooled", cache=cache)
        return labelled_rows(batches, lambda output: output.patches.flatten(1), items=items)


@dataclass(frozen=True, kw_only=True)
class ShapeHistogram(SupportVectors):
    """Accuracy on `test` of a linear SVM on D2 histograms: `accuracy`, which is the same for every encoder.

    Args:
        num_bins: number of bins of the histogram.
        max_points: number of points of a cloud at most; all pairs of them count.
    """

    modality = "points"
    unused = ("layer", "tokens", "bf16")

    num_bins: int = 64
    max_points: int = 512

    def validate(self) -> None:
        super().validate()
        if self.num_bins < 2 or self.max_points < 2:
            raise ValueError(f"num_bins: {self.num_bins}, max_points: {self.max_points}; accepted: at least 2")

    def vectors(self, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None) -> LabelledFeatures:
        """See `SupportVectors`."""
        batches = items.batches(self.features.shape(encoder), resize=self.features.cropping, batch_size=self.features.batch_size)
        histograms = ((batch, distance_histograms(batch.items[:, : self.max_points], num_bins=self.num_bins)) for batch in batches)
        return labelled_rows(histograms, lambda rows: rows, items=items)


def svm_predict(train: LabelledFeatures, queries: Tensor, *, inverse_l2: float, scale: Scale) -> Tensor:
    """Int[B]: the class of Float[B D], by an SVM that was fitted on `train`."""
    rows = train.cls.double()
    queries = queries.double()
    if scale == "standard":
        standardised = standardiser(rows)
        rows, queries = standardised(rows), standardised(queries)
    elif scale == "unit":
        rows, queries = functional.normalize(rows, dim=1), functional.normalize(queries, dim=1)
    # The primal problem: its solver draws no random number.
    machine = LinearSVC(C=inverse_l2, dual=False, max_iter=_MAX_ITER)  # pyright: ignore[reportArgumentType] - guessed from its default
    with warnings.catch_warnings(), small_products(rows):
        warnings.simplefilter("ignore", ConvergenceWarning)
        machine.fit(rows.numpy(), train.labels.numpy())
    return in_parts(lambda part: torch.from_numpy(machine.predict(part.numpy())), queries, num_scores=len(machine.classes_))


def distance_histograms(points: Tensor, *, num_bins: int) -> Tensor:
    """Float[B num_bins], rows sum to one: distances of all pairs of Float[B P 3] on [0, 2], the largest there is in a unit sphere."""
    first, second = torch.triu_indices(points.shape[1], points.shape[1], offset=1)
    # Cloud by cloud: the pairs of a batch would be gigabytes.
    return torch.stack(
        [torch.histc((cloud[first] - cloud[second]).norm(dim=1).clamp(max=_LARGEST), num_bins, min=0.0, max=_LARGEST) for cloud in points]
    ) / len(first)
