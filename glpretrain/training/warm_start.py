"""The trunk of a run that starts from trained weights: frozen in front of random heads, then learning at a rate that rises.

Left out: where weights come from (`glpretrain.weights`), what may differ (`encoders.transfer`) and the rates of layers (`optim`).
"""

import math

import torch
from torch import Tensor

from glpretrain.core.distributed import all_reduce_mean
from glpretrain.training.memory import State
from glpretrain.training.optim import TrunkRelease


class Trunk(State):
    """Whether the trunk learns, and at which share of its rate. All of it is in checkpoints, so that a resumed run goes on.

    Args:
        settings: when the trunk is released.
    """

    released_at: Tensor
    sums: Tensor
    means: Tensor
    pending: Tensor
    window: Tensor

    def __init__(self, settings: TrunkRelease) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("released_at", torch.full((), math.inf, dtype=torch.float64))  # progress; infinite before
        self.register_buffer("sums", torch.zeros(2))  # of the losses in the window at hand, and their count
        self.register_buffer("means", torch.full((2,), math.nan))  # losses of the two windows before
        self.register_buffer("pending", torch.zeros(2), persistent=False)  # the same of the micro-batches of the step at hand
        self.register_buffer("window", torch.zeros((), dtype=torch.int64))  # number of the window at hand
        self._released: float | None = None  # the same on the host, which must not ask the device at every step

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
        return abs(last - before) <= self.settings.tolerance * abs(last)  # false while a window is missing: no number is near NaN

    @torch.no_grad()
    def update(self, loss: Tensor) -> None:
        """Take in the loss of one micro-batch, Float[]."""
        if self.settings.tolerance is not None and math.isinf(self.released):
            self.pending += torch.stack([all_reduce_mean(loss.detach().float()), torch.ones_like(loss)])

    @torch.no_grad()
    def advance(self, progress: float = 0.0) -> None:
        """Close the window at hand where the step at `progress` is the first of another one."""
        if self.settings.tolerance is None or not math.isinf(self.released):
            return
        window = math.floor(progress / self.settings.window + 1e-9)
        if window != int(self.window):
            self.window.fill_(window)
            self.means.copy_(torch.stack([self.means[1], self.sums[0] / self.sums[1]]))
            self.sums.zero_()
        self.sums += self.pending
        self.pending.zero_()
