"""A few processes that run tasks, and the outcome of each task.

This differs from the pools of the standard library in two ways. When a process dies (a decoder crashes, memory runs out), only its task
fails, and the process is replaced. And a worker ends when this process ends, even by SIGKILL. Left out: order; outcomes come as soon as
they are ready.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple, Protocol


class Task(Protocol):
    """Something to do in another process. The task and its result can be pickled."""

    def run(self) -> object: ...


class Outcome(NamedTuple):
    """A finished task."""

    task: Task
    result: object  # what the task returned, or the exception that it raised


class Workers:
    """Processes that start when there are tasks and end at the end of the context.

    Args:
        count: number of processes; with 1, this process runs the tasks.
        preload: modules that every worker needs; they are imported once for all workers.
    """

    def __init__(self, count: int, *, preload: Sequence[str] = ()) -> None:
        self.count = count
        self._waiting: deque[Task] = deque()
        self._idle: list[tuple[BaseProcess, Connection]] = []
        self._busy: dict[Connection, tuple[BaseProcess, Task]] = {}
        # Not forked from this process, because the threads of a progress bar or of torch do not survive a fork.
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
        """Whether another task would start at once."""
        return len(self._waiting) + len(self._busy) < self.count

    def submit(self, task: Task) -> None:
        """Queue a task behind the tasks that were submitted before."""
        self._waiting.append(task)

    def withdraw(self, tasks: Sequence[Task]) -> None:
        """Drop those of these tasks that have not started."""
        self._waiting = deque(task for task in self._waiting if not any(task is one for one in tasks))

    def outcomes(self) -> Iterator[Outcome]:
        """Outcomes of all tasks, until none is left. More tasks may be submitted meanwhile."""
        while self._waiting or self._busy:
            if self.count == 1:
                task = self._waiting.popleft()
                yield Outcome(task, _result(task))
                continue
            while self._waiting and len(self._busy) < self.count:
                process, connection = self._idle.pop() if self._idle else self._start()
                task = self._waiting.popleft()
                self._busy[connection] = (process, task)
                connection.send(task)
            for connection in wait(list(self._busy)):
                assert isinstance(connection, Connection)  # `wait` accepts other kinds as well
                process, task = self._busy.pop(connection)
                try:
                    result = connection.recv()
                except (EOFError, ConnectionResetError):
                    process.join()
                    yield Outcome(task, ValueError(f"the process that worked on it ended with status {process.exitcode}"))
                    continue
                self._idle.append((process, connection))
                yield Outcome(task, result)


def _work(connection: Connection) -> None:
    """Run the tasks that arrive, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on an interrupt, the parent process ends this one
    while True:
        try:
            connection.send(_result(connection.recv()))
        except (EOFError, BrokenPipeError):
            return


def _result(task: Task) -> object:
    try:
        return task.run()
    except (ValueError, OSError, MemoryError) as error:  # damaged data, a full disk; any other exception is a bug
        return error
