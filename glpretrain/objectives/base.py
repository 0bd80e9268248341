"""The contract of an objective, and means over pairs of views."""

from abc import ABC
from collections.abc import Callable

import torch
from torch import Tensor, nn

from glpretrain.training.memory import states_of


class Objective(nn.Module, ABC):
    """Keyword tensors in, a float32 loss out. Knows no trainer, step, schedule, teacher or weight.

    A call computes in float32, whatever the precision of the inputs and the autocast around it, because `forward` gets its tensors in
    float32 and with autocast off. Under autocast the products inside (einsum, matmul) would be rounded to half precision again, and those
    over thousands of items can overflow in float16.

    The loss is Float[B], one number per item, where it is a mean over items: the method averages it, with the weights of the items. It is
    Float[] where it has no value per item; the docstring of the objective says so.

    What an objective remembers (centre, queue) is a `State`: `update` gathers from each micro-batch, and the method moves all states once
    per optimizer step, by all micro-batches. A loss that compares items compares those of a micro-batch; a method says for which of its
    terms this is so (`Method.in_batch`).
    """

    forward: Callable[..., Tensor]  # subclasses take their tensors as keywords

    def __call__(self, **inputs: object) -> Tensor:
        """`forward` in float32; the gradient of an input has the input's own precision."""
        (device, *_) = (value.device.type for value in inputs.values() if isinstance(value, Tensor))
        full = {name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value for name, value in inputs.items()}
        with torch.autocast(device_type=device, enabled=False):
            return super().__call__(**full)

    def advance(self, progress: float = 0.0) -> None:
        """Move the objective's states by one optimizer step, as a method does for all its states."""
        for state in states_of(self):
            state.advance(progress)


def mean_over_pairs(values: Tensor, *, balanced: bool) -> Tensor:
    """Float[*S]: mean over pairs of a teacher view g and a student view v != g; the student's first G views are the teacher's.

    Args:
        values: Float[G V *S].
        balanced: pairs with a global and pairs with a local student view count one half each (Mugs); otherwise all pairs count alike.
    """
    num_global, num_views, *rest = values.shape
    same = torch.eye(num_global, num_views, device=values.device, dtype=torch.bool)
    values = values.masked_fill(same.view(num_global, num_views, *[1] * len(rest)), 0.0)
    if not balanced or num_global in (1, num_views):  # one kind of pair only
        return values.sum(dim=(0, 1)) / (num_global * num_views - num_global)
    among_globals, with_locals = values[:, :num_global], values[:, num_global:]
    return 0.5 * among_globals.sum(dim=(0, 1)) / (num_global * (num_global - 1)) + 0.5 * with_locals.mean(dim=(0, 1))
