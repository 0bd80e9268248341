"""Distances from a student to an expert: of `cls`, of maps of tokens, and of the relations between the tokens of an item."""

import torch
import torch.nn.functional as F
from torch import Tensor

from glpretrain.core.patches import resize_tokens
from glpretrain.objectives.base import Objective

_COSINE_SHARE = 0.9  # of `FeatureDistance`


class CosineDistance(Objective):
    """1 - mean over items of cos(student, expert) (GPFM's kl_loss.py, Cosine). Zero when all pairs have the same direction."""

    def forward(self, *, predictions: Tensor, targets: Tensor) -> Tensor:
        """Float[B]: the student's features after its head for this expert, Float[B D], and the expert's, Float[B D]."""
        assert predictions.shape == targets.shape, f"{tuple(predictions.shape)} and {tuple(targets.shape)}"
        return 1.0 - F.cosine_similarity(predictions, targets.detach(), dim=-1)


class FeatureDistance(Objective):
    """Cosine and smooth L1 between maps of tokens, the expert's resized to the student's grid (GPFM's kl_loss.py, FeatureLoss).

    0.9 * (1 - mean over items and tokens of cos) + 0.1 * mean over all numbers of smooth L1 with a corner at 1. Zero for equal maps.
    """

    def forward(self, *, predictions: Tensor, targets: Tensor, grid: tuple[int, int], target_grid: tuple[int, int]) -> Tensor:
        """Float[B]: distance of maps.

        Args:
            predictions: Float[B N D], the student's tokens after its head for this expert.
            targets: Float[B M D], the expert's tokens.
            grid: rows and columns of the student's tokens, N in all.
            target_grid: rows and columns of the expert's tokens, M in all.
        """
        targets = resize_tokens(targets.detach(), grid=target_grid, new_grid=grid)
        assert predictions.shape == targets.shape, f"{tuple(predictions.shape)} and {tuple(targets.shape)}"
        cosine = 1.0 - F.cosine_similarity(predictions, targets, dim=-1).mean(dim=1)
        distance = F.smooth_l1_loss(predictions, targets, reduction="none").mean(dim=(1, 2))
        return _COSINE_SHARE * cosine + (1.0 - _COSINE_SHARE) * distance


class WhitenedFeatures(Objective):
    """Smooth L1 to an expert's whitened map (feature distillation, Wei et al. 2022): every target token gets mean 0 and variance 1.

    mean over all numbers of smooth L1 with a corner at `corner`. Zero when the student predicts the whitened map.
    """

    def __init__(self, *, corner: float = 2.0) -> None:
        super().__init__()
        if corner <= 0.0:
            raise ValueError(f"corner: accepted are values above 0, not {corner}")
        self.corner = corner

    def forward(self, *, predictions: Tensor, targets: Tensor) -> Tensor:
        """Float[B]: the student's tokens after its head, Float[B N D], and the expert's on the same grid, Float[B N D]."""
        assert predictions.shape == targets.shape, f"{tuple(predictions.shape)} and {tuple(targets.shape)}"
        targets = F.layer_norm(targets.detach(), targets.shape[-1:])
        return F.smooth_l1_loss(predictions, targets, beta=self.corner, reduction="none").mean(dim=(1, 2))


class TokenRelations(Objective):
    """Divergence of two kinds of relations between tokens (TinyMIM, Ren et al. 2023: query to key, and value to value).

    A relation is softmax over tokens m of <a_n, b_m> / sqrt(d). The loss is the sum over both kinds of the mean over items, heads
    and tokens n of KL(expert's || student's). Zero when all relations are equal.

    Our choice, after MiniLMv2 (Wang et al. 2021): the channels of all attention heads are divided again into `num_heads`, so that experts
    and students may have any number of heads and any width.

    Args:
        num_heads: number of heads of the relations; divides the widths of both.
    """

    def __init__(self, *, num_heads: int = 12) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads: at least 1, not {num_heads}")
        self.num_heads = num_heads

    def log_relation(self, a: Tensor, b: Tensor) -> Tensor:
        """Float[B R N N] of two Float[B heads N d]: logarithms of rows that sum to one.

        Raises:
            ValueError: `num_heads` does not divide the width.
        """
        width = a.shape[1] * a.shape[3]
        if width % self.num_heads:
            raise ValueError(f"relations: num_heads={self.num_heads} does not divide the {width} channels of an attention")
        first, second = (x.transpose(1, 2).flatten(2).unflatten(2, (self.num_heads, -1)) for x in (a, b))  # [B N R d]
        scores = torch.einsum("bnrd,bmrd->brnm", first, second) * first.shape[-1] ** -0.5
        return torch.log_softmax(scores, dim=-1)

    def forward(
        self,
        *,
        student_queries: Tensor,
        student_keys: Tensor,
        student_values: Tensor,
        expert_queries: Tensor,
        expert_keys: Tensor,
        expert_values: Tensor,
    ) -> Tensor:
        """Float[B]: divergence of the relations of the same tokens.

        Queries, keys and values are Float[B heads N d], with the heads and the width of the student or of the expert.
        """
        assert student_queries.shape[::2] == expert_queries.shape[::2], f"{student_queries.shape} and {expert_queries.shape}"
        pairs = (
            ((student_queries, student_keys), (expert_queries, expert_keys)),
            ((student_values, student_values), (expert_values, expert_values)),
        )
        total = student_queries.new_zeros(len(student_queries))
        for student, expert in pairs:
            ours, theirs = self.log_relation(*student), self.log_relation(*expert).detach()
            total = total + (theirs.exp() * (theirs - ours)).sum(dim=-1).mean(dim=(1, 2))
        return total
