"""n-way k-shot classification: small problems of a few classes and a few labelled items each, drawn several times.

Protocol: as the few-shot tables of point clouds (Sharma and Kaul, NeurIPS 2020; Point-MAE's generate_few_shot_data.py): an episode
draws n classes, k training items of each and up to 20 test items of each, and mean and standard deviation over 10 episodes are
reported. Features stay frozen, and the classifier is a linear SVM with C = `inverse_l2` (as cTree and OcCo score encoders) on features
less the mean of all training items, scaled to length one: a handful of items is too few to standardise by. Point-BERT and Point-MAE
fine-tune instead; their numbers are higher and not comparable.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from glpretrain.core import keys
from glpretrain.data.sources.base import Source
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, Score
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.cls.knn import labelled_pair
from glpretrain.evaluate.features import LabelledFeatures, cls_features
from glpretrain.evaluate.metrics.intervals import Z95, mean_interval
from glpretrain.evaluate.pixels import Pixels
from glpretrain.evaluate.points.linear_svm import svm_predict

_EPISODE_SEED = 120


class Episodes(Evaluator):
    """Mean accuracy over episodes: `way<n>_shot<k>` and its standard deviation `way<n>_shot<k>_std`; `accuracy` is the first pair's.

    Args:
        train: items that are learned from.
        test: items that are classified.
        ways: numbers of classes n.
        shots: training items k of each.
        num_queries: test items of each class at most.
        num_episodes: how often classes and items are drawn.
        inverse_l2: scikit-learn's C.
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
        ways: Sequence[int] = (5, 10),
        shots: Sequence[int] = (10, 20),
        num_queries: int = 20,
        num_episodes: int = 10,
        inverse_l2: float = 1.0,
        image_size: int | Sequence[int] | None = None,
        layer: int = -1,
        batch_size: int = 64,
        bf16: bool = False,
    ) -> None:
        self.train, self.test = labelled_pair(train, test)
        num_classes = len(self.train.source.classes)
        if not ways or min(ways) < 2 or max(ways) > num_classes:
            raise ValueError(f"ways: {list(ways)}; accepted: numbers from 2 to {num_classes}, the classes")
        if not shots or min(shots) < 1 or num_queries < 1 or num_episodes < 2:
            given = f"shots: {list(shots)}, num_queries: {num_queries}, num_episodes: {num_episodes}"
            raise ValueError(f"{given}; accepted: positive numbers, and at least 2 episodes")
        if inverse_l2 <= 0:
            raise ValueError(f"inverse_l2: {inverse_l2}; accepted: a positive number")
        self.ways, self.shots, self.num_queries, self.num_episodes = tuple(ways), tuple(shots), num_queries, num_episodes
        self.inverse_l2 = inverse_l2
        self.image_size, self.layer, self.batch_size, self.bf16 = image_size, layer, batch_size, bf16

    @property
    def scored(self) -> Pixels:
        return self.test

    def run(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> Result:
        options = {"image_size": self.image_size, "layer": self.layer, "batch_size": self.batch_size, "bf16": self.bf16, "cache": cache}
        train, test = (cls_features(encoder, pixels, **options) for pixels in (self.train, self.test))
        mean = train.cls.mean(dim=0)
        train, test = (LabelledFeatures(side.cls - mean, side.labels) for side in (train, test))
        scores: dict[str, Score] = {}
        for way in self.ways:
            for shot in self.shots:
                rates = torch.tensor([self._episode(train, test, way=way, shot=shot, number=n) for n in range(self.num_episodes)])
                name, std = f"way{way}_shot{shot}", rates.std().item()
                scores[name] = Score(100 * rates.mean().item(), 100 * mean_interval(rates), self.num_episodes)
                scores[f"{name}_std"] = Score(100 * std, 100 * Z95 * std / (2 * (self.num_episodes - 1)) ** 0.5, self.num_episodes)
        return Result({"accuracy": scores[f"way{self.ways[0]}_shot{self.shots[0]}"], **scores}, chosen={})

    def _episode(self, train: LabelledFeatures, test: LabelledFeatures, *, way: int, shot: int, number: int) -> float:
        """Accuracy of one episode; its classes and items are a function of (way, shot, number)."""
        key = keys.fold_in(keys.fold_in(keys.fold_in(torch.tensor(_EPISODE_SEED), way), shot), number)
        present = [label for label in train.labels.unique().tolist() if (test.labels == label).any()]
        if len(present) < way:
            raise ValueError(f"ways: {way}; only {len(present)} classes have training and test items")
        classes = [present[place] for place in keys.permutation(keys.fold_in(key, 0), len(present))[:way].tolist()]
        support = torch.cat([self._drawn(train.labels, label, count=shot, key=keys.fold_in(key, 1), exactly=True) for label in classes])
        queries = torch.cat(
            [self._drawn(test.labels, label, count=self.num_queries, key=keys.fold_in(key, 2), exactly=False) for label in classes]
        )
        drawn = LabelledFeatures(train.cls[support], train.labels[support])
        predicted = svm_predict(drawn, test.cls[queries], inverse_l2=self.inverse_l2, scale="unit")
        return (predicted == test.labels[queries]).float().mean().item()

    @staticmethod
    def _drawn(labels: Tensor, label: int, *, count: int, key: Tensor, exactly: bool) -> Tensor:
        of_class = (labels == label).nonzero()[:, 0]
        if exactly and len(of_class) < count:
            raise ValueError(f"shots: {count}; class {label} has {len(of_class)} training items")
        return of_class[keys.permutation(keys.fold_in(key, label), len(of_class))[:count]]
