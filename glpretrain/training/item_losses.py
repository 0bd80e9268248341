"""The last loss of every item, for an order that leaves some items out (`glpretrain.data.infobatch`).

Left out: which items are left out, and with which weights the others train.
"""

import math
from collections.abc import Callable, Mapping, Sized
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from glpretrain.core.distributed import gather_with_grad
from glpretrain.training.memory import State


@runtime_checkable
class FollowsLosses(Protocol):
    """An order of items that looks at their losses."""

    def follow(self, losses: Callable[[], Tensor]) -> None:
        """Set the function that gives the last loss of every item, Float[N], with NaN where there is none."""
        ...


@runtime_checkable
class Ordered(Protocol):
    """What is asked of the data of a run."""

    source: Sized
    order: object


class ItemLosses(State):
    """The last loss of every item: the weighted sum of those terms that have a number per item, without the weight of the item.

    All processes hold those of all items. A step that is refused leaves them as they were.

    Args:
        num_items: number N of items.
    """

    moves_every_step: ClassVar[bool] = False  # the items that a report looks at may not be in the last steps
    last: Tensor  # Float[N]  NaN before the first one

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.register_buffer("last", torch.full((num_items,), math.nan))
        self._pending: list[Tensor] = []  # of this step's micro-batches

    @torch.no_grad()
    def update(self, index: Tensor, *, terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
        """Gather the losses of a micro-batch.

        Args:
            index: Int[B], numbers of the items.
            terms: terms of the loss; those of one number for the whole batch, Float[], are passed over.
            weights: weights of the terms.
        """
        parts = [weights[name] * value.detach().float() for name, value in terms.items() if value.ndim == 1 and weights[name] > 0.0]
        losses = torch.stack(parts).sum(dim=0)  # [B]
        # A float holds no large index: the losses become integers of the same 32 bits, so that one collective is enough.
        self._pending.append(torch.stack([index, losses.view(torch.int32).to(torch.int64)], dim=1))  # [B 2]

    @torch.no_grad()
    def advance(self, progress: float = 0.0) -> None:
        """Write the losses of all processes that came in since the last call."""
        if not self._pending:
            return
        index, bits = gather_with_grad(torch.cat(self._pending)).unbind(dim=1)  # [W M] each
        self._pending = []
        self.last[index] = bits.to(torch.int32).view(torch.float32)

    def discard(self) -> None:
        """Forget what came in since the last call of `advance`."""
        self._pending = []


def losses_for(data: object, *, method: str, weights: Mapping[str, float]) -> ItemLosses | None:
    """What remembers the losses of the items of a run, where its order looks at them; else None.

    Args:
        data: data module of the run.
        method: name of the method, for messages.
        weights: weights, at the end of the run, of the terms that have a number per item.

    Raises:
        ValueError: the order looks at losses of items, and there is no such term with a weight above 0.
    """
    if not isinstance(data, Ordered) or not isinstance(data.order, FollowsLosses):
        return None
    if not any(weights.values()):
        name = type(data.order).__name__
        raise ValueError(f"data.order: {name} needs losses of items, but no term of {method} has one per item; leave data.order out")
    losses = ItemLosses(len(data.source))
    data.order.follow(lambda: losses.last)
    return losses
