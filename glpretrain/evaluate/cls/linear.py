"""Linear probe on `cls`: multinomial logistic regression of scikit-learn, its L2 strength chosen on held-out training items.

Left out on purpose: probes trained by gradient steps on the same features (`linear_sweep`), and with augmentation, which costs more
than a short pretraining.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

from glpretrain.core import keys
from glpretrain.data.sources.base import Source
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.cls.knn import accuracy, labelled_pair
from glpretrain.evaluate.features import LabelledFeatures, cls_features
from glpretrain.evaluate.pixels import Pixels

_LOG = logging.getLogger(__name__)
_SPLIT_SEED = 30
_SMALL = 1 << 24  # 40,000 x 384: two threads took 1.6 times as long as one; 2,000 x 96: 6 times
_MIN_STD = 1e-6  # a collapsed feature is not blown up beyond this


class LinearProbe(Evaluator):
    """Accuracy of logistic regression on standardised `cls`: `accuracy`; chosen: `inverse_l2`, the strength.

    Args:
        train: items that it is fitted on.
        test: items that are classified.
        inverse_l2: candidates for scikit-learn's C; the best on a held-out part of `train` is refitted on all of it.
        held_out_ratio: share of `train` that chooses.
        max_iter: L-BFGS iterations.
        image_size: side of the square, or height and width; None for the card's item shape.
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
        inverse_l2: Sequence[float] = (0.001, 0.01, 0.1, 1.0, 10.0),
        held_out_ratio: float = 0.2,
        max_iter: int = 500,
        image_size: int | Sequence[int] | None = None,
        layer: int = -1,
        batch_size: int = 64,
        bf16: bool = False,
    ) -> None:
        self.train, self.test = labelled_pair(train, test)
        if not inverse_l2 or min(inverse_l2) <= 0:
            raise ValueError(f"inverse_l2: {list(inverse_l2)}; accepted: positive numbers")
        if not 0 < held_out_ratio < 1:
            raise ValueError(f"held_out_ratio: {held_out_ratio}; accepted: between 0 and 1")
        self.inverse_l2, self.held_out_ratio, self.max_iter = tuple(inverse_l2), held_out_ratio, max_iter
        self.image_size, self.layer, self.batch_size, self.bf16 = image_size, layer, batch_size, bf16

    @property
    def scored(self) -> Pixels:
        return self.test

    def run(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> Result:
        options = {"image_size": self.image_size, "layer": self.layer, "batch_size": self.batch_size, "bf16": self.bf16, "cache": cache}
        train, test = cls_features(encoder, self.train, **options), cls_features(encoder, self.test, **options)
        predicted, chosen = self._predict(train, test.cls)
        return Result({"accuracy": accuracy(predicted, test.labels)}, chosen={"inverse_l2": chosen})

    def _predict(self, train: LabelledFeatures, queries: Tensor) -> tuple[Tensor, float]:
        """Int[B], the classes of Float[B D], and the chosen strength."""
        mean, std = train.cls.mean(dim=0), train.cls.std(dim=0).clamp_min(_MIN_STD)
        train = LabelledFeatures((train.cls - mean) / std, train.labels)
        chosen = self._choose(train)
        probe = _fit(train, inverse_l2=chosen, max_iter=self.max_iter)
        return torch.from_numpy(probe.predict(((queries - mean) / std).numpy())), chosen

    def _choose(self, train: LabelledFeatures) -> float:
        """The candidate with the best held-out accuracy, the strongest penalty on a tie."""
        if len(self.inverse_l2) == 1:
            return self.inverse_l2[0]
        held_out, fitted = held_out_split(len(train.labels), ratio=self.held_out_ratio)
        if len(held_out) == 0 or len(train.labels[fitted].unique()) < 2:
            count = len(train.labels)
            raise ValueError(f"train: {count} labelled items are too few to choose among inverse_l2 {list(self.inverse_l2)}; give one")
        part = LabelledFeatures(train.cls[fitted], train.labels[fitted])
        queries, truth = train.cls[held_out].numpy(), train.labels[held_out]
        rates: Tensor = torch.tensor(
            [
                (torch.from_numpy(_fit(part, inverse_l2=value, max_iter=self.max_iter).predict(queries)) == truth).float().mean()
                for value in sorted(self.inverse_l2)
            ]
        )
        return sorted(self.inverse_l2)[int(rates.argmax())]


def held_out_split(count: int, *, ratio: float) -> tuple[Tensor, Tensor]:
    """Positions of the training items that choose, Int[M], and of those that fit, Int[count-M]: fixed and pseudo-random."""
    order = keys.permutation(torch.tensor(_SPLIT_SEED), count)
    num_held_out = round(ratio * count)
    return order[:num_held_out], order[num_held_out:]


@contextmanager
def small_products(features: Tensor) -> Iterator[None]:
    """One thread for the matrix products on Float[B D], unless they are large: L-BFGS makes so many that starting threads costs more."""
    with threadpool_limits(1 if features.numel() < _SMALL else None, user_api="blas"):
        yield


def _fit(train: LabelledFeatures, *, inverse_l2: float, max_iter: int) -> LogisticRegression:
    probe = LogisticRegression(C=inverse_l2, max_iter=max_iter)
    with warnings.catch_warnings(record=True) as caught, small_products(train.cls):
        warnings.simplefilter("always", ConvergenceWarning)
        probe.fit(train.cls.numpy(), train.labels.numpy())
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        _LOG.info("linear probe: %d iterations were not enough at inverse_l2 %g", max_iter, inverse_l2)
    return probe
