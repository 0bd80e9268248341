"""A callback for tests of several processes, one of which fails. Named in a recipe, and allowed with `--import faulty`."""

import os
import signal
import time
from pathlib import Path
from typing import Literal

import pytorch_lightning as pl

from glpretrain.data.sources.base import UnreadableItemError


class Fault(pl.Callback):
    """Does something to one process, or to all, once.

    Args:
        kind: "raise" an error, be killed, get SIGTERM or SIGSTOP, in the middle of a step; or items that cannot be read, before the first.
        rank: number of the process; -1 for all of them.
        step: number of optimizer steps that are done by then.
        clock: file that gets the time of the fault, in seconds; one that is there says that it has happened.
    """

    def __init__(self, kind: Literal["raise", "kill", "term", "stop", "unreadable"], *, rank: int, step: int, clock: str) -> None:
        self.kind, self.rank, self.step, self.clock = kind, rank, step, Path(clock)
        self.is_over = self.clock.exists()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.kind == "unreadable" and trainer.global_rank == self.rank and not self.is_over:
            source = trainer.datamodule.source
            source.__class__ = type("Unreadable", (type(source),), {"__getitem__": lambda source, index: self._fail()})

    def _fail(self) -> None:
        self._happens()
        raise UnreadableItemError("the disk of this process is gone")

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: object) -> None:
        if self.is_over or self.kind == "unreadable" or trainer.global_step != self.step or self.rank not in (-1, trainer.global_rank):
            return
        self._happens()
        if self.kind == "raise":
            raise ValueError("the disk of this process is gone")
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}[self.kind])

    def _happens(self) -> None:
        if not self.clock.exists():
            self.clock.write_text(str(time.time()))
        self.is_over = True
