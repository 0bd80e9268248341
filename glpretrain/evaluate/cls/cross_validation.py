"""Linear probe on `cls` by cross-validation, for labelled sets that are small.

Every item is classified by a probe that was fitted on the other folds, so the score rests on all items and its interval is as narrow
as they allow. The probe, and how its strength is chosen within the items that it is fitted on, are those of `LinearProbe`.
"""

from collections.abc import Sequence

import torch

from glpretrain.core import keys
from glpretrain.data.sources.base import Source
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Result
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.cls.knn import accuracy
from glpretrain.evaluate.cls.linear import LinearProbe
from glpretrain.evaluate.features import LabelledFeatures, cls_features
from glpretrain.evaluate.pixels import Pixels

_FOLD_SEED = 120


class CrossValidatedProbe(LinearProbe):
    """Accuracy of logistic regression over folds: `accuracy`; chosen: `inverse_l2`, the mean over folds.

    Args:
        test: labelled items; a fixed permutation deals them into folds, so every encoder meets the same ones.
        folds: how many.
        inverse_l2: see `LinearProbe`.
        held_out_ratio: see `LinearProbe`.
        max_iter: see `LinearProbe`.
        image_size: see `LinearProbe`.
        layer: see `LinearProbe`.
        batch_size: see `LinearProbe`.
        bf16: see `LinearProbe`.

    Raises:
        ValueError: there are fewer than two folds, or more than items.
    """

    def __init__(
        self,
        test: Source | Pixels,
        *,
        folds: int = 5,
        inverse_l2: Sequence[float] = (0.001, 0.01, 0.1, 1.0, 10.0),
        held_out_ratio: float = 0.2,
        max_iter: int = 500,
        image_size: int | Sequence[int] | None = None,
        layer: int = -1,
        batch_size: int = 64,
        bf16: bool = False,
    ) -> None:
        super().__init__(
            test,
            test,
            inverse_l2=inverse_l2,
            held_out_ratio=held_out_ratio,
            max_iter=max_iter,
            image_size=image_size,
            layer=layer,
            batch_size=batch_size,
            bf16=bf16,
        )
        if folds < 2:
            raise ValueError(f"folds: {folds}; accepted: at least 2")
        self.folds = folds

    def run(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> Result:
        options = {"image_size": self.image_size, "layer": self.layer, "batch_size": self.batch_size, "bf16": self.bf16, "cache": cache}
        cls, labels = cls_features(encoder, self.test, **options)  # Float[B D], Int[B]
        if self.folds > len(labels):
            raise ValueError(f"folds: {self.folds}; accepted: at most the {len(labels)} labelled items of {self.test.source.name!r}")
        order = keys.permutation(torch.tensor(_FOLD_SEED), len(labels))
        predicted = torch.empty_like(labels)
        strengths: list[float] = []
        for fold in range(self.folds):
            queries = order[fold :: self.folds]
            others = torch.ones(len(labels), dtype=torch.bool)
            others[queries] = False
            predicted[queries], strength = self._predict(LabelledFeatures(cls[others], labels[others]), cls[queries])
            strengths.append(strength)
        return Result({"accuracy": accuracy(predicted, labels)}, chosen={"inverse_l2": sum(strengths) / self.folds})
