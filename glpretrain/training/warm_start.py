"""Going on from a trained trunk with heads that know nothing: the heads learn first, then the trunk joins in.

Random heads send random gradients into the trunk and undo what it knows. So the trunk is left as it is until what the teacher
asks for, the entropy of its assignments, has settled; then its rate rises from zero, lower layers staying slower than upper ones.
Methods whose teacher assigns nothing watch their loss instead. Left out: where weights come from (`encoders.transfer`,
`backbones`) and the rates of layers (`optim`).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glpretrain.core.distributed import all_reduce_sum, has_process_group
from glpretrain.encoders.base import Encoder
from glpretrain.objectives.base import Objective
from glpretrain.objectives.distillation import Distillation

LAYER_DECAY = 0.75  # of a continued run that says nothing else; the default of MAE's fine-tuning (main_finetune.py)


@dataclass(frozen=True)
class Continuation:
    """When the trunk joins in.

    Args:
        tolerance: the curve has settled when its moving average has changed by no more than this share of itself within a window.
        window: share of the run over which the curve is averaged and its change is taken; two windows are the least that is seen.
        shortest: share of the run for which the trunk stays frozen whatever the curve does; the default is the usual warm-up of
            the heads' rate, before which a flat curve says nothing.
        longest: share of the run after which it is released whatever the curve does; 0 never freezes it.
        ramp: share of the run in which the trunk's rate rises to its full value.

    Raises:
        ValueError: a value out of range.
    """

    tolerance: float = 0.05
    window: float = 0.05
    shortest: float = 0.1
    longest: float = 0.3
    ramp: float = 0.05

    def __post_init__(self) -> None:
        if self.tolerance <= 0.0:
            raise ValueError(f"continuation: tolerance is a share above 0, not {self.tolerance}")
        for name in ("window", "shortest", "longest", "ramp"):
            if not 0.0 <= (value := vars(self)[name]) < 1.0:
                raise ValueError(f"continuation: {name} is a share of the run in [0, 1), not {value}")


class Settling(nn.Module):
    """Have all curves stopped moving?

    A window is W = 8 blocks of equally many optimizer steps. The means of the last 2 W blocks of every curve are kept. Averaged over
    W neighbours they make W + 1 smooth values; the curve has settled when the largest and the smallest of these differ by at most
    `tolerance` of the last. The range, and not the difference of first and last, so that a curve which turns around has not settled.

    Equal in every process, and all of it is in checkpoints except what belongs to the step at hand.

    Args:
        num_curves: all of them have to settle.
        tolerance: share of a curve's value.
    """

    BLOCKS = 8  # of a window; their number does not depend on the length of the run, so neither does the size of the state

    def __init__(self, num_curves: int, *, tolerance: float) -> None:
        super().__init__()
        self.tolerance = tolerance
        self.register_buffer("means", torch.zeros(num_curves, 2 * self.BLOCKS))  # of blocks, oldest first
        self.register_buffer("num_means", torch.zeros((), dtype=torch.int64))
        self.register_buffer("block", torch.zeros(num_curves, 2))  # sum of the steps' values in the block at hand, and their count
        self.register_buffer("pending", torch.zeros(num_curves, 2), persistent=False)  # the same of the samples in the step at hand

    @torch.no_grad()
    def update(self, curve: int, *, samples: Tensor) -> None:
        """Take in what one micro-batch has to say about a curve, Float[S]; S may be 0."""
        samples = samples.detach().float()
        self.pending[curve] += torch.cat([samples.sum().reshape(1), samples.new_full((1,), float(samples.numel()))])

    @torch.no_grad()
    def advance(self, *, ends_block: bool) -> Tensor:
        """Move on by one optimizer step: the mean over the samples of all micro-batches and processes since the last call.

        Args:
            ends_block: the step is the last of its block.

        Returns:
            Float[curves]: this step's values, 0 without samples.
        """
        sums, counts = all_reduce_sum(self.pending).unbind(dim=1)  # [curves] each
        values = sums / counts.clamp(min=1.0)
        self.block += torch.stack([values, (counts > 0).to(values)], dim=1)  # without samples (nothing was masked) nothing is added
        self.pending.zero_()
        if ends_block:
            total, count = self.block.unbind(dim=1)
            mean = torch.where(count > 0, total / count.clamp(min=1.0), self.means[:, -1])
            self.means.copy_(torch.cat([self.means[:, 1:], mean.unsqueeze(1)], dim=1))
            self.num_means += 1
            self.block.zero_()
        return values

    def change(self) -> Tensor:
        """Float[curves]: range of the smooth values over the last window, as a share of the last of them."""
        smooth = self.means.unfold(1, self.BLOCKS, 1).mean(dim=-1)  # [curves W+1]
        low, high = smooth.aminmax(dim=1)
        return (high - low) / smooth[:, -1].abs().clamp(min=torch.finfo(smooth.dtype).tiny)

    def settled(self) -> Tensor:
        """Bool[]: all curves have, and two windows were seen."""
        return (self.num_means >= 2 * self.BLOCKS) & (self.change() <= self.tolerance).all()


class HeadWarmup(nn.Module):
    """Keeps a trunk frozen until the curves have settled, then lets its rate rise.

    Frozen means: the encoder is in evaluation mode, runs without gradient, and the optimizer finds none. `requires_grad` stays
    true, because DistributedDataParallel decides once, before the first step, which gradients it will average.

    Args:
        settings: when the trunk is released.
        encoder: the student's trunk.
        objectives: all of the method's; the entropy of the teacher is watched where there are targets, else the loss.
    """

    def __init__(self, settings: Continuation, *, encoder: Encoder, objectives: Iterable[Objective]) -> None:
        super().__init__()
        self.settings = settings
        distillations = [objective for objective in objectives if isinstance(objective, Distillation)]
        self.watches_entropy = bool(distillations)
        self.settling = Settling(max(1, len(distillations)), tolerance=settings.tolerance)
        self.register_buffer("released_at", torch.full((), -1, dtype=torch.int64))  # optimizer step; -1: not yet
        self._released = -1  # the same on the host, which must not ask the device at every step
        self._is_read = False
        self._rate = 0.0
        self._last: Tensor | None = None  # what was watched in the step before
        for curve, objective in enumerate(distillations):
            self._watch(objective, curve=curve)
        self._without_gradient(encoder)

    @property
    def frozen(self) -> bool:
        """Is the trunk left as it is in this step?"""
        return self._released < 0

    @property
    def released(self) -> int | None:
        """The optimizer step from which on the trunk learns; None before."""
        return None if self.frozen else self._released

    def _watch(self, objective: Distillation, *, curve: int) -> None:
        """Objectives know tensors only, so what they are given is looked at from outside."""

        def note(objective: Distillation, args: tuple, inputs: dict, output: Tensor) -> None:
            if self.frozen:
                entropy = objective.entropy(inputs["teacher_logits"], teacher_temp=inputs["teacher_temp"])
                self.settling.update(curve, samples=entropy.flatten())

        objective.register_forward_hook(note, with_kwargs=True)

    def _without_gradient(self, encoder: Encoder) -> None:
        modes: list[bool] = []

        def before(encoder: Encoder, args: tuple) -> None:
            modes.append(torch.is_grad_enabled())
            torch.set_grad_enabled(modes[-1] and not self.frozen)

        def after(encoder: Encoder, args: tuple, output: object) -> None:
            torch.set_grad_enabled(modes.pop())

        encoder.register_forward_pre_hook(before)
        encoder.register_forward_hook(after, always_call=True)

    def begin_step(self, encoder: Encoder, *, groups: list[dict], step: int, num_steps: float) -> str | None:
        """Before every micro-batch: release the trunk if it is time, and set its rate.

        Looks at what was known after the step before, so the host waits for no more than that.

        Args:
            encoder: the student's trunk.
            groups: of the optimizer, with their rates; those of the trunk are scaled.
            step: optimizer steps done.
            num_steps: of the whole run.

        Returns:
            Why the trunk was released, in the step that does it.
        """
        if not self._is_read:  # a checkpoint may have been loaded
            self._released, self._is_read = int(self.released_at), True
        reason = self._reason(step / num_steps) if self.frozen else None
        if reason is not None:
            self._released = step
            self.released_at.fill_(step)
        if encoder.training is self.frozen:
            encoder.train(not self.frozen)
        # Not from zero: the first step of the ramp is a step too.
        self._rate = 0.0 if self.frozen else min(1.0, (step - self._released + 1) / max(1.0, self.settings.ramp * num_steps))
        for group in groups:
            if group["trunk"]:
                group["lr"] *= self._rate
        return reason

    def _reason(self, progress: float) -> str | None:
        watched = "the teacher's entropy" if self.watches_entropy else "the loss"
        if progress >= self.settings.longest:
            return f"the longest warm-up of heads is over, whether or not {watched} has settled"
        if progress >= self.settings.shortest and bool(self.settling.settled()):
            return f"{watched} has settled"
        return None

    def metrics(self) -> dict[str, float | Tensor]:
        """What a step logs. The teacher's entropy is that of the step before, and no number where it is not looked at."""
        shown: dict[str, float | Tensor] = {"schedule/trunk_frozen": float(self.frozen), "schedule/trunk_rate": self._rate}
        if self.watches_entropy:
            shown["train/teacher_entropy"] = math.nan if self._last is None else self._last
        return shown

    def after_losses(self, total: Tensor, *, encoder: Encoder) -> Tensor:
        """Note the loss where it is what is watched.

        Returns:
            `total`, Float[], with a gradient of zero for the trunk where DistributedDataParallel waits for one.
        """
        if not self.frozen:
            return total
        if not self.watches_entropy:
            self.settling.update(0, samples=total.reshape(1))
        if not has_process_group():
            return total
        # One number of each: a sum over all of them may overflow in half precision, and nothing times infinity is not nothing.
        numbers = [parameter.reshape(-1)[0] for parameter in encoder.parameters() if parameter.requires_grad]
        return total + 0.0 * torch.stack(numbers).sum()

    def drop_gradients(self, encoder: Encoder) -> None:
        """A gradient of zero is not none: the optimizer would still decay the weights."""
        if self.frozen:
            for parameter in encoder.parameters():
                parameter.grad = None

    def advance(self, *, step: int, num_steps: float) -> None:
        """Right after the optimizer.

        Args:
            step: optimizer steps done before this one.
            num_steps: of the whole run.
        """
        self._last = None
        if self.frozen:
            block = max(1, math.ceil(self.settings.window * num_steps / Settling.BLOCKS))  # optimizer steps
            self._last = self.settling.advance(ends_block=(step + 1) % block == 0).mean()
