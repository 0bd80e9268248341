"""iBOT's two losses and centres against the official code."""

import torch
from golden import assert_matches, load, wave

from glpretrain.objectives.distillation import PatchDistillation, ViewDistillation

GOLDEN = load("ibot_loss")
CALLS = GOLDEN["calls"]["float64"]
MASK = torch.tensor(GOLDEN["mask"])  # [G B N]


def test_the_reference_mask_holds_an_item_without_and_one_with_every_token() -> None:
    assert not MASK[0, 1].any() and MASK[1, 2].all()


def test_view_loss_follows_the_official_code_over_three_steps() -> None:
    objective = ViewDistillation(num_prototypes=7)
    for i, call in enumerate(CALLS):
        student, teacher = wave(5, 3, 7, phase=i, scale=0.5).requires_grad_(), wave(2, 3, 7, phase=10 + i, scale=0.6)
        loss = objective(student_logits=student, teacher_logits=teacher, teacher_temp=call["cls_teacher_temp"]).mean()
        loss.backward()
        objective.update(teacher_logits=teacher)
        objective.advance()
        assert_matches(loss.detach(), call["cls"])
        assert_matches(student.grad, call["cls_gradient"])
        assert_matches(objective.centre, call["cls_centre_after"])


def test_patch_loss_follows_the_official_code_over_three_steps() -> None:
    objective = PatchDistillation(num_prototypes=11)
    for i, call in enumerate(CALLS):
        student, teacher = wave(2, 3, 5, 11, phase=20 + i, scale=0.5).requires_grad_(), wave(2, 3, 5, 11, phase=30 + i, scale=0.6)
        logits = {"student_logits": student[MASK], "teacher_logits": teacher[MASK]}
        loss = objective(**logits, mask=MASK, teacher_temp=call["patch_teacher_temp"]).mean()
        loss.backward()
        objective.update(teacher_logits=teacher)
        objective.advance()
        assert_matches(loss.detach(), call["patch"])
        assert_matches(student.grad, call["patch_gradient"])
        assert_matches(objective.centre, call["patch_centre_after"])
