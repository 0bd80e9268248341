"""Logistic regression in parts is scikit-learn's."""

import numpy as np
import pytest
import torch
from evaluate_stubs import noise
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from glpretrain.evaluate import LinearProbe, logistic
from glpretrain.evaluate.cls import linear
from glpretrain.evaluate.logistic import fit_logistic
from glpretrain.evaluate.rows import LabelledFeatures

CPU = torch.device("cpu")


def problem(num_classes: int) -> LabelledFeatures:
    """Classes that overlap, whose numbers have gaps."""
    index = torch.arange(211)
    labels = index * index % 13 % num_classes
    return LabelledFeatures(noise(index, 7, seed=1) + 1.5 * functional.one_hot(labels, 7), 3 * labels + 2, index)


@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("inverse_l2", [0.01, 1.0])
def test_weights_are_those_of_scikit_learn(num_classes: int, inverse_l2: float, monkeypatch: pytest.MonkeyPatch) -> None:
    train, queries = problem(num_classes), noise(torch.arange(500), 7, seed=2)
    reference = LogisticRegression(C=inverse_l2, max_iter=500).fit(train.cls.double().numpy(), train.labels.numpy())
    found = fit_logistic(train.cls.double(), train.labels, inverse_l2=inverse_l2, max_iter=500, device=CPU)
    assert found.has_converged
    weight = found.weight.numpy().T
    expected = reference.coef_ if num_classes > 2 else np.concatenate([-reference.coef_, reference.coef_]) / 2
    np.testing.assert_allclose(weight, expected, atol=2e-3)  # both stop where the gradient is below 1e-4
    assert (found.predict(queries.double()).numpy() == reference.predict(queries.double().numpy())).mean() > 0.995
    monkeypatch.setattr(logistic, "_LOGITS", 17 * num_classes)
    parts = fit_logistic(train.cls.double(), train.labels, inverse_l2=inverse_l2, max_iter=500, device=CPU)
    torch.testing.assert_close(parts.weight, found.weight, rtol=1e-6, atol=1e-8)  # sums of float64 in another order


def test_too_few_iterations_are_known() -> None:
    train = problem(5)
    assert not fit_logistic(train.cls, train.labels, inverse_l2=100.0, max_iter=1, device=CPU).has_converged


def test_a_probe_of_many_items_is_the_one_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    train, queries = problem(5), noise(torch.arange(900), 7, seed=3)
    plain, chosen = LinearProbe().predict(train, queries, device=CPU)
    used: list[int] = []
    monkeypatch.setattr(linear, "_MOST_LOGITS", 5 * 211 - 1)  # the whole set is too large, and the part that chooses is not
    monkeypatch.setattr(linear, "fit_logistic", lambda *args, **given: (used.append(len(args[0])), fit_logistic(*args, **given))[1])
    found, again = LinearProbe().predict(train, queries, device=CPU)
    assert used == [211] and again == chosen and (found == plain).float().mean() > 0.995
