"""The contract of an objective, and means over pairs of views."""

from abc import ABC
from collections.abc import Callable

import torch
from torch import Tensor, nn

from glpretrain.training.memory import states_of
from glpretrain.training.prototypes import PrototypeLogits


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
        (device, *_) = (value.device.type for value in inputs.values() if isinstance(value, Tensor | PrototypeLogits))
        full = {name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value for name, value in inputs.items()}
        with torch.autocast(device_type=device, enabled=False):
            return super().__call__(**full)

    def advance(self, progress: float = 0.0) -> None:
        """Move the objective's states by one optimizer step, as a method does for all its states."""
        for state in states_of(self):
            state.advance(progress)


def pair_weights(num_global: int, num_views: int, *, balanced: bool, device: torch.device, local_weight: float = 1.0) -> Tensor:
    """Float[V G]: share of a student view v and a teacher view g in a mean over all pairs with v != g.

    The student's first G views are the teacher's.

    Args:
        num_global: number G of teacher views.
        num_views: number V of student views.
        balanced: pairs with a global and pairs with a local student view count one half each (Mugs); otherwise all pairs count alike.
        device: device of the result, where it is made, since a copy from the host would wait.
        local_weight: factor on the pairs with a local student view; the others do not grow when it is below 1.
    """
    shares = torch.full((num_views, num_global), 1.0 / (num_global * num_views - num_global), device=device)
    if balanced and num_global not in (1, num_views):  # both kinds of pairs are there
        shares[:num_global] = 0.5 / (num_global * (num_global - 1))
        shares[num_global:] = 0.5 / (num_global * (num_views - num_global))
    if local_weight != 1.0:
        shares[num_global:] *= local_weight
    return shares.fill_diagonal_(0.0)


def mean_over_pairs(values: Tensor, *, balanced: bool, local_weight: float = 1.0) -> Tensor:
    """Float[*S]: mean over pairs of a teacher view g and a student view v != g; see `pair_weights`.

    Args:
        values: Float[G V *S].
        balanced: see `pair_weights`.
        local_weight: see `pair_weights`.
    """
    num_global, num_views, *rest = values.shape
    of_pairs = pair_weights(num_global, num_views, balanced=balanced, device=values.device, local_weight=local_weight)
    shares = of_pairs.t().view(num_global, num_views, *[1] * len(rest))
    return (shares * values.masked_fill(shares == 0.0, 0.0)).sum(dim=(0, 1))
