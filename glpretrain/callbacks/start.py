"""What a run starts from, kept so that its report can show it beside what was trained. Left out: the report itself (`run_report`)."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl

from glpretrain.callbacks.evaluators import Trained
from glpretrain.encoders.base import Encoder

_log = logging.getLogger(__name__)


class KeepStart(pl.Callback):
    """Writes the backbone to a folder before the first step. A resumed run has it already; a full disk costs a line, and not the run.

    Args:
        folder: a new folder; None in a process that writes nothing, but has its share of a sharded backbone.
        save: function that writes a backbone to a folder.
    """

    def __init__(self, folder: Path | None, save: Callable[[Encoder, Path], object]) -> None:
        self.folder, self.save = folder, save

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what the run starts from."""
        if trainer.ckpt_path is not None:
            return
        assert isinstance(pl_module, Trained)
        backbone = pl_module.whole_backbone()
        if self.folder is not None:
            try:
                self.save(backbone, self.folder)
            except OSError as error:
                _log.warning("what the run starts from cannot be kept for its report: %s", error)
