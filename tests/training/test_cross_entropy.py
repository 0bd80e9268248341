"""The cross-entropy that never holds all logits equals the one that does, in values and gradients."""

import math

import pytest
import torch
from torch import Tensor

from glpretrain.objectives.distillation import Distillation, PatchDistillation, ViewDistillation
from glpretrain.training import cross_entropy
from glpretrain.training.prototypes import PrototypeLogits, Prototypes

G, V, B, N, K, D = 2, 5, 3, 6, 700, 11


def wave(*shape: int, step: float = 0.37) -> Tensor:
    return torch.sin(step * torch.arange(math.prod(shape), dtype=torch.float32)).reshape(shape)


def heads(*, train_gain: bool) -> tuple[Prototypes, Prototypes]:
    """Of student and teacher; learned gains may be 0."""
    made = Prototypes(D, num_prototypes=K, train_gain=train_gain), Prototypes(D, num_prototypes=K)
    with torch.no_grad():
        for number, head in enumerate(made):
            head.directions.copy_(wave(K, D, step=0.71 + number))
            head.gain.copy_(5.0 * wave(K, 1, step=1.3) if train_gain else torch.ones(K, 1))
    return made[0], made[1].requires_grad_(False)


def gradients(loss: Tensor, parts: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad((loss * wave(*loss.shape, step=0.9)).sum(), parts, retain_graph=True)
    return [loss.detach(), *found]


def check_equal(
    objective: Distillation, *, student: PrototypeLogits, teacher: PrototypeLogits, parts: list[Tensor], **settings: object
) -> None:
    objective.update(teacher_logits=teacher)
    objective.advance()
    assert objective.centre_state is None or objective.centre.abs().sum() > 0
    lazy = gradients(objective(student_logits=student, teacher_logits=teacher, **settings), parts)
    dense = gradients(objective(student_logits=student.dense(), teacher_logits=teacher.dense(), **settings), parts)
    for a, b in zip(lazy, dense, strict=True):
        scale = float(b.abs().max())
        assert scale > 0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("train_gain", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("cells", [1, 10_000, 1 << 25])  # three chunks of 256, two, and one
@pytest.mark.parametrize("sinkhorn", [None, 3])
def test_views(train_gain: bool, balanced: bool, cells: int, sinkhorn: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy._CELLS, "cpu", cells)
    head, teacher_head = heads(train_gain=train_gain)
    rows = wave(V, B, D).requires_grad_()
    check_equal(
        ViewDistillation(num_prototypes=K, sinkhorn_iterations=sinkhorn),
        student=head(rows),
        teacher=teacher_head(wave(G, B, D, step=0.53)),
        parts=[rows, *(parameter for parameter in head.parameters() if parameter.requires_grad)],
        teacher_temp=0.04,
        balanced=balanced,
    )


def test_views_with_a_plain_last_layer_and_a_weight_of_the_local_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy._CELLS, "cpu", 1)
    head, teacher_head = (Prototypes(D, num_prototypes=K, train_gain=True, last_layer="linear") for _ in range(2))
    with torch.no_grad():
        head.directions.copy_(wave(K, D, step=0.71))
        teacher_head.requires_grad_(False).directions.copy_(wave(K, D, step=1.71))
    rows = wave(V, B, D).requires_grad_()
    student, teacher = head(rows), teacher_head(wave(G, B, D, step=0.53))
    torch.testing.assert_close(student.dense(), rows @ head.directions.t())
    check_equal(
        ViewDistillation(num_prototypes=K, sinkhorn_iterations=3),
        student=student,
        teacher=teacher,
        parts=[rows, head.directions],
        teacher_temp=0.04,
        local_weight=0.5,
    )


@pytest.mark.parametrize(("num_positions", "sinkhorn"), [(None, None), (N, None), (None, 3)])
def test_patches(num_positions: int | None, sinkhorn: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy._CELLS, "cpu", 1)
    head, teacher_head = heads(train_gain=False)
    rows, mask = wave(G, B, N, D).requires_grad_(), wave(G, B, N, step=1.1) > 0
    teacher = teacher_head(wave(G, B, N, D, step=0.53))
    objective = PatchDistillation(num_prototypes=K, num_positions=num_positions, sinkhorn_iterations=sinkhorn)
    objective.update(teacher_logits=teacher)
    objective.advance()
    settings = {"mask": mask, "teacher_temp": 0.04}
    lazy = gradients(objective(student_logits=head(rows)[mask], teacher_logits=teacher[mask], **settings), [rows, head.directions])
    dense = gradients(
        objective(student_logits=head(rows)[mask].dense(), teacher_logits=teacher[mask].dense(), **settings), [rows, head.directions]
    )
    for a, b in zip(lazy, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("sinkhorn", [None, 3])
def test_no_token_gives_a_loss_of_zero(sinkhorn: int | None) -> None:
    head, teacher_head = heads(train_gain=False)
    rows = torch.zeros(0, D, requires_grad=True)
    objective = PatchDistillation(num_prototypes=K, sinkhorn_iterations=sinkhorn)
    loss = objective(
        student_logits=head(rows), teacher_logits=teacher_head(rows), mask=torch.zeros(G, B, N, dtype=torch.bool), teacher_temp=0.04
    )
    assert loss.tolist() == [0.0] * B
    loss.sum().backward()
    assert head.directions.grad is not None and head.directions.grad.abs().sum() == 0


def test_a_row_that_is_not_finite_gives_a_loss_that_is_not_finite() -> None:
    head, teacher_head = heads(train_gain=False)
    rows = wave(V, B, D)
    rows[1, 2, 3] = torch.nan
    loss = ViewDistillation(num_prototypes=K)(student_logits=head(rows), teacher_logits=teacher_head(wave(G, B, D)), teacher_temp=0.04)
    assert loss.isfinite().tolist() == [True, True, False]


def test_the_backward_pass_has_the_precision_of_autocast() -> None:
    head, teacher_head = heads(train_gain=False)
    rows, teacher = wave(V, B, D).requires_grad_(), teacher_head(wave(G, B, D, step=0.53))
    objective = ViewDistillation(num_prototypes=K)

    def both(student: PrototypeLogits) -> list[Tensor]:
        return gradients(objective(student_logits=student, teacher_logits=teacher, teacher_temp=0.04), [rows, head.directions])

    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = both(head(rows))
    full = both(head(rows))
    assert torch.equal(low[0], full[0])
    for a, b in zip(low[1:], full[1:], strict=True):
        assert a.dtype == torch.float32 and 0 < float((a - b).abs().max() / b.abs().max()) < 0.01


def test_memory_does_not_grow_with_rows_times_prototypes() -> None:
    """The largest tensor that is made has a chunk of logits, or as many numbers as the directions or the rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
            nonlocal largest
            out = func(*args, **(kwargs or {}))  # type: ignore[operator]
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return out

    count, rows = 1 << 14, 512
    head = Prototypes(D, num_prototypes=count)
    with Sizes():
        objective = ViewDistillation(num_prototypes=count)
        student, teacher = wave(V, rows // V, D).requires_grad_(), wave(G, rows // V, D, step=0.53)
        with torch.no_grad():
            targets = head(teacher)
        objective(student_logits=head(student), teacher_logits=targets, teacher_temp=0.04).sum().backward()
        objective.update(teacher_logits=targets)
    assert largest <= 1 << 20 < rows * count
