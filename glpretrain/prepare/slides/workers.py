"""A few processes that work tasks off, and what became of each task.

Unlike the pools of the standard library: a process that dies (a decoder that crashes, memory that runs out) costs its task and is replaced,
and a worker ends when this process does, even by SIGKILL. Left out: order; results come as they are ready.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple, Protocol


class Task(Protocol):
    """Something to do in another process: it, and what it returns, can be pickled."""

    def run(self) -> object: ...


class Outcome(NamedTuple):
    """What became of a task."""

    task: Task
    value: object  # what it returned; None where there is an error
    error: Exception | None


class Workers:
    """Processes, started when there is something to do and ended at the end of the context.

    Args:
        count: how many; with 1 there is none and this process does the work.
        preload: modules that every worker needs, imported once for all of them.
    """

    def __init__(self, count: int, *, preload: Sequence[str] = ()) -> None:
        self.count = count
        self._waiting: deque[Task] = deque()
        self._idle: list[tuple[BaseProcess, Connection]] = []
        self._busy: dict[Connection, tuple[BaseProcess, Task]] = {}
        # Not forked from here: the threads of a progress bar or of torch do not survive that.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))

    def _start(self) -> tuple[BaseProcess, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the connection
        return process, ours

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *raised: object) -> None:
        processes = [process for process, _ in (*self._idle, *self._busy.values())]
        for process in processes:
            process.kill()
        for process in processes:
            process.join()

    @property
    def has_room(self) -> bool:
        """Whether another task would be started on at once."""
        return len(self._waiting) + len(self._busy) < self.count

    def submit(self, task: Task) -> None:
        """Have it done after those submitted before."""
        self._waiting.append(task)

    def withdraw(self, tasks: Sequence[Task]) -> None:
        """Forget those of the tasks that nobody has begun."""
        self._waiting = deque(task for task in self._waiting if not any(task is one for one in tasks))

    def outcomes(self) -> Iterator[Outcome]:
        """What became of the tasks, until none is left; more may be submitted meanwhile."""
        while self._waiting or self._busy:
            if self.count == 1:
                task = self._waiting.popleft()
                yield Outcome(task, *_result(task))
                continue
            while self._waiting and len(self._busy) < self.count:
                process, connection = self._idle.pop() if self._idle else self._start()
                task = self._waiting.popleft()
                self._busy[connection] = (process, task)
                connection.send(task)
            for connection in wait(list(self._busy)):
                process, task = self._busy.pop(connection)
                try:
                    value, error = connection.recv()
                except (EOFError, ConnectionResetError):
                    process.join()
                    yield Outcome(task, None, ValueError(f"the process that worked on it ended with status {process.exitcode}"))
                    continue
                self._idle.append((process, connection))
                yield Outcome(task, value, error)


def _work(connection: Connection) -> None:
    """Do what comes, until nobody is at the other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this process ends it when interrupted
    while True:
        try:
            connection.send(_result(connection.recv()))
        except (EOFError, BrokenPipeError):
            return


def _result(task: Task) -> tuple[object, Exception | None]:
    try:
        return task.run(), None
    except (ValueError, OSError, MemoryError) as error:  # damaged data, a full disk; anything else is our mistake
        return None, error
