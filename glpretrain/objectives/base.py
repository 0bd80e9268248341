"""The contract of an objective."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from glpretrain.training.memory import states_of


class Objective(nn.Module):
    """Keyword tensors in, one float32 scalar out. Knows no trainer, step, schedule, teacher or weight.

    A subclass writes `forward`, which takes its own tensors as keywords, and returns Float[].

    What an objective remembers (centre, queue) is a `State` of its own: `update` only gathers what a micro-batch has to say, and
    the method moves all states once per optimizer step. So accumulating micro-batches changes nothing.
    """

    forward: Callable[..., Tensor]

    def advance(self) -> None:
        """Move the objective's states by one optimizer step: what a method does for all its states together."""
        for state in states_of(self):
            state.advance()


def mean_over_pairs(values: Tensor, *, balanced: bool) -> Tensor:
    """Mean over pairs of a teacher view g and a student view v != g; the student's first G views are the teacher's.

    Args:
        values: Float[G V].
        balanced: pairs with a global and pairs with a local student view count one half each (Mugs); otherwise all pairs count alike.

    Returns:
        Float[].
    """
    num_global, num_views = values.shape
    same = torch.eye(num_global, num_views, device=values.device, dtype=torch.bool)
    values = values.masked_fill(same, 0.0)
    if not balanced or num_global in (1, num_views):  # one kind of pair only
        return values.sum() / (num_global * num_views - num_global)
    mine, local = values[:, :num_global], values[:, num_global:]
    return 0.5 * mine.sum() / (num_global * (num_global - 1)) + 0.5 * local.mean()
