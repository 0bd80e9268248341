"""Signals that end a run: noted at once, acted on between two steps, by all processes together.

Left out: saving (`checkpoints`) and the exit status (`cli`).
"""

import signal
import threading
from types import FrameType
from typing import Protocol, runtime_checkable

import pytorch_lightning as pl
from pytorch_lightning.utilities.types import STEP_OUTPUT

from glpretrain.core.batch import Batch
from glpretrain.training.step import Step

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


@runtime_checkable
class Stepping(Protocol):
    """What this callback has to know of a method."""

    step: Step


class StoppedBySignalError(Exception):
    """A run that was ended by a signal, after a whole step. `exit_status` is that of a command that may be given again (EX_TEMPFAIL).

    Args:
        number: number of the signal that this process got; 0 where another process got one.
        step: number of optimizer steps that are done.
    """

    exit_status = 75

    def __init__(self, number: int, step: int) -> None:
        name = signal.Signals(number).name if number else "a signal to another process"
        super().__init__(f"stopped by {name} after step {step}; its checkpoint is written, and the same command goes on from it")
        self.number, self.step = number, step


class StopOnSignal(pl.Callback):
    """Ends a run after the step at hand when one of its processes gets SIGTERM, SIGINT, SIGHUP or SIGUSR1.

    The wish travels with the losses of the step, so that all processes learn of it in the same step. A second signal of the same kind
    interrupts at once. Nothing is changed where the fit does not run in the main thread.
    """

    def __init__(self) -> None:
        self._number = 0
        self._before: dict[int, object] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace the handlers, Lightning's among them: its own waits for other processes inside the handler, for ever if they are busy."""
        self._number = 0
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Tell the other processes."""
        if self._number:
            assert isinstance(pl_module, Stepping)
            pl_module.step.asks_stop = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """End the run where all processes have agreed to; the checkpoint of this step has been saved by then.

        Raises:
            StoppedBySignalError: in every process.
        """
        assert isinstance(pl_module, Stepping)
        if pl_module.step.stop_agreed and not pl_module.step.is_open:
            raise StoppedBySignalError(self._number, trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the handlers back: the state is saved, and scores can be computed again."""
        self._put_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the handlers back."""
        self._put_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._number == number:
            self._put_back()
            raise KeyboardInterrupt
        self._number = number

    def _put_back(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)  # pyright: ignore[reportArgumentType]  what `signal.signal` gave
        self._before = {}
