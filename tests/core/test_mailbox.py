"""Messages between processes: they arrive whole and once, and waiting for one outlives the timeout of collectives."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from processes import Ended, free_port, together

from glpretrain.core import mailbox


def both(function, folder: Path, *, address: str) -> list[Ended]:
    """Call `function(rank)` in two processes with a group whose collectives wait for half a second."""

    def run(rank: int) -> object:
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=0.5))
        return function(rank)

    ended = together(run, count=2)
    assert [one.error for one in ended] == ["", ""]
    return ended


@pytest.mark.parametrize("kind", ["file", "tcp"])
def test_messages_arrive_whole_and_are_taken_away(kind: str, tmp_path: Path) -> None:
    content = bytes(range(256)) * 50_000  # 12.8 MB: more than the store takes at once
    address = f"file://{tmp_path / 'store'}" if kind == "file" else f"tcp://127.0.0.1:{free_port()}"

    def run(rank: int) -> object:
        if rank == 0:
            mailbox.post("large", content)
            mailbox.post("empty", b"")
            return mailbox.fetch("answer")
        found = mailbox.fetch("large") == content, mailbox.read("empty"), mailbox.read("empty"), mailbox.is_there("large")
        mailbox.forget("empty")
        mailbox.post("answer", b"seen")
        return *found, mailbox.is_there("empty"), mailbox.fetch("never", until=lambda: True)

    first, second = both(run, tmp_path, address=address)
    assert first.value == b"seen" and second.value == (True, b"", b"", False, False, None)


def test_waiting_outlives_the_timeout_of_collectives(tmp_path: Path) -> None:
    def run(rank: int) -> float:
        start = time.monotonic()
        if rank == 0:
            time.sleep(1.5)
            mailbox.post("here", b"")
        else:
            mailbox.fetch("here")
        return time.monotonic() - start

    _, second = both(run, tmp_path, address=f"file://{tmp_path / 'store'}")
    assert second.value > 1.0
