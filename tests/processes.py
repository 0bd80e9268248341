"""Several processes that do something at the same moment, for tests of what they share."""

import multiprocessing
import socket
import sys
from collections.abc import Callable
from typing import NamedTuple

_SECONDS = 120.0  # for a program that hangs; it says nothing about speed


class Ended(NamedTuple):
    """What became of one process."""

    pid: int
    value: object  # what the function returned
    error: str  # what it raised; empty where it returned


def free_port() -> int:
    """A port that no process listens to at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(function: Callable[[int], object], *, count: int) -> list[Ended]:
    """Call `function(0)` to `function(count - 1)` in forked processes that start at the same moment.

    Raises:
        AssertionError: a process died, or did not end.
    """
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(count), context.SimpleQueue()

    def call(number: int) -> None:
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)  # threads of the parent are not there after a fork
        pid = multiprocessing.current_process().pid
        barrier.wait()
        try:
            answers.put((number, Ended(pid, function(number), "")))
        except Exception as error:
            answers.put((number, Ended(pid, None, f"{type(error).__name__}: {error}")))

    processes = [context.Process(target=call, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_SECONDS)
        assert process.exitcode == 0, f"a process ended with {process.exitcode} (None: it did not end)"
    return [ended for _, ended in sorted((answers.get() for _ in processes), key=lambda pair: pair[0])]
