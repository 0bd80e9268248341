"""The distillation and N-pair losses of POS-BERT, DCGLR's successor, against the official code."""

import pytest
import torch
from golden import assert_matches, load, wave

from glpretrain.objectives.contrastive import NPair
from glpretrain.objectives.distillation import PatchDistillation, ViewDistillation

GOLDEN = load("pos_bert_loss")


def test_distillation_between_views_follows_the_official_code_over_three_calls() -> None:
    objective = ViewDistillation(num_prototypes=7)
    for i, call in enumerate(GOLDEN["calls"]):
        student, teacher = wave(5, 3, 7, phase=i, scale=0.5).requires_grad_(), wave(2, 3, 7, phase=10 + i, scale=0.6)
        loss = objective(student_logits=student, teacher_logits=teacher, teacher_temp=call["teacher_temp"]).mean()
        loss.backward()
        objective.update(teacher_logits=teacher)
        objective.advance()
        assert_matches(loss.detach(), call["gfc"]["loss"])
        assert_matches(student.grad, call["gfc"]["gradient"])
        assert_matches(objective.centre, call["centre_after"])


def test_distillation_of_hidden_tokens_follows_the_official_code_over_three_calls() -> None:
    objective = PatchDistillation(num_prototypes=7, num_positions=4)
    for i, call in enumerate(GOLDEN["calls"]):
        student, teacher = wave(2, 3, 4, 7, phase=20 + i, scale=0.5).requires_grad_(), wave(2, 3, 4, 7, phase=30 + i, scale=0.6)
        mask = wave(2, 3, 4, phase=40 + i) > 0.2
        temp = call["teacher_temp"]
        loss = objective(student_logits=student[mask], teacher_logits=teacher[mask], mask=mask, teacher_temp=temp).mean()
        loss.backward()
        objective.update(teacher_logits=teacher)
        objective.advance()
        assert_matches(loss.detach(), call["mpm"]["loss"])
        assert_matches(student.grad, call["mpm"]["gradient"])
        assert_matches(objective.centre, call["mpm_centre_after"])


def test_a_centre_per_position_needs_all_tokens_and_no_sinkhorn() -> None:
    with pytest.raises(ValueError, match="num_positions and sinkhorn_iterations were both given"):
        PatchDistillation(num_prototypes=7, num_positions=4, sinkhorn_iterations=3)
    with pytest.raises(ValueError, match="logits of 5 tokens given; its centres are for 4"):
        PatchDistillation(num_prototypes=7, num_positions=4).update(teacher_logits=wave(3, 5, 7))


def test_npair_is_the_official_one() -> None:
    student, teacher = wave(5, 3, 7, phase=50, scale=0.5).requires_grad_(), wave(2, 3, 7, phase=51, scale=0.6)
    loss = NPair()(assignments=torch.softmax(teacher / 0.04, dim=-1), logits=student).mean()
    loss.backward()
    assert_matches(loss.detach(), GOLDEN["npair"]["loss"])
    assert_matches(student.grad, GOLDEN["npair"]["gradient"], atol=2e-6)  # a scale of 64 / 0.1 on float32 inputs


def test_npair_falls_when_logits_fit_their_own_item() -> None:
    assignments = torch.eye(3, 7).unsqueeze(0)  # [1 3 7]
    fitting = torch.eye(3, 7).unsqueeze(0).repeat(2, 1, 1)
    objective = NPair()
    assert (objective(assignments=assignments, logits=fitting) < 1e-6).all()
    assert (objective(assignments=assignments, logits=fitting.roll(1, dims=1)) > 1e-6).all()
