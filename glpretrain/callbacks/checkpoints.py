"""Checkpoints that survive: by time and by steps, written whole and proved, with the one before kept until the new one is there.

Left out: which run a checkpoint continues (`cli.resume`), and what is in it (Lightning, the method and the callbacks).
"""

import hashlib
import logging
import os
import pickle
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.types import STEP_OUTPUT

from glpretrain.core.batch import Batch
from glpretrain.core.distributed import rank, world_size
from glpretrain.core.files import part_file, write_whole
from glpretrain.core.shards import FILES, split
from glpretrain.core.written import DIGESTS, digests
from glpretrain.training.sharding import is_sharded
from glpretrain.training.step import Step

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
_PART = ".shard"  # ending of the files beside the head of a sharded checkpoint
_KEPT_DIGESTS = 8
_DISK = (OSError, RuntimeError, zipfile.BadZipFile)  # a full or read-only disk; torch's writer raises the second
_log = logging.getLogger(__name__)


@runtime_checkable
class Stepping(Protocol):
    """What this callback has to know of a method."""

    step: Step


class Checkpoints(pl.Callback):
    """Writes `last.ckpt` by time and at the end of training, and keeps the one before as `previous.ckpt`.

    A checkpoint is written to another name, flushed to the disk, read again and compared before it takes its place. One that cannot be
    written costs a line, and the run goes on with the ones that are there. Where parameters are sharded, every process writes its part to
    a file of its own beside it, and the checkpoint takes its place once all of them are proved.

    Args:
        every_minutes: minutes between two checkpoints; None for none by time.
        every_n_steps: number of optimizer steps between two checkpoints; None for none by steps.
        milestones: number of optimizer steps between two checkpoints that are kept for good, as `step-1000.ckpt`; None for none.

    Raises:
        ValueError: a number that is not above 0.
    """

    def __init__(self, *, every_minutes: float | None = 10.0, every_n_steps: int | None = None, milestones: int | None = None) -> None:
        for name, value in (("every_minutes", every_minutes), ("every_n_steps", every_n_steps), ("milestones", milestones)):
            if value is not None and not value > 0:
                raise ValueError(f"Checkpoints: {name} is above 0, or null for none, not {value}")
        self.every_minutes, self.every_n_steps, self.milestones = every_minutes, every_n_steps, milestones
        self.folder: Path | None = None  # set in the first process, the only one that writes
        self.has_saved = False
        self.is_saving = False
        self._saved_at, self._saved_step = time.monotonic(), -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first checkpoint by time is due `every_minutes` from here."""
        self._saved_at = time.monotonic()
        if is_sharded(pl_module):  # all of them write
            self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Ask all processes to save after this step, once it is time by the clock of one of them."""
        if self.every_minutes is not None and time.monotonic() - self._saved_at >= 60.0 * self.every_minutes:
            assert isinstance(pl_module, Stepping)
            pl_module.step.asks_save = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Save where all processes have agreed to."""
        assert isinstance(pl_module, Stepping)
        step = trainer.global_step
        if pl_module.step.is_open or step == self._saved_step:
            return
        by_steps = self.every_n_steps is not None and step % self.every_n_steps == 0
        kept = self.milestones is not None and step % self.milestones == 0
        if by_steps or kept or pl_module.step.save_agreed or pl_module.step.stop_agreed:
            self.save(trainer, name=f"step-{step}.ckpt" if kept else None)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the trained state, before anything else can fail."""
        if trainer.global_step != self._saved_step:
            self.save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save what the first process has, if its step is whole; with replicas that is all, whatever became of the other processes."""
        assert isinstance(pl_module, Stepping)
        is_replica = trainer.world_size == 1 or isinstance(trainer.strategy, DDPStrategy)
        if is_replica and 0 < trainer.global_step != self._saved_step and not pl_module.step.is_moving:
            self._write(trainer)

    def save(self, trainer: pl.Trainer, *, name: str | None = None) -> None:
        """Save now; all processes have to call it.

        Args:
            trainer: Lightning's trainer.
            name: name of a further copy that is kept.
        """
        self._write(trainer, name=name)
        trainer.strategy.barrier("checkpoint")

    def _write(self, trainer: pl.Trainer, *, name: str | None = None) -> None:
        self.is_saving = True
        try:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            is_written = True
            if self.folder is not None and is_sharded(trainer.lightning_module):
                checkpoint, is_written = with_parts(checkpoint, self.folder, step=trainer.global_step)
            if self.folder is not None and trainer.is_global_zero and is_written:
                self._write_proved(trainer, checkpoint, folder=self.folder, name=name)
                remove_unused_parts(self.folder)
        finally:
            self.is_saving = False
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def _write_proved(self, trainer: pl.Trainer, checkpoint: dict, *, folder: Path, name: str | None) -> None:
        try:
            with part_file(folder / LAST) as part:
                _write_to(part, checkpoint)
                digest = proved(part)
                _add_digest(folder, digest, step=trainer.global_step)
                _second_name(folder / LAST, folder / PREVIOUS)
            if name is not None:
                _second_name(folder / LAST, folder / name)
            self.has_saved = True
        except _DISK as error:
            _log.warning("checkpoint of step %d: not written (%s); the one before is kept", trainer.global_step, error)


def write_sharded(checkpoint: dict, path: Path, *, step: int) -> bool:
    """Write a checkpoint of sharded parameters to a file, with the parts of all processes beside it; all have to call it.

    Returns:
        Whether every process could write its part.
    """
    head, is_written = with_parts(checkpoint, path.parent, step=step)
    if is_written and rank() == 0:
        with part_file(path) as part:
            _write_to(part, head)
    return is_written


def with_parts(checkpoint: dict, folder: Path, *, step: int) -> tuple[dict, bool]:
    """The head of a checkpoint of sharded parameters, once the parts of all processes lie in a folder; all have to call it.

    Returns:
        The head, which names the parts and their digests, and whether every process could write its part.
    """
    head, parts = split(checkpoint)
    own: tuple[str, str] | None = None
    try:
        digest = ""
        folder.mkdir(parents=True, exist_ok=True)
        unnamed = folder / f"step-{step}-{rank()}-of-{world_size()}{_PART}"
        with part_file(unnamed) as part:
            _write_to(part, parts)
            digest = proved(part)
        own = f"{unnamed.stem}-{digest[:8]}{_PART}", digest  # a run that comes to this step twice does not write over the first one
        unnamed.replace(folder / own[0])
    except _DISK as error:
        _log.warning("checkpoint of step %d: process %d did not write its part (%s)", step, rank(), error)
    found: list[tuple[str, str] | None] = [None] * world_size()
    dist.all_gather_object(found, own)
    names = [one for one in found if one is not None]
    return {**head, FILES: dict(names)}, len(names) == len(found)


def remove_unused_parts(folder: Path) -> None:
    """Remove parts that no checkpoint of the folder names any more; none where a checkpoint cannot be read."""
    parts = list(folder.glob(f"*{_PART}"))
    try:
        used = {name for path in folder.glob("*.ckpt") for name in _parts_of(path)} if parts else set()
    except (*_DISK, EOFError, pickle.UnpicklingError):
        return
    for path in parts:
        if path.name not in used:
            path.unlink(missing_ok=True)


def _parts_of(path: Path) -> dict[str, str]:
    """Digests of the parts that a checkpoint names, by their names; none of one that is not sharded."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True).get(FILES, {})


def _damaged_part(path: Path) -> str:
    """Name of a part of a whole checkpoint that is missing or has other bytes than were written; empty where there is none."""
    for name, digest in _parts_of(path).items():
        beside = path.parent / name
        if not beside.is_file() or _digest(beside) != digest:
            return name
    return ""


class Proved(NamedTuple):
    """A checkpoint whose bytes are those that were written."""

    path: Path
    step: int


def proved(path: Path) -> str:
    """SHA-256 of a file that torch wrote, in hexadecimal, after every part of it was read again and compared with its own checksum.

    Raises:
        zipfile.BadZipFile: a part differs, or the file is cut short.
    """
    with zipfile.ZipFile(path) as archive:
        if (bad := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{bad} differs from what was written")
    return _digest(path)


def newest_whole(folder: Path, *, names: Sequence[str] = (LAST, PREVIOUS)) -> tuple[Proved | None, list[str]]:
    """The newest checkpoint of a folder that is whole, and a line for each that is not.

    Args:
        folder: folder of the checkpoints of a run.
        names: names of the files, the newest first.
    """
    steps = digests(folder)
    damaged: list[str] = []
    for path in (folder / name for name in names):
        if not path.is_file():
            continue
        digest = _digest(path)
        if digest not in steps:
            damaged.append(f"{path} is damaged: its bytes are not those that were written")
        elif part := _damaged_part(path):
            damaged.append(f"{path} is damaged: its part {part} is missing, or its bytes are not those that were written")
        else:
            return Proved(path, steps[digest]), damaged
    return None, damaged


def is_damaged(path: Path) -> bool:
    """Whether the folder of a checkpoint knows what was written, and this is not it."""
    steps = digests(path.parent)
    return bool(steps) and path.name in (LAST, PREVIOUS) and (_digest(path) not in steps or bool(_damaged_part(path)))


def _write_to(path: Path, checkpoint: dict) -> None:
    """Not by Lightning, which writes to the folder for temporary files first; that may be full, and a kill leaves the file there."""
    try:
        with path.open("wb") as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:  # torch's writer hides what the file said behind a complaint of its own
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _add_digest(folder: Path, digest: str, *, step: int) -> None:
    """Before the checkpoint takes its place, so that a kill at any moment leaves no whole checkpoint without its digest."""
    known = digests(folder)
    known.pop(digest, None)
    kept = [*list(known.items())[-_KEPT_DIGESTS:], (digest, step)]
    write_whole(folder / DIGESTS, "".join(f"{one} {number}\n" for one, number in kept).encode())


def _second_name(path: Path, other: Path) -> None:
    """Give a file a second name, in place of what had that name; a file system without hard links moves it."""
    if not path.exists():
        return
    part = other.with_name(f".{other.name}.link")
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:
        path.replace(other)
        return
    part.replace(other)
