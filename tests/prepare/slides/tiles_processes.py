"""What tests of tiles share, without torch: comparing folders, the memory of a process with all that it started, a task."""

import os
import signal
import threading
import time
from pathlib import Path
from subprocess import Popen
from typing import NamedTuple


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class PeakMemory:
    """The largest memory of a process and its descendants, shared pages counted once, sampled until it ends.

    Args:
        process: a running one.
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


def proportional(pid: int) -> int:
    """Bytes of a process, its part of shared pages; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) << 10


class Job(NamedTuple):
    """What a worker is asked to do in a test."""

    number: int

    def run(self) -> int:
        if self.number == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.number == 3:
            raise ValueError("three")
        return self.number * 10
