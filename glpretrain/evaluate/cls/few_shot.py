"""Few-shot classification on `cls`: a handful of labelled items per class, drawn several times.

Protocol: Assran et al., "Masked siamese networks for label-efficient learning", 2022, and logistic_eval.py of
github.com/facebookresearch/msn at 4388dc1: each `cls` less its own mean and scaled to length one, multinomial logistic regression
without an intercept, L2 strength 0.00025 on the sum of losses. Nothing is chosen: one item per class leaves none to hold out. Beside
it the simplest classifier, the class whose mean direction is nearest (cosine). Known differences: draws are ours and nested (the
five items of a class contain the one), and more than three.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional

from glpretrain.core import keys
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, Score, require_positive, with_accuracy
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.items import Sources
from glpretrain.evaluate.metrics.intervals import Z95, interval_score, mean_interval, rate_interval
from glpretrain.evaluate.probes import answerable, in_parts, small_products
from glpretrain.evaluate.progress import tracked
from glpretrain.evaluate.rows import LabelledFeatures

_DRAW_SEED = 80
_MAX_ITER = 1000
_TOLERANCE = 1e-8  # scikit-learn's own of 1e-4 stops after two steps at so weak a penalty, with other answers for one item in ten


@dataclass(frozen=True, kw_only=True)
class FewShot(Evaluator):
    """Mean accuracy over draws of n training items per class: `shot<n>` by logistic regression, `centroid<n>` by the nearest centroid.

    `accuracy` is `shot<n>` for the last n; `shot<n>_std` and `centroid<n>_std` are the standard deviations over draws (their n is the
    number of draws). Items of `train` are drawn, all of `test` are classified.

    Args:
        shots: numbers of items per class.
        num_draws: how often they are drawn.
        inverse_l2: scikit-learn's C.
    """

    headlines = ("accuracy",)
    scored = "test"
    needs = ("train", "test")
    truth = "classes"

    shots: Sequence[int] = (1, 5, 10)
    num_draws: int = 10
    inverse_l2: float = 4000.0

    def validate(self) -> None:
        require_positive("shots", self.shots)
        require_positive("num_draws", self.num_draws)
        require_positive("inverse_l2", self.inverse_l2)

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        train, test = (centred(self.features.labelled(encoder, sources[role], cache)) for role in ("train", "test"))
        test, unlike = answerable(train, test, sources)
        classes, counts = train.labels.unique(return_counts=True)
        fewest, label = int(counts.min()), sources["train"].source.classes[int(classes[counts.argmin()])]
        shots = [num for num in self.shots if num <= fewest]
        reason = f"shots: {list(self.shots)}; accepted: numbers from 1 to {fewest}, the training items of class {label!r}"
        if not shots:
            raise ValueError(reason)
        draws = class_draws(train.labels, num_items=max(shots), num_draws=self.num_draws)  # [draws classes items]
        scores: dict[str, Score] = {}
        for num in shots:
            logistic, centroid = [], []
            for draw in tracked(draws, total=len(draws), description=f"{num} items per class"):
                drawn = train.at(draw[:, :num].flatten())
                logistic.append((logistic_predict(drawn, test.cls, inverse_l2=self.inverse_l2) == test.labels).float().mean())
                centroid.append((centroid_predict(drawn, test.cls) == test.labels).float().mean())
            scores |= draw_scores(f"shot{num}", torch.stack(logistic), num_items=len(test.labels))
            scores |= draw_scores(f"centroid{num}", torch.stack(centroid), num_items=len(test.labels))
        left_out = {f"{kind}{num}": reason for num in self.shots if num > fewest for kind in ("shot", "centroid")}
        return with_accuracy(scores, of=f"shot{self.shots[-1]}", left_out={**left_out, **unlike})


def centred(features: LabelledFeatures) -> LabelledFeatures:
    """Every row less its own mean, scaled to length one."""
    return features.with_cls(functional.normalize(features.cls - features.cls.mean(dim=1, keepdim=True), dim=1))


def class_draws(labels: Tensor, *, num_items: int, num_draws: int) -> Tensor:
    """Which items are drawn, without replacement within a draw.

    Args:
        labels: Int[B], classes of the items.
        num_items: number of items of each class; none has fewer.
        num_draws: number of draws.

    Returns:
        Int[num_draws classes num_items], for the classes that there are.
    """
    classes = labels.unique()
    draws = []
    for draw in range(num_draws):
        key = keys.fold_in(torch.tensor(_DRAW_SEED), draw)
        rows = []
        for label in classes.tolist():
            of_class = (labels == label).nonzero()[:, 0]
            rows.append(of_class[keys.permutation(keys.fold_in(key, label), len(of_class))[:num_items]])
        draws.append(torch.stack(rows))
    return torch.stack(draws)


def logistic_predict(drawn: LabelledFeatures, queries: Tensor, *, inverse_l2: float) -> Tensor:
    """Int[B]: the class of Float[B D] by logistic regression without an intercept, in float64."""
    probe = LogisticRegression(C=inverse_l2, fit_intercept=False, max_iter=_MAX_ITER, tol=_TOLERANCE)
    with small_products(drawn.cls):
        probe.fit(drawn.cls.double().numpy(), drawn.labels.numpy())
    return in_parts(lambda part: torch.from_numpy(probe.predict(part.double().numpy())), queries, num_scores=len(probe.classes_))


def centroid_predict(drawn: LabelledFeatures, queries: Tensor) -> Tensor:
    """Int[B]: the class whose mean of unit rows has the largest cosine with Float[B D]; the lower class on a tie."""
    classes, position = drawn.labels.unique(return_inverse=True)
    sums = torch.zeros(len(classes), queries.shape[1]).index_add_(0, position, functional.normalize(drawn.cls, dim=1))  # [classes D]
    centroids = functional.normalize(sums, dim=1)
    return classes[in_parts(lambda part: (part @ centroids.T).argmax(dim=1), queries, num_scores=len(classes))]


def draw_scores(name: str, rates: Tensor, *, num_items: int) -> dict[str, Score]:
    """Mean and standard deviation of the rates of several draws on the same items, Float[draws], in percent.

    The mean's interval joins two independent sources of chance: which items were drawn, and which were scored (Wilson's, as if all
    draws answered alike, so that it is rather too wide than too narrow).
    """
    mean, num_draws = rates.mean().item(), len(rates)
    if num_draws < 2:
        return {name: Score(100 * mean, None, None, num_items)}
    of_draws, (low, high), std = mean_interval(rates), rate_interval(mean, count=num_items), rates.std().item()
    ends = (max(0.0, mean - math.hypot(of_draws, mean - low)), min(1.0, mean + math.hypot(of_draws, high - mean)))
    spread = interval_score(100 * std, 100 * Z95 * std / math.sqrt(2 * (num_draws - 1)), count=num_draws)
    return {name: Score(100 * mean, 100 * ends[0], 100 * ends[1], num_items), f"{name}_std": spread}
