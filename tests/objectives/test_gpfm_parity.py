"""Distillation from experts against GPFM's code, and DINOv2's losses with both ways of balancing, values and gradients."""

import pytest
import torch
from golden import assert_matches, load, wave

from glpretrain.objectives.distillation import PatchDistillation, ViewDistillation, sinkhorn_knopp
from glpretrain.objectives.experts import CosineDistance, FeatureDistance
from glpretrain.objectives.regularization import KoLeo

EXPERTS, DINOV2, DINOV3 = load("gpfm_distillation")["cases"], load("dinov2_loss"), load("dinov3_views")
MASK = torch.tensor(DINOV2["mask"], dtype=torch.bool).unflatten(0, (2, 3))  # [G B N]
BALANCES = {"centre": None, "sinkhorn": 3}


@pytest.mark.parametrize("case", range(len(EXPERTS)))
def test_distances_to_an_expert_are_gpfms(case: int) -> None:
    expected = EXPERTS[case]
    items, width, grid, target_grid = (expected[name] for name in ("items", "width", "student_grid", "expert_grid"))
    tokens, target_tokens = grid[0] * grid[1], target_grid[0] * target_grid[1]
    patches = wave(items, tokens, width, phase=case, scale=0.8).requires_grad_()
    targets = wave(items, target_tokens, width, phase=10 + case, scale=1.7)
    feature = FeatureDistance()(predictions=patches, targets=targets, grid=tuple(grid), target_grid=tuple(target_grid)).mean()
    cls = wave(items, width, phase=20 + case, scale=0.6).requires_grad_()
    cosine = CosineDistance()(predictions=cls, targets=wave(items, width, phase=30 + case, scale=2.0)).mean()
    (feature + cosine).backward()
    assert_matches(feature.detach(), expected["feature"])
    assert_matches(patches.grad, expected["feature_gradient"])
    assert_matches(cosine.detach(), expected["cosine"])
    assert_matches(cls.grad, expected["cosine_gradient"])


@pytest.mark.parametrize("kind", BALANCES)
def test_cls_loss_is_dinov2s_with_its_eighteen_terms(kind: str) -> None:
    """Two global and four local views make 2 * 1 + 2 * 4 terms here, as two and eight make the official 18."""
    objective = ViewDistillation(num_prototypes=7, sinkhorn_iterations=BALANCES[kind])
    for i, call in enumerate(DINOV2["calls"]):
        expected = call[kind]
        whole, local = wave(2, 3, 7, phase=i, scale=0.5).requires_grad_(), wave(4, 3, 7, phase=40 + i, scale=0.5).requires_grad_()
        teacher = wave(2, 3, 7, phase=10 + i, scale=0.6)
        loss = objective(student_logits=torch.cat([whole, local]), teacher_logits=teacher, teacher_temp=call["teacher_temp"]).mean()
        loss.backward()
        assert_matches(objective.targets(teacher, teacher_temp=call["teacher_temp"]), expected["targets"])
        assert_matches(loss.detach(), expected["local"] + expected["global"])
        assert_matches(whole.grad, expected["global_gradient"])
        assert_matches(local.grad, expected["local_gradient"])
        objective.update(teacher_logits=teacher)
        if kind == "centre":
            objective.centre_state.advance()
            assert_matches(objective.centre, expected["cls_centre_after"])


@pytest.mark.parametrize("number", range(len(DINOV3["cases"])))
def test_local_views_count_as_in_dinov3(number: int) -> None:
    case = DINOV3["cases"][number]
    whole = wave(2, 3, 7, phase=number, scale=0.5).requires_grad_()
    local = wave(4, 3, 7, phase=40 + number, scale=0.5).requires_grad_()
    teacher = wave(2, 3, 7, phase=10 + number, scale=0.6)
    objective = ViewDistillation(num_prototypes=7, sinkhorn_iterations=3)
    given = {"student_logits": torch.cat([whole, local]), "teacher_logits": teacher, "teacher_temp": 0.07}
    loss = objective(**given, local_weight=case["weight"]).mean()
    loss.backward()
    assert_matches(loss.detach(), case["loss"])
    assert_matches(whole.grad, case["global_gradient"])
    assert_matches(local.grad, case["local_gradient"])


def test_ten_student_views_make_eighteen_terms() -> None:
    """Every term is 1 when the student is uniform over e prototypes' worth of nats: the sum over terms / 18 is one of them."""
    objective = ViewDistillation(num_prototypes=7)
    teacher = wave(2, 3, 7, scale=0.6)
    student = wave(10, 3, 7, scale=0.5)
    targets, logs = objective.targets(teacher, teacher_temp=0.04), torch.log_softmax(student / 0.1, dim=-1)
    terms = [-(targets[g] * logs[v]).sum(-1).mean() for g in range(2) for v in range(10) if v != g]
    assert len(terms) == 18
    loss = objective(student_logits=student, teacher_logits=teacher, teacher_temp=0.04).mean()
    torch.testing.assert_close(loss, torch.stack(terms).sum() / 18)


@pytest.mark.parametrize("kind", BALANCES)
def test_patch_loss_is_dinov2s(kind: str) -> None:
    objective, rows = PatchDistillation(num_prototypes=11, sinkhorn_iterations=BALANCES[kind]), int(MASK.sum())
    for i, call in enumerate(DINOV2["calls"]):
        expected = call[kind]
        student, teacher = wave(rows, 11, phase=20 + i, scale=0.5).requires_grad_(), wave(rows, 11, phase=30 + i, scale=0.6)
        loss = objective(student_logits=student, teacher_logits=teacher, mask=MASK, teacher_temp=call["teacher_temp"]).mean()
        loss.backward()
        assert_matches(objective.targets(teacher, teacher_temp=call["teacher_temp"]), expected["patch_targets"])
        assert_matches(loss.detach(), expected["patch"])
        assert_matches(student.grad, expected["patch_gradient"])
        objective.update(teacher_logits=teacher)
        if kind == "centre":
            objective.centre_state.advance()
            assert_matches(objective.centre, expected["patch_centre_after"])


@pytest.mark.parametrize("case", range(len(DINOV2["sinkhorn"])))
def test_sinkhorn_knopp_is_dinov2s(case: int) -> None:
    expected = DINOV2["sinkhorn"][case]
    logits = wave(expected["rows"], expected["prototypes"], phase=60 + case, scale=0.9)
    ours = sinkhorn_knopp(logits, temp=expected["temp"], num_iterations=expected["iterations"])
    assert_matches(ours, expected["assignments"])


@pytest.mark.parametrize("case", range(len(DINOV2["koleo"])))
def test_koleo_is_dinov2s(case: int) -> None:
    expected = DINOV2["koleo"][case]
    features = wave(expected["items"], expected["width"], phase=50 + case, scale=1.3).requires_grad_()
    loss = KoLeo()(features=features)
    loss.backward()
    assert_matches(loss.detach(), expected["loss"])
    assert_matches(features.grad, expected["gradient"])
