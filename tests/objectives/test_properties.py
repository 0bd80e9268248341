"""What must hold whatever the numbers: optima, invariances, gradients, state."""

import math

import pytest
import torch
from batches import unpatchify

from glpretrain.core.frames import crop_frames, token_centres
from glpretrain.core.patches import patchify
from glpretrain.objectives.contrastive import InfoNCE, PatchInfoNCE
from glpretrain.objectives.distillation import PatchDistillation, ViewDistillation
from glpretrain.objectives.reconstruction import CorruptedPixels, PatchPixels

G, V, B, N, K, D = 2, 5, 3, 6, 7, 11


def wave(*shape: int, step: float = 0.37) -> torch.Tensor:
    return torch.sin(step * torch.arange(math.prod(shape), dtype=torch.float32)).reshape(shape)


def frames_of(*boxes: list[float], flip: list[bool] | None = None) -> torch.Tensor:
    """Float[B 2 3] of boxes x0 y0 x1 y1."""
    flags = torch.tensor([False] * len(boxes) if flip is None else flip)
    return crop_frames(torch.tensor(boxes), flip=flags, turns=torch.zeros(len(boxes), dtype=torch.int64))


def test_view_distillation_does_not_depend_on_the_order_of_items() -> None:
    objective = ViewDistillation(num_prototypes=K)
    student, teacher, order = wave(V, B, K), wave(G, B, K, step=0.71), torch.tensor([2, 0, 1])
    a = objective(student_logits=student, teacher_logits=teacher, teacher_temp=0.04).mean()
    b = objective(student_logits=student[:, order], teacher_logits=teacher[:, order], teacher_temp=0.04).mean()
    torch.testing.assert_close(a, b)


def test_view_distillation_is_log_k_for_a_student_that_knows_nothing() -> None:
    objective = ViewDistillation(num_prototypes=K)
    loss = objective(student_logits=torch.zeros(V, B, K), teacher_logits=wave(G, B, K), teacher_temp=0.04).mean()
    assert float(loss) == pytest.approx(math.log(K), rel=1e-6)


def test_teacher_gets_no_gradient() -> None:
    objective = ViewDistillation(num_prototypes=K)
    student, teacher = wave(V, B, K).requires_grad_(), wave(G, B, K, step=0.71).requires_grad_()
    objective(student_logits=student, teacher_logits=teacher, teacher_temp=0.04).mean().backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_the_same_view_is_not_its_own_target() -> None:
    """With V = G = 2 each student view sees the other's target only: changing a view's own target changes nothing for it."""
    objective = ViewDistillation(num_prototypes=K)
    student = wave(2, B, K).requires_grad_()
    teacher = wave(2, B, K, step=0.71)
    first = torch.autograd.grad(objective(student_logits=student, teacher_logits=teacher, teacher_temp=0.04).mean(), student)[0]
    moved = teacher.clone()
    moved[0] += wave(B, K, step=1.3)
    second = torch.autograd.grad(objective(student_logits=student, teacher_logits=moved, teacher_temp=0.04).mean(), student)[0]
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_are_finite_float32_at_collapse(dtype: torch.dtype) -> None:
    student, teacher = torch.full((V, B, K), 30.0, dtype=dtype).requires_grad_(), torch.full((G, B, K), 30.0, dtype=dtype)
    loss = ViewDistillation(num_prototypes=K)(student_logits=student, teacher_logits=teacher, teacher_temp=0.04).mean()
    rows = torch.ones(B, D, dtype=dtype, requires_grad=True)
    contrast = InfoNCE(temp=0.2)(queries=rows, keys=rows).mean()
    (loss + contrast).backward()
    assert loss.dtype == contrast.dtype == torch.float32
    assert torch.isfinite(student.grad).all() and torch.isfinite(rows.grad).all()


def test_centre_moves_once_per_advance_and_by_the_mean_of_all_micro_batches() -> None:
    whole, halves = (ViewDistillation(num_prototypes=K, centre_momentum=0.9) for _ in range(2))
    logits = wave(G, 4, K)
    whole.update(teacher_logits=logits)
    whole.advance()
    for part in logits.chunk(2, dim=1):
        halves.update(teacher_logits=part)
        assert halves.centre.abs().sum() == 0
    halves.advance()
    torch.testing.assert_close(halves.centre, whole.centre)
    torch.testing.assert_close(whole.centre, 0.1 * logits.mean(dim=(0, 1)))


def test_centre_survives_a_checkpoint() -> None:
    objective, other = ViewDistillation(num_prototypes=K), ViewDistillation(num_prototypes=K)
    objective.update(teacher_logits=wave(G, B, K))
    objective.advance()
    other.load_state_dict(objective.state_dict())
    assert objective.centre.abs().sum() > 0 and torch.equal(other.centre, objective.centre)


def test_centre_stays_when_no_token_was_seen() -> None:
    objective = PatchDistillation(num_prototypes=K)
    objective.update(teacher_logits=wave(B, K))
    objective.advance()
    before = objective.centre.clone()
    objective.update(teacher_logits=torch.empty(0, K))
    objective.advance()
    torch.testing.assert_close(objective.centre, before)


def test_patch_distillation_gives_every_image_the_same_weight() -> None:
    """One hidden token weighs as much as five: the mean is per image first."""
    objective = PatchDistillation(num_prototypes=K)
    mask = torch.zeros(1, 2, N, dtype=torch.bool)
    mask[0, 0, 2] = mask[0, 1, :5] = True
    student, teacher = wave(6, K), wave(6, K, step=0.71)
    loss = objective(student_logits=student, teacher_logits=teacher, mask=mask, teacher_temp=0.07).mean()
    cross = -(torch.softmax(teacher / 0.07, -1) * torch.log_softmax(student / 0.1, -1)).sum(-1)
    torch.testing.assert_close(loss, (cross[0] + cross[1:].mean()) / 2)


def test_patch_distillation_is_zero_without_hidden_tokens() -> None:
    empty = torch.zeros(0, K, requires_grad=True)
    mask = torch.zeros(G, B, N, dtype=torch.bool)
    loss = PatchDistillation(num_prototypes=K)(student_logits=empty, teacher_logits=empty, mask=mask, teacher_temp=0.07).mean()
    loss.backward()
    assert loss.item() == 0.0


def test_info_nce_prefers_matching_rows() -> None:
    rows = torch.eye(B, D)
    objective = InfoNCE(temp=0.1)
    assert (objective(queries=rows, keys=rows) < objective(queries=rows, keys=rows.roll(1, 0))).all()


def test_token_centres_follow_crop_and_flip() -> None:
    frames = frames_of([0.0, 0.0, 1.0, 1.0], [0.5, 0.0, 1.0, 0.5], flip=[False, True])
    centres = token_centres(frames, grid=(1, 2))
    expected = torch.tensor([[[0.5, 0.25], [0.5, 0.75]], [[0.25, 0.875], [0.25, 0.625]]])  # rows, columns
    torch.testing.assert_close(centres, expected)


def test_patches_match_where_they_show_the_same_place() -> None:
    grid = (2, 3)
    whole, flipped = frames_of([0.0, 0.0, 1.0, 1.0]), frames_of([0.0, 0.0, 1.0, 1.0], flip=[True])
    elsewhere = frames_of([0.0, 0.0, 0.1, 0.1])
    objective = PatchInfoNCE(max_distance=0.5)
    nearest, valid = objective.match(query_frames=whole, key_frames=flipped, grid=grid)
    assert nearest.tolist() == [[2, 1, 0, 5, 4, 3]] and valid.all()
    assert objective.match(query_frames=whole, key_frames=elsewhere, grid=grid)[1].sum() == 0


def test_patch_info_nce_is_lowest_for_patches_that_follow_the_flip() -> None:
    grid, patches = (2, 3), torch.eye(N, D).unsqueeze(0)
    whole, flipped = frames_of([0.0, 0.0, 1.0, 1.0]), frames_of([0.0, 0.0, 1.0, 1.0], flip=[True])
    mirrored = patches[:, [2, 1, 0, 5, 4, 3]]
    objective = PatchInfoNCE(temp=0.1)
    nearest, valid = objective.match(query_frames=whole, key_frames=flipped, grid=grid)
    found = [objective(queries=patches, keys=keys, nearest=nearest, valid=valid) for keys in (mirrored, patches)]
    assert (found[0] < found[1]).all()
    some = objective(queries=patches[:, :2], keys=mirrored, nearest=nearest[:, :2], valid=valid[:, :2])  # as many keys, fewer queries
    torch.testing.assert_close(some, objective(queries=patches, keys=mirrored, nearest=nearest, valid=valid & (torch.arange(N) < 2)))
    assert (objective(queries=patches, keys=mirrored, nearest=nearest, valid=torch.zeros_like(valid)) == 0).all()


def test_unpatchify_inverts_patchify() -> None:
    images = wave(2, 5, 6, 14)
    patches = patchify(images, patch_size=(3, 7))
    assert patches.shape == (2, 4, 105)
    assert torch.equal(unpatchify(patches, patch_size=(3, 7), grid=(2, 2), num_channels=5), images)


def test_pixel_losses_are_zero_for_perfect_predictions_and_blind_elsewhere() -> None:
    images = wave(2, 3, 4, 4)
    corruption = torch.zeros(2, 4, 4, dtype=torch.bool)
    corruption[0, 1:3, 2] = True
    wrong = torch.where(corruption.unsqueeze(1), images, images + 5.0)
    assert (CorruptedPixels()(predictions=wrong, targets=images, corruption=corruption) == 0.0).all()
    patches, mask = patchify(images, patch_size=(2, 2)), torch.tensor([[True, False, True, False]] * 2)
    normed = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    predictions = torch.where(mask.unsqueeze(-1), normed, normed + 5.0)
    assert (PatchPixels()(predictions=predictions, targets=patches, mask=mask) < 1e-10).all()  # rounding of the normalisation


def test_patch_pixels_normalise_away_brightness_and_contrast() -> None:
    patches, mask = wave(2, 4, 12), torch.ones(2, 4, dtype=torch.bool)
    predictions = wave(2, 4, 12, step=0.71)
    a = PatchPixels()(predictions=predictions, targets=patches, mask=mask).mean()
    b = PatchPixels()(predictions=predictions, targets=3.0 * patches + 2.0, mask=mask).mean()
    torch.testing.assert_close(a, b, rtol=1e-4, atol=0)  # the 1e-6 beside the variance


def test_assignments_sum_to_one() -> None:
    objective = ViewDistillation(num_prototypes=K)
    torch.testing.assert_close(objective.targets(wave(B, K), teacher_temp=0.04).sum(-1), torch.ones(B))
    torch.testing.assert_close(objective.log_assignments(wave(B, K)).exp().sum(-1), torch.ones(B))
