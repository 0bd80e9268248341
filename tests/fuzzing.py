"""What the tests with damaged files share: the damage, a limit of time for each file and of memory for all, and what became of them."""

import random
import resource
import signal
import struct
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

SECONDS = 20  # of one file, on a machine that does other things too
_HEAD = 96  # bytes of a header


class Hang(BaseException):
    """A file took too long. No reader may catch it."""


@contextmanager
def time_limit(what: str) -> Iterator[None]:
    """Raise `Hang` where this takes longer than `SECONDS`."""

    def stop(*_: object) -> None:
        raise Hang(f"{what}: still running after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def counted(kind: str, *, megabytes: float) -> Iterator[Counter[str]]:
    """Outcomes of files of one kind; says what they were, what they cost, and fails where they took more memory than this."""
    outcomes = Counter[str]()
    with suppress(OSError):  # Linux: the peak starts again from here, and is not that of an earlier test
        Path("/proc/self/clear_refs").write_text("5")
    before, start = _peak(), time.process_time()
    yield outcomes
    grown, seconds = _peak() - before, time.process_time() - start
    said = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
    print(f"\nfuzz: {kind}: {outcomes.total()} files, {seconds:.0f} s of CPU, {grown:.0f} MB more at the peak: {said}")
    assert grown < megabytes, f"{kind}: {grown:.0f} MB more than before"


def _peak() -> float:
    """Largest memory of this process, in MB."""
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def damaged(content: bytes, draw: random.Random, *, heads: Sequence[int] = (0,)) -> bytes:
    """A copy that is changed as a disk or a download changes it, in half of all places at one of the headers.

    Args:
        content: whole file.
        draw: where the damage comes from.
        heads: where headers begin.
    """
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(len(data) or 1)
        if draw.random() < 0.5:
            place = min(draw.choice(heads) + draw.randrange(_HEAD), max(0, len(data) - 1))
        length = draw.choice((1, 2, 4, 16, 200))
        match draw.randrange(7):
            case 0:
                data[place : place + 1] = bytes([draw.randrange(256)])
            case 1:
                del data[place:]
            case 2:
                data[place : place + length] = bytes(length)
            case 3:
                data[place : place + length] = b"\xff" * length
            case 4:
                data[place:place] = draw.randbytes(length)
            case 5:
                del data[place : place + length]
            case _:
                data[place : place + 4] = struct.pack(draw.choice("<>") + "I", draw.choice((0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1)))
    return bytes(data)
