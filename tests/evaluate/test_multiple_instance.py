"""Attention over bags: the formula, what it may not depend on, and whether it finds what decides a bag's label."""

import numpy as np
import pytest
import torch
from evaluate_stubs import StubEncoder, TableSource, chance, labelled, truth

from glpretrain.core import keys
from glpretrain.evaluate import Result, SlideAttention
from glpretrain.evaluate.slides import multiple_instance
from glpretrain.evaluate.slides.multiple_instance import GatedAttention, balanced_weights, fit_gated_attention

D = 7


def bags_of(count: int, *, seed: int) -> tuple[list[torch.Tensor], list[int]]:
    """Bags of 11 to 17 rows; those of class 1 have two rows, numbers 3 and 4, that lie elsewhere."""
    bags, labels = [], []
    for number in range(count):
        key = keys.fold_in(torch.tensor(seed), number)
        bag = keys.normal(key, 11 + number % 7, D)
        if number % 2:
            bag[3:5] += torch.tensor([4.0, -4.0, 0.0, 0.0, 0.0, 0.0, 0.0])
        bags.append(bag)
        labels.append(number % 2)
    return bags, labels


def test_it_is_the_gated_attention_of_the_paper() -> None:
    module = GatedAttention(D, num_classes=3, hidden_dim=5).eval()
    bag = torch.sin(torch.arange(6.0 * D)).unflatten(0, (6, D))
    logits, attention = module(bag)
    weights = {name: value.detach().double().numpy() for name, value in module.state_dict().items()}
    rows = bag.double().numpy()
    content = np.tanh(rows @ weights["content.weight"].T + weights["content.bias"])
    gate = 1 / (1 + np.exp(-(rows @ weights["gate.weight"].T + weights["gate.bias"])))
    scores = np.exp((content * gate) @ weights["score.weight"][0])
    expected = scores / scores.sum()
    np.testing.assert_allclose(attention.detach().numpy(), expected, rtol=1e-5)
    pooled = (expected[:, None] * rows).sum(axis=0)
    np.testing.assert_allclose(
        logits.detach().numpy(), weights["classifier.weight"] @ pooled + weights["classifier.bias"], rtol=1e-4, atol=1e-6
    )


@pytest.mark.slow
def test_it_finds_the_rows_that_decide_and_classifies_new_bags() -> None:
    module = fit_gated_attention(*bags_of(30, seed=1), epochs=60, lr=2e-3)
    bags, labels = bags_of(20, seed=2)
    right = 0
    for bag, label in zip(bags, labels, strict=True):
        logits, attention = module(bag)
        right += int(logits.argmax()) == label
        assert attention.sum().item() == pytest.approx(1.0, abs=1e-5)
        if label:
            assert set(attention.topk(2).indices.tolist()) == {3, 4} and attention[3:5].sum() > 0.5
    assert right >= 19


def test_order_of_rows_and_units_do_not_count() -> None:
    bags, labels = bags_of(12, seed=3)
    module = fit_gated_attention(bags, labels, epochs=3)
    turned = torch.arange(len(bags[1]) - 1, -1, -1)
    for one, other in zip(module(bags[1]), module(bags[1][turned]), strict=True):
        torch.testing.assert_close(one if one.shape[0] == 2 else one[turned], other)
    scaled = fit_gated_attention([3 * bag + 5 for bag in bags], labels, epochs=3)
    torch.testing.assert_close(module(bags[1])[0], scaled(3 * bags[1] + 5)[0], rtol=1e-3, atol=1e-4)


def test_the_same_seed_gives_the_same_and_nobody_elses_draws_change() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = (fit_gated_attention(*bags_of(6, seed=4), epochs=2, seed=9) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one, other) for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_bad_bags_are_named() -> None:
    bags, labels = bags_of(4, seed=1)
    with pytest.raises(ValueError, match="labels: 3 for 4 bags"):
        fit_gated_attention(bags, labels[:3])
    with pytest.raises(ValueError, match="bags: number 4 has no rows"):
        fit_gated_attention([*bags, torch.zeros(0, D)], [*labels, 1])
    with pytest.raises(ValueError, match=r"labels: \[0\]; accepted: at least two classes"):
        fit_gated_attention(bags, [0, 0, 0, 0])


def test_classes_weigh_alike_however_many_bags_they_have() -> None:
    weights = balanced_weights(torch.tensor([0, 0, 0, 2]), num_classes=3)
    assert weights[0] * 3 == weights[2] and (weights[0] * 3 + weights[2]) / 4 == 1.0
    bags, labels = bags_of(8, seed=3)
    few = [number for number in range(8) if labels[number] == 0 or number == 1]
    plain, weighted = (
        fit_gated_attention([bags[number] for number in few], [labels[number] for number in few], epochs=15, lr=1e-3, class_weights=weights)
        for weights in (False, True)
    )
    rare, common = bags[3], bags[2]
    assert weighted(rare)[0].softmax(dim=0)[1] > plain(rare)[0].softmax(dim=0)[1]
    assert weighted(common)[0].softmax(dim=0)[1] > plain(common)[0].softmax(dim=0)[1]


def test_the_fit_stops_where_held_out_bags_are_no_longer_better(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, int]] = []
    compute = multiple_instance._loss

    def noted(attention, bags, labels, number, *, weight):
        seen.append((attention.training, number))
        return compute(attention, bags, labels, number, weight=weight)

    monkeypatch.setattr(multiple_instance, "_loss", noted)
    bags, _ = bags_of(12, seed=6)
    labels = [number // 2 % 2 for number in range(12)]  # no bag says its label, so that held-out bags are soon no longer better
    options = {"held_out_ratio": 0.3, "patience": 3, "min_epochs": 5, "lr": 2e-2}
    stopped = fit_gated_attention(bags, labels, epochs=200, **options)
    held_out = {number for training, number in seen if not training}
    fitted = {number for training, number in seen if training}
    assert len(held_out) == 4 and not held_out & fitted and held_out | fitted == set(range(12))
    epochs = len(seen) // 12
    assert 5 <= epochs < 200
    again = fit_gated_attention(bags, labels, epochs=epochs - 3, **{**options, "patience": 100})
    assert all(torch.equal(one, other) for one, other in zip(stopped.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("given", [{"held_out_ratio": 1.0}, {"patience": 0}])
def test_settings_of_the_stop_are_checked(given: dict) -> None:
    with pytest.raises(ValueError, match="accepted: a share below 1, and at least 1 epoch"):
        fit_gated_attention(*bags_of(4, seed=1), **given)
    with pytest.raises(ValueError, match="no class has two bags"):
        fit_gated_attention(*bags_of(2, seed=1), held_out_ratio=0.5)


class Slides(TableSource):
    """Tiles of two classes, five to a slide."""

    @property
    def groups(self) -> list[str]:
        return [f"slide {index // 5}" for index in range(len(self))]


def tiles(count: int, *, skip: int = 0, kinds: int = 2) -> Slides:
    source = labelled([index // 5 % kinds for index in range(skip + count)], num_classes=kinds)
    return Slides(source.items[skip:], classes=source.classes)


def run(features, *, kinds: int = 2, **options) -> Result:
    sources = {"train": tiles(150, kinds=kinds), "test": tiles(90, skip=150, kinds=kinds)}
    return SlideAttention(epochs=20, lr=5e-3, hidden_dim=8, **options).run(StubEncoder(features), sources)


def test_slides_of_features_that_know_the_truth_score_100() -> None:
    result = run(truth)
    assert {name: (score.value, score.n) for name, score in result.scores.items()} == dict.fromkeys(
        ("accuracy", "balanced_accuracy", "auc"), (100.0, 18)
    )


def test_slides_of_noise_score_chance() -> None:
    accuracy = run(chance).scores["accuracy"]
    assert accuracy.low < 50.0 < accuracy.high


def test_an_auc_of_three_classes_is_left_out() -> None:
    result = run(truth, kinds=3)
    assert result.scores["accuracy"].value == 100.0 and "an AUC is of two" in result.left_out["auc"]


def test_tiles_that_belong_to_no_slide_are_refused() -> None:
    source = labelled([0, 1] * 6, num_classes=2)
    with pytest.raises(ValueError, match="its items belong to no slides; accepted: tiles"):
        SlideAttention().run(StubEncoder(truth), {"train": source, "test": source})
    mixed = Slides(labelled([0, 1] * 10, num_classes=2).items, classes=["c0", "c1"])
    with pytest.raises(ValueError, match="the tiles of slide 0 are of 2 classes; a slide has one"):
        SlideAttention().run(StubEncoder(truth), {"train": mixed, "test": tiles(20)})
