"""Where the run stands: steps, loss, images per second and the time left for all of it, not only for the epoch."""

import sys
import time
from datetime import timedelta
from typing import Protocol, runtime_checkable

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.utilities.types import STEP_OUTPUT
from rich.progress import BarColumn, Progress, TextColumn

from glpretrain.callbacks.throughput import Throughput
from glpretrain.core.batch import Batch
from glpretrain.data.module import DataModule

_TERMINAL_SECONDS, _LOG_SECONDS = 1.0, 15.0


@runtime_checkable
class Progressing(Protocol):
    """What is asked of a method."""

    def progress(self) -> float:
        """Share of the run that is done."""
        ...


class RunProgress(ProgressBar):
    """One bar on a terminal, a line every 15 seconds in a log file.

    The loss is read once per refresh: reading it at every step would make the host wait for the device.

    Args:
        throughput: the callback that measures how fast it goes.
    """

    def __init__(self, throughput: Throughput) -> None:
        super().__init__()
        self.throughput = throughput
        self._enabled = True
        self._bar: Progress | None = None
        self._start, self._start_step, self._shown = 0.0, 0, 0.0

    def enable(self) -> None:
        """Show progress (Lightning asks for it in the first process)."""
        self._enabled = True

    def disable(self) -> None:
        """Show none (Lightning asks for it in every other process)."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the empty bar."""
        self._start, self._start_step = time.perf_counter(), trainer.global_step
        if self._enabled and sys.stdout.isatty():
            self._bar = Progress(TextColumn("training"), BarColumn(), TextColumn("{task.description}"))
            self._bar.add_task("", total=trainer.estimated_stepping_batches)
            self._bar.start()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what the order of items says of the epoch."""
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]  its stub
        if self._enabled and isinstance(data, DataModule) and (said := data.order.said()):
            (print if self._bar is None else self._bar.console.print)(said)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Refresh, at most once a second."""
        now = time.perf_counter()
        if self._enabled and now - self._shown >= (_LOG_SECONDS if self._bar is None else _TERMINAL_SECONDS):
            self._shown = now
            self._show(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the last state standing."""
        if self._enabled:
            self._show(trainer)
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, trainer: pl.Trainer) -> None:
        text = self.text(trainer)
        if self._bar is None:
            print(f"training {text}", flush=True)
        else:
            self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, total=self._num_steps(trainer), description=text)

    @staticmethod
    def _num_steps(trainer: pl.Trainer) -> float:
        """Steps of the run, if the epochs to come are as long as this one."""
        method, whole = trainer.lightning_module, trainer.estimated_stepping_batches
        return trainer.global_step + max(1.0 - method.progress(), 0.0) * whole if isinstance(method, Progressing) else whole

    def text(self, trainer: pl.Trainer) -> str:
        """`step 200/1500  loss 4.812  213 images/s  0:01:23 left`."""
        step, total = trainer.global_step, self._num_steps(trainer)
        parts = [f"step {step}/{total:.0f}"]
        if "train/loss" in trainer.progress_bar_metrics:
            parts.append(f"loss {trainer.progress_bar_metrics['train/loss']:.3f}")
        if self.throughput.images_per_second is not None:
            parts.append(f"{self.throughput.images_per_second:.0f} images/s")
        if step > self._start_step:
            seconds = (time.perf_counter() - self._start) / (step - self._start_step) * (total - step)
            parts.append(f"{timedelta(seconds=round(seconds))} left")
        return "  ".join(parts)
