"""Linear heads trained side by side: truth scores 100, noise chance, each head is the one torch trains alone, DINOv2's numbers come out."""

import time

import numpy as np
import pytest
import torch
from evaluate_stubs import (
    NUM_CLASSES,
    StubEncoder,
    TableSource,
    chance,
    half_width,
    labelled,
    labels,
    noise,
    noisy,
    output,
    position_of,
    truth,
)
from golden import assert_matches, load, wave
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional

from glpretrain.core.types import EncoderOutput
from glpretrain.encoders import ViT
from glpretrain.evaluate import DecodedItems, FeatureCache, Features, LinearSweep, Result, Sources
from glpretrain.evaluate.cls.linear_sweep import Heads, Kind, initial_heads, linear_input, train_heads, training_order
from glpretrain.evaluate.probes import stratified_split
from glpretrain.evaluate.rows import LabelledFeatures


def sources(train: int, test: int) -> dict[str, TableSource]:
    """Items 0 to `train` learn, the `test` next ones are scored."""
    scored = labelled(labels(train + test), num_classes=NUM_CLASSES)
    scored.items = scored.items[train:]
    return {"train": labelled(labels(train), num_classes=NUM_CLASSES), "test": scored}


def sweep(train: int, test: int, features, **options) -> Result:
    return LinearSweep(num_blocks=(1,), **{"num_steps": 200, **options}).run(StubEncoder(features), sources(train, test))


def cls_of(source: TableSource) -> Tensor:
    return Features().labelled(StubEncoder(noisy), DecodedItems(source)).cls


def rows(cls: Tensor, numbers: Tensor) -> LabelledFeatures:
    return LabelledFeatures(cls, numbers, torch.arange(len(cls)))


def test_truth_scores_100():
    score = sweep(61, 43, truth).scores["accuracy"]
    assert score.value == 100 and 0 < half_width(score) < 10 and score.n == 43


def test_noise_scores_chance_within_the_binomial_interval():
    score = sweep(500, 600, chance).scores["accuracy"]
    shares = np.bincount(labels(1100)[500:]) / 600  # a classifier that knows nothing lies between the rarest and the commonest class
    slack = 4 * np.sqrt(0.2 * 0.8 / 600)  # 4 standard deviations
    assert 100 * (shares.min() - slack) < score.value < 100 * (shares.max() + slack)


def test_every_head_is_the_one_that_torch_trains_alone():
    train = rows(wave(37, 7), torch.arange(37) ** 2 % 11 % 3)
    order = training_order(37, num_steps=50, items_per_step=16)
    rates = torch.tensor([1e-3, 0.1, 2.0])
    start = initial_heads(7, num_heads=3, num_classes=3)
    together = train_heads(start, train, learning_rates=rates, order=order)
    for number, rate in enumerate(rates.tolist()):
        alone = torch.nn.Linear(7, 3)
        alone.weight.data, alone.bias.data = start.weight[:, number].T.clone(), start.bias[number].clone()
        optimizer = torch.optim.SGD(alone.parameters(), lr=rate, momentum=0.9, weight_decay=0)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(order), eta_min=0)
        for items in order:
            optimizer.zero_grad()
            functional.cross_entropy(alone(train.cls[items]), train.labels[items]).backward()
            optimizer.step()
            scheduler.step()
        # 50 steps of float32 sums in another order.
        torch.testing.assert_close(together.weight[:, number], alone.weight.detach().T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.bias[number], alone.bias.detach(), rtol=1e-4, atol=1e-5)


def test_heads_agree_with_official_code():
    reference = load("dinov2_linear")
    blocks = [wave(11, 3, phase=block) for block in range(4)]
    joined = torch.cat([*blocks, wave(11, 2, 3, phase=13).mean(dim=1)], dim=1)
    truth_labels = torch.arange(11) ** 2 % 7 % 4
    order = (6 * torch.arange(5)[:, None] + torch.arange(6)) % 11
    rates = torch.tensor([0.4, 8.0]) * 64 / 256
    assert_matches(rates, reference["learning_rates"][0])
    kinds = [Kind(1, False), Kind(1, True), Kind(4, False), Kind(4, True)]
    expected = iter(reference["heads"])
    for number, kind in enumerate(kinds):
        features = linear_input(joined, num_blocks=4, kind=kind)
        weight = wave(features.shape[1], 4, phase=20 + number, scale=0.1)
        start = Heads(weight[:, None].repeat(1, 2, 1), torch.zeros(2, 4))
        trained = train_heads(start, rows(features, truth_labels), learning_rates=rates, order=order)
        for rate in range(2):
            official = next(expected)
            assert_matches(trained.weight[:, rate], official["weight"], atol=1e-5)  # both in float32
            assert_matches(trained.bias[rate], official["bias"], atol=1e-5)


def test_converged_head_classifies_as_logistic_regression():
    train = Features().labelled(StubEncoder(noisy), DecodedItems(labelled(labels(300), num_classes=NUM_CLASSES)))
    heads = initial_heads(8, num_heads=1, num_classes=NUM_CLASSES)
    order = training_order(300, num_steps=1500, items_per_step=300)  # every step sees everything
    heads = train_heads(heads, train, learning_rates=torch.tensor([0.5]), order=order)
    reference = LogisticRegression(C=1e6, max_iter=5000).fit(train.cls.numpy(), train.labels.numpy())
    queries = noise(torch.arange(2000), 8, seed=9) + functional.one_hot(torch.arange(2000) % NUM_CLASSES, 8)
    same = heads.logits(queries)[:, 0].argmax(dim=-1).numpy() == reference.predict(queries.numpy())
    assert same.mean() > 0.99  # both minimise one convex loss; 1 % lies where two classes are as likely to 0.01


def test_accuracy_is_that_of_logistic_regression_within_the_interval():
    score = sweep(400, 300, noisy, num_steps=500).scores["accuracy"]
    cls = torch.cat([cls_of(source) for source in sources(400, 300).values()])
    reference = LogisticRegression(C=1.0, max_iter=500).fit(cls[:400].numpy(), labels(400))
    assert abs(score.value - 100 * reference.score(cls[400:].numpy(), labels(700)[400:])) < half_width(score)
    assert 30 < score.value < 100


def test_the_best_on_held_out_items_is_chosen_and_the_scored_ones_have_no_say():
    chosen = sweep(400, 50, noisy, learning_rates=(1e-4, 0.1, 0.5)).chosen
    held_out, fitted = stratified_split(torch.tensor(labels(400)), None, ratio=0.2)
    assert len(held_out) == 81 and sorted([*held_out.tolist(), *fitted.tolist()]) == list(range(400))
    train = cls_of(sources(400, 50)["train"])
    part = rows(train[fitted], torch.tensor(labels(400))[fitted])
    rates = []
    for rate in (1e-4, 0.1, 0.5):
        heads = initial_heads(8, num_heads=1, num_classes=NUM_CLASSES)
        order = training_order(len(fitted), num_steps=200, items_per_step=128)
        heads = train_heads(heads, part, learning_rates=torch.tensor([rate * 128 / 256]), order=order)
        rates.append((heads.logits(train[held_out])[:, 0].argmax(dim=1) == torch.tensor(labels(400))[held_out]).float().mean().item())
    assert rates[(1e-4, 0.1, 0.5).index(chosen["learning_rate"])] >= max(rates[0], rates[1], rates[2]) - 1e-6
    assert rates[0] < max(rates)
    others = sources(400, 50)
    others["test"].items = [item._replace(label=0) for item in others["test"].items]
    evaluator = LinearSweep(num_blocks=(1,), num_steps=200, learning_rates=(1e-4, 0.1, 0.5))
    assert evaluator.run(StubEncoder(noisy), others).chosen == chosen


def test_kinds_of_features_are_those_of_the_blocks():
    model = ViT("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=12, depth=4, num_heads=3).eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.data = torch.sin(torch.arange(parameter.numel()) * 1.7 + number).reshape(parameter.shape) * 0.3
    source = labelled(labels(13), num_classes=NUM_CLASSES, size=8)
    source.items[3] = source.items[3]._replace(label=-1)
    evaluator = LinearSweep(num_blocks=(1, 4), num_steps=3, held_out_ratio=0.5)
    cache, items = FeatureCache(model), DecodedItems(source)
    every = evaluator._rows(model, items, cache)
    features = {kind: evaluator._seen(every, kind) for kind in evaluator._kinds}
    kept = [index for index in range(13) if index != 3]
    by_layer = [Features(layer=layer).labelled(model, items).cls for layer in range(4)]
    mean_patch = torch.cat([given.patches.mean(dim=1) for _, given in Features().encode(model, items, resize="crop")])[kept]
    assert torch.equal(features[Kind(1, False)].cls, by_layer[3])
    assert torch.equal(features[Kind(1, True)].cls, torch.cat([by_layer[3], mean_patch], dim=1))
    assert torch.equal(features[Kind(4, False)].cls, torch.cat(by_layer, dim=1))
    assert features[Kind(4, True)].cls.shape == (12, 60)
    assert features[Kind(4, True)].labels.tolist() == [label for index, label in enumerate(labels(13)) if index != 3]
    assert cache.num_computed == 4
    both = {"train": items, "test": items}
    result = evaluator.run(model, both, cache)
    assert cache.num_computed == 4
    assert result == evaluator.run(model, both)  # to the last bit
    with pytest.raises(ValueError, match=r"num_blocks: \[5\]; accepted: numbers from 1 to 4"):
        LinearSweep(num_blocks=(5,)).run(model, both)


def test_every_item_is_seen_once_per_epoch():
    order = training_order(23, num_steps=46, items_per_step=7)
    assert order.shape == (46, 7)
    for epoch in order.flatten().split(23):
        assert sorted(epoch.tolist()) == list(range(23))
    assert not torch.equal(*order.flatten()[:46].split(23))


def test_picture_shows_the_held_out_accuracy_of_every_head():
    evaluator, given = LinearSweep(num_blocks=(1,), num_steps=200, learning_rates=(0.5, 0.01)), Sources(sources(100, 30))
    (figure,) = evaluator.pictures(StubEncoder(noisy), given).values()
    lines = [line for line in figure.axes[0].lines if line.get_label().startswith("cls")]
    assert [line.get_label() for line in lines] == ["cls", "cls + mean patch"]
    rates = 100 * evaluator._held_out_rates(
        evaluator._rows(StubEncoder(noisy), given["train"], None), num_classes=NUM_CLASSES, device=torch.device("cpu")
    )
    for line, row in zip(lines, rates, strict=True):
        assert line.get_xdata().tolist() == [0.01, 0.5]
        assert line.get_ydata().tolist() == pytest.approx([row[1].item(), row[0].item()])


def test_two_thousand_items_take_seconds():
    position = torch.arange(2500)
    features = noise(position, 96, seed=4) + 2 * functional.one_hot(position % 10, 96)
    train = labelled([p % 10 for p in range(2000)], num_classes=10)
    test = labelled([p % 10 for p in range(2500)], num_classes=10)
    test.items = test.items[2000:]
    start = time.process_time()
    encoder = StubEncoder(lambda items: output(features[position_of(items)]))
    score = LinearSweep(num_blocks=(1,)).run(encoder, {"train": train, "test": test}).scores["accuracy"]
    assert score.value > 30
    assert time.process_time() - start < 20  # 4 s on an idle core; the bound leaves room for a busy one


def test_heads_that_grow_without_bound_are_not_chosen():
    def huge(items: Tensor) -> EncoderOutput:
        return output(1e18 * noisy(items).cls)

    assert sweep(100, 30, huge, learning_rates=(1e30, 1e-30), num_steps=20).chosen["learning_rate"] == 1e-30
    with pytest.raises(ValueError, match=r"learning_rates: \[1e\+30\]; the weights grew without bound"):
        sweep(100, 30, huge, learning_rates=(1e30,), num_steps=20)


def test_bad_input_is_named():
    source = labelled(labels(9), num_classes=NUM_CLASSES)
    for options, message in (
        ({"learning_rates": (0.1, 0)}, r"learning_rates: \[0.1, 0\]; accepted: positive numbers"),
        ({"num_blocks": ()}, r"num_blocks: \[\]"),
        ({"num_steps": 0}, "num_steps: 0"),
        ({"items_per_step": 0}, "items_per_step: 0"),
        ({"held_out_ratio": 1}, "held_out_ratio: 1; accepted: between 0 and 1"),
        ({"features": Features(layer=0)}, r"features\.layer: 0; this evaluator does not use it"),
    ):
        with pytest.raises(ValueError, match=message):
            LinearSweep(**options)
    with pytest.raises(ValueError, match="5 labelled items are too few to hold"):
        LinearSweep(num_blocks=(1,)).run(StubEncoder(truth), dict.fromkeys(("train", "test"), labelled(range(5), num_classes=NUM_CLASSES)))
    with pytest.raises(ValueError, match="not finite"):
        nan = StubEncoder(lambda items: output(torch.full((len(items), 8), torch.nan)))
        LinearSweep(num_blocks=(1,)).run(nan, {"train": source, "test": source})
    blank = labelled([-1] * 9, num_classes=NUM_CLASSES)
    with pytest.raises(ValueError, match="no item has a label"):
        LinearSweep(num_blocks=(1,)).run(StubEncoder(chance), {"train": blank, "test": blank})
