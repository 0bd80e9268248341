"""Cross-entropy between a teacher's sharpened, balanced assignment to prototypes and the student's (DINO, iBOT, DINOv2)."""

import math

import torch
from torch import Tensor

from glpretrain.core.distributed import all_reduce_max, all_reduce_sum
from glpretrain.objectives.base import Objective, mean_over_pairs, pair_weights
from glpretrain.training.cross_entropy import prototype_cross_entropy
from glpretrain.training.memory import State
from glpretrain.training.prototypes import PrototypeLogits, dense


class Centre(State):
    """Running mean of the teacher's logits; subtracting it keeps one prototype from winning everything.

    Starts at zero. `value`, Float[K] or Float[N K], is in the checkpoint; the sums over the micro-batches of the current step are not.

    Args:
        num_prototypes: number of prototypes, K.
        momentum: momentum of the running mean.
        num_positions: number N of token positions that have a mean of their own each; None has one mean for all.
    """

    value: Tensor
    pending: Tensor

    def __init__(self, num_prototypes: int, *, momentum: float, num_positions: int | None = None) -> None:
        super().__init__()
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"centre_momentum: accepted are values in [0, 1), not {momentum}")
        self.momentum = momentum
        shape = (num_prototypes,) if num_positions is None else (num_positions, num_prototypes)
        self.register_buffer("value", torch.zeros(shape))
        self.register_buffer("pending", torch.zeros(math.prod(shape) + 1), persistent=False)  # sum of logits, and their count

    @torch.no_grad()
    def update(self, logits: Tensor | PrototypeLogits) -> None:
        """Gather the teacher's logits of one micro-batch, Float[*S K] or Float[*S N K].

        Raises:
            ValueError: the logits are of another number of tokens than the centres.
        """
        shape = self.value.shape
        if self.value.dim() > 1 and logits.shape[-2:] != shape:
            raise ValueError(f"centre: logits of {logits.shape[-2]} tokens given; its centres are for {shape[0]}")
        axes = logits.shape[: len(logits.shape) - len(shape)]
        if isinstance(logits, PrototypeLogits):
            total = logits.total(num_axes=len(axes))
        else:
            total = logits.detach().float().reshape(-1, *shape).sum(dim=0)
        self.pending[:-1] += total.flatten()
        self.pending[-1] += math.prod(axes)

    @torch.no_grad()
    def advance(self, progress: float = 0.0) -> None:
        """value = momentum * value + (1 - momentum) * mean over all micro-batches and processes since the last call."""
        total = all_reduce_sum(self.pending)
        # Without any row (no token was masked) the centre stays as it is.
        mean = torch.where(total[-1] > 0, (total[:-1] / total[-1].clamp(min=1.0)).view_as(self.value), self.value)
        self.value.lerp_(mean, 1.0 - self.momentum)
        self.discard()

    def discard(self) -> None:
        """Forget the logits of this step."""
        self.pending.zero_()


@torch.no_grad()
def sinkhorn_offsets(logits: Tensor, *, temp: float, num_iterations: int) -> Tensor:
    """Float[K]: what Sinkhorn-Knopp (SwAV; DINOv2's dinov2/loss) subtracts from logits / temp before the softmax of each row.

    From exp(logits / temp), in turn: every prototype gets the share 1 / K of the whole, every row the share 1 / rows, over the rows of all
    processes. In logarithms, because the official exponential overflows or leaves rows of zeros once learned gains spread the logits. All
    that is done to the rows cancels in a softmax, so what is done to the prototypes is the result.

    Args:
        logits: Float[*S K]; processes may have different numbers of rows, or none.
        temp: temperature of the assignments.
        num_iterations: number of iterations, each over prototypes and then over rows.
    """
    shares = logits.float().flatten(0, -2) / temp  # [rows K], logarithms
    lowest = shares.new_full((shares.shape[1],), torch.finfo(shares.dtype).min)  # the maximum of a process without rows
    offsets = torch.zeros_like(lowest)
    for _ in range(num_iterations):
        largest = all_reduce_max(shares.amax(dim=0) if len(shares) else lowest)  # [K]
        total = all_reduce_sum(torch.exp(shares - largest).sum(dim=0))  # [K]
        step = largest + total.log()
        offsets += step
        shares.sub_(step)
        shares.sub_(shares.logsumexp(dim=1, keepdim=True))
    return offsets


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, *, temp: float, num_iterations: int) -> Tensor:
    """Assignments Float[*S K] that use all prototypes equally; rows sum to one. See `sinkhorn_offsets`."""
    return torch.softmax(logits.float() / temp - sinkhorn_offsets(logits, temp=temp, num_iterations=num_iterations), dim=-1)


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
        """Float[K], or Float[N K] with one centre per position; there is none with `sinkhorn_iterations`."""
        assert self.centre_state is not None, "Sinkhorn-Knopp needs no centre"
        return self.centre_state.value

    def targets(self, teacher_logits: Tensor | PrototypeLogits, *, teacher_temp: float, centre: Tensor | None = None) -> Tensor:
        """Float[*S K]: the teacher's assignment, rows sum to one; float32 because exp of logits / 0.04 overflows in half.

        Args:
            teacher_logits: Float[*S K].
            teacher_temp: temperature of the assignment.
            centre: what is subtracted from the logits, broadcast against them; None is `self.centre`.
        """
        teacher_logits = dense(teacher_logits)
        if self.sinkhorn_iterations is not None:
            return sinkhorn_knopp(teacher_logits, temp=teacher_temp, num_iterations=self.sinkhorn_iterations)
        return torch.softmax((teacher_logits.detach().float() - (self.centre if centre is None else centre)) / teacher_temp, dim=-1)

    def balance(self, teacher_logits: Tensor | PrototypeLogits, *, teacher_temp: float) -> Tensor:
        """Float[K]: what is subtracted from the teacher's logits, so that no prototype wins everything."""
        if self.sinkhorn_iterations is None:
            return self.centre
        return teacher_temp * sinkhorn_offsets(dense(teacher_logits), temp=teacher_temp, num_iterations=self.sinkhorn_iterations)

    def log_assignments(self, student_logits: Tensor | PrototypeLogits) -> Tensor:
        """Float[*S K]: logarithm of the student's assignment, in float32."""
        return torch.log_softmax(dense(student_logits).float() / self.student_temp, dim=-1)

    def _of_rows(
        self,
        student_logits: Tensor | PrototypeLogits,
        teacher_logits: Tensor | PrototypeLogits,
        *,
        teacher_temp: float,
        centre: Tensor | None = None,
    ) -> Tensor:
        """Float[M]: cross-entropy of each of the student's rows, Float[M K], with the teacher's row of the same number; see `targets`."""
        if isinstance(student_logits, PrototypeLogits) and isinstance(teacher_logits, PrototypeLogits):
            return prototype_cross_entropy(
                student=student_logits.unsqueeze(0),
                teacher=teacher_logits.detach().unsqueeze(0),
                centre=self.balance(teacher_logits, teacher_temp=teacher_temp) if centre is None else centre,
                student_temp=self.student_temp,
                teacher_temp=teacher_temp,
                weights=torch.ones(1, 1, device=student_logits.device),
            )
        targets = self.targets(teacher_logits, teacher_temp=teacher_temp, centre=centre)
        return -torch.einsum("mk,mk->m", targets, self.log_assignments(student_logits))

    def update(self, *, teacher_logits: Tensor | PrototypeLogits) -> None:
        """Gather the teacher's logits of one micro-batch, Float[*S K]; the centre moves in `advance`."""
        if self.centre_state is not None:
            self.centre_state.update(teacher_logits)


class ViewDistillation(Distillation):
    """DINO's loss (main_dino.py, DINOLoss).

    mean over items, and over pairs of a teacher view g and a student view v != g, of -sum_k targets[g, k] log student[v, k].
    The student's first G views are the teacher's. Smallest, at the entropy of the targets, where the student's assignments equal them.
    """

    def forward(
        self,
        *,
        student_logits: Tensor | PrototypeLogits,
        teacher_logits: Tensor | PrototypeLogits,
        teacher_temp: float,
        balanced: bool = False,
        local_weight: float = 1.0,
    ) -> Tensor:
        """Float[B]: cross-entropy over all pairs of different views.

        Args:
            student_logits: Float[V B K].
            teacher_logits: Float[G B K].
            teacher_temp: temperature of the targets.
            balanced: whether pairs with a global and with a local student view count one half each (Mugs src/loss.py, ClusteringLoss).
            local_weight: factor on the pairs with a local student view (DINOv3's train/ssl_meta_arch.py, reweight_dino_local_loss).
        """
        num_views, num_items, num_prototypes = student_logits.shape
        num_global, *rest = teacher_logits.shape
        assert rest == [num_items, num_prototypes], f"student {tuple(student_logits.shape)}, teacher {tuple(teacher_logits.shape)}"
        if isinstance(student_logits, PrototypeLogits) and isinstance(teacher_logits, PrototypeLogits):
            return prototype_cross_entropy(
                student=student_logits,
                teacher=teacher_logits.detach(),
                centre=self.balance(teacher_logits, teacher_temp=teacher_temp),
                student_temp=self.student_temp,
                teacher_temp=teacher_temp,
                weights=pair_weights(num_global, num_views, balanced=balanced, device=student_logits.device, local_weight=local_weight),
            )
        targets = self.targets(teacher_logits, teacher_temp=teacher_temp)
        cross = -torch.einsum("gbk,vbk->gvb", targets, self.log_assignments(student_logits))  # [G V B]
        return mean_over_pairs(cross, balanced=balanced, local_weight=local_weight)


class PatchDistillation(Distillation):
    """iBOT's patch loss (main_ibot.py, iBOTLoss): same view, same position, on selected tokens.

    mean over views and items of [ sum over selected tokens of -sum_k targets[k] log student[k] / max(1, number selected) ].
    An item without selected tokens contributes zero and still counts.

    Args:
        num_prototypes: see `Distillation`; so are the next three.
        student_temp: temperature of the student's assignment.
        centre_momentum: momentum of the running mean.
        sinkhorn_iterations: iterations of `sinkhorn_knopp`.
        num_positions: number N of tokens of a view, each position with a centre of its own (POS-BERT's pretrain.py, center2); `update` then
            needs the logits of all tokens, Float[*S N K]. None has one centre for all positions (iBOT).

    Raises:
        ValueError: `num_positions` was given, and so was `sinkhorn_iterations`.
    """

    def __init__(
        self,
        *,
        num_prototypes: int,
        student_temp: float = 0.1,
        centre_momentum: float = 0.9,
        sinkhorn_iterations: int | None = None,
        num_positions: int | None = None,
    ) -> None:
        super().__init__(
            num_prototypes=num_prototypes,
            student_temp=student_temp,
            centre_momentum=centre_momentum,
            sinkhorn_iterations=sinkhorn_iterations,
        )
        self.num_positions = num_positions
        if num_positions is not None:
            if sinkhorn_iterations is not None:
                raise ValueError("num_positions and sinkhorn_iterations were both given; Sinkhorn-Knopp has no centre, give one of them")
            self.centre_state = Centre(num_prototypes, momentum=centre_momentum, num_positions=num_positions)

    def forward(
        self,
        *,
        student_logits: Tensor | PrototypeLogits,
        teacher_logits: Tensor | PrototypeLogits,
        mask: Tensor,
        teacher_temp: float,
        places: Tensor | None = None,
    ) -> Tensor:
        """Float[B]: cross-entropy on the selected tokens.

        Args:
            student_logits: Float[M K], the selected tokens in row-major order of `mask`.
            teacher_logits: Float[M K], the same tokens of the teacher.
            mask: Bool[G B N], True: selected.
            teacher_temp: temperature of the targets.
            places: Int[M], places of the selected tokens in the flattened mask; None counts them.
        """
        assert student_logits.shape == teacher_logits.shape, f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        centre = None
        if self.num_positions is not None:
            places = mask.flatten().nonzero().squeeze(1) if places is None else places
            centre = self.centre[places % self.num_positions]  # [M K]
        cross = self._of_rows(student_logits, teacher_logits, teacher_temp=teacher_temp, centre=centre)
        share = mask / mask.sum(dim=-1, keepdim=True).clamp(min=1)  # [G B N]
        spread = torch.zeros(mask.shape, device=cross.device).masked_scatter(mask, cross)  # [G B N]
        return (spread * share).sum(dim=-1).mean(dim=0)


class TokenDistillation(Distillation):
    """Cross-entropy of the student's assignment of a token with the teacher's of another one, which shows the same place (MMC).

    mean over views and items of [ sum over valid tokens of -sum_k targets[k] log student[k] / max(1, number valid) ]. All rows take part
    in the balance of the targets, valid or not: their number is the same in every step.
    """

    def forward(
        self, *, student_logits: Tensor | PrototypeLogits, teacher_logits: Tensor | PrototypeLogits, valid: Tensor, teacher_temp: float
    ) -> Tensor:
        """Float[B]: cross-entropy on the valid tokens.

        Args:
            student_logits: Float[(V B M) K].
            teacher_logits: Float[(V B M) K], the tokens that these are compared with.
            valid: Bool[V B M], tokens that count.
            teacher_temp: temperature of the targets.
        """
        assert student_logits.shape == teacher_logits.shape, f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        cross = self._of_rows(student_logits, teacher_logits, teacher_temp=teacher_temp).view(valid.shape)
        return ((cross * valid).sum(dim=-1) / valid.sum(dim=-1).clamp(min=1)).mean(dim=0)
