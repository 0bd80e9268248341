"""Chamfer distances against the official extension, and what must be true of them."""

import pytest
import torch
from golden import assert_matches, load, noise

from glpretrain.objectives.chamfer import ChamferL1, ChamferL2, nearest_distances

GOLDEN = load("chamfer")


@pytest.mark.parametrize(("objective", "name"), [(ChamferL1(), "l1"), (ChamferL2(), "l2")])
def test_values_and_gradients_are_the_official_ones(objective, name: str) -> None:
    a, b = noise(3, 5, 3, name="a").requires_grad_(), noise(3, 7, 3, name="b").requires_grad_()
    loss = objective(predictions=a, targets=b).mean()
    loss.backward()
    assert_matches(loss.detach(), GOLDEN[name]["loss"])
    assert_matches(a.grad, GOLDEN[name]["gradient_a"])
    assert_matches(b.grad, GOLDEN[name]["gradient_b"])


def test_zero_for_equal_sets_in_any_order() -> None:
    a = noise(2, 5, 3, name="a").requires_grad_()
    loss = ChamferL2()(predictions=a, targets=a.detach().flip(1)).mean()
    loss.backward()
    assert loss == 0 and (a.grad == 0).all()


def test_the_nearest_is_found_in_each_direction() -> None:
    there, back = nearest_distances(torch.tensor([[[0.0, 0, 0]]]), torch.tensor([[[3.0, 4, 0], [0, 0, 1]]]))
    assert there.tolist() == [[1.0]] and back.tolist() == [[25.0, 1.0]]
