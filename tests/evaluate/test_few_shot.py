"""Few-shot classification: truth scores 100, noise chance, the classifiers are what their definitions say, draws are fair and fixed."""

import math
import re

import pytest
import torch
from evaluate_stubs import NUM_CLASSES, StubEncoder, TableSource, chance, half_width, labelled, masked, noisy, truth
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer
from torch import Tensor
from torch.nn import functional

from glpretrain.evaluate import DecodedItems, Features, FewShot, Result
from glpretrain.evaluate.cls.few_shot import centred, centroid_predict, class_draws, draw_scores, logistic_predict
from glpretrain.evaluate.rows import LabelledFeatures


def sources(train: int, test: int) -> dict[str, TableSource]:
    scored = labelled([index % NUM_CLASSES for index in range(train + test)], num_classes=NUM_CLASSES)
    scored.items = scored.items[train:]
    return {"train": labelled([index % NUM_CLASSES for index in range(train)], num_classes=NUM_CLASSES), "test": scored}


def few_shot(train: int, test: int, features, **options) -> Result:
    return FewShot(**options).run(StubEncoder(features), sources(train, test))


def rows(cls: Tensor, numbers: Tensor) -> LabelledFeatures:
    return LabelledFeatures(cls, numbers, torch.arange(len(cls)))


def test_truth_scores_100_from_one_item_per_class():
    scores = few_shot(60, 43, truth).scores
    for name in ("accuracy", "shot1", "shot5", "shot10", "centroid1", "centroid5", "centroid10"):
        assert scores[name].value == 100 and scores[name].n == 43 and 0 < half_width(scores[name]) < 10, name
    for name in ("shot1_std", "centroid10_std"):
        assert scores[name] == (0, 0, 0, 10)


def test_noise_scores_chance_within_its_interval():
    scores = few_shot(200, 600, chance).scores
    for name in ("shot1", "shot10", "centroid1", "centroid10"):
        assert abs(scores[name].value - 20) < 2 * half_width(scores[name]), name  # 4 standard deviations; chance is 1 / 5


def test_more_shots_help_and_the_last_is_the_headline():
    scores = few_shot(200, 300, noisy, shots=(1, 3, 20)).scores
    assert scores["shot1"].value < scores["shot3"].value < scores["shot20"].value < 100
    assert scores["accuracy"] == scores["shot20"]


def test_every_draw_agrees_with_a_pipeline_of_scikit_learn():
    scores = few_shot(60, 300, noisy, shots=(1, 4), num_draws=3).scores
    train, test = (
        Features().labelled(StubEncoder(noisy), DecodedItems(source)).cls.double().numpy() for source in sources(60, 300).values()
    )
    truth_labels = torch.arange(60) % NUM_CLASSES
    for num in (1, 4):
        rates = []
        for draw in class_draws(truth_labels, num_items=4, num_draws=3):
            items = draw[:, :num].flatten().numpy()
            centre = FunctionTransformer(lambda rows: rows - rows.mean(axis=1, keepdims=True))
            probe = make_pipeline(centre, Normalizer(), LogisticRegression(C=1 / 0.00025, fit_intercept=False, max_iter=5000, tol=1e-10))
            rates.append(probe.fit(train[items], truth_labels[items]).score(test, [index % NUM_CLASSES for index in range(60, 360)]))
        rates = torch.tensor(rates)
        assert scores[f"shot{num}"].value == pytest.approx(100 * rates.mean().item(), abs=0.12)  # an item in 900: rows are float32 here
        assert scores[f"shot{num}_std"].value == pytest.approx(100 * rates.std().item(), abs=0.2)


def test_logistic_regression_minimises_the_published_objective():
    drawn = centred(rows(torch.sin(torch.arange(15.0 * 7).reshape(15, 7) * 1.7), torch.arange(15) % 3))
    weight = torch.zeros(3, 7, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=5000, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(drawn.cls.double() @ weight.T, drawn.labels, reduction="sum") + 0.00025 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    queries = centred(rows(torch.sin(torch.arange(300.0 * 7).reshape(300, 7) * 0.9), torch.zeros(300))).cls
    expected = (queries.double() @ weight.T).argmax(dim=1)
    predicted = logistic_predict(drawn, queries, inverse_l2=4000.0)
    assert (expected == predicted).float().mean() > 0.99
    assert len(predicted.unique()) == 3


def test_nearest_centroid_agrees_with_loops():
    drawn = rows(torch.sin(torch.arange(12.0 * 5).reshape(12, 5) * 1.3) * torch.arange(1, 13)[:, None], torch.arange(12) % 4 * 2)
    queries = torch.cos(torch.arange(23.0 * 5).reshape(23, 5) * 0.7)
    for query, predicted in zip(queries, centroid_predict(drawn, queries).tolist(), strict=True):
        cosines = {}
        for label in (0, 2, 4, 6):
            units = [row / row.norm() for row, own in zip(drawn.cls, drawn.labels.tolist(), strict=True) if own == label]
            centre = sum(units) / len(units)
            cosines[label] = (query @ centre / query.norm() / centre.norm()).item()
        assert predicted == max(cosines, key=cosines.get)


def test_draws_are_nested_fixed_and_without_repeats():
    truth_labels = torch.arange(70) ** 2 % 7  # residues 0, 1, 2 and 4, unevenly often
    draws = class_draws(truth_labels, num_items=9, num_draws=6)
    assert draws.shape == (6, 4, 9)
    assert torch.equal(draws, class_draws(truth_labels, num_items=9, num_draws=6))
    assert torch.equal(draws[:3, :, :2], class_draws(truth_labels, num_items=2, num_draws=3))
    for draw in draws:
        assert [truth_labels[row].unique().tolist() for row in draw] == [[0], [1], [2], [4]]
        assert len(draw.unique()) == 36
    assert len({tuple(draw[0].sort().values.tolist()) for draw in draws}) > 1


def test_interval_joins_draws_and_items():
    rates = torch.tensor([0.2, 0.3, 0.4])
    scores = draw_scores("shot1", rates, num_items=100)
    assert scores["shot1"].value == pytest.approx(30) and scores["shot1_std"].value == pytest.approx(10)
    of_draws = 1.96 * 10 / math.sqrt(3)
    assert scores["shot1"].low == pytest.approx(30 - math.hypot(of_draws, 30 - 21.89), abs=0.01)  # Wilson's for 30 of 100: 0.2189 to 0.3958
    assert scores["shot1"].high == pytest.approx(30 + math.hypot(of_draws, 39.58 - 30), abs=0.01)
    assert half_width(scores["shot1_std"]) == pytest.approx(1.96 * 10 / 2, rel=1e-3) and scores["shot1_std"].n == 3
    alone = draw_scores("shot1", rates[:1], num_items=100)
    assert half_width(alone["shot1"]) == math.inf and list(alone) == ["shot1"]


def test_a_run_can_be_repeated():
    assert few_shot(60, 80, noisy, num_draws=2) == few_shot(60, 80, noisy, num_draws=2)


def test_bad_input_is_named():
    source = labelled([index % NUM_CLASSES for index in range(24)], num_classes=NUM_CLASSES)
    reason = "shots: [5]; accepted: numbers from 1 to 4, the training items of class 'c4'"
    with pytest.raises(ValueError, match=re.escape(reason)):
        FewShot(shots=(5,)).run(StubEncoder(noisy), {"train": source, "test": source})
    some = FewShot(shots=(1, 5)).run(StubEncoder(noisy), {"train": source, "test": source})
    assert list(some.scores) == ["shot1", "shot1_std", "centroid1", "centroid1_std"]
    assert some.left_out == dict.fromkeys(("accuracy", "shot5", "centroid5"), reason.replace("[5]", "[1, 5]"))
    for options, message in (({"shots": (0,)}, r"shots: \[0\]"), ({"num_draws": 0}, "num_draws: 0"), ({"inverse_l2": 0}, "inverse_l2: 0")):
        with pytest.raises(ValueError, match=message):
            FewShot(**options)
    with pytest.raises(ValueError, match="has no classes"):
        FewShot().check({"train": source, "test": masked([torch.zeros(4, 4, dtype=torch.long)])})
    single = labelled([2] * 24, num_classes=NUM_CLASSES)
    with pytest.raises(ValueError, match="all 24 labelled items are of the class 'c2'; at least two are needed"):
        FewShot().run(StubEncoder(noisy), {"train": single, "test": source})
