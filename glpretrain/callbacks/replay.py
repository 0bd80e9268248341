"""Steps that were refused because a loss or a gradient was not finite: said, counted, and the first of them kept to be computed again.

Left out: the decision (`training.step`), and how a bundle is read (`cli.replay`).
"""

import logging
from pathlib import Path
from typing import Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import move_data_to_device
from pytorch_lightning.utilities.types import STEP_OUTPUT
from torch import Tensor

from glpretrain.core.batch import Batch
from glpretrain.core.files import part_file
from glpretrain.data.module import DataModule
from glpretrain.encoders.base import Encoder
from glpretrain.training.sharding import is_sharded
from glpretrain.training.step import Step

BUNDLE_FORMAT = 1
_log = logging.getLogger(__name__)


@runtime_checkable
class Stepping(Protocol):
    """What this callback has to know of a method."""

    step: Step

    @property
    def encoder(self) -> Encoder:
        """The encoder that is trained."""
        ...

    def progress(self) -> float:
        """Share of the run that is done."""
        ...


class KeepRefused(pl.Callback):
    """Writes a replay bundle for each of the first refused steps: the state before the step, its batches, and torch's random state.

    A bundle holds tensors, numbers and the text of config.yaml, so that reading one runs no code. Each process writes its own.

    Args:
        folder: run folder with the config.yaml; bundles go into its folder `refused`.
        num_bundles: number of refused steps that are kept.
    """

    def __init__(self, folder: Path, *, num_bundles: int = 3) -> None:
        self.folder = folder
        self.num_bundles = num_bundles
        self._micro_batches: list[tuple[Tensor, Tensor]] = []  # indices and weights
        self._random_state, self._progress, self._step = torch.empty(0), 0.0, 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Note what the step is made from. Views are not kept: they are a function of the indices, the epoch and the step."""
        assert isinstance(pl_module, Stepping)
        if not pl_module.step.is_open:
            self._micro_batches = []
            self._random_state, self._progress = torch.get_rng_state(), pl_module.progress()
            self._step = batch_idx // trainer.accumulate_grad_batches  # of this epoch
        self._micro_batches.append((batch.index, batch.weight))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Say that the step was refused."""
        assert isinstance(pl_module, Stepping)
        if pl_module.step.is_open or not pl_module.step.reason:
            return
        pl_module.log("health/refused_steps", float(pl_module.step.num_refused), batch_size=len(batch.index))
        path = None if pl_module.step.num_refused > self.num_bundles else self._write(trainer, pl_module)
        kept = "" if path is None else f"; to compute it again: glpretrain replay {path}"
        _log.warning("%s; the step moved nothing%s", pl_module.step.reason, kept)

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Path | None:
        """Path of the bundle; None where the batches cannot be made again because they came from no data module of ours, and where this
        process does not hold all of the weights."""
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]  Lightning sets it
        if not isinstance(data, DataModule) or is_sharded(pl_module):
            return None
        assert isinstance(pl_module, Stepping)
        parts = []
        for index, weight in self._micro_batches:
            raw = data.raw_batch(index.tolist(), encoder=pl_module.encoder, epoch=trainer.current_epoch, step=self._step)
            batch = data.make_batch(move_data_to_device(raw, index.device), encoder=pl_module.encoder)._replace(weight=weight)
            groups = {name: group._asdict() for name, group in batch.views.items()}
            parts.append({"index": batch.index, "weight": batch.weight, "views": groups})
        path = self.folder / "refused" / f"step-{trainer.global_step}-process-{trainer.global_rank}.pt"
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        config = self.folder / "config.yaml"
        bundle = {
            "format": BUNDLE_FORMAT,
            "config": config.read_text(encoding="utf-8") if config.is_file() else "",
            "reason": pl_module.step.reason,
            "state": pl_module.state_dict(),
            "batches": parts,
            "progress": self._progress,
            "random_state": self._random_state,
            "precision": str(trainer.precision),
            "loss_scale": 1.0 if scaler is None else float(scaler.get_scale()),
            "terms": pl_module.step.terms,
            "processes": trainer.world_size,
        }
        with part_file(path) as part:
            torch.save(bundle, part)
        return path
