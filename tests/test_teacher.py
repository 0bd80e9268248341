"""The momentum teacher follows, never learns, and never trains."""

import pytest
import torch
from torch import nn

from glpretrain.teacher import EMATeacher


def _branch() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))


def test_update_is_the_exponential_average_of_parameters() -> None:
    student = _branch()
    teacher = EMATeacher(student)
    before = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.sin(torch.arange(parameter.numel(), dtype=torch.float32)).reshape(parameter.shape))
    teacher.update(student, momentum=0.75)
    for old, new, target in zip(before, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * target)


def test_integer_and_float_buffers_are_copied() -> None:
    student = _branch()
    teacher = EMATeacher(student)
    student(torch.sin(torch.arange(21.0)).reshape(7, 3))
    teacher.update(student, momentum=0.996)
    for mine, theirs in zip(teacher.branch.buffers(), student.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert teacher.branch[1].num_batches_tracked == 1


def test_half_precision_weights_are_averaged_in_float32() -> None:
    """One bf16 lerp of 1 - 0.9 from 256 towards 260 gives 256.4, which bf16 cannot hold; it must round, not overshoot or stall."""
    student = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        student.weight.fill_(256.0)
    teacher = EMATeacher(student)
    with torch.no_grad():
        student.weight.fill_(264.0)
    teacher.update(student, momentum=0.5)
    assert teacher.branch.weight.item() == 260.0


def test_teacher_stays_in_evaluation_mode_and_without_gradients() -> None:
    whole = nn.ModuleDict({"student": _branch()})
    whole["teacher"] = EMATeacher(whole["student"])
    whole.train()
    assert whole["student"].training and not any(m.training for m in whole["teacher"].branch.modules())
    assert not any(p.requires_grad for p in whole["teacher"].parameters())


def test_a_student_of_another_shape_is_refused() -> None:
    teacher = EMATeacher(_branch())
    with pytest.raises(AssertionError, match="differ in"):
        teacher.update(nn.Linear(3, 5), momentum=0.9)
