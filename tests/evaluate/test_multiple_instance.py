"""Attention over bags: the formula, what it may not depend on, and whether it finds what decides a bag's label."""

import numpy as np
import pytest
import torch

from glpretrain.core import keys
from glpretrain.evaluate.slides.multiple_instance import GatedAttention, fit_gated_attention

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
