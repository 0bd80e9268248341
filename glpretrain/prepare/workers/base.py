"""What runs tasks in other processes, whichever it is."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol


class Task(Protocol):
    """Something to do in another process. The task and its result can be pickled."""

    def run(self) -> object: ...


class Outcome(NamedTuple):
    """A finished task."""

    task: Task
    result: object  # what the task returned, or the exception that it raised


class Executor(ABC):
    """Processes that run tasks until the end of the context. Outcomes have no order: they come as soon as they are ready."""

    def __init__(self) -> None:
        self._waiting: deque[Task] = deque()

    def __enter__(self) -> "Executor":
        return self

    @abstractmethod
    def __exit__(self, *raised: object) -> None:
        """End what was started. Tasks that are not finished are left."""

    @property
    @abstractmethod
    def has_room(self) -> bool:
        """Whether another task would start soon."""

    def submit(self, task: Task) -> None:
        """Queue a task behind the tasks that were submitted before."""
        self._waiting.append(task)

    def withdraw(self, tasks: Sequence[Task]) -> None:
        """Drop those of these tasks that have not started."""
        self._waiting = deque(task for task in self._waiting if not any(task is one for one in tasks))

    @abstractmethod
    def outcomes(self) -> Iterator[Outcome]:
        """Outcomes of all tasks, until none is left. More tasks may be submitted meanwhile."""


def result_of(task: Task) -> object:
    """What a task returns, or the exception with which it says that its data is damaged or a file cannot be written."""
    try:
        return task.run()
    except (ValueError, OSError, MemoryError) as error:  # damaged data, a full disk; any other exception is a bug
        return error
