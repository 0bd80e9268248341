"""Linear probes on `cls`: multinomial logistic regression of scikit-learn, its L2 strength chosen on held-out training items.

Probes trained by gradient steps on the same features are in `linear_sweep`; probes with augmentation, which cost more than a short
pretraining, are in `linear_protocols`.
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, require_positive, require_share
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.encoding import device_of
from glpretrain.evaluate.items import Sources
from glpretrain.evaluate.logistic import fit_logistic
from glpretrain.evaluate.metrics.intervals import accuracy
from glpretrain.evaluate.probes import (
    answerable,
    choose_strength,
    classes_named,
    dealt,
    in_parts,
    require_two_classes,
    small_products,
    standardiser,
)
from glpretrain.evaluate.rows import LabelledFeatures

_LOG = logging.getLogger(__name__)
_FOLD_SEED = 120
_MOST_LOGITS = 1 << 28  # that scikit-learn computes at once, several times 1 GB


@dataclass(frozen=True, kw_only=True)
class LogisticProbe(Evaluator):
    """What the probes of this file share; not used by itself.

    Args:
        inverse_l2: candidates for scikit-learn's C; the best one on a held-out part of the training items is fitted again on all of them.
        held_out_ratio: share of the training items that chooses.
        max_iter: number of L-BFGS iterations.
    """

    headlines = ("accuracy",)
    scored = "test"
    truth = "classes"

    inverse_l2: Sequence[float] = (0.001, 0.01, 0.1, 1.0, 10.0)
    held_out_ratio: float = 0.2
    max_iter: int = 500

    def validate(self) -> None:
        require_positive("inverse_l2", self.inverse_l2)
        require_share("held_out_ratio", self.held_out_ratio)

    def predict(self, train: LabelledFeatures, queries: Tensor, *, device: torch.device) -> tuple[Tensor, float]:
        """Int[B], the classes of Float[B D], and the chosen strength."""
        standardised = standardiser(train.cls)
        train = train.with_cls(standardised(train.cls))

        def predict(part: LabelledFeatures, rows: Tensor, inverse_l2: float) -> Tensor:
            return self._fitted(part, rows, inverse_l2, device=device)

        chosen = choose_strength(train, self.inverse_l2, held_out_ratio=self.held_out_ratio, predict=predict)
        return predict(train, standardised(queries), chosen), chosen

    def _fitted(self, train: LabelledFeatures, queries: Tensor, inverse_l2: float, *, device: torch.device) -> Tensor:
        """Int[B], the classes of Float[B D]: by scikit-learn, or on a GPU and where its logits would not fit by `fit_logistic`."""
        num_classes = len(train.labels.unique())
        if device.type != "cpu" or len(train.labels) * num_classes > _MOST_LOGITS:
            found = fit_logistic(train.cls, train.labels, inverse_l2=inverse_l2, max_iter=self.max_iter, device=device)
            if not found.has_converged:
                _LOG.info("linear probe: %d iterations were not enough at inverse_l2 %g", self.max_iter, inverse_l2)
            return in_parts(found.predict, queries, num_scores=num_classes)
        probe = LogisticRegression(C=inverse_l2, max_iter=self.max_iter)
        with warnings.catch_warnings(record=True) as caught, small_products(train.cls):
            warnings.simplefilter("always", ConvergenceWarning)
            probe.fit(train.cls.numpy(), train.labels.numpy())
        if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
            _LOG.info("linear probe: %d iterations were not enough at inverse_l2 %g", self.max_iter, inverse_l2)
        return in_parts(lambda part: torch.from_numpy(probe.predict(part.numpy())), queries, num_scores=len(probe.classes_))


@dataclass(frozen=True, kw_only=True)
class LinearProbe(LogisticProbe):
    """Accuracy on `test` of logistic regression on standardised `cls` of `train`: `accuracy`; chosen: `inverse_l2`.

    Settings are those of `LogisticProbe`.
    """

    needs = ("train", "test")

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        train, test = (self.features.labelled(encoder, sources[role], cache) for role in ("train", "test"))
        test, unlike = answerable(train, test, sources)
        predicted, chosen = self.predict(train, test.cls, device=device_of(encoder))
        return Result({"accuracy": accuracy(predicted, test.labels, test.groups)}, {"inverse_l2": chosen}, unlike)


@dataclass(frozen=True, kw_only=True)
class CrossValidatedProbe(LogisticProbe):
    """Accuracy of logistic regression by cross-validation, for labelled sets that are small; chosen: `inverse_l2`, the mean over folds.

    Every item of `test` is classified by a probe that was fitted on the other folds, so the score is one of all items and its interval is
    as narrow as they allow. Every fold has each class in its share, so that features that know nothing score chance and not less; items
    of one group, such as frames of one video, share a fold. A fixed permutation deals them, so every encoder meets the same folds. The
    only item of a class is fitted to, but not scored.

    Args:
        folds: number of folds; fewer where no class has so many items.
    """

    needs = ("test",)

    folds: int = 5

    def validate(self) -> None:
        super().validate()
        if self.folds < 2:
            raise ValueError(f"folds: {self.folds}; accepted: at least 2")

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        items = self.features.labelled(encoder, sources["test"], cache)
        require_two_classes(items.labels, sources["test"])
        place, of_class = dealt(items.labels, items.groups, seed=_FOLD_SEED)
        scored = of_class > 1
        left_out: dict[str, str] = {}
        if not scored.all():
            alone = classes_named(items.labels[~scored], sources["test"].source.classes)
            left_out[alone] = f"test shows one item or group of it, so {int((~scored).sum())} of {len(scored)} items are not scored"
            if not scored.any():
                raise ValueError(f"{alone}: {left_out[alone]}; give at least two of a class")
        # Every class is dealt from the first fold on, so that classes of one size have one size in each fold.
        fold_of = torch.where(scored, place % self.folds, -1)
        predicted = torch.empty_like(items.labels)
        strengths: list[float] = []
        for fold in range(int(fold_of.max()) + 1):
            queries = fold_of == fold
            predicted[queries], strength = self.predict(items.at(~queries), items.cls[queries], device=device_of(encoder))
            strengths.append(strength)
        found = items.at(scored)
        scores = {"accuracy": accuracy(predicted[scored], found.labels, found.groups)}
        return Result(scores, {"inverse_l2": sum(strengths) / len(strengths)}, left_out)
