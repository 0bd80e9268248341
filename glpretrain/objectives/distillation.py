"""Cross-entropy between a teacher's sharpened, balanced assignment to prototypes and the student's (DINO, iBOT, DINOv2)."""

import torch
from torch import Tensor

from glpretrain.core.distributed import all_reduce_max, all_reduce_sum
from glpretrain.objectives.base import Objective, mean_over_pairs
from glpretrain.training.memory import State


class Centre(State):
    """Running mean of the teacher's logits; subtracting it keeps one prototype from winning everything.

    Starts at zero. `value`, Float[K], is in the checkpoint; the sums over the micro-batches of the current step are not.
    """

    value: Tensor
    pending: Tensor

    def __init__(self, num_prototypes: int, *, momentum: float) -> None:
        super().__init__()
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"centre_momentum: accepted are values in [0, 1), not {momentum}")
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(num_prototypes))
        self.register_buffer("pending", torch.zeros(num_prototypes + 1), persistent=False)  # sum of logits, and their count

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """Gather the teacher's logits of one micro-batch, Float[*S K]."""
        rows = logits.detach().float().flatten(0, -2)  # [rows K]
        count = rows.new_full((1,), float(rows.shape[0]))
        self.pending += torch.cat([rows.sum(dim=0), count])

    @torch.no_grad()
    def advance(self, progress: float = 0.0) -> None:
        """value = momentum * value + (1 - momentum) * mean over all micro-batches and processes since the last call."""
        total = all_reduce_sum(self.pending)
        # Without any row (no token was masked) the centre stays as it is.
        mean = torch.where(total[-1] > 0, total[:-1] / total[-1].clamp(min=1.0), self.value)
        self.value.lerp_(mean, 1.0 - self.momentum)
        self.discard()

    def discard(self) -> None:
        """Forget the logits of this step."""
        self.pending.zero_()


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, *, temp: float, num_iterations: int) -> Tensor:
    """Assignments Float[*S K] that use all prototypes equally over the rows of all processes (SwAV; DINOv2's dinov2/loss); rows sum to one.

    exp(logits / temp), then in turn: every prototype gets the share 1 / K of the whole, every row the share 1 / rows. In logarithms,
    because the official exponential overflows or leaves rows of zeros once learned gains spread the logits.

    Args:
        logits: Float[*S K]; processes may have different numbers of rows, or none.
        temp: temperature of the assignments.
        num_iterations: number of iterations, each over prototypes and then over rows.
    """
    shares = logits.float().flatten(0, -2) / temp  # [rows K], logarithms
    lowest = shares.new_full((1, shares.shape[1]), torch.finfo(shares.dtype).min)  # the maximum of a process without rows
    for _ in range(num_iterations):
        largest = all_reduce_max(torch.cat([shares, lowest]).amax(dim=0))  # [K]
        total = all_reduce_sum(torch.exp(shares - largest).sum(dim=0))  # [K]
        shares = torch.log_softmax(shares - largest - total.log(), dim=1)
    return shares.exp().unflatten(0, logits.shape[:-1])


class Distillation(Objective):
    """The common part of both distillation objectives: the temperatures, and how the teacher's assignments are balanced.

    Args:
        num_prototypes: number of prototypes, K.
        student_temp: temperature of the student's assignment.
        centre_momentum: momentum of the running mean that is subtracted from the teacher's logits.
        sinkhorn_iterations: iterations of `sinkhorn_knopp`, which replaces the centre; None uses the centre.
    """

    def __init__(
        self,
        *,
        num_prototypes: int,
        student_temp: float = 0.1,
        centre_momentum: float = 0.9,
        sinkhorn_iterations: int | None = None,
    ) -> None:
        super().__init__()
        if not student_temp > 0.0:
            raise ValueError(f"student_temp: accepted are values above 0, not {student_temp}")
        if sinkhorn_iterations is not None and sinkhorn_iterations < 1:
            raise ValueError(f"sinkhorn_iterations: at least 1, or null for a centre, not {sinkhorn_iterations}")
        self.student_temp = student_temp
        self.sinkhorn_iterations = sinkhorn_iterations
        self.centre_state = Centre(num_prototypes, momentum=centre_momentum) if sinkhorn_iterations is None else None

    @property
    def centre(self) -> Tensor:
        """Float[K]; there is none with `sinkhorn_iterations`."""
        assert self.centre_state is not None, "Sinkhorn-Knopp needs no centre"
        return self.centre_state.value

    def targets(self, teacher_logits: Tensor, *, teacher_temp: float) -> Tensor:
        """Float[*S K]: the teacher's assignment, rows sum to one; float32 because exp of logits / 0.04 overflows in half."""
        if self.sinkhorn_iterations is not None:
            return sinkhorn_knopp(teacher_logits, temp=teacher_temp, num_iterations=self.sinkhorn_iterations)
        return torch.softmax((teacher_logits.detach().float() - self.centre) / teacher_temp, dim=-1)

    def log_assignments(self, student_logits: Tensor) -> Tensor:
        """Float[*S K]: logarithm of the student's assignment, in float32."""
        return torch.log_softmax(student_logits.float() / self.student_temp, dim=-1)

    def update(self, *, teacher_logits: Tensor) -> None:
        """Gather the teacher's logits of one micro-batch, Float[*S K]; the centre moves in `advance`."""
        if self.centre_state is not None:
            self.centre_state.update(teacher_logits)


class ViewDistillation(Distillation):
    """DINO's loss (main_dino.py, DINOLoss).

    mean over items, and over pairs of a teacher view g and a student view v != g, of -sum_k targets[g, k] log student[v, k].
    The student's first G views are the teacher's. Smallest, at the entropy of the targets, where the student's assignments equal them.
    """

    def forward(self, *, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float, balanced: bool = False) -> Tensor:
        """Float[B]: cross-entropy over all pairs of different views.

        Args:
            student_logits: Float[V B K].
            teacher_logits: Float[G B K].
            teacher_temp: temperature of the targets.
            balanced: whether pairs with a global and with a local student view count one half each (Mugs src/loss.py, ClusteringLoss).
        """
        _, num_items, num_prototypes = student_logits.shape
        _, *rest = teacher_logits.shape
        assert rest == [num_items, num_prototypes], f"student {tuple(student_logits.shape)}, teacher {tuple(teacher_logits.shape)}"
        targets = self.targets(teacher_logits, teacher_temp=teacher_temp)
        cross = -torch.einsum("gbk,vbk->gvb", targets, self.log_assignments(student_logits))  # [G V B]
        return mean_over_pairs(cross, balanced=balanced)


class PatchDistillation(Distillation):
    """iBOT's patch loss (main_ibot.py, iBOTLoss): same view, same position, on selected tokens.

    mean over views and items of [ sum over selected tokens of -sum_k targets[k] log student[k] / max(1, number selected) ].
    An item without selected tokens contributes zero and still counts.
    """

    def forward(self, *, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, teacher_temp: float) -> Tensor:
        """Float[B]: cross-entropy on the selected tokens.

        Args:
            student_logits: Float[M K], the selected tokens in row-major order of `mask`.
            teacher_logits: Float[M K], the same tokens of the teacher.
            mask: Bool[G B N], True: selected.
            teacher_temp: temperature of the targets.
        """
        assert student_logits.shape == teacher_logits.shape, f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        targets = self.targets(teacher_logits, teacher_temp=teacher_temp)
        cross = -torch.einsum("mk,mk->m", targets, self.log_assignments(student_logits))  # [M]
        share = mask / mask.sum(dim=-1, keepdim=True).clamp(min=1)  # [G B N]
        spread = torch.zeros(mask.shape, device=cross.device).masked_scatter(mask, cross)  # [G B N]
        return (spread * share).sum(dim=-1).mean(dim=0)
