"""Linear support vector machine on one vector per item: the usual score of encoders of points.

Protocol: scikit-learn's `LinearSVC` (squared hinge, one class against the rest) on `cls`, or on mean and maximum of the patches side by
side. Published numbers differ in what is done before: POS-BERT scales every vector to length one and leaves C at 1 (`scale: unit`,
`inverse_l2: [1.0]`); Point-BERT and PointGLR take the vectors as they are (`scale: none`). By default the features are standardised
and C is chosen on a held-out part of the training items, so that encoders with features of any scale, untrained ones too, are
compared at their best. Nothing is chosen on the test items, where POS-BERT keeps its best checkpoint by them.
"""

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.nn import functional

from glpretrain.data.sources.base import Source
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.cls.knn import accuracy, labelled_pair
from glpretrain.evaluate.cls.linear import held_out_split, small_products
from glpretrain.evaluate.features import LabelledFeatures, cls_features, encode
from glpretrain.evaluate.pixels import Pixels

Scale = Literal["standard", "unit", "none"]
Pooling = Literal["cls", "mean_max"]
_MIN_STD = 1e-6  # a collapsed feature is not blown up beyond this
_MAX_ITER = 5000


class LinearSVM(Evaluator):
    """Accuracy of a linear SVM: `accuracy`; chosen: `inverse_l2`, scikit-learn's C.

    Args:
        train: items that it is fitted on.
        test: items that are classified.
        inverse_l2: candidates for C; the best on a held-out part of `train` is refitted on all of it.
        scale: what is done to the features before: standard (by the training items' mean and deviation), unit (length one) or none.
        pooling: cls, or mean_max: mean and maximum of the patches side by side.
        held_out_ratio: share of `train` that chooses.
        image_size: side of the square, height and width, or points of a cloud; None for the card's item shape.
        layer: block whose features are taken; negative numbers count from the last.
        batch_size: items at a time.
        bf16: encode under bfloat16 autocast.
    """

    headlines = ("accuracy",)

    def __init__(
        self,
        train: Source | Pixels,
        test: Source | Pixels,
        *,
        inverse_l2: Sequence[float] = (0.0001, 0.001, 0.01, 0.1, 1.0),
        scale: Scale = "standard",
        pooling: Pooling = "cls",
        held_out_ratio: float = 0.2,
        image_size: int | Sequence[int] | None = None,
        layer: int = -1,
        batch_size: int = 64,
        bf16: bool = False,
    ) -> None:
        self.train, self.test = labelled_pair(train, test)
        check_svm(inverse_l2=inverse_l2, scale=scale, held_out_ratio=held_out_ratio)
        if pooling not in ("cls", "mean_max"):
            raise ValueError(f"pooling: {pooling!r}; accepted: cls, mean_max")
        self.inverse_l2, self.scale, self.pooling, self.held_out_ratio = tuple(inverse_l2), scale, pooling, held_out_ratio
        self.image_size, self.layer, self.batch_size, self.bf16 = image_size, layer, batch_size, bf16

    @property
    def scored(self) -> Pixels:
        return self.test

    def run(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> Result:
        options = {"image_size": self.image_size, "layer": self.layer, "batch_size": self.batch_size, "bf16": self.bf16, "cache": cache}
        gather = cls_features if self.pooling == "cls" else mean_max_features
        train, test = gather(encoder, self.train, **options), gather(encoder, self.test, **options)
        return svm_result(train, test, inverse_l2=self.inverse_l2, scale=self.scale, held_out_ratio=self.held_out_ratio)


def check_svm(*, inverse_l2: Sequence[float], scale: str, held_out_ratio: float) -> None:
    """Of the settings of an SVM.

    Raises:
        ValueError: one is out of range.
    """
    if not inverse_l2 or min(inverse_l2) <= 0:
        raise ValueError(f"inverse_l2: {list(inverse_l2)}; accepted: positive numbers")
    if scale not in ("standard", "unit", "none"):
        raise ValueError(f"scale: {scale!r}; accepted: standard, unit, none")
    if not 0 < held_out_ratio < 1:
        raise ValueError(f"held_out_ratio: {held_out_ratio}; accepted: between 0 and 1")


def mean_max_features(encoder: Encoder, pixels: Pixels, **options: object) -> LabelledFeatures:
    """Mean and maximum of the patches side by side, Float[B 2D], of every item that has a label. Options as of `encode`.

    Raises:
        ValueError: no item has a label, or features are not finite.
    """
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    for batch, output in encode(encoder, pixels, fit="crop", **options):
        labelled = batch.labels >= 0
        rows.append(torch.cat([output.patches.mean(dim=1), output.patches.amax(dim=1)], dim=1)[labelled])
        labels.append(batch.labels[labelled])
    features = LabelledFeatures(torch.cat(rows), torch.cat(labels))
    if len(features.labels) == 0:
        raise ValueError(f"source {pixels.source.name!r}: no item has a label; this evaluator needs labels")
    if not features.cls.isfinite().all():
        raise ValueError(f"source {pixels.source.name!r}: the encoder's patch features are not finite; nothing can be scored on them")
    return features


def svm_result(
    train: LabelledFeatures, test: LabelledFeatures, *, inverse_l2: Sequence[float], scale: Scale, held_out_ratio: float
) -> Result:
    """Choose C on a part of the training items, fit on all of them, score on the test items; see `LinearSVM`.

    Raises:
        ValueError: too few training items to choose.
    """
    chosen = inverse_l2[0]
    if len(inverse_l2) > 1:
        held_out, fitted = held_out_split(len(train.labels), ratio=held_out_ratio)
        if len(held_out) == 0 or len(train.labels[fitted].unique()) < 2:
            raise ValueError(f"train: {len(train.labels)} items are too few to choose among inverse_l2 {list(inverse_l2)}; give one")
        part = LabelledFeatures(train.cls[fitted], train.labels[fitted])
        rates = [
            (svm_predict(part, train.cls[held_out], inverse_l2=value, scale=scale) == train.labels[held_out]).float().mean().item()
            for value in sorted(inverse_l2)
        ]
        chosen = sorted(inverse_l2)[rates.index(max(rates))]  # the strongest penalty on a tie
    predicted = svm_predict(train, test.cls, inverse_l2=chosen, scale=scale)
    return Result({"accuracy": accuracy(predicted, test.labels)}, chosen={"inverse_l2": chosen})


def svm_predict(train: LabelledFeatures, queries: Tensor, *, inverse_l2: float, scale: Scale) -> Tensor:
    """Int[B]: the class of Float[B D], by an SVM that was fitted on `train`."""
    rows = train.cls.double()
    queries = queries.double()
    if scale == "standard":
        mean, std = rows.mean(dim=0), rows.std(dim=0).clamp_min(_MIN_STD)
        rows, queries = (rows - mean) / std, (queries - mean) / std
    elif scale == "unit":
        rows, queries = functional.normalize(rows, dim=1), functional.normalize(queries, dim=1)
    # The primal problem: its solver draws no random number.
    machine = LinearSVC(C=inverse_l2, dual=False, max_iter=_MAX_ITER)
    with warnings.catch_warnings(), small_products(rows):
        warnings.simplefilter("ignore", ConvergenceWarning)
        machine.fit(rows.numpy(), train.labels.numpy())
    return torch.from_numpy(machine.predict(queries.numpy()))
