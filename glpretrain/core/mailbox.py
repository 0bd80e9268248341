"""Messages between the processes of a run, through the store that its group was formed with.

A collective needs all processes to come to it, and gives up after half an hour. A message waits until somebody reads it, however long that
takes. Left out: what a process says when another has ended (`watch`).
"""

import time
from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]  its public home

from glpretrain.core.distributed import rank, world_size

_PIECE = 1 << 22  # bytes: the store takes values of 8 MiB at most
_ended: list[str] = []  # why nobody will answer any more, from another thread
_SOON, _LATE = 0.0005, 0.05  # seconds between two looks, at first and after a while


def post(name: str, content: bytes) -> None:
    """Leave a message.

    Args:
        name: its name, which no other message has that was not read yet.
        content: what it says.
    """
    pieces = range(0, len(content), _PIECE)
    for number, start in enumerate(pieces):
        _store().set(f"{name}/{number}", content[start : start + _PIECE])  # pyright: ignore[reportArgumentType] - bytes are taken
    _store().set(name, str(len(pieces)))


def fetch(name: str, *, until: Callable[[], bool] = lambda: False) -> bytes | None:
    """Wait for a message, and take it away.

    Args:
        name: its name.
        until: whether it is not worth waiting any more.

    Returns:
        What it says; None where it was not worth waiting.
    """
    if not wait(lambda: is_there(name), until=until):
        return None
    content = read(name)
    forget(name)
    return content


def read(name: str) -> bytes:
    """Wait for a message, and leave it there for others."""
    wait(lambda: is_there(name))
    return b"".join(_store().get(f"{name}/{number}") for number in range(int(_store().get(name))))


def exchanged(name: str, value: str, *, ranks: Sequence[int]) -> list[str]:
    """What each of these processes tells under a name, in their order. Waits for them, however long that takes.

    Args:
        name: name of this place and moment, which no other call of the run has.
        value: what this process tells.
        ranks: processes whose values are asked for.
    """
    if world_size() == 1:
        return [value]
    if rank() in ranks:
        post(f"{name} of {rank()}", value.encode())
    return [read(f"{name} of {number}").decode() for number in ranks]


def wait(condition: Callable[[], bool], *, until: Callable[[], bool] = lambda: False) -> bool:
    """Wait until the condition holds, which is True, or until it is not worth waiting any more, which is False."""
    pause = _SOON
    while not condition():
        if _ended:
            raise RuntimeError(f"TCPStore: nobody will answer: {_ended[-1]}")
        if until():
            return False
        time.sleep(pause)
        pause = min(2 * pause, _LATE)
    return True


def give_up(reason: str) -> None:
    """Let whoever waits for a message in this process fail, because the run has ended elsewhere; an empty reason lets all wait again."""
    _ended[:] = [reason] if reason else []


def is_there(name: str) -> bool:
    """Whether a message waits to be read."""
    return _store().check([name])


def forget(name: str) -> None:
    """Take a message away, if it is there."""
    if is_there(name):
        count = int(_store().get(name))
        _store().delete_key(name)
        for number in range(count):
            _store().delete_key(f"{name}/{number}")


def _store() -> Store:
    return dist.distributed_c10d._get_default_store()  # it has no public name
