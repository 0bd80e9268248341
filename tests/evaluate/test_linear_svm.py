"""Linear SVM, episodes and D2 histograms: truth scores 100, noise chance, scikit-learn and SciPy agree, choices stay off the test items."""

import numpy as np
import pytest
import torch
from evaluate_stubs import NUM_CLASSES, StubEncoder, chance, labelled, labels, noisy, truth
from golden import noise
from scipy.spatial.distance import pdist
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler
from sklearn.svm import LinearSVC

from glpretrain.data import Solids
from glpretrain.encoders import PointTransformer
from glpretrain.evaluate import KNN, Episodes, LinearProbe, LinearSVM, Pixels, ShapeHistogram
from glpretrain.evaluate.features import encode
from glpretrain.evaluate.points.shape_histogram import distance_histograms


def svm(train: int, test: int, **options) -> LinearSVM:
    scored = labelled(labels(train + test), num_classes=NUM_CLASSES)
    scored.items = scored.items[train:]
    return LinearSVM(labelled(labels(train), num_classes=NUM_CLASSES), scored, **options)


def rows(evaluator: LinearSVM | Episodes) -> tuple[np.ndarray, ...]:
    """Features and labels of both sides, Float64[B 8] and Int[B]."""
    sides = []
    for source in (evaluator.train, evaluator.test):
        batches = [(batch.labels, output.cls) for batch, output in encode(StubEncoder(noisy), source, fit="crop")]
        sides += [torch.cat([cls for _, cls in batches]).double().numpy(), torch.cat([label for label, _ in batches]).numpy()]
    return tuple(sides)


@pytest.mark.parametrize("pooling", ["cls", "mean_max"])
def test_truth_scores_100(pooling: str):
    result = svm(100, 40, pooling=pooling).run(StubEncoder(truth))
    assert result.scores["accuracy"].value == 100 and result.scores["accuracy"].n == 40 and 0 < result.scores["accuracy"].ci < 10


def test_noise_scores_chance():
    found = svm(300, 700).run(StubEncoder(chance)).scores["accuracy"]
    largest = max(labels(1000)[300:].count(label) for label in range(NUM_CLASSES)) / 7  # a constant answer, in percent
    assert 10 < found.value < largest + 2 * found.ci


@pytest.mark.parametrize(
    ("scale", "before"),
    [("standard", StandardScaler()), ("unit", Normalizer()), ("none", FunctionTransformer())],
    ids=lambda value: str(value),
)
def test_scikit_learns_pipeline_agrees(scale: str, before):
    evaluator = svm(120, 300, scale=scale, inverse_l2=[0.1])
    train, train_labels, test, test_labels = rows(evaluator)
    expected = make_pipeline(before, LinearSVC(C=0.1, dual=False, max_iter=5000)).fit(train, train_labels).score(test, test_labels)
    found = evaluator.run(StubEncoder(noisy))
    assert abs(found.scores["accuracy"].value - 100 * expected) <= 100 / 300 and found.chosen == {"inverse_l2": 0.1}  # one item on the edge


def test_the_penalty_is_chosen_on_training_items_and_repeats():
    evaluator = svm(120, 100)
    one, two = evaluator.run(StubEncoder(noisy)), evaluator.run(StubEncoder(noisy))
    assert one == two and one.chosen["inverse_l2"] in evaluator.inverse_l2
    other = svm(120, 30).run(StubEncoder(noisy))
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
        svm(20, 10, **options)


def episodes(**options) -> Episodes:
    train, test = (labelled([index % NUM_CLASSES for index in range(count)], num_classes=NUM_CLASSES) for count in (100, 175))
    test.items = test.items[100:]
    return Episodes(train, test, **{"ways": (2, 5), "shots": (1, 10), **options})


def test_episodes_of_truth_score_100_and_of_noise_chance():
    scores = episodes().run(StubEncoder(truth)).scores
    assert all(scores[f"way{n}_shot{k}"].value == 100 for n in (2, 5) for k in (1, 10)) and scores["way5_shot10_std"].value == 0
    scores = episodes(num_episodes=40).run(StubEncoder(chance)).scores
    for name, level in (("way2_shot10", 50), ("way5_shot10", 20)):
        # Episodes share their 100 training and 75 test items, so the interval over episodes does not hold for other items.
        assert abs(scores[name].value - level) < 10 and scores[name].n == 40, name


def test_more_shots_help_and_episodes_repeat():
    scores = episodes(num_episodes=10).run(StubEncoder(noisy)).scores
    assert scores["way5_shot1"].value < scores["way5_shot10"].value < 100 and scores["accuracy"] == scores["way2_shot1"]
    assert episodes(num_episodes=10).run(StubEncoder(noisy)).scores == scores
    assert scores["way5_shot1"].value < scores["way2_shot1"].value


def test_an_episode_of_all_classes_and_items_is_the_svm():
    evaluator = episodes(ways=(5,), shots=(20,), num_episodes=2, inverse_l2=0.1)
    train, train_labels, test, test_labels = rows(evaluator)
    machine = make_pipeline(StandardScaler(with_std=False), Normalizer(), LinearSVC(C=0.1, dual=False))
    expected = machine.fit(train, train_labels).score(test, test_labels)
    assert abs(evaluator.run(StubEncoder(noisy)).scores["accuracy"].value - 100 * expected) <= 100 / 75


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": (6,)}, "numbers from 2 to 5"),
        ({"ways": (1,)}, "numbers from 2"),
        ({"shots": (0,)}, "positive"),
        ({"num_episodes": 1}, "at least 2"),
    ],
)
def test_bad_episodes_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        episodes(**options)
    with pytest.raises(ValueError, match=r"class .* has 20 training items"):
        episodes(shots=(21,)).run(StubEncoder(noisy))


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
    train, test = Pixels(Solids(90, num_points=128)), Pixels(Solids(60, num_points=128, split="test"))
    encoder = small_encoder()
    found = ShapeHistogram(train, test, max_points=64).run(encoder)
    assert found == ShapeHistogram(train, test, max_points=64).run(
        PointTransformer("point_mae", num_points=128, embed_dim=24, num_heads=3, depth=1)
    )
    assert 100 / 15 < found.scores["accuracy"].value < 100
    for evaluator in (LinearSVM(train, test), KNN(train, test, k=(3,)), LinearProbe(train, test, inverse_l2=[0.1])):
        assert evaluator.run(encoder).scores["accuracy"].n == 60


def test_other_encoders_are_refused():
    solids = Solids(20, num_points=64)
    with pytest.raises(ValueError, match="is for image; this evaluator accepts: points"):
        ShapeHistogram(solids, solids).run(StubEncoder(truth))
    with pytest.raises(ValueError, match="the encoder accepts images"):
        LinearSVM(solids, solids).run(StubEncoder(truth))
    with pytest.raises(ValueError, match="the encoder accepts clouds of points"):
        svm(20, 10).run(small_encoder())
    with pytest.raises(ValueError, match="accepted for points: their number"):
        LinearSVM(solids, solids, image_size=(8, 8)).run(small_encoder())
