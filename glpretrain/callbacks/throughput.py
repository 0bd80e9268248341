"""Images per second of the training itself."""

import time

import pytorch_lightning as pl
from pytorch_lightning.utilities.types import STEP_OUTPUT

from glpretrain.callbacks.evaluators import RunEvaluators
from glpretrain.core.batch import Batch


class Throughput(pl.Callback):
    """Counts images and the seconds they took, from the end of one step to the end of the next, so that waiting for data counts.

    Args:
        evaluators: the callback that evaluates; its time is not training time.
        num_warmup_steps: number of first steps that are not timed: they allocate, compile and fill the loader's queue.
    """

    def __init__(self, *, evaluators: RunEvaluators | None = None, num_warmup_steps: int = 10) -> None:
        self.evaluators = evaluators
        self.num_warmup_steps = num_warmup_steps
        self.images_seen = 0
        self._timed_images, self._timed_seconds = 0, 0.0
        self._steps, self._last = 0, 0.0

    @property
    def images_per_second(self) -> float | None:
        """Over all processes; None before a step was timed."""
        return self._timed_images / self._timed_seconds if self._timed_seconds > 0 else None

    def _now(self) -> float:
        return time.perf_counter() - (self.evaluators.seconds if self.evaluators is not None else 0.0)

    def state_dict(self) -> dict[str, int]:
        """The images that were seen, of which a resumed run goes on to count."""
        return {"images_seen": self.images_seen}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over what the interrupted run had."""
        self.images_seen = state_dict["images_seen"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Count one micro-batch."""
        images = len(batch.index) * trainer.world_size
        self.images_seen += images
        self._steps += 1
        now = self._now()
        if self._steps > self.num_warmup_steps:
            self._timed_images += images
            self._timed_seconds += now - self._last
        self._last = now
        if (speed := self.images_per_second) is not None:
            pl_module.log("speed/images_per_second", speed, batch_size=len(batch.index))
