"""The contract of an objective."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Objective(nn.Module, ABC):
    """Keyword tensors in, one float32 scalar out. Knows no trainer, step, schedule, teacher or weight.

    An objective with state (centre, queue) offers `update`, which only gathers what a micro-batch has to say, and moves its
    state in `advance`, which the method calls once per optimizer step. So accumulating micro-batches changes nothing.
    """

    @abstractmethod
    def forward(self) -> Tensor:
        """Float[]; subclasses take their tensors as keywords."""

    def advance(self) -> None:
        """Move the state by one optimizer step; nothing to do without state."""
