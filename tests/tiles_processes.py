"""Helpers of the tests of tiles, without torch: comparing folders, processes with their descendants and their memory, and a task."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from typing import NamedTuple


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def wait_until(condition: Callable[[], bool], *, seconds: float = 120.0) -> None:
    """Poll a condition. The limit is for a program that hangs; it says nothing about speed.

    Raises:
        TimeoutError: the condition did not become true.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened within {seconds} seconds")
        time.sleep(0.002)


class PeakMemory:
    """The largest memory of a process and its descendants, sampled until it ends. Shared pages count once.

    Args:
        process: a running process.
    """

    def __init__(self, process: Popen) -> None:
        self.process = process
        self.bytes = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while self.process.poll() is None:
            self.bytes = max(self.bytes, sum(proportional(pid) for pid in family(self.process.pid)))
            time.sleep(0.05)

    def wait(self) -> int:
        """Exit status of the process."""
        self.process.wait()
        self._thread.join()
        return self.process.returncode


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for one in found:
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += [int(child) for child in children.read_text().split()]
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile
    return found


def ended(pid: int) -> bool:
    """Whether a process has ended, also if nobody has waited for it yet."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return status.rpartition(") ")[2].startswith("Z")


def proportional(pid: int) -> int:
    """Memory of a process in bytes, with its share of the pages that it shares with others; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) << 10


def end_process() -> None:
    """End this process as a bug in a library does. In a thread that is not the first, the signal may come a little later."""
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)


class Job(NamedTuple):
    """A task of a test for a worker."""

    number: int
    notes: Path  # folder in which it notes that it ran

    def run(self) -> int:
        times = len(list(self.notes.glob(f"{self.number}-*")))
        (self.notes / f"{self.number}-{times}").touch()
        if self.number == 2 or (self.number == 4 and times == 0):
            end_process()
        if self.number == 3:
            raise ValueError("three")
        return self.number * 10
