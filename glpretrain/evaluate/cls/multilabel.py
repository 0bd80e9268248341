"""A linear probe on `cls` for items with any number of labels: a logistic regression for each label, by scikit-learn."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from torch import Tensor

from glpretrain.data.label_sets import SEPARATOR, LabelSets
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, require_positive, require_share
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.items import Sources
from glpretrain.evaluate.metrics.average_precision import mean_average_precision
from glpretrain.evaluate.probes import small_products, standardiser, stratified_split

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MultilabelProbe(Evaluator):
    """Mean average precision on `test` of a logistic regression for each label, on standardised `cls` of `train`: `map`, in percent.

    The names of the classes of both sources hold the labels of their items. Labels that no item of `train` has, and those that all have,
    are left out. Chosen: `inverse_l2`, the same for all labels.

    Args:
        separator: what stands between two labels in the name of a class.
        inverse_l2: candidates for scikit-learn's C; the best mean average precision on a held-out part of `train` decides.
        held_out_ratio: share of the training items that chooses.
        max_iter: number of L-BFGS iterations.
    """

    headlines = ("map",)
    scored = "test"
    truth = "classes"
    needs = ("train", "test")

    separator: str = SEPARATOR
    inverse_l2: Sequence[float] = (0.001, 0.01, 0.1, 1.0)
    held_out_ratio: float = 0.2
    max_iter: int = 500

    def validate(self) -> None:
        require_positive("inverse_l2", self.inverse_l2)
        require_share("held_out_ratio", self.held_out_ratio)

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        train, test = (self.features.labelled(encoder, sources[role], cache) for role in ("train", "test"))
        of_train, of_test = (LabelSets(sources[role].source.classes, separator=self.separator) for role in ("train", "test"))
        truth = of_train.targets(train.labels).bool()  # [B K]
        learned = (truth.any(dim=0) & ~truth.all(dim=0)).nonzero()[:, 0].tolist()
        places = {of_train.names[number]: number for number in learned}
        shown = of_test.targets(test.labels).bool()
        common = [number for number, name in enumerate(of_test.names) if name in places and shown[:, number].any()]
        left_out = {
            name: f"train has no item with it or none without it, so {int(shown[:, number].sum())} test items are not scored for it"
            for number, name in enumerate(of_test.names)
            if name not in places and shown[:, number].any()
        }
        if not common:
            raise ValueError(f"test: none of the labels of {sources['test'].name!r} can be learned from {sources['train'].name!r}")
        truth = truth[:, [places[of_test.names[number]] for number in common]]
        standardised = standardiser(train.cls)
        rows = standardised(train.cls)
        chosen = self.choose(rows, truth, train.groups)
        if chosen is None:
            raise ValueError(f"train: {len(rows)} items are too few to choose among inverse_l2 {list(self.inverse_l2)}; give one")
        found = self.fitted(rows, truth, standardised(test.cls), chosen)
        return Result({"map": mean_average_precision(found, shown[:, common], test.groups)}, {"inverse_l2": chosen}, left_out)

    def choose(self, rows: Tensor, truth: Tensor, groups: Tensor | None) -> float | None:
        """The candidate with the best score on held-out training items, the strongest penalty on a tie; None where they are too few."""
        if len(self.inverse_l2) == 1:
            return self.inverse_l2[0]
        held_out, fitted = stratified_split(torch.zeros(len(rows), dtype=torch.int64), groups, ratio=self.held_out_ratio)
        learned = truth[fitted].any(dim=0) & ~truth[fitted].all(dim=0) & truth[held_out].any(dim=0)
        if not learned.any():
            return None
        asked = truth[held_out][:, learned]

        def score(inverse_l2: float) -> float:
            found = self.fitted(rows[fitted], truth[fitted][:, learned], rows[held_out], inverse_l2)
            return mean_average_precision(found, asked).value

        rates = {value: score(value) for value in sorted(self.inverse_l2)}
        return max(rates, key=lambda value: rates[value])

    def fitted(self, rows: Tensor, truth: Tensor, queries: Tensor, inverse_l2: float) -> Tensor:
        """Float[M K], the logits of the labels Bool[B K] for queries Float[M D], learned from rows Float[B D]."""
        probe = OneVsRestClassifier(LogisticRegression(C=inverse_l2, max_iter=self.max_iter))
        with warnings.catch_warnings(record=True) as caught, small_products(rows):
            warnings.simplefilter("always", ConvergenceWarning)
            probe.fit(rows.numpy(), truth.int().numpy())
        if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
            _LOG.info("multilabel probe: %d iterations were not enough at inverse_l2 %g", self.max_iter, inverse_l2)
        found = torch.from_numpy(probe.decision_function(queries.numpy())).float()
        return found.unsqueeze(1) if found.dim() == 1 else found
