"""What a step of a run costs, part by part: time, wait for data, FLOPs and memory. For `glpretrain bench`; no other run has it.

Everything is measured from outside: by the actions that Lightning reports to a profiler, by hooks on encoders, and by wrapping three
functions of the method at hand. No method, objective or encoder knows of it. Left out: the tables (`cli`), and the speed that every run
logs (`throughput`).
"""

import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import Profiler
from pytorch_lightning.utilities.types import STEP_OUTPUT
from torch.utils.flop_counter import FlopCounterMode

from glpretrain.callbacks.health import Watched
from glpretrain.core.batch import Batch
from glpretrain.data.items import RawBatch
from glpretrain.encoders.base import Encoder
from glpretrain.training.teacher import FrozenTeacher

WAIT, VIEWS, TEACHER, EXPERTS, STUDENT = "wait for data", "views", "teacher forward", "experts forward", "student forward"
HEADS, BACKWARD, OPTIMIZER, MEAN = "heads and losses", "backward", "clip and optimizer", "moving average and states"
REST = "logging and the rest"
PARTS = (WAIT, VIEWS, TEACHER, EXPERTS, STUDENT, HEADS, BACKWARD, OPTIMIZER, MEAN, REST)

# Which part the actions of Lightning belong to, in its own names; an action inside another one is taken out of it.
_ACTIONS = {
    r"\[_TrainingEpochLoop\]\.train_dataloader_next": WAIT,
    r"\[Strategy\]\w+\.batch_to_device": VIEWS,
    r"\[LightningDataModule\]\w+\.on_before_batch_transfer": REST,
    r"\[Strategy\]\w+\.training_step": REST,  # what is left beside `losses` logs
    r"\[Strategy\]\w+\.backward": BACKWARD,
    r"\[LightningModule\]\w+\.optimizer_step": OPTIMIZER,
    r"\[LightningModule\]\w+\.configure_gradient_clipping": OPTIMIZER,
    r"\[Callback\].*": REST,
}
_RESET_PEAK, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Clock:
    """Divides time among parts: each part has the time in which it is the innermost one, and `REST` what no part has.

    On a GPU the time is that of the device: marks are events in its queue, so that nothing waits for it and what is computed between two
    marks is what lies between them. A part that the device only waits for, because the host is late, has the time of the wait.

    Args:
        device: where the parts are computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: list[str] = []
        self._marks: list[tuple[str, float | torch.Event]] = []  # the part that ends here, and when
        self._ends: list[int] = []  # number of marks at the start, and at the end of every step

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the inside of this context."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        """A part begins, inside the one at hand."""
        self._mark()
        self._open.append(name)

    def leave(self) -> None:
        """The innermost part ends."""
        self._mark()
        self._open.pop()

    def end_step(self) -> None:
        """A step ends, and the next one begins; the first call only begins one."""
        self._mark()
        self._ends.append(len(self._marks))

    def steps(self) -> list[dict[str, float]]:
        """Milliseconds of every part in every step. Waits for the device."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        found: list[dict[str, float]] = []
        for first, last in zip(self._ends, self._ends[1:], strict=False):
            step: dict[str, float] = dict.fromkeys(PARTS, 0.0)
            for number in range(first, last):
                name, mark = self._marks[number]
                step[name] += _milliseconds(self._marks[number - 1][1], mark)
            found.append(step)
        return found

    def _mark(self) -> None:
        now: float | torch.Event = time.perf_counter()
        if self._device.type != "cpu":
            now = torch.Event(self._device, enable_timing=True)
            now.record()
        self._marks.append((self._open[-1] if self._open else REST, now))


def _milliseconds(start: float | torch.Event, end: float | torch.Event) -> float:
    if isinstance(start, torch.Event) and isinstance(end, torch.Event):
        return start.elapsed_time(end)
    assert isinstance(start, float) and isinstance(end, float)
    return 1e3 * (end - start)


class Measured(NamedTuple):
    """What was measured of a run."""

    steps: list[dict[str, float]]  # milliseconds of every part, of every measured step
    flops: int  # of one step: products of matrices, convolutions and attention, as torch counts them
    peak_bytes: int  # most that was held during the measured steps: by torch on a GPU, by the process on a CPU
    read: list[float]  # milliseconds in which a worker has read and decoded the items of a batch, for every batch
    cut: list[float]  # likewise, in which it has cut their views
    first_batch: float  # when the first batch was there, by `time.perf_counter`


class StepCost(pl.Callback):
    """Measures steps once the first ones are over.

    Args:
        num_warmup_steps: number of first steps that are not timed: they allocate, compile and fill the loader's queue. FLOPs are counted in
            the first of them.
        num_steps: number of steps that are timed.

    Raises:
        ValueError: there is no first step or no other.
    """

    def __init__(self, *, num_warmup_steps: int, num_steps: int) -> None:
        if min(num_warmup_steps, num_steps) < 1:
            raise ValueError(f"steps: {num_warmup_steps} to warm up and {num_steps} to measure; accepted: at least 1 each")
        self.num_warmup_steps, self.num_steps = num_warmup_steps, num_steps
        self.profiler = _Parts()
        self.measured: Measured | None = None  # after the last step
        self._flops = FlopCounterMode(display=False)
        self._counts = False  # while the FLOPs are counted
        self._raw: list[RawBatch] = []  # all batches so far, without their parts
        self._first_batch = 0.0
        self._undo: list[Callable[[], object]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to encoders, and wrap what has neither an action nor a hook. Workers tell by themselves how long they took."""
        assert isinstance(pl_module, Watched)
        clock = self.profiler.clock = Clock(trainer.strategy.root_device)
        experts = [module for module in pl_module.modules() if isinstance(module, FrozenTeacher)]
        branches = [(STUDENT, pl_module.student), *((TEACHER, one) for one in (pl_module.teacher,) if one is not None)]
        listened = [(EXPERTS, one) for one in experts]
        listened += [(part, one) for part, branch in branches for one in branch.modules() if isinstance(one, Encoder)]
        for part, module in listened:
            before = module.register_forward_pre_hook(partial(_entered, clock, part))
            after = module.register_forward_hook(partial(_left, clock))
            self._undo += [before.remove, after.remove]
        self._time(pl_module, "losses", HEADS)
        self._time(pl_module.step, "end", MEAN)
        if pl_module.teacher is not None:
            self._time(pl_module.teacher, "update", MEAN)
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]  the trainer has it while it fits
        before_transfer = data.on_before_batch_transfer

        def noted(batch: RawBatch, dataloader_idx: int) -> RawBatch:
            self._first_batch = self._first_batch or time.perf_counter()
            self._raw.append(batch._replace(parts={}, drawn={}))
            return before_transfer(batch, dataloader_idx)

        data.on_before_batch_transfer = noted
        self._undo.append(partial(delattr, data, "on_before_batch_transfer"))

    def _time(self, owner: object, name: str, part: str) -> None:
        """Time a function of one object."""
        function, clock = getattr(owner, name), self.profiler.clock
        assert clock is not None

        @wraps(function)
        def timed(*args: object, **kwargs: object) -> object:
            with clock.part(part):
                return function(*args, **kwargs)

        setattr(owner, name, timed)
        self._undo.append(partial(delattr, owner, name))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Count the FLOPs of the first step."""
        if trainer.global_step == 0 and not self._counts:
            self._counts = True
            self._flops.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """End a step, once its last micro-batch is done."""
        if trainer.fit_loop._should_accumulate():
            return
        if self._counts:
            self._flops.__exit__(None, None, None)
            self._counts = False
        clock = self.profiler.clock
        assert clock is not None
        if trainer.global_step >= self.num_warmup_steps:
            if trainer.global_step == self.num_warmup_steps:
                _reset_peak(trainer.strategy.root_device)
            clock.end_step()
        if trainer.global_step == self.num_warmup_steps + self.num_steps:
            peak = _peak_bytes(trainer.strategy.root_device)
            read, cut = ([1e3 * getattr(batch, name) for batch in self._raw] for name in ("read_seconds", "prepare_seconds"))
            self.measured = Measured(clock.steps(), self._flops.get_total_flops(), peak, read, cut, self._first_batch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the method as it was."""
        for undo in reversed(self._undo):
            undo()
        self._undo, self.profiler.clock = [], None


class _Parts(Profiler):
    """Hears of Lightning's actions, of which some are parts."""

    def __init__(self) -> None:
        super().__init__()
        self.clock: Clock | None = None  # while a run is measured
        self._open: list[Clock | None] = []  # of the actions that are parts: what times them; the clock comes and goes inside of one

    def start(self, action_name: str) -> None:
        """An action begins."""
        if (part := _part_of(action_name)) is not None:
            self._open.append(self.clock)
            if self.clock is not None:
                self.clock.enter(part)

    def stop(self, action_name: str) -> None:
        """It ends."""
        if _part_of(action_name) is not None and (clock := self._open.pop()) is not None:
            clock.leave()


def _part_of(action: str) -> str | None:
    return next((part for pattern, part in _ACTIONS.items() if re.fullmatch(pattern, action)), None)


def _entered(clock: Clock, part: str, module: torch.nn.Module, args: object) -> None:
    clock.enter(part)


def _left(clock: Clock, module: torch.nn.Module, args: object, output: object) -> None:
    clock.leave()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # without it the peak is that of the whole life of the process
            _RESET_PEAK.write_text("5")  # Linux: the peak of this process is what it holds now


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())):
        return 1024 * int(found[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
