"""The folder of a run while it trains: `latest` moves once there is something to show, and a start that fails leaves nothing.

What is written into it is left out (`training`, and the callbacks and loggers that are given its path).
"""

import logging
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.types import STEP_OUTPUT

from glpretrain.callbacks import finish
from glpretrain.core.batch import Batch
from glpretrain.runs import discard, new_folder, point_latest

_log = logging.getLogger(__name__)


class RunFolder(pl.Callback):
    """A new folder in `runs/<recipe>/`, of the first process only.

    Args:
        recipe: name of what is trained.
        runs: folder of run folders.
    """

    def __init__(self, recipe: str, *, runs: Path) -> None:
        self.runs, self.path = runs, new_folder(recipe, runs=runs)
        self._trained = self._shown = False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Point `latest` here once a checkpoint is there."""
        if not self._shown and any(isinstance(one, ModelCheckpoint) and one.best_model_path for one in trainer.checkpoint_callbacks):
            self.show()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """From here on the folder stays."""
        self._trained = True

    def show(self) -> None:
        """Point `latest` at this run."""
        if self._shown:
            return
        self._shown = True
        try:
            point_latest(self.path)
        except OSError as error:  # a file system without links; the run itself is complete
            _log.warning("latest: not moved (%s); the run folder is %s", error, self.path)

    def leave(self, loggers: list[Logger]) -> None:
        """Leave a run that has failed: remove the folder unless something was trained, or items that cannot be read are listed there."""
        finish(loggers)
        if any(self.path.glob("checkpoints/*.ckpt")) and self._trained:
            self.show()
        elif not self._trained and not (self.path / "unreadable.txt").exists():
            discard(self.path, runs=self.runs)
