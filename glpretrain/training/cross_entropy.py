"""Cross-entropy between assignments to prototypes, without ever holding the rows x K logits of student and teacher.

The logits are computed for some prototypes at a time: in the forward pass with running maxima and sums (an online softmax), in the backward
pass once more. So memory grows with the number of rows and with K, but not with their product. In both passes all that is done to the
logits of these prototypes happens in a cache of the processor, or in few launches on a GPU. Left out: kernels of our own for a GPU, which
hold no logits at all and are used where they were asked for (`fused_cross_entropy`).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from glpretrain.training.fused_cross_entropy import FusedCrossEntropy, require_fused
from glpretrain.training.prototypes import Context, PrototypeLogits, lengths_of, remove_along

_CELLS = {"cpu": 1 << 18}  # logits at a time that fit into a cache
_CELLS_ELSEWHERE = 1 << 25
_LEAST = 256  # prototypes at a time, below which matrix products are slow


def prototype_cross_entropy(
    *, student: PrototypeLogits, teacher: PrototypeLogits, centre: Tensor, student_temp: float, teacher_temp: float, weights: Tensor
) -> Tensor:
    """Float[B]: sum over v and g of weights[v, g] * cross-entropy of the student's assignment of view v with the teacher's of view g.

    All in float32, except the products of the backward pass, see `PrototypeLogits.precision`.

    Args:
        student: logits Float[V B K].
        teacher: logits Float[G B K], without gradient.
        centre: what is subtracted from the teacher's logits, Float[K] or Float[B K].
        student_temp: temperature of the student's assignment.
        teacher_temp: temperature of the teacher's.
        weights: Float[V G].

    Raises:
        ValueError: the student's logits ask for the fused form, which cannot run here.
    """
    (_, num_items, num_prototypes), (_, *rest) = student.shape, teacher.shape
    assert rest == [num_items, num_prototypes], f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
    parts = (student.rows, student.directions, student.gain, teacher.rows, teacher.directions, teacher.gain)
    function = _CrossEntropy
    # The plan of memory (`glpretrain.bench.plan`) counts the chunked form: a kernel cannot run on tensors without numbers.
    if student.cross_entropy == "fused" and not isinstance(student.rows, FakeTensor):
        require_fused(student.device)
        function = FusedCrossEntropy
    return function.apply(*parts, centre, weights, (student_temp, teacher_temp), student.precision)


class _Factors(NamedTuple):
    """What products with directions are multiplied with, and what is subtracted from them, to be logits over temperatures."""

    lengths: Tensor  # Float[K]  of the student's directions
    own: Tensor  # Float[K]
    other: Tensor  # Float[K]  of the teacher
    shift: Tensor  # Float[K] or Float[B K]


def _chunks(student: PrototypeLogits, teacher: PrototypeLogits, factors: _Factors) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A slice of the prototypes, and the logits of student and teacher there over their temperatures: Float[V B k] and Float[G B k]."""
    (num_views, num_items, num_prototypes), num_global = student.shape, teacher.shape[0]
    cells = _CELLS.get(student.device.type, _CELLS_ELSEWHERE)
    size = max(_LEAST, cells // max(1, (num_views + num_global) * num_items))
    for start in range(0, num_prototypes, size):
        part = slice(start, start + size)
        own = F.linear(student.rows, student.directions[part]).mul_(factors.own[part])
        other = F.linear(teacher.rows, teacher.directions[part]).mul_(factors.other[part]).sub_(factors.shift[..., part])
        yield part, own, other


class _Context(Context):
    temp: float  # of the student
    precision: torch.dtype


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        rows: Tensor,
        directions: Tensor,
        gain: Tensor,
        teacher_rows: Tensor,
        teacher_directions: Tensor,
        teacher_gain: Tensor,
        centre: Tensor,
        weights: Tensor,
        temps: tuple[float, float],
        precision: torch.dtype,
    ) -> Tensor:
        """Float[V B D], Float[K D], Float[K 1], the same of the teacher with Float[G B D], and the rest as above, to Float[B]."""
        student, teacher = PrototypeLogits(rows, directions, gain), PrototypeLogits(teacher_rows, teacher_directions, teacher_gain)
        (num_views, num_items, _), num_global = student.shape, teacher.shape[0]
        lengths = lengths_of(directions)
        factors = _Factors(
            lengths=lengths,
            own=gain.squeeze(1) / lengths / temps[0],
            other=teacher_gain.squeeze(1) / lengths_of(teacher_directions) / temps[1],
            shift=centre / temps[1],
        )
        highest, teacher_highest = rows.new_full((num_views, num_items), -torch.inf), rows.new_full((num_global, num_items), -torch.inf)
        total, teacher_total = torch.zeros_like(highest), torch.zeros_like(teacher_highest)
        products = rows.new_zeros(num_global, num_views, num_items)  # sum over k of exp(teacher's logit - highest) * student's logit
        for _, own, other in _chunks(student, teacher, factors):
            teacher_total, teacher_highest, factor = _added(other, total=teacher_total, highest=teacher_highest)
            products = products * factor.unsqueeze(1) + torch.einsum("gbk,vbk->gvb", other, own)
            total, highest, _ = _added(own, total=total, highest=highest)
        log_total, teacher_log_total = highest + total.log(), teacher_highest + teacher_total.log()
        given = (rows, directions, gain, teacher_rows, teacher_directions, teacher_gain, weights)
        ctx.save_for_backward(*given, log_total, teacher_log_total, *factors)
        ctx.temp, ctx.precision = temps[0], precision
        return torch.einsum("vg,gvb->b", weights, log_total - products / teacher_total.unsqueeze(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of a student's logit over its temperature: sum over g of weights[v, g] * (student's assignment - teacher's)."""
        with torch.autocast(device_type=grad.device.type, enabled=False):
            return _gradients(ctx, grad)


def _gradients(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, directions, gain, teacher_rows, teacher_directions, teacher_gain, *rest = ctx.saved_tensors
    weights, log_total, teacher_log_total, *scales = rest
    factors = _Factors(*scales)
    student, teacher = PrototypeLogits(rows, directions, gain), PrototypeLogits(teacher_rows, teacher_directions, teacher_gain)
    learns_rows, learns_directions, learns_gain, *_ = ctx.needs_input_grad
    flat = rows.flatten(0, 1)  # [(V B) D]
    of_rows = torch.zeros_like(flat) if learns_rows else None
    of_directions = torch.empty_like(directions) if learns_directions or learns_gain else None
    of_gain = torch.empty_like(gain) if learns_gain else None
    scale = 1.0 / (factors.lengths * ctx.temp) if learns_gain else factors.own
    share = weights.sum(dim=1, keepdim=True) * grad  # [V B]
    lowered = flat.to(ctx.precision)
    for part, own, other in _chunks(student, teacher, factors):
        own.sub_(log_total.unsqueeze(-1)).exp_().mul_(share.unsqueeze(-1))
        other.sub_(teacher_log_total.unsqueeze(-1)).exp_().mul_(grad.unsqueeze(-1))
        own.flatten(1).addmm_(weights, other.flatten(1), alpha=-1.0)
        of_products = own.mul_(scale[part]).flatten(0, 1)  # [(V B) k]
        if of_directions is not None:
            of_directions[part] = of_products.to(ctx.precision).t() @ lowered
            along = remove_along(of_directions[part], directions=directions[part], lengths=factors.lengths[part])
            if of_gain is not None:
                of_gain[part] = along.unsqueeze(1)
                of_directions[part] *= gain[part]
                of_products.mul_(gain[part].squeeze(1))
        if of_rows is not None:
            of_rows += of_products.to(ctx.precision) @ directions[part].to(ctx.precision)
    return (
        None if of_rows is None else of_rows.view_as(rows),
        of_directions if learns_directions else None,
        of_gain,
        *[None] * 7,
    )


def _added(logits: Tensor, *, total: Tensor, highest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One more chunk of an online softmax; the logits, Float[V B k], become exp(logit - highest so far).

    Returns:
        The sum of exponentials, the highest logit, and the factor on sums that belong to the highest logit before, Float[V B] each.
    """
    now = torch.maximum(highest, logits.amax(dim=-1))
    factor = torch.exp(highest - now)
    return total * factor + logits.sub_(now.unsqueeze(-1)).exp_().sum(dim=-1), now, factor
