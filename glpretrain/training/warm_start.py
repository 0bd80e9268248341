"""The trunk of a run that starts from trained weights: first frozen in front of random heads, then learning at a rate that rises.

Left out: loading weights (`glpretrain.weights`), copying them (`encoders.transfer`), and the rates of layers (`optim`).
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from glpretrain.core.distributed import all_reduce_mean
from glpretrain.training.memory import State
from glpretrain.training.optim import TrunkRelease


class Trunk(State):
    """Decides whether the trunk learns, and at which share of its rate. Its buffers are in checkpoints, so that a resumed run goes on.

    Args:
        settings: when the trunk is released.
    """

    moves_every_step: ClassVar[bool] = False  # once released, it stands still
    released_at: Tensor
    sums: Tensor
    means: Tensor
    pending: Tensor
    window: Tensor

    def __init__(self, settings: TrunkRelease) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("released_at", torch.full((), math.inf, dtype=torch.float64))  # progress; infinite before
        self.register_buffer("sums", torch.zeros(2))  # sum of the losses in the current window, and their number
        self.register_buffer("means", torch.full((2,), math.nan))  # mean losses of the two windows before
        self.register_buffer("pending", torch.zeros(2), persistent=False)  # the same for the micro-batches of the current step
        self.register_buffer("window", torch.zeros((), dtype=torch.int64))  # number of the current window
        self._released: float | None = None  # the same on the host, which must not ask the device at every step

    @classmethod
    def in_front_of(cls, heads: nn.Module, settings: TrunkRelease | None, *, fresh: bool) -> "Trunk":
        """The trunk of a run with these heads.

        Args:
            heads: heads of the student; without any the trunk waits for nothing.
            settings: when it is released; None raises its rate slowly in front of fresh heads, and at once in front of trained ones.
            fresh: whether the heads have random weights.
        """
        if next(heads.parameters(), None) is None:
            return cls(TrunkRelease(frozen=0.0))
        return cls(settings or (TrunkRelease() if fresh else TrunkRelease(ramp=0.0)))

    @property
    def released(self) -> float:
        """Progress at which the trunk began to learn; infinite before."""
        if self._released is None:  # a checkpoint may have been loaded since construction
            self._released = float(self.released_at)
        return self._released

    def rate(self, progress: float, *, step: float) -> float:
        """Factor on the rate of the trunk in the step at `progress`, 0 while it is frozen; releases the trunk when it is time.

        Args:
            progress: share of the run that is done.
            step: share of the run that one step is, so that the first step of the ramp moves the trunk too.
        """
        if math.isinf(self.released) and (progress >= self.settings.frozen or self._settled()):
            self.released_at.fill_(progress)
            self._released = progress
        if math.isinf(self.released):
            return 0.0
        return min(1.0, (progress - self.released + step) / max(self.settings.ramp, step))

    def _settled(self) -> bool:
        if self.settings.tolerance is None:
            return False
        before, last = self.means.tolist()
        return abs(last - before) <= self.settings.tolerance * abs(last)  # false while a mean is still NaN

    @torch.no_grad()
    def update(self, loss: Tensor) -> None:
        """Gather the loss of one micro-batch, Float[]."""
        if self.settings.tolerance is not None and math.isinf(self.released):
            self.pending += torch.stack([all_reduce_mean(loss.detach().float()), torch.ones_like(loss)])

    @torch.no_grad()
    def advance(self, progress: float = 0.0) -> None:
        """End the current window if the step at `progress` is the first of the next one."""
        if self.settings.tolerance is None or not math.isinf(self.released):
            return
        window = math.floor(progress / self.settings.window + 1e-9)
        if window != int(self.window):
            self.window.fill_(window)
            self.means.copy_(torch.stack([self.means[1], self.sums[0] / self.sums[1]]))
            self.sums.zero_()
        self.sums += self.pending
        self.discard()

    def discard(self) -> None:
        """Forget the losses of this step."""
        self.pending.zero_()
