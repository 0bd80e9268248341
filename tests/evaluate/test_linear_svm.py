"""Linear SVM, episodes and D2 histograms: truth scores 100, noise chance, scikit-learn and SciPy agree, choices stay off the test items."""

import numpy as np
import pytest
import torch
from evaluate_stubs import NUM_CLASSES, StubEncoder, TableSource, chance, half_width, labelled, labels, noisy, truth
from golden import noise
from scipy.spatial.distance import pdist
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler
from sklearn.svm import LinearSVC

from glpretrain.data import Solids
from glpretrain.encoders import PointTransformer
from glpretrain.evaluate import KNN, DecodedItems, Episodes, Features, LinearProbe, LinearSVM, Result, ShapeHistogram, Sources
from glpretrain.evaluate.points.linear_svm import distance_histograms


def sources(train: int, test: int) -> dict[str, TableSource]:
    scored = labelled(labels(train + test), num_classes=NUM_CLASSES)
    scored.items = scored.items[train:]
    return {"train": labelled(labels(train), num_classes=NUM_CLASSES), "test": scored}


def svm(train: int, test: int, features, **options) -> Result:
    return LinearSVM(**options).run(StubEncoder(features), sources(train, test))


def rows(given: dict[str, TableSource]) -> tuple[np.ndarray, ...]:
    """Features and labels of both sides, Float64[B 8] and Int[B]."""
    found = [Features().labelled(StubEncoder(noisy), DecodedItems(source)) for source in given.values()]
    return tuple(part for side in found for part in (side.cls.double().numpy(), side.labels.numpy()))


@pytest.mark.parametrize("pooling", ["cls", "mean_max"])
def test_truth_scores_100(pooling: str):
    result = svm(100, 40, truth, pooling=pooling)
    assert result.scores["accuracy"].value == 100 and result.scores["accuracy"].n == 40 and 0 < half_width(result.scores["accuracy"]) < 10


def test_noise_scores_chance():
    found = svm(300, 700, chance).scores["accuracy"]
    largest = max(labels(1000)[300:].count(label) for label in range(NUM_CLASSES)) / 7  # a constant answer, in percent
    assert 10 < found.value < largest + 2 * half_width(found)


@pytest.mark.parametrize(
    ("scale", "before"),
    [("standard", StandardScaler()), ("unit", Normalizer()), ("none", FunctionTransformer())],
    ids=lambda value: str(value),
)
def test_scikit_learns_pipeline_agrees(scale: str, before):
    train, train_labels, test, test_labels = rows(sources(120, 300))
    expected = make_pipeline(before, LinearSVC(C=0.1, dual=False, max_iter=5000)).fit(train, train_labels).score(test, test_labels)
    found = svm(120, 300, noisy, scale=scale, inverse_l2=[0.1])
    assert abs(found.scores["accuracy"].value - 100 * expected) <= 100 / 300 and found.chosen == {"inverse_l2": 0.1}  # one item on the edge


def test_the_penalty_is_chosen_on_training_items_and_repeats():
    one, two = svm(120, 100, noisy), svm(120, 100, noisy)
    assert one == two and one.chosen["inverse_l2"] in LinearSVM().inverse_l2
    other = svm(120, 30, noisy)
    assert other.chosen == one.chosen  # whatever the test items are


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inverse_l2": []}, r"inverse_l2: \[\]"),
        ({"inverse_l2": [0.0]}, "inverse_l2"),
        ({"scale": "max"}, "scale: 'max'; accepted: standard, unit, none"),
        ({"pooling": "max"}, "pooling: 'max'; accepted: cls, mean_max"),
        ({"held_out_ratio": 1.0}, r"held_out_ratio: 1\.0"),
    ],
)
def test_bad_settings_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LinearSVM(**options)


def even_sources() -> dict[str, TableSource]:
    train, test = (labelled([index % NUM_CLASSES for index in range(count)], num_classes=NUM_CLASSES) for count in (100, 175))
    test.items = test.items[100:]
    return {"train": train, "test": test}


def episodes(features, **options) -> Result:
    return Episodes(**{"ways": (2, 5), "shots": (1, 10), **options}).run(StubEncoder(features), even_sources())


def test_episodes_of_truth_score_100_and_of_noise_chance():
    scores = episodes(truth).scores
    assert all(scores[f"way{n}_shot{k}"].value == 100 for n in (2, 5) for k in (1, 10)) and scores["way5_shot10_std"].value == 0
    scores = episodes(chance, num_episodes=40).scores
    for name, level in (("way2_shot10", 50), ("way5_shot10", 20)):
        # Episodes share their 100 training and 75 test items, so the interval over episodes does not hold for other items.
        assert abs(scores[name].value - level) < 10 and scores[name].n == 40, name


def test_more_shots_help_and_episodes_repeat():
    scores = episodes(noisy, num_episodes=10).scores
    assert scores["way5_shot1"].value < scores["way5_shot10"].value < 100 and scores["accuracy"] == scores["way2_shot1"]
    assert episodes(noisy, num_episodes=10).scores == scores
    assert scores["way5_shot1"].value < scores["way2_shot1"].value


def test_an_episode_of_all_classes_and_items_is_the_svm():
    found = episodes(noisy, ways=(5,), shots=(20,), num_episodes=2, inverse_l2=0.1)
    train, train_labels, test, test_labels = rows(even_sources())
    machine = make_pipeline(StandardScaler(with_std=False), Normalizer(), LinearSVC(C=0.1, dual=False))
    expected = machine.fit(train, train_labels).score(test, test_labels)
    assert abs(found.scores["accuracy"].value - 100 * expected) <= 100 / 75


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": (1,)}, "numbers from 2"),
        ({"shots": (0,)}, "positive"),
        ({"num_episodes": 1}, "at least 2"),
    ],
)
def test_bad_episodes_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Episodes(**{"ways": (2, 5), **options}).check(even_sources())


def test_episodes_that_cannot_be_drawn_are_left_out_with_the_reason():
    some = episodes(noisy, ways=(2, 6), shots=(20, 21))
    assert list(some.scores) == ["accuracy", "way2_shot20", "way2_shot20_std"]
    assert some.left_out == {
        "way6_shot20": "ways: 6; only 5 classes have test items and 20 training items",
        "way2_shot21": "ways: 2; only 0 classes have test items and 21 training items",
        "way6_shot21": "ways: 6; only 0 classes have test items and 21 training items",
    }
    with pytest.raises(ValueError, match="ways: 6; only 5 classes have test items and 1 training items"):
        episodes(noisy, ways=(6,), shots=(1,))


def small_encoder() -> PointTransformer:
    torch.manual_seed(0)
    return PointTransformer("pos_bert_base", num_points=128, points_per_token=16, group_size=16, embed_dim=24, depth=1, num_heads=3).eval()


def test_histograms_are_those_of_all_pairs():
    clouds = 0.5 * noise(3, 30, 3, name="d2")
    expected = [np.histogram(pdist(cloud.double().numpy()), bins=16, range=(0, 2))[0] / 435 for cloud in clouds]
    # A distance on the edge of a bin may fall to either side in float32.
    assert np.abs(distance_histograms(clouds, num_bins=16).numpy() - np.stack(expected)).sum() < 4 / 435
    turned = clouds[:, :, [1, 2, 0]] + 3.0
    torch.testing.assert_close(distance_histograms(turned, num_bins=16), distance_histograms(clouds, num_bins=16), atol=2 / 435, rtol=0)


def test_histograms_score_alike_whatever_the_encoder_and_clouds_are_scored_by_every_classifier():
    given = Sources({"train": Solids(90, num_points=128), "test": Solids(60, num_points=128, split="test")})
    encoder, ruler = small_encoder(), ShapeHistogram(max_points=64)
    found = ruler.run(encoder, given)
    assert found == ruler.run(PointTransformer("point_mae", num_points=128, embed_dim=24, num_heads=3, depth=1), given)
    assert 100 / 15 < found.scores["accuracy"].value < 100
    for evaluator in (LinearSVM(), KNN(k=(3,)), LinearProbe(inverse_l2=[0.1])):
        assert evaluator.run(encoder, given).scores["accuracy"].n == 60


def test_other_encoders_are_refused():
    solids = {"train": Solids(20, num_points=64), "test": Solids(20, num_points=64)}
    with pytest.raises(ValueError, match="is for image; ShapeHistogram accepts: points"):
        ShapeHistogram().run(StubEncoder(truth), solids)
    with pytest.raises(ValueError, match="train: source 'solids' has items of kind points; encoder 'StubEncoder' accepts: image"):
        LinearSVM().run(StubEncoder(truth), solids)
    with pytest.raises(ValueError, match="train: source 'table' has items of kind image; encoder 'PointTransformer' accepts: points"):
        LinearSVM().run(small_encoder(), sources(20, 10))
    with pytest.raises(ValueError, match="the size of a cloud is its number of points"):
        LinearSVM(features=Features(size=(8, 8))).run(small_encoder(), solids)
    for setting in ({"layer": 0}, {"bf16": True}):
        with pytest.raises(ValueError, match=r"ShapeHistogram: features\..*this evaluator does not use it"):
            ShapeHistogram(features=Features(**setting))
