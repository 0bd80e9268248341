"""The scale of a frozen teacher's features, measured once before the first step, so that targets have variance 1.

Left out: which items are measured (methods), and the features themselves (`teacher`).
"""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from glpretrain.core.distributed import all_reduce_sum, world_size
from glpretrain.training.memory import State


class TargetScale(State):
    """One number, 1 / standard deviation of all features that were measured; it is 1 before.

    All processes measure together, so the number is the same in all of them. It is in checkpoints, so a resumed run goes on with it
    (locality alignment, scripts/train.py, get_baseline_loss).
    """

    moves_every_step: ClassVar[bool] = False
    scale: Tensor  # Float[]
    num_measured: Tensor  # Int[], numbers that it was measured on; 0 before

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("num_measured", torch.zeros((), dtype=torch.int64))

    @property
    def is_measured(self) -> bool:
        """Whether `measure` was called, in this run or before a resume; waits for the device."""
        return int(self.num_measured) > 0

    @torch.no_grad()
    def measure(self, features: Iterable[Tensor]) -> None:
        """Set the scale by the features of this process, Float[*S] each, and of all others.

        Raises:
            ValueError: there are no features, or they do not vary, or are not finite.
        """
        sums = torch.zeros(3, dtype=torch.float64)  # number, sum, sum of squares
        for part in features:
            values = part.detach().float().cpu().double()  # on the host, because not every device has float64
            sums += torch.stack([values.new_tensor(float(values.numel())), values.sum(), values.square().sum()])
        count, total, squares = (sums if world_size() == 1 else all_reduce_sum(sums.to(self.scale.device))).tolist()
        variance = squares / count - (total / count) ** 2 if count else 0.0
        if not 0.0 < variance < float("inf"):
            raise ValueError(
                f"targets: {int(count)} features of the frozen teacher have a variance of {variance:g}; accepted: a finite number above 0;"
                " look at the backbone that the run starts from"
            )
        self.scale.fill_(variance**-0.5)
        self.num_measured.fill_(int(count))

    def forward(self, features: Tensor) -> Tensor:
        """Float[*S]: features times the scale."""
        return features * self.scale

    def advance(self, progress: float = 0.0) -> None:
        """Nothing: it is measured once."""

    def discard(self) -> None:
        """Nothing: a step moves nothing."""
