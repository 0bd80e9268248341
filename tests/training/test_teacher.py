"""The momentum teacher follows, the expert stays; neither learns, neither trains."""

import pytest
import torch
from golden import wave
from torch import nn

from glpretrain.encoders import ViT, fingerprint
from glpretrain.training.teacher import EMATeacher, FrozenTeacher


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
    student = nn.Linear(3, 5)
    student.register_buffer("count", torch.tensor(3))
    student.register_buffer("scale", torch.tensor([0.1, 0.7]))
    teacher = EMATeacher(student)
    student.count.add_(4)
    student.scale.mul_(3.0)
    teacher.update(student, momentum=0.996)
    assert teacher.branch.count == 7 and torch.equal(teacher.branch.scale, student.scale)


def test_batch_norms_normalise_the_teachers_batch_and_keep_its_statistics() -> None:
    """As in the official codes: what the student sees beside the teacher's views does not move them."""
    views, others = (wave(7, 3, phase=phase, scale=scale) for phase, scale in ((0.0, 1.0), (1.0, 5.0)))
    student = _branch()
    teacher = EMATeacher(student)
    alone = _branch().requires_grad_(False)
    alone.load_state_dict(student.state_dict())
    alone[2].eval()
    for _ in range(2):
        assert torch.equal(teacher.branch(views), alone(views))
        student(others)
        teacher.update(student, momentum=0.5)  # nothing is learned here, so the weights stay
    mean = teacher.branch[1].running_mean
    assert torch.equal(mean, alone[1].running_mean) and not torch.allclose(mean, student[1].running_mean)
    teacher.eval()
    before = mean.clone()
    teacher.branch(others)
    assert torch.equal(mean, before)


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
    assert whole["student"].training and [m.training for m in whole["teacher"].branch] == [False, True, False]
    assert not whole.eval()["teacher"].branch[1].training
    assert not any(p.requires_grad for p in whole["teacher"].parameters())


def test_a_student_of_another_shape_is_refused() -> None:
    teacher = EMATeacher(_branch())
    with pytest.raises(AssertionError, match="differ in"):
        teacher.update(nn.Linear(3, 5), momentum=0.9)


# Experts ------------------------------------------------------------------------------------------------------------------


def _encoder(name: str = "vit_tiny_patch16_224", **changes) -> ViT:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}
    return ViT(name, **(sizes | changes))


def _pixels(*shape: int) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return 0.5 + 0.5 * torch.sin(0.37 * torch.arange(count, dtype=torch.float32)).reshape(shape)


def _normalised(pixels: torch.Tensor, card) -> torch.Tensor:
    return (pixels - torch.tensor(card.mean).view(-1, 1, 1)) / torch.tensor(card.std).view(-1, 1, 1)


def test_an_expert_sees_views_in_its_own_normalisation_and_not_the_students() -> None:
    encoder, student = _encoder(), _encoder(mean=None, std=None)
    pixels = _pixels(2, 3, 32, 32)
    seen = FrozenTeacher(encoder)(_normalised(pixels, student.card), card=student.card)
    expected = encoder(_normalised(pixels, encoder.card))
    torch.testing.assert_close(seen.cls, expected.cls)
    torch.testing.assert_close(seen.patches, expected.patches)


def test_an_expert_sees_views_in_its_own_size() -> None:
    student = _encoder(mean=None, std=None)
    expert = FrozenTeacher(_encoder(), size=(48, 40))
    assert expert.grid == (6, 5)
    views = _normalised(_pixels(2, 3, 32, 32), student.card)
    assert expert.prepare(views, card=student.card).shape == (2, 3, 48, 40)
    assert expert(views, card=student.card).patches.shape == (2, 30, 24)
    flat = _normalised(torch.full((1, 3, 32, 32), 0.5), student.card)  # what has no detail is resized without error
    torch.testing.assert_close(expert.prepare(flat, card=student.card), _normalised(torch.full((1, 3, 48, 40), 0.5), _encoder().card))


def test_an_expert_is_in_no_checkpoint_and_loads_without_one() -> None:
    whole = nn.ModuleDict({"student": nn.Linear(3, 5), "expert": FrozenTeacher(_encoder())})
    assert list(whole.state_dict()) == ["student.weight", "student.bias"]
    before = {name: value.clone() for name, value in whole["expert"].encoder.state_dict().items()}
    other = nn.ModuleDict({"student": nn.Linear(3, 5), "expert": FrozenTeacher(_encoder())})
    whole.load_state_dict(other.state_dict())  # strict
    assert torch.equal(whole["student"].weight, other["student"].weight)
    assert all(torch.equal(value, before[name]) for name, value in whole["expert"].encoder.state_dict().items())


def test_an_expert_never_learns_nor_trains_and_moves_with_the_module() -> None:
    whole = nn.ModuleDict({"expert": FrozenTeacher(_encoder(drop_path_rate=0.5))})
    whole.train()
    assert not any(module.training for module in whole["expert"].encoder.modules())
    assert not any(parameter.requires_grad for parameter in whole.parameters())
    card = whole["expert"].encoder.card
    views = _normalised(_pixels(2, 3, 32, 32), card).requires_grad_()
    assert not whole["expert"](views, card=card).cls.requires_grad
    assert {parameter.device.type for parameter in whole.to("meta").parameters()} == {"meta"}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_an_experts_precision_is_its_own_and_its_fingerprint_that_of_the_file(precision: str) -> None:
    encoder = _encoder("vit_small_patch14_reg4_dinov2")
    name, card = fingerprint(encoder), encoder.card
    views = _normalised(_pixels(2, 3, 32, 32), card)
    expected = encoder(views)
    expert = FrozenTeacher(encoder, precision=precision)
    assert {parameter.dtype for parameter in expert.parameters()} == {getattr(torch, precision)}
    assert expert.fingerprint == name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = expert(views, card=card)
    assert seen.cls.dtype == seen.patches.dtype == seen.registers.dtype == torch.float32
    for found, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.05)  # 8 bits of features of about 1, after one block


def test_autocast_does_not_reach_an_expert_of_full_precision() -> None:
    expert, card = FrozenTeacher(_encoder()), _encoder().card
    views = _normalised(_pixels(2, 3, 32, 32), card)
    expected = expert(views, card=card).cls
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(expert(views, card=card).cls, expected)


def test_what_an_expert_cannot_take_is_named() -> None:
    with pytest.raises(ValueError, match=r"height 30 does not divide by the patch of 8"):
        FrozenTeacher(_encoder(), size=30)
    with pytest.raises(ValueError, match=r"precision='half' given; accepted: float32, bfloat16, float16"):
        FrozenTeacher(_encoder(), precision="half")
    grey = _encoder(in_chans=1, mean=None, std=None)
    with pytest.raises(ValueError, match=r"its items have 3 channels, the student's 1"):
        FrozenTeacher(_encoder())(torch.zeros(1, 1, 32, 32), card=grey.card)
