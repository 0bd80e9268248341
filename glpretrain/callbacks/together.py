"""A run of several processes ends in all of them when it ends in one. Left out: how they learn of it (`core.watch`)."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from subprocess import Popen

import pytorch_lightning as pl
import torch.distributed as dist

from glpretrain.callbacks.checkpoints import Checkpoints
from glpretrain.callbacks.signals import StoppedBySignalError
from glpretrain.core.mailbox import give_up
from glpretrain.core.watch import Watch, connect, serve

_OBSERVER = "child-process-observer"  # Lightning's thread, by name
_NOTICE = 4.0  # seconds, twice, that the main thread has to notice that another process is gone
_EXIT = 20.0  # seconds that the interpreter has to end
_log = logging.getLogger(__name__)


class EndedByAnotherError(Exception):
    """A run that ends because another of its processes has ended. `exit_status` is that of the command."""

    exit_status = 1


class EndTogether(pl.Callback):
    """Ends all processes of a run when one of them fails or is killed, with the line of that one.

    The first process saves its state before it ends, if its step is whole (`Checkpoints`). A process whose main thread waits for the lost
    one and cannot be woken is ended after some seconds. Nothing is done in a run of one process.

    Args:
        patience: seconds without a sign of life after which a process counts as lost.

    Raises:
        ValueError: `patience` is not above 0.
    """

    def __init__(self, *, patience: float = 15.0) -> None:
        if not patience > 0:
            raise ValueError(f"EndTogether: patience is a number of seconds above 0, not {patience}")
        self.patience = patience
        self._watch: Watch | None = None
        self._checkpoints: Checkpoints | None = None
        self._children: Sequence[Popen] = ()
        self._has_noticed = threading.Event()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin to watch: here the processes can talk to one another."""
        if trainer.world_size == 1 or self._watch is not None:
            return
        host = trainer.strategy.cluster_environment.main_address  # pyright: ignore[reportAttributeAccessIssue]
        is_first = trainer.is_global_zero
        server = serve(host) if is_first else None
        port = trainer.strategy.broadcast(0 if server is None else server.port)
        self._checkpoints = next((callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)), None)  # pyright: ignore[reportAttributeAccessIssue]
        self._children = _children(trainer) if is_first else ()
        give_up("")
        self._watch = Watch(
            server or connect(host, port),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            on_failure=self._another_failed,
            patience=self.patience,
            children=self._children,
        )

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: object) -> None:
        """Move nothing after another process is gone: a collective that was broken off may have left anything in the gradients.

        Raises:
            EndedByAnotherError: another process has ended.
        """
        if self._watch is not None and self._watch.failure:
            raise EndedByAnotherError(self._watch.failure)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tell the others; called after the state has been saved."""
        self._tell(exception)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Around all that a process does in a run: whatever ends it there, the others end too.

        Raises:
            EndedByAnotherError: another process was the first to end, in the first process; the others leave without a line.
        """
        try:
            yield
        except BaseException as error:
            if self._watch is None:
                raise
            is_first, reason = self._watch.rank == 0, self._tell(error)
            self._leave()
            if reason and not is_first:
                raise SystemExit(EndedByAnotherError.exit_status) from error
            if reason:
                raise EndedByAnotherError(reason) from error
            raise
        if self._watch is not None:
            self._watch.leave()

    def _tell(self, error: BaseException) -> str:
        """Why another process has ended, if that was first; otherwise tell the others why this one ends."""
        watch = self._watch
        if watch is None or isinstance(error, StoppedBySignalError):  # all have agreed to stop
            return ""
        self._has_noticed.set()
        own = f"process {watch.rank}: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"
        reason = watch.failure or (watch.wait(seconds=self.patience + 4.0) if _is_of_collective(error) else "") or watch.tell(own)
        return "" if reason == own else reason

    def _leave(self) -> None:
        assert self._watch is not None
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()  # closes the connections, which wakes those that wait for this process
        self._watch.leave()
        for child in self._children:
            child.kill()  # one that has not followed by now hangs, or is stopped
        signal.setitimer(signal.ITIMER_REAL, _EXIT)  # ends a process that hangs in what a library does at its exit

    def _another_failed(self, reason: str) -> None:
        """In the thread of the watch: wake the main thread, or end the process."""
        give_up(reason)
        if dist.is_initialized() and dist.get_backend() == "nccl":
            dist.distributed_c10d._abort_process_group()
        if self._has_noticed.wait(_NOTICE):
            return
        for child in self._children:
            child.kill()  # the connections of one that is stopped stay open until it is killed
        if self._has_noticed.wait(_NOTICE):
            return
        while self._checkpoints is not None and self._checkpoints.is_saving:
            time.sleep(0.1)
        if not self._has_noticed.wait(1.0):
            _log.error("%s; this process ends", reason)
            os._exit(EndedByAnotherError.exit_status)


def _children(trainer: pl.Trainer) -> Sequence[Popen]:
    """The processes that this one has started.

    Lightning's own observer is told that there are none: it would kill this process as soon as a child has ended, before it can save.
    """
    children: Sequence[Popen] = list(getattr(trainer.strategy.launcher, "procs", ()))
    for thread in threading.enumerate():
        if thread.name == _OBSERVER and hasattr(thread, "_child_processes"):
            thread._child_processes = []  # pyright: ignore[reportAttributeAccessIssue]
    return children


def _is_of_collective(error: BaseException) -> bool:
    """Whether an error may come from a collective in which another process is missing."""
    words = ("gloo", "NCCL", "by peer", "Broken pipe", "process group", "TCPStore")
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
