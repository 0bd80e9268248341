"""The cross-entropy of `cross_entropy` in kernels for a GPU: neither logits nor chunks of them are ever in its memory.

The sum over k of targets[g, k] * logit[v, k] is the product of the student's row v with the mean, by the teacher's assignment g, of the
student's scaled directions. So the rows of student and teacher are two independent attentions over prototypes, as in flash attention, and
the means of the forward pass are also the gradients of the rows; the backward pass computes those of the directions only.

No GPU has measured it yet, so it runs only where it was asked for (`Optimization.cross_entropy`). The chunked form is what it must equal.
"""

import importlib.util
import os

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glpretrain.training.prototypes import Context, lengths_of, remove_along

MOST_WIDTH = 512  # of projections; wider blocks do not fit into the fast memory of a processor of a GPU


def require_fused(device: torch.device) -> None:
    """Refuse what the kernels cannot run on.

    Raises:
        ValueError: there is no Triton, or the device is no GPU (Triton's interpreter, which tests use, runs on a CPU).
    """
    given = "optimization: cross_entropy='fused' given, but"
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"{given} the package triton is not installed, as it is with torch for CUDA; leave it out, or install that")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"{given} this run is on {device.type}; it needs a CUDA GPU; leave it out")


class _Context(Context):
    temp: float  # of the student
    precision: torch.dtype


class FusedCrossEntropy(torch.autograd.Function):
    """The function of `cross_entropy`, with the same arguments and results."""

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
        """Float[V B D], Float[K D], Float[K 1], the same of the teacher with Float[G B D], and the rest to Float[B]."""
        from glpretrain.training.prototype_kernels import Side, attend  # needs Triton

        assert teacher_rows.shape[-1] == rows.shape[-1], "student and teacher have heads of one width"
        with torch.autocast(device_type=rows.device.type, enabled=False):
            own = gain.float().squeeze(1) / lengths_of(directions.float()) / temps[0]
            other = teacher_gain.float().squeeze(1) / lengths_of(teacher_directions.float()) / temps[1]
            student = Side(rows.flatten(0, 1), directions, own, None)
            shift = centre.float() / temps[1]
            teacher = Side(teacher_rows.flatten(0, 1), teacher_directions, other, shift)
            # The student's means are a gradient only, in the precision of a backward pass; the teacher's are part of the loss.
            total, mean = attend(student, values=directions, factor=own, precision=precision)
            teacher_total, teacher_mean = attend(teacher, values=directions, factor=own, precision=torch.float32)
            log_total, teacher_mean = total.view(rows.shape[:2]), teacher_mean.view(teacher_rows.shape)
            products = torch.einsum("gbd,vbd->gvb", teacher_mean, rows.float())
            loss = torch.einsum("vg,gvb->b", weights, log_total - products)
        given = (rows, directions, gain, teacher.rows, teacher_directions, weights)
        ctx.save_for_backward(*given, own, other, shift, total, mean, teacher_total, teacher_mean)
        ctx.temp, ctx.precision = temps[0], precision
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of a student's logit over its temperature: sum over g of weights[v, g] * (student's assignment - teacher's)."""
        with torch.autocast(device_type=grad.device.type, enabled=False):
            return _gradients(ctx, grad)


def _gradients(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    from glpretrain.training.prototype_kernels import Side, gather

    rows, directions, gain, flat_teacher, teacher_directions, weights, own, other, shift, *results = ctx.saved_tensors
    total, mean, teacher_total, teacher_mean = results
    learns_rows, learns_directions, learns_gain, *_ = ctx.needs_input_grad
    share = torch.einsum("vg,b->vb", weights, grad).unsqueeze(-1)  # [V B 1]
    of_rows = of_directions = of_gain = None
    if learns_rows:
        of_targets = torch.einsum("vg,gbd->vbd", weights, teacher_mean * grad.unsqueeze(-1))
        of_rows = (share * mean.view(rows.shape) - of_targets).to(rows.dtype)
    if learns_directions or learns_gain:
        full, lengths = rows.float(), lengths_of(directions.float())
        student, teacher = Side(rows.flatten(0, 1), directions, own, None), Side(flat_teacher, teacher_directions, other, shift)
        mixed = torch.einsum("vg,vbd->gbd", weights, full) * grad.unsqueeze(-1)
        found = gather(student, total=total, given=(share * full).flatten(0, 1), precision=ctx.precision)
        gather(teacher, total=teacher_total, given=mixed.flatten(0, 1), precision=ctx.precision, subtract_from=found)
        found *= (1.0 / (lengths * ctx.temp) if learns_gain else own).unsqueeze(1)
        along = remove_along(found, directions=directions.float(), lengths=lengths)
        if learns_gain:
            of_gain = along.unsqueeze(1).to(gain.dtype)
            found *= gain
        of_directions = found.to(directions.dtype) if learns_directions else None
    return of_rows, of_directions, of_gain, *[None] * 7
