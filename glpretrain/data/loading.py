"""Workers that read a dataset, and what becomes of a run when they are killed, hang, or run out of shared memory.

Where a worker is killed, by the system when memory runs out, for instance, the workers start again and give the batches that are still
missing, so that the batches are the same as in a run without it. A worker that gives nothing for 15 minutes ends the run with a line.

Left out: what is read (`items`), and which items an epoch holds (`orders`).
"""

import logging
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import active_children, connection
from multiprocessing.process import BaseProcess
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

_LOG = logging.getLogger(__name__)
_GLANCE = 1.0  # seconds between looks at the workers while nothing comes from them
_DYING = 20.0  # seconds that a killed process may take to end after its connections were closed
_PATIENCE = 900.0  # seconds that a batch may take
_MAX_RESTARTS, _CALM = 3, 1000  # how often workers start again within this number of batches
_SHARED_MEMORY = "/dev/shm"
T = TypeVar("T")
KeyT = TypeVar("KeyT")
KeyT_co = TypeVar("KeyT_co", covariant=True)


class Order(Protocol[KeyT_co]):
    """The keys that a loader asks a dataset for. It can be iterated over again for the next epoch."""

    def __iter__(self) -> Iterator[KeyT_co]: ...
    def __len__(self) -> int: ...


class _Asked(Generic[KeyT]):
    """The keys of an order as workers are asked for them. Those that were not answered can be asked for again."""

    def __init__(self, order: Order[KeyT]) -> None:
        self._order = order
        self._rest: Iterator[KeyT] = iter(())
        self._open: deque[KeyT] = deque()  # asked for and not answered
        self._again: deque[KeyT] = deque()

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[KeyT]:
        while (key := self._again.popleft() if self._again else next(self._rest, None)) is not None:
            self._open.append(key)
            yield key

    def begin(self) -> None:
        """Ask for the whole order from its beginning."""
        self._rest, self._open, self._again = iter(self._order), deque(), deque()

    def first(self) -> KeyT:
        """The key whose answer comes next."""
        return self._open[0]

    def answered(self) -> None:
        self._open.popleft()

    def ask_again(self) -> None:
        self._again, self._open = self._open + self._again, deque()


class Loader(DataLoader[T], Generic[T, KeyT]):
    """What a dataset gives for each key of an order. Workers that are killed start again.

    Args:
        items: dataset.
        order: its keys, in order.
        num_workers: number of processes. With 0 this process reads, and it waits for ever where a file system does not answer.
        named: function that names what is read for a key, for messages.
        setting: name of the setting of `num_workers`, for messages.
    """

    def __init__(self, items: Dataset[T], order: Order[KeyT], *, num_workers: int, named: Callable[[KeyT], str], setting: str) -> None:
        self._asked = _Asked(order)
        self._named, self._setting = named, setting
        self._workers: list[BaseProcess] = []
        super().__init__(
            items,
            sampler=order,
            batch_size=None,  # a key is one of a whole batch
            collate_fn=_shared,  # the default would change tuples into lists
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            timeout=_GLANCE if num_workers > 0 else 0,
        )

    @property
    def _index_sampler(self) -> _Asked[KeyT]:
        """Where torch takes the keys from."""
        return self._asked

    def __iter__(self) -> Iterator[T]:  # pyright: ignore[reportIncompatibleMethodOverride]  torch names a private class
        self._asked.begin()
        return self._answers(self._started())

    def _started(self) -> Iterator[T]:
        """Torch's iterator.

        Torch would let the signal that a worker has ended raise an error anywhere in the program, such as in the middle of an optimizer
        step. Its handler is removed; `_answers` finds the workers that have ended.
        """
        others, handler, is_new = active_children(), signal.getsignal(signal.SIGCHLD), self._iterator is None
        batches = super().__iter__()
        if is_new:
            self._workers = [child for child in active_children() if child not in others]
        if signal.getsignal(signal.SIGCHLD) is not handler and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
        return batches

    def _answers(self, batches: Iterator[T]) -> Iterator[T]:
        answered, last = 0, time.monotonic()
        starts: list[int] = []  # number of answers before the workers started again
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                is_late = "timed out" in str(error)
                if ended := self._ended(timeout=0.0 if is_late else _GLANCE if isinstance(error, RuntimeError) else _DYING):
                    self._end_workers()
                    starts = [at for at in starts if answered - at < _CALM] + [answered]
                    if len(starts) > _MAX_RESTARTS:
                        raise ValueError(self._explained(ended, len(starts))) from None
                    _LOG.warning("%s; the workers start again and give the batches that are missing", _fate(ended))
                    self._asked.ask_again()
                    batches, last = self._started(), time.monotonic()
                elif "shared memory" in str(error) or "</torch_" in str(error):
                    self._end_workers()
                    raise ValueError(f"{self._named(self._asked.first())}: {_shared_memory_is_full(self._setting)}") from error
                elif not is_late:
                    raise
                elif time.monotonic() - last > _PATIENCE:
                    self._end_workers()
                    raise ValueError(
                        f"{self._named(self._asked.first())}: no worker has given anything for {_PATIENCE:.0f} seconds; see whether the"
                        f" file system answers (with {self._setting} 0 the run waits longer)"
                    ) from None
                continue
            self._asked.answered()
            answered, last = answered + 1, time.monotonic()
            yield batch

    def _ended(self, *, timeout: float) -> list[BaseProcess]:
        """The workers that have ended, which none does by itself. Waits for the first one."""
        gone = connection.wait([worker.sentinel for worker in self._workers], timeout=timeout)
        for worker in self._workers:
            if worker.sentinel in gone:  # its files are closed, and its status follows
                worker.join(_DYING)
        return [worker for worker in self._workers if worker.exitcode is not None]

    def _end_workers(self) -> None:
        for worker in self._workers:
            worker.kill()  # one that waits for a file system would not listen to a request
        self._workers, self._iterator = [], None

    def _explained(self, ended: Sequence[BaseProcess], count: int) -> str:
        """Why the run cannot go on, and what to do."""
        codes = {worker.exitcode for worker in ended}
        if -signal.SIGBUS in codes:
            advice = _shared_memory_is_full(self._setting)
        elif -signal.SIGKILL in codes:
            advice = f"the system kills processes when memory runs out; lower {self._setting} (now {self.num_workers}) or give more memory"
        else:
            advice = f"a library may have failed at a damaged file; with {self._setting} 0 the last lines of the run show where"
        return f"{self._named(self._asked.first())}: {_fate(ended)}, the {count}th time in a row; {advice}"


def _fate(ended: Sequence[BaseProcess]) -> str:
    """What became of workers."""
    codes = sorted({worker.exitcode or 0 for worker in ended})
    ways = [f"was killed by {signal.Signals(-code).name}" if code < 0 else f"has ended with status {code}" for code in codes]
    return f"a worker process {' and another '.join(ways)}"


def _shared_memory_is_full(setting: str) -> str:
    space = shutil.disk_usage(_SHARED_MEMORY)
    return (
        f"the shared memory {_SHARED_MEMORY}, through which workers give batches, is full ({space.free >> 20} of {space.total >> 20} MiB"
        f" are free); make it larger (docker run --shm-size=8g), or give {setting} 0"
    )


def _shared(batch: T) -> T:
    """The batch, in shared memory if this is a worker: later, torch's own thread would do it, and would lose a batch that does not fit."""
    if get_worker_info() is not None:
        for tensor in _tensors_of(batch):
            tensor.share_memory_()
    return batch


def _tensors_of(batch: object) -> Iterator[Tensor]:
    """All tensors of nested tuples and mappings."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors_of(part)
