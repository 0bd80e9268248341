"""How the tokens of an item look at one another, in a student as in an expert, whatever their widths."""

import torch
from torch import Tensor

from glpretrain.objectives.base import Objective


class TokenRelations(Objective):
    """Divergence of two kinds of relations between tokens (TinyMIM, Ren et al. 2023: query to key, and value to value).

    A relation is softmax over tokens m of <a_n, b_m> / sqrt(d). The loss is the sum over both kinds of the mean over items, heads
    and tokens n of KL(expert's || student's). Zero when all relations are equal.

    Our choice, after MiniLMv2 (Wang et al. 2021): the channels of all attention heads are cut anew into `num_heads`, so that experts
    and students may have any number of heads and any width.

    Args:
        num_heads: of the relations; divides the widths of both.
    """

    def __init__(self, *, num_heads: int = 12) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads: at least 1, not {num_heads}")
        self.num_heads = num_heads

    def log_relation(self, a: Tensor, b: Tensor) -> Tensor:
        """Float[B R N N] of two Float[B heads N d]: logarithms of rows that sum to one, in float32.

        Raises:
            ValueError: `num_heads` does not divide the width.
        """
        width = a.shape[1] * a.shape[3]
        if width % self.num_heads:
            raise ValueError(f"relations: num_heads={self.num_heads} does not divide the {width} channels of an attention")
        first, second = (x.float().transpose(1, 2).flatten(2).unflatten(2, (self.num_heads, -1)) for x in (a, b))  # [B N R d]
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
        """Divergence of the relations of the same tokens.

        Args:
            student_queries: Float[B heads N d], as the keys and values.
            student_keys: see above.
            student_values: see above.
            expert_queries: Float[B heads N d] with heads and d of the expert, as the keys and values.
            expert_keys: see above.
            expert_values: see above.

        Returns:
            Float[].
        """
        assert student_queries.shape[::2] == expert_queries.shape[::2], f"{student_queries.shape} and {expert_queries.shape}"
        pairs = (
            ((student_queries, student_keys), (expert_queries, expert_keys)),
            ((student_values, student_values), (expert_values, expert_values)),
        )
        total = student_queries.new_zeros((), dtype=torch.float32)
        for student, expert in pairs:
            ours, theirs = self.log_relation(*student), self.log_relation(*expert).detach()
            total = total + (theirs.exp() * (theirs - ours)).sum(dim=-1).mean()
        return total
