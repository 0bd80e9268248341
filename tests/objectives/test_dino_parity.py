"""DINO's loss and centre against the official code."""

from itertools import pairwise

import pytest
import torch
from golden import assert_matches, load, wave

from glpretrain.objectives.distillation import ViewDistillation

GOLDEN = load("dino_loss")
CALLS = GOLDEN["calls"]["float64"]


def _student(call: int) -> torch.Tensor:
    return wave(5, 3, 7, phase=call, scale=0.5).requires_grad_()


def _teacher(call: int) -> torch.Tensor:
    return wave(2, 3, 7, phase=10 + call, scale=0.6)


def test_loss_gradient_and_centre_follow_the_official_code_over_three_steps() -> None:
    objective = ViewDistillation(num_prototypes=7)
    for i, call in enumerate(CALLS):
        student, teacher = _student(i), _teacher(i)
        loss = objective(student_logits=student, teacher_logits=teacher, teacher_temp=call["teacher_temp"]).mean()
        loss.backward()
        objective.update(teacher_logits=teacher)
        objective.advance()
        assert_matches(loss.detach(), call["loss"])
        assert_matches(student.grad, call["gradient"])
        assert_matches(objective.centre, call["centre_after"])


@pytest.mark.parametrize("parts", [(0, 1, 3), (0, 2, 3)])
def test_two_micro_batches_move_the_centre_like_their_union(parts: tuple[int, ...]) -> None:
    objective = ViewDistillation(num_prototypes=7)
    teacher = _teacher(0)
    for start, end in pairwise(parts):
        objective.update(teacher_logits=teacher[:, start:end])
    objective.advance()
    assert_matches(objective.centre, CALLS[0]["centre_after"])
