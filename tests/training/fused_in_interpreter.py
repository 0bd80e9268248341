"""Runs the kernels of the fused cross-entropy beside the chunked form, and prints the largest relative differences as JSON.

    TRITON_INTERPRET=1 python tests/training/fused_in_interpreter.py [CASE ...]     on a CPU, in Triton's interpreter
    python tests/training/fused_in_interpreter.py --device cuda [CASE ...]          compiled, on a GPU

A process of its own, because Triton reads the variable when kernels are defined, and then runs all of them in one way.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glpretrain.objectives.distillation import Distillation, PatchDistillation, TokenDistillation, ViewDistillation
from glpretrain.training.cross_entropy import prototype_cross_entropy
from glpretrain.training.prototypes import PrototypeLogits, Prototypes

G, V, B, N, K, D = 2, 5, 3, 6, 150, 11  # K is no multiple of a block of 64 prototypes, and 15 rows are none of 64 rows


def wave(*shape: int, step: float = 0.37, device: torch.device) -> Tensor:
    return torch.sin(step * torch.arange(math.prod(shape), dtype=torch.float32)).reshape(shape).to(device)


def heads(*, count: int, width: int, train_gain: bool, device: torch.device) -> tuple[Prototypes, Prototypes]:
    made = Prototypes(width, num_prototypes=count, train_gain=train_gain), Prototypes(width, num_prototypes=count)
    with torch.no_grad():
        for number, head in enumerate(made):
            head.to(device)
            head.directions.copy_(wave(count, width, step=0.71 + number, device=device))
            head.gain.copy_(5.0 * wave(count, 1, step=1.3, device=device) if train_gain else torch.ones(count, 1, device=device))
    return made[0], made[1].requires_grad_(False)


def results(loss: Tensor, parts: list[Tensor]) -> list[Tensor]:
    """The loss, and its gradients with another factor for each item."""
    found = torch.autograd.grad((loss * wave(*loss.shape, step=0.9, device=loss.device)).sum(), parts, retain_graph=True)
    return [loss.detach(), *found]


def differences(fused: list[Tensor], chunked: list[Tensor]) -> list[float]:
    """Largest difference of each tensor, relative to its largest number."""
    assert all(float(one.abs().max()) > 0 for one in chunked)
    return [float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in zip(fused, chunked, strict=True)]


def both_forms(
    objective: Distillation,
    *,
    student: PrototypeLogits,
    teacher: PrototypeLogits,
    seen: PrototypeLogits,
    parts: list[Tensor],
    **settings: object,
) -> list[float]:
    """Differences, with a centre that has moved by all the logits that the teacher has `seen`."""
    objective.to(student.device).update(teacher_logits=seen)
    objective.advance()
    found = []
    for form in ("fused", "chunked"):
        loss = objective(student_logits=replace(student, cross_entropy=form), teacher_logits=teacher, **settings)
        found.append(results(loss, parts))
    return differences(*found)


def views(
    *,
    device: torch.device,
    count: int = K,
    width: int = D,
    items: int = B,
    train_gain: bool = False,
    programs: int = 512,
    balanced: bool = False,
    **settings: object,
) -> list[float]:
    """Every view of the student against every other one of the teacher."""
    head, teacher_head = heads(count=count, width=width, train_gain=train_gain, device=device)
    rows = wave(V, items, width, device=device).requires_grad_()
    teacher = teacher_head(wave(G, items, width, step=0.53, device=device))
    learned = [parameter for parameter in head.parameters() if parameter.requires_grad]
    objective = ViewDistillation(num_prototypes=count, **settings)
    with patch("glpretrain.training.prototype_kernels._PROGRAMS", programs):
        return both_forms(
            *(objective,), student=head(rows), teacher=teacher, seen=teacher, parts=[rows, *learned], teacher_temp=0.04, balanced=balanced
        )


def patches(*, device: torch.device, num_positions: int | None = None) -> list[float]:
    """Selected tokens only, with a centre for all places or one for each."""
    head, teacher_head = heads(count=K, width=D, train_gain=False, device=device)
    rows, mask = wave(G, B, N, D, device=device).requires_grad_(), wave(G, B, N, step=1.1, device=device) > 0
    teacher = teacher_head(wave(G, B, N, D, step=0.53, device=device))
    objective, parts = PatchDistillation(num_prototypes=K, num_positions=num_positions), [rows, head.directions]
    return both_forms(
        *(objective,), student=head(rows)[mask], teacher=teacher[mask], seen=teacher, parts=parts, teacher_temp=0.07, mask=mask
    )


def tokens(*, device: torch.device) -> list[float]:
    """Rows of which some do not count, balanced by Sinkhorn-Knopp."""
    head, teacher_head = heads(count=K, width=D, train_gain=False, device=device)
    rows, valid = wave(G * B * N, D, device=device).requires_grad_(), wave(G, B, N, step=1.1, device=device) > 0
    teacher = teacher_head(wave(G * B * N, D, step=0.53, device=device))
    objective, parts = TokenDistillation(num_prototypes=K, sinkhorn_iterations=3), [rows, head.directions]
    return both_forms(*(objective,), student=head(rows), teacher=teacher, seen=teacher, parts=parts, teacher_temp=0.07, valid=valid)


def half_inputs(*, device: torch.device) -> list[float]:
    """Rows and directions in bfloat16, against the chunked form of the same numbers in float32; no gradient is far from its rounding."""
    given = wave(V, B, D, device=device), wave(K, D, step=0.71, device=device), 1.0 + 0.5 * wave(K, 1, step=1.3, device=device)
    rows, directions, gain = (one.bfloat16().requires_grad_() for one in given)
    teacher = [one.bfloat16() for one in (wave(G, B, D, step=0.53, device=device), wave(K, D, step=1.71, device=device))]
    teacher_gain, weights, centre = torch.ones(K, 1, device=device), wave(V, G, device=device), wave(B, K, step=0.2, device=device)
    settings = {"centre": centre, "student_temp": 0.1, "teacher_temp": 0.04, "weights": weights}
    student = PrototypeLogits(rows, directions, gain, cross_entropy="fused")
    fused = prototype_cross_entropy(student=student, teacher=PrototypeLogits(*teacher, teacher_gain), **settings)
    full = [one.detach().float().requires_grad_() for one in (rows, directions, gain)]
    teacher = [one.float() for one in teacher]
    chunked = prototype_cross_entropy(student=PrototypeLogits(*full), teacher=PrototypeLogits(*teacher, teacher_gain), **settings)
    found = results(fused, [rows, directions, gain])
    assert [one.dtype for one in found] == [torch.float32] + [torch.bfloat16] * 3
    return differences(found, results(chunked, full))


def half_products(*, device: torch.device, precision: torch.dtype) -> list[float]:
    """The backward pass as under autocast, against one in float32."""
    head, teacher_head = heads(count=K, width=D, train_gain=False, device=device)
    rows = wave(V, B, D, device=device).requires_grad_()
    objective, teacher = ViewDistillation(num_prototypes=K).to(device), teacher_head(wave(G, B, D, step=0.53, device=device))
    found = []
    for student in (replace(head(rows), precision=precision, cross_entropy="fused"), head(rows)):
        loss = objective(student_logits=student, teacher_logits=teacher, teacher_temp=0.04)
        found.append(results(loss, [rows, head.directions]))
    return differences(*found)


def not_finite(*, device: torch.device) -> list[bool]:
    """Whether the loss of each item is finite, where a number of the second one is not."""
    head, teacher_head = heads(count=K, width=D, train_gain=False, device=device)
    rows = wave(V, B, D, device=device)
    rows[1, 1, 3] = torch.nan
    student, teacher = replace(head(rows), cross_entropy="fused"), teacher_head(wave(G, B, D, device=device))
    objective = ViewDistillation(num_prototypes=K).to(device)
    return objective(student_logits=student, teacher_logits=teacher, teacher_temp=0.04).isfinite().tolist()


def no_rows(*, device: torch.device) -> list[float]:
    """Loss and gradients without a single row."""
    head, teacher_head = heads(count=K, width=D, train_gain=False, device=device)
    rows = torch.zeros(0, D, device=device, requires_grad=True)
    loss = PatchDistillation(num_prototypes=K).to(device)(
        student_logits=replace(head(rows), cross_entropy="fused"),
        teacher_logits=teacher_head(rows),
        mask=torch.zeros(G, B, N, dtype=torch.bool, device=device),
        teacher_temp=0.04,
    )
    (of_directions,) = torch.autograd.grad(loss.sum(), [head.directions])
    return [*loss.tolist(), float(of_directions.abs().max())]


class Sizes(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes; the interpreter's copies have bytes and no numbers."""

    largest = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.nbytes)
        return out


def memory(*, device: torch.device) -> list[int]:
    """Bytes of the largest tensor, and of all logits of the student."""
    count, items = 2048, 40
    head, teacher_head = heads(count=count, width=D, train_gain=False, device=device)
    rows, teacher = wave(V, items, D, device=device).requires_grad_(), teacher_head(wave(G, items, D, step=0.53, device=device))
    objective = ViewDistillation(num_prototypes=count).to(device)
    with Sizes() as sizes:
        student = replace(head(rows), cross_entropy="fused")
        objective(student_logits=student, teacher_logits=teacher, teacher_temp=0.04).sum().backward()
    assert head.directions.grad is not None
    return [sizes.largest, 4 * V * items * count]


CASES: dict[str, Callable[..., list]] = {
    "views": views,
    "views, balanced, other temperature": partial(views, balanced=True, student_temp=0.23),
    "views, gains": partial(views, train_gain=True),
    "views, Sinkhorn-Knopp": partial(views, sinkhorn_iterations=3),
    "views, several blocks in a part": partial(views, programs=2, train_gain=True),
    "views, one part": partial(views, programs=1),
    "views, fewer prototypes than a block": partial(views, count=7),
    "views, whole blocks": partial(views, count=128, width=16, items=64, programs=9),
    "views, several blocks of rows": partial(views, items=29, programs=5),
    "views, wide": partial(views, width=200, items=7, count=70),
    "patches": patches,
    "patches, a centre for each place": partial(patches, num_positions=N),
    "tokens, some of which do not count": tokens,
    "half inputs": half_inputs,
    "half products, bfloat16": partial(half_products, precision=torch.bfloat16),
    "half products, float16": partial(half_products, precision=torch.float16),
    "not finite": not_finite,
    "no rows": no_rows,
    "memory": memory,
}


def main() -> None:
    """Print the results of cases by name, as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("cases", nargs="*", help="all of them, without a name")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({name: CASES[name](device=given.device) for name in given.cases or CASES}), flush=True)


if __name__ == "__main__":
    main()
