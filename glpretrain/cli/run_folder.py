"""The folder of a run while it trains: `latest` moves once there is something to show, and a start that fails leaves nothing.

What is written into it is left out (`training`, and the callbacks and loggers that are given its path).
"""

import logging
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.types import STEP_OUTPUT

from glpretrain.callbacks import Checkpoints, StoppedBySignalError, finish
from glpretrain.core.batch import Batch
from glpretrain.core.files import locked, remove_parts, write_whole
from glpretrain.runs import FAILED, discard, new_folder, point_latest

_log = logging.getLogger(__name__)


class RunFolder(pl.Callback):
    """A folder in `runs/<recipe>/`, of the first process only, locked for other processes until the run ends.

    Args:
        recipe: name of what is trained.
        runs: folder of run folders.
        resumed: folder of the run that goes on; None makes a new one.
    """

    def __init__(self, recipe: str, *, runs: Path, resumed: Path | None = None) -> None:
        self.runs, self.path = runs, new_folder(recipe, runs=runs) if resumed is None else resumed
        self._trained = resumed is not None
        self._shown = False
        self._lock = ExitStack()
        self._lock.enter_context(locked(self.path, argument="run folder"))
        remove_parts(self.path)
        (self.path / FAILED).unlink(missing_ok=True)

    def close(self) -> None:
        """Let other processes in."""
        self._lock.close()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Point `latest` here once a checkpoint is there."""
        if not self._shown and any(_has_saved(callback) for callback in trainer.callbacks):  # pyright: ignore[reportAttributeAccessIssue]
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

    def emptied(self, name: str) -> Path:
        """Path of a folder that is written at the end of a run. What an end that was interrupted left there is removed first."""
        path = self.path / name
        if path.exists():  # results.json comes last and is missing, or the run would have been called finished
            shutil.rmtree(path)
        return path

    def leave(self, loggers: list[Logger], error: BaseException) -> None:
        """Leave a run that has failed: remove the folder unless something was trained, or items that cannot be read are listed there.

        Args:
            loggers: loggers of the run, which are closed.
            error: what ended it; kept in a line, unless it is a signal, after which the run goes on.
        """
        finish(loggers)
        self.close()
        if any(self.path.glob("checkpoints/*.ckpt")) and self._trained:
            self.show()
        elif not self._trained and not (self.path / "unreadable.txt").exists():
            discard(self.path, runs=self.runs)
            return
        if not isinstance(error, StoppedBySignalError | KeyboardInterrupt):
            with suppress(OSError):  # a full disk may be what ended it
                write_whole(self.path / FAILED, f"{type(error).__name__}: {' '.join(str(error).split())}\n".encode())


def _has_saved(callback: pl.Callback) -> bool:
    return bool(isinstance(callback, Checkpoints) and callback.has_saved) or bool(
        isinstance(callback, ModelCheckpoint) and callback.best_model_path
    )
