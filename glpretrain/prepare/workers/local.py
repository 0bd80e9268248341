"""A few processes of this machine.

They differ in two ways from the pools of the standard library. When a process dies (a decoder crashes, memory runs out), the process is
replaced and its task runs once more; if it dies again, only this task fails. And a worker ends when this process ends, even by SIGKILL.
"""

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from glpretrain.prepare.workers.base import Executor, Outcome, Task, result_of


class Workers(Executor):
    """Processes that start when there are tasks and end at the end of the context.

    Args:
        count: number of processes; with 1, this process runs the tasks.
        preload: modules that every worker needs; they are imported once for all workers.

    Raises:
        ValueError: `count` is below 1.
    """

    def __init__(self, count: int, *, preload: Sequence[str] = ()) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"workers: {count}; accepted: at least 1 process")
        self.count = count
        self._idle: list[tuple[BaseProcess, Connection]] = []
        self._busy: dict[Connection, tuple[BaseProcess, Task]] = {}
        self._again: list[Task] = []  # those whose process has died once
        # Not forked from this process, because the threads of a progress bar or of torch do not survive a fork.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))

    def _start(self) -> tuple[BaseProcess, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the connection
        return process, ours

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

    def outcomes(self) -> Iterator[Outcome]:
        """Outcomes of all tasks, until none is left. More tasks may be submitted meanwhile."""
        while self._waiting or self._busy:
            if self.count == 1:
                task = self._waiting.popleft()
                yield Outcome(task, result_of(task))
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
                    if not any(task is one for one in self._again):
                        self._again.append(task)
                        self._waiting.appendleft(task)
                        continue
                    self._again = [one for one in self._again if one is not task]
                    yield Outcome(task, ValueError(f"the process that worked on it ended with status {process.exitcode}, twice"))
                    continue
                self._idle.append((process, connection))
                yield Outcome(task, result)


def _work(connection: Connection) -> None:
    """Run the tasks that arrive, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on an interrupt, the parent process ends this one
    while True:
        try:
            connection.send(result_of(connection.recv()))
        except (EOFError, BrokenPipeError):
            return
