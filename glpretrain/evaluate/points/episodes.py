"""n-way k-shot classification: small problems of a few classes and a few labelled items each, drawn several times.

Protocol: as the few-shot tables of point clouds (Sharma and Kaul, NeurIPS 2020; Point-MAE's generate_few_shot_data.py): an episode
draws n classes, k training items of each and up to 20 test items of each, and mean and standard deviation over 10 episodes are
reported. Features stay frozen, and the classifier is a linear SVM with C = `inverse_l2` (as cTree and OcCo score encoders) on features
less the mean of all training items, scaled to length one: a handful of items is too few to standardise by. Point-BERT and Point-MAE
fine-tune instead; their numbers are higher and not comparable.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glpretrain.core import keys
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, Score, require_positive, with_accuracy
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.items import Sources
from glpretrain.evaluate.metrics.intervals import Z95, interval_score, mean_score
from glpretrain.evaluate.points.linear_svm import svm_predict
from glpretrain.evaluate.probes import answerable
from glpretrain.evaluate.rows import LabelledFeatures

_EPISODE_SEED = 120


@dataclass(frozen=True, kw_only=True)
class Episodes(Evaluator):
    """Mean accuracy over episodes: `way<n>_shot<k>` and its standard deviation `way<n>_shot<k>_std`; `accuracy` is the first pair's.

    Episodes learn from items of `train` and classify items of `test`.

    Args:
        ways: numbers of classes n.
        shots: numbers of training items k of each class.
        num_queries: number of test items of each class at most.
        num_episodes: how often classes and items are drawn.
        inverse_l2: scikit-learn's C.
    """

    headlines = ("accuracy",)
    scored = "test"
    needs = ("train", "test")
    truth = "classes"

    ways: Sequence[int] = (5, 10)
    shots: Sequence[int] = (10, 20)
    num_queries: int = 20
    num_episodes: int = 10
    inverse_l2: float = 1.0

    def validate(self) -> None:
        if not self.ways or min(self.ways) < 2:
            raise ValueError(f"ways: {list(self.ways)}; accepted: numbers from 2 to that of the classes")
        require_positive("shots", self.shots)
        require_positive("num_queries", self.num_queries)
        if self.num_episodes < 2:
            raise ValueError(f"num_episodes: {self.num_episodes}; accepted: at least 2")
        require_positive("inverse_l2", self.inverse_l2)

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        train, test = (self.features.labelled(encoder, sources[role], cache) for role in ("train", "test"))
        test, unlike = answerable(train, test, sources)
        mean = train.cls.mean(dim=0)
        train, test = (side.with_cls(side.cls - mean) for side in (train, test))
        scores: dict[str, Score] = {}
        left_out: dict[str, str] = {}
        for shot in self.shots:
            present = [label for label in test.labels.unique().tolist() if (train.labels == label).sum() >= shot]
            for way in self.ways:
                name = f"way{way}_shot{shot}"
                if way > len(present):
                    left_out[name] = f"ways: {way}; only {len(present)} classes have test items and {shot} training items"
                    continue
                draws = range(self.num_episodes)
                rates = torch.tensor([self._episode(train, test, present, way=way, shot=shot, number=number) for number in draws])
                std = rates.std().item()
                scores[name] = mean_score(rates)
                scores[f"{name}_std"] = interval_score(
                    100 * std, 100 * Z95 * std / (2 * (self.num_episodes - 1)) ** 0.5, count=self.num_episodes
                )
        if not scores:
            raise ValueError("; ".join(dict.fromkeys(left_out.values())))
        return with_accuracy(scores, of=f"way{self.ways[0]}_shot{self.shots[0]}", left_out={**left_out, **unlike})

    def _episode(
        self, train: LabelledFeatures, test: LabelledFeatures, present: Sequence[int], *, way: int, shot: int, number: int
    ) -> float:
        """Accuracy of one episode of some of the classes that are present; it is a function of (way, shot, number)."""
        key = keys.fold_in(keys.fold_in(keys.fold_in(torch.tensor(_EPISODE_SEED), way), shot), number)
        classes = [present[place] for place in keys.permutation(keys.fold_in(key, 0), len(present))[:way].tolist()]
        support = torch.cat([self._drawn(train.labels, label, count=shot, key=keys.fold_in(key, 1)) for label in classes])
        queries = torch.cat([self._drawn(test.labels, label, count=self.num_queries, key=keys.fold_in(key, 2)) for label in classes])
        predicted = svm_predict(train.at(support), test.cls[queries], inverse_l2=self.inverse_l2, scale="unit")
        return (predicted == test.labels[queries]).float().mean().item()

    @staticmethod
    def _drawn(labels: Tensor, label: int, *, count: int, key: Tensor) -> Tensor:
        of_class = (labels == label).nonzero()[:, 0]
        return of_class[keys.permutation(keys.fold_in(key, label), len(of_class))[:count]]
