"""k-NN and linear probe: truth scores 100, noise scores chance, scikit-learn agrees."""

import logging
import time

import numpy as np
import PIL.Image
import pytest
import torch
from evaluate_stubs import NUM_CLASSES, StubEncoder, chance, half_width, labelled, labels, masked, noise, noisy, output, position_of, truth
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

from glpretrain.core.types import EncoderOutput
from glpretrain.evaluate import (
    KNN,
    CrossValidatedProbe,
    DecodedItems,
    FeatureCache,
    Features,
    LinearProbe,
    default_evaluators,
    default_sources,
)
from glpretrain.evaluate.cls.knn import knn_predict
from glpretrain.evaluate.metrics.intervals import mean_interval, rate_interval
from glpretrain.evaluate.probes import dealt
from glpretrain.evaluate.progress import tracked
from glpretrain.evaluate.rows import LabelledFeatures


def features_of(encoder, source) -> LabelledFeatures:
    return Features().labelled(encoder, DecodedItems(source))


def rows(cls: Tensor, numbers: Tensor) -> LabelledFeatures:
    return LabelledFeatures(cls, numbers, torch.arange(len(cls)))


@pytest.mark.parametrize("evaluator", [KNN, LinearProbe])
def test_truth_scores_100(evaluator):
    sources = {"train": labelled(labels(61), num_classes=NUM_CLASSES), "test": labelled(labels(43), num_classes=NUM_CLASSES)}
    scores = evaluator().run(StubEncoder(truth), sources).scores
    assert scores["accuracy"].value == 100
    assert 0 < half_width(scores["accuracy"]) < 10
    assert scores["accuracy"].n == 43


@pytest.mark.parametrize("evaluator", [KNN, LinearProbe])
def test_noise_scores_chance_within_the_binomial_interval(evaluator):
    train = labelled([index % NUM_CLASSES for index in range(500)], num_classes=NUM_CLASSES)
    test = labelled([index % NUM_CLASSES for index in range(1100)], num_classes=NUM_CLASSES)
    test.items = test.items[500:]  # other features than those of train
    scores = evaluator().run(StubEncoder(chance), {"train": train, "test": test}).scores
    assert abs(scores["accuracy"].value - 20) < 4 * 100 * np.sqrt(0.2 * 0.8 / 600)  # 4 standard deviations


def test_knn_agrees_with_scikit_learn_for_every_k():
    train, test = labelled(labels(211), num_classes=NUM_CLASSES), labelled(labels(503)[211:], num_classes=NUM_CLASSES)
    encoder = StubEncoder(noisy)
    queries = noise(torch.arange(300), 8, seed=9) + functional.one_hot(torch.arange(300) % NUM_CLASSES, 8)
    voters = features_of(encoder, train)
    for k, predicted in zip((1, 7, 20), knn_predict(voters, queries, k=(1, 7, 20), temp=0.07), strict=True):
        reference = KNeighborsClassifier(
            n_neighbors=k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
        ).fit(voters.cls.numpy(), voters.labels.numpy())
        assert (reference.predict(queries.numpy()) == predicted.numpy()).all()
    scores = KNN(k=(1, 7, 20)).run(encoder, {"train": train, "test": test}).scores
    assert scores["accuracy"] == scores["k20"]
    assert 30 < scores["k20"].value < 100  # the features are neither noise nor the truth


def test_many_voters_are_looked_at_in_smaller_chunks(monkeypatch):
    voters = rows(noise(torch.arange(211), 8, seed=9), torch.arange(211) % NUM_CLASSES)
    queries = noise(torch.arange(83), 8, seed=10)
    whole = knn_predict(voters, queries, k=(1, 7, 200), temp=0.07)
    monkeypatch.setattr("glpretrain.evaluate.cls.knn._TABLE_CELLS", 1000)
    for some, all_at_once in zip(knn_predict(voters, queries, k=(1, 7, 200), temp=0.07), whole, strict=True):
        assert torch.equal(some, all_at_once)


def test_votes_do_not_overflow_at_a_small_temperature():
    voters = rows(torch.eye(3), torch.tensor([0, 1, 2]))
    (predicted,) = knn_predict(voters, torch.tensor([[0.1, 0.9, 0.2], [0.0, 0.3, 1.0]]), k=(3,), temp=1e-3)
    assert predicted.tolist() == [1, 2]


def test_interval_of_a_rate_agrees_with_wilson_by_hand():
    assert rate_interval(0.5, count=100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # the textbook's
    assert rate_interval(1.0, count=38) == (pytest.approx(0.9082, abs=1e-4), 1.0)
    assert rate_interval(0.0, count=38) == (0.0, pytest.approx(0.0918, abs=1e-4))
    assert rate_interval(1.0, count=1) == (pytest.approx(0.2065, abs=1e-4), 1.0)


def test_linear_probe_agrees_with_a_pipeline_of_scikit_learn():
    scales = torch.logspace(0, 2, 8)

    def features(items: Tensor) -> EncoderOutput:
        return output(noisy(items).cls * scales + 10 * scales)

    train, test = labelled(labels(400), num_classes=NUM_CLASSES), labelled(labels(700), num_classes=NUM_CLASSES)
    test.items = test.items[400:]
    encoder = StubEncoder(features)
    scores, chosen, _ = LinearProbe().run(encoder, {"train": train, "test": test})
    fitted, queries = features_of(encoder, train), features_of(encoder, test)
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=chosen["inverse_l2"], max_iter=500))
    rate = reference.fit(fitted.cls.numpy(), fitted.labels.numpy()).score(queries.cls.numpy(), queries.labels.numpy())
    assert scores["accuracy"].value == pytest.approx(100 * rate, abs=0.7)  # two of 300 items: one takes n - 1 in the deviation, the other n
    assert 30 < scores["accuracy"].value < 100


def test_cross_validation_scores_every_item_by_probes_that_did_not_see_it():
    source = labelled(labels(60), num_classes=NUM_CLASSES)
    encoder = StubEncoder(noisy)
    found, chosen, _ = CrossValidatedProbe(folds=4, inverse_l2=[0.1]).run(encoder, {"test": source})
    cls, numbers = features_of(encoder, source).cls, features_of(encoder, source).labels
    right = torch.zeros(60, dtype=torch.bool)
    place, of_class = dealt(numbers, None, seed=120)
    assert of_class.tolist() == numbers.bincount()[numbers].tolist()
    for fold in range(4):
        queries = (place % 4 == fold).nonzero()[:, 0]
        assert ((numbers[queries].bincount(minlength=NUM_CLASSES) - numbers.bincount() / 4).abs() < 1).all()
        others = torch.tensor([position for position in range(60) if position not in queries])
        mean, std = cls[others].mean(dim=0), cls[others].std(dim=0)
        probe = LogisticRegression(C=0.1, max_iter=500).fit(((cls[others] - mean) / std).numpy(), numbers[others].numpy())
        right[queries] = torch.from_numpy(probe.predict(((cls[queries] - mean) / std).numpy())) == numbers[queries]
    assert found["accuracy"].value == pytest.approx(100 * right.float().mean().item()) and found["accuracy"].n == 60
    assert 20 < found["accuracy"].value < 100 and chosen == {"inverse_l2": pytest.approx(0.1)}
    with pytest.raises(ValueError, match="folds: 1; accepted: at least 2"):
        CrossValidatedProbe(folds=1)


def test_interval_of_a_mean_is_the_textbook_one():
    assert mean_interval(torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(1.96 * (5 / 3) ** 0.5 / 2, rel=1e-4)
    assert mean_interval(torch.tensor([1.0])) == float("inf")


def test_linear_probe_is_fast_enough():
    position = torch.arange(3500)
    # Mixed so that the features are correlated, as real ones are: independent ones converge in a few iterations.
    mixing = torch.sin(torch.arange(96.0)[:, None] * torch.arange(96.0) * 0.37) * torch.logspace(0, -2, 96)
    features = (noise(position, 96, seed=4) + 3 * functional.one_hot(position % 20, 96)) @ mixing
    train = labelled([p % 20 for p in range(3000)], num_classes=20)
    test = labelled([p % 20 for p in range(3500)], num_classes=20)
    test.items = test.items[3000:]
    start = time.perf_counter()
    encoder = StubEncoder(lambda items: output(features[position_of(items)]))
    scores = LinearProbe().run(encoder, {"train": train, "test": test}).scores
    assert scores["accuracy"].value > 25  # chance is 5
    assert time.perf_counter() - start < 20  # 5 s on an idle core; the bound leaves room for a busy one


def test_a_run_leaves_modes_and_gradients_alone_and_decodes_once():
    source = labelled(labels(23), num_classes=NUM_CLASSES)
    encoder = StubEncoder(truth).train()
    encoder.frozen.eval()
    items = DecodedItems(source)
    first = Features(batch_size=7).labelled(encoder, items)
    second = Features(batch_size=7).labelled(encoder, items)
    assert encoder.training and encoder.probe.training and not encoder.frozen.training
    assert not any(encoder.modes)
    assert source.num_reads == 23
    assert torch.equal(first.cls, second.cls) and first.labels.tolist() == labels(23)


def test_modes_come_back_when_the_encoder_fails():
    def failing(items: Tensor) -> EncoderOutput:
        raise RuntimeError("no")

    encoder = StubEncoder(failing).train()
    with pytest.raises(RuntimeError, match="no"):
        features_of(encoder, labelled([0], num_classes=1))
    assert encoder.training


def test_unreadable_items_are_left_out_with_a_warning(caplog):
    source = labelled(labels(11), num_classes=NUM_CLASSES)
    source.unreadable = {2, 5}
    with caplog.at_level(logging.WARNING):
        features = Features(batch_size=3).labelled(StubEncoder(truth), DecodedItems(source))
    assert features.labels.tolist() == [label for index, label in enumerate(labels(11)) if index not in {2, 5}]
    assert "item 2: truncated" in caplog.text


def test_items_without_a_label_do_not_count():
    source = labelled(labels(11), num_classes=NUM_CLASSES)
    source.items[3] = source.items[3]._replace(label=-1)
    features = Features(batch_size=3).labelled(StubEncoder(truth), DecodedItems(source))
    assert features.index.tolist() == [0, 1, 2, *range(4, 11)] and features.labels.min() >= 0
    assert KNN(k=(1,)).run(StubEncoder(truth), {"train": source, "test": source}).scores["accuracy"].n == 10


def test_items_are_cropped_in_the_middle_for_classification():
    source = labelled([3], num_classes=5)
    image = torch.zeros(3, 8, 20, dtype=torch.uint8)
    image[:, :, 6:14] = 200  # the centre square; short side 8 -> 4 halves it
    source.items[0] = source.items[0]._replace(values=image)
    encoder = StubEncoder(lambda items: output(items[:, 0, :2, :4].flatten(1)))
    ((batch, _),) = Features().encode(encoder, DecodedItems(source), resize="crop")
    assert batch.items.shape == (1, 3, 4, 4)
    # The antialiased filter reaches into the dark beside the square only from its outer columns.
    assert (batch.items[..., 1:3].int() - 200).abs().max() <= 12


@pytest.mark.parametrize("sides", [(375, 500), (500, 333), (301, 301), (40, 57), (229, 224)])
@pytest.mark.parametrize("size", [224, 64])
def test_the_inner_crop_is_that_of_torchvision_to_the_last_bit(sides, size):
    values = torch.arange(3 * sides[0] * sides[1]).reshape(*sides, 3)
    image = ((values * 0.013).sin() * 127 + 128).to(torch.uint8)  # [H W C], as decoders leave it in memory
    resized = 256 if size == 224 else 73  # 64 x 256 / 224 is 73.1
    expected = Compose([Resize(resized, interpolation=InterpolationMode.BICUBIC), CenterCrop(size), PILToTensor()])
    source = labelled([3], num_classes=5)
    source.items[0] = source.items[0]._replace(values=image.permute(2, 0, 1))
    encoder = StubEncoder(lambda items: output(items.mean(dim=(1, 2, 3))[:, None]), size=size)
    features = Features(crop="inner")
    ((batch, _),) = features.encode(encoder, DecodedItems(source), resize=features.cropping)
    assert torch.equal(batch.items[0], expected(PIL.Image.fromarray(image.numpy())))


def test_what_is_seen_of_an_image_is_a_setting_and_has_its_own_features():
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, :, :2] = 255  # at the border, which an inner crop does not show: it cuts 4 of 73 columns
    source = labelled([0], num_classes=2)
    source.items[0] = source.items[0]._replace(values=image)
    encoder = StubEncoder(lambda items: output(items.mean(dim=(1, 2))), size=64)
    cache = FeatureCache(encoder)
    whole, inner = (Features(crop=crop).labelled(encoder, DecodedItems(source), cache).cls[0] for crop in ("short_side", "inner"))
    assert whole[:2].min() == 255 and inner.max() < 20
    with pytest.raises(ValueError, match=r"features\.crop: 'centre'; accepted: short_side, inner"):
        Features(crop="centre")


def test_a_subset_is_fixed_and_holds_every_class():
    source = labelled([index % NUM_CLASSES for index in range(1000)], num_classes=NUM_CLASSES)
    items = DecodedItems(source, max_items=100)
    assert items.indices == DecodedItems(source, max_items=100).indices
    counts = Features().labelled(StubEncoder(truth), items).labels.bincount(minlength=NUM_CLASSES)
    assert counts.sum() == 100 and counts.min() > 5


def test_bad_input_is_named():
    small = labelled(labels(9), num_classes=NUM_CLASSES)
    reason = "k: [1, 10]; accepted: numbers from 1 to 9, the training items"
    some = KNN(k=(1, 10)).run(StubEncoder(truth), {"train": small, "test": small})
    assert list(some.scores) == ["k1"] and some.left_out == {"accuracy": reason, "k10": reason}
    with pytest.raises(ValueError, match=r"k: \[10\]; accepted: numbers from 1 to 9"):
        KNN(k=(10,)).run(StubEncoder(truth), {"train": small, "test": small})
    with pytest.raises(ValueError, match="has no classes"):
        KNN().check({"train": masked([torch.zeros(4, 4, dtype=torch.long)]), "test": small})
    with pytest.raises(ValueError, match=r"KNN: needs the sources \['train'\]; given: \['masked', 'test'\]"):
        KNN().check({"test": small, "masked": small})
    with pytest.raises(ValueError, match=r"KNN: k: \[0, 3\]; accepted: positive numbers"):
        KNN(k=(0, 3))
    with pytest.raises(ValueError, match="KNN: temp: 0; accepted: a positive number"):
        KNN(temp=0)
    with pytest.raises(ValueError, match=r"features\.batch_size: 0; accepted: a positive number"):
        Features(batch_size=0)
    with pytest.raises(ValueError, match="max_items: 0"):
        DecodedItems(small, max_items=0)
    grey = labelled([0], num_classes=1)
    grey.items[0] = grey.items[0]._replace(values=torch.zeros(1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="item 0: an image has 1 channels; the encoder needs 3"):
        features_of(StubEncoder(truth), grey)
    nan = StubEncoder(lambda items: output(torch.full((len(items), 8), torch.nan)))
    with pytest.raises(ValueError, match="not finite"):
        KNN(k=(1,)).run(nan, {"train": small, "test": small})


def test_features_are_float32_and_close_under_bf16():
    weight = torch.sin(torch.arange(8.0 * 8).reshape(8, 8))

    def features(items: Tensor) -> EncoderOutput:
        return output(noise(position_of(items), 8, seed=6) @ weight)

    items = DecodedItems(labelled(labels(11), num_classes=NUM_CLASSES))
    exact, rounded = (Features(bf16=bf16).labelled(StubEncoder(features), items).cls for bf16 in (False, True))
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0, atol=0.06)  # 8 products of size 1 to 3, each rounded to 2**-8


def test_the_bar_passes_every_element_on_and_stays_quiet_without_a_terminal(monkeypatch, capfd):
    monkeypatch.setattr("glpretrain.evaluate.progress._PATIENCE", 0.0)
    assert list(tracked(range(7), total=7, description="counting")) == list(range(7))
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    assert list(tracked(range(7), total=7, description="counting")) == list(range(7))
    assert "counting" in capfd.readouterr().err


def test_tiny_sets_are_scored_with_fewer_neighbours():
    train = labelled(labels(11), num_classes=NUM_CLASSES)
    sources = default_sources((train, train), masked([torch.zeros(4, 4, dtype=torch.long)]))
    assert set(default_evaluators("image")["knn"].run(StubEncoder(truth), sources).scores) == {"accuracy", "k10"}
    few = labelled(labels(7), num_classes=NUM_CLASSES)
    assert set(KNN().run(StubEncoder(truth), {"train": few, "test": few}).scores) == {"accuracy", "k1"}
    enough = labelled(labels(20), num_classes=NUM_CLASSES)
    assert set(KNN().run(StubEncoder(truth), {"train": enough, "test": few}).scores) == {"accuracy", "k10", "k20"}


def test_default_sources_are_fixed_parts_of_large_ones():
    many = labelled([index % NUM_CLASSES for index in range(2100)], num_classes=NUM_CLASSES)
    sources = default_sources((many, many), masked([torch.zeros(4, 4).long()] * 410))
    assert [len(sources[role]) for role in ("train", "test", "masked")] == [2000, 1000, 400]


def test_protocol_is_every_setting():
    assert KNN(k=(1, 5), features=Features(size=8)).protocol == {
        "k": (1, 5), "temp": 0.07,
        "features": {"size": 8, "layer": -1, "tokens": "output", "crop": "short_side", "batch_size": 64, "bf16": False},
    }  # fmt: skip
