"""SiT's contrastive and reconstruction losses against the official code."""

import torch
from golden import assert_matches, load, wave

from glpretrain.objectives.contrastive import InfoNCE
from glpretrain.objectives.reconstruction import CorruptedPixels

GOLDEN = load("sit_loss")["results"]["float64"]


def test_contrastive_loss_and_gradient_are_the_official_ones() -> None:
    queries = wave(5, 7, phase=0.1).requires_grad_()
    loss = InfoNCE(temp=0.2)(queries=queries, keys=wave(5, 7, phase=0.6, scale=2.0)).mean()
    loss.backward()
    assert_matches(loss.detach(), GOLDEN["one_direction"]["loss"])
    assert_matches(queries.grad, GOLDEN["one_direction"]["gradient"])


def test_the_official_total_is_the_sum_over_both_directions() -> None:
    student, teacher = wave(2, 5, 7, phase=1.1).requires_grad_(), wave(2, 5, 7, phase=1.4)
    objective = InfoNCE(temp=0.2)
    loss = (objective(queries=student[0], keys=teacher[1]) + objective(queries=student[1], keys=teacher[0])).mean()
    loss.backward()
    assert_matches(loss.detach(), GOLDEN["both_directions"]["loss"])
    assert_matches(student.grad, GOLDEN["both_directions"]["gradient"])


def test_corrupted_pixel_loss_and_gradient_are_the_official_ones() -> None:
    predictions = wave(3, 2, 5, 7, phase=2.1).requires_grad_()
    loss = CorruptedPixels()(predictions=predictions, targets=wave(3, 2, 5, 7, phase=2.9), corruption=wave(3, 5, 7, phase=4.0) > 0.3).mean()
    loss.backward()
    assert_matches(loss.detach(), GOLDEN["reconstruction"]["loss"])
    assert_matches(predictions.grad, GOLDEN["reconstruction"]["gradient"])


def test_the_reference_mask_does_not_hang_on_rounding() -> None:
    assert ((wave(3, 5, 7, phase=4.0) - 0.3).abs() > 1e-4).all()
    assert torch.tensor(GOLDEN["reconstruction"]["gradient"]).any(dim=1).sum() == (wave(3, 5, 7, phase=4.0) > 0.3).sum()
