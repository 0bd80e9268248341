"""Decoded items in memory that the processes of a machine share: one copy, equal items, and nothing that stays behind."""

import json
import os
import platform
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import together
from test_items import Mixed, held

from glpretrain.core import node
from glpretrain.core.listing import say_once
from glpretrain.core.node import Node
from glpretrain.data import Item, Source, items, memory
from glpretrain.data.items import Items

LENGTH = 96
TYPES = (torch.uint8, torch.float32, torch.int16, torch.float64, torch.bool)


class Noted(Mixed):
    """`Mixed`, which notes in a folder which process has read which item."""

    def __init__(self, folder: Path, *, regions: bool = False, length: int = LENGTH) -> None:
        super().__init__(regions=regions, length=length)
        self.folder = folder

    def __getitem__(self, index: int) -> Item:
        (self.folder / f"{index}-{os.getpid()}").touch()
        return super().__getitem__(index)


_INHERITED: set[str] = set()  # inodes of blocks that other tests have left in the process that this one was forked from


def _blocks() -> list[tuple[str, int]]:
    """The blocks of decoded items that this process maps: their inodes and sizes, each once."""
    found: dict[str, int] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, _, _, _, inode, *name = line.split()
        if name and name[0].startswith("/memfd:glpretrain") and inode not in _INHERITED:
            start, end = (int(part, 16) for part in place.split("-"))
            found[inode] = found.get(inode, 0) + end - start
    return sorted(found.items())


def _copied() -> int:
    """Kilobytes of those blocks that this process has a copy of."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = "/memfd:glpretrain" in line and line.split()[4] not in _INHERITED
        elif inside and line.startswith("Anonymous:"):
            total += int(line.split()[1])
    return total


def _left_behind(processes: Sequence[int]) -> list[str]:
    """What is in shared memory of processes that have ended; others may use it at the same time."""
    return [name for name in os.listdir("/dev/shm") if "glpretrain" in name or any(str(process) in name for process in processes)]


def _joined(rank: int, store: Path, count: int = 2) -> None:
    _INHERITED.update(inode for inode, _ in _blocks())
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)


def _same(item: Item, expected: Item) -> bool:
    regions = item.regions is expected.regions is None or torch.equal(item.regions, expected.regions)
    return torch.equal(item.values, expected.values) and item.values.stride() == expected.values.stride() and regions


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_two_processes_decode_a_half_each_and_keep_one_copy(regions: bool, num_workers: int, tmp_path: Path) -> None:
    (read := tmp_path / "read").mkdir()

    def keep(rank: int) -> dict[str, object]:
        _joined(rank, tmp_path / "store")
        here = Node.of_run("first")
        kept, source = held(Noted(read, regions=regions)), Mixed(regions=regions, length=LENGTH)
        unreadable = kept.keep_in_memory(num_workers=num_workers, show=False, most_bytes=1e9, node=here)
        equal = all(_same(kept.item(index, [])[0], source[index if index != 6 else 7]) for index in range(LENGTH))
        dist.barrier()  # what the other one maps is there as long as it is
        return {"equal": equal, "blocks": _blocks(), "unreadable": unreadable, "ranks": here.ranks, "copied": _copied()}

    ended = together(keep, count=2)
    assert not any(one.error for one in ended), ended
    first, second = (one.value for one in ended)
    assert first["equal"] and second["equal"] and first["ranks"] == (0, 1)
    assert first["unreadable"] == second["unreadable"] == [(6, "mixed/6.jpg: truncated")]
    assert first["blocks"] == second["blocks"] and len(first["blocks"]) == 2  # a half of each, mapped by both
    assert first["copied"] == second["copied"] == 0
    readers = {index: {name.name.partition("-")[2] for name in read.glob(f"{index}-*")} for index in range(LENGTH)}
    sampled = {(LENGTH - 1) * place // 7 for place in range(8)}  # both look at the size of these
    assert sum(len(of) > 1 for index, of in readers.items() if index not in (6, 7)) <= len(sampled)
    assert not _left_behind([one.pid for one in ended])


def test_three_processes_share_two_chunks(tmp_path: Path) -> None:
    """There is a process that decodes nothing."""
    (tmp_path / "read").mkdir()

    def keep(rank: int) -> bool:
        _joined(rank, tmp_path / "store", 3)
        kept = held(Noted(tmp_path / "read", length=2))
        kept.keep_in_memory(num_workers=0, show=False, most_bytes=1e9, node=Node.of_run("first"))
        return all(_same(kept.item(index, [])[0], Mixed()[index]) for index in range(2))

    assert [one.value for one in together(keep, count=3)] == [True] * 3


def test_what_a_process_changes_is_its_own_copy(tmp_path: Path) -> None:
    (tmp_path / "read").mkdir()

    def keep(rank: int) -> int:
        _joined(rank, tmp_path / "store")
        kept = held(Noted(tmp_path / "read"))
        kept.keep_in_memory(num_workers=0, show=False, most_bytes=1e9, node=Node.of_run("first"))
        if rank == 0:
            kept.item(1, [])[0].values.zero_()
        dist.barrier()
        return int(kept.item(1, [])[0].values.sum())

    assert [one.value for one in together(keep, count=2)] == [0, int(Mixed()[1].values.sum())]


@pytest.mark.parametrize("least", [0, 1])
def test_the_halves_together_may_not_be_too_large(least: int, tmp_path: Path) -> None:
    source = Mixed(length=LENGTH)
    exact = sum(source[index if index != 6 else 7].values.nbytes for index in range(LENGTH))
    (tmp_path / "read").mkdir()

    def keep(rank: int) -> tuple[bool, int]:
        _joined(rank, tmp_path / "store")
        kept = held(Noted(tmp_path / "read"))
        kept.mean_bytes = lambda: 1.0  # ty: the sample says that they fit
        here = Node.of_run("first")
        found = kept.keep_in_memory(num_workers=0, show=False, most_bytes=exact - least, node=here)
        return found is not None, len(_blocks())

    assert [one.value for one in together(keep, count=2)] == [(True, 2) if least == 0 else (False, 0)] * 2


def test_processes_that_cannot_open_each_others_memory_keep_copies_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    say_once.cache_clear()
    mapped = memory._mapped

    def refused(part: dict[str, int]) -> torch.Tensor:
        if part["process"] != os.getpid():
            raise PermissionError(13, "Permission denied", f"/proc/{part['process']}/fd/7")
        return mapped(part)

    monkeypatch.setattr(memory, "_mapped", refused)
    (tmp_path / "read").mkdir()

    def keep(rank: int) -> tuple[bool, int, list[str]]:
        _joined(rank, tmp_path / "store")
        kept = held(Noted(tmp_path / "read"))
        assert kept.keep_in_memory(num_workers=0, show=False, most_bytes=1e9, node=Node.of_run("first")) is not None
        equal = all(_same(kept.item(index, [])[0], Mixed()[index if index != 6 else 7]) for index in range(LENGTH))
        return equal, len(_blocks()), [record.getMessage() for record in caplog.records]

    for one in together(keep, count=2):
        equal, blocks, (line,) = one.value
        assert equal and blocks == 1 and "cannot share memory" in line and "Permission denied" in line


class Deadly(Noted):
    """The process of rank 1 is killed in the middle of its half."""

    rank = 0

    def __getitem__(self, index: int) -> Item:
        if self.rank == 1 and index == 3 * LENGTH // 4 + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.parametrize("when", ["decoding", "training"])
def test_a_killed_process_leaves_nothing_behind(when: str, tmp_path: Path) -> None:
    (tmp_path / "read").mkdir()
    children: list[int] = []
    for rank in range(2):
        if not (child := os.fork()):
            try:
                torch.set_num_threads(1)
                _joined(rank, tmp_path / "store")
                source = (Deadly if when == "decoding" else Noted)(tmp_path / "read")
                source.rank = rank
                kept = held(source)
                kept.keep_in_memory(num_workers=0, show=False, most_bytes=1e9, node=Node.of_run("first"))
                (tmp_path / f"{rank}.json").write_text(json.dumps(_blocks()))
                time.sleep(60)
            finally:
                os._exit(0)
        children.append(child)
    deadline = time.monotonic() + 60
    if when == "training":
        while len(list(tmp_path.glob("*.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(children[1], signal.SIGKILL)
    assert os.waitpid(children[1], 0)[1] == signal.SIGKILL
    assert not _left_behind(children[1:])
    os.kill(children[0], signal.SIGKILL)  # a run's own watch ends it
    os.waitpid(children[0], 0)
    assert not _left_behind(children)
    assert (when == "decoding") != (len(list(tmp_path.glob("*.json"))) == 2)


@pytest.mark.parametrize(
    ("affinities", "shares"),
    [
        ([range(8)] * 4, [2] * 4),  # all may run anywhere
        ([range(4), range(4, 8)], [4, 4]),  # the launcher has divided the cores already
        ([range(6), range(2, 6)], [4, 2]),
        ([range(2)] * 5, [1] * 5),
    ],
)
def test_cores_are_divided_among_the_processes_that_may_run_on_them(
    affinities: list[range], shares: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [json.dumps([node._machine(), list(cores)]) for cores in affinities] + [json.dumps(["another machine", list(range(8))])]
    monkeypatch.setattr(node, "exchanged", lambda name, value, ranks: told)
    monkeypatch.setattr(node, "world_size", lambda: len(told))
    found = []
    for number in range(len(affinities)):
        monkeypatch.setattr(node, "rank", lambda number=number: number)
        here = Node.of_run("first")
        assert here.ranks == tuple(range(len(affinities))) and here.place == number
        found.append(here.cores)
    assert found == shares


def test_a_machine_that_does_not_say_what_it_is_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "_PIDS", "/proc/self/ns/nothing")
    assert node._machine() == platform.node() and Node.of_run("first") == Node((0,), node.usable_cores(), "first")


def test_items_of_every_type_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clouds(Source):
        name = "clouds"

        def __len__(self) -> int:
            return len(TYPES)

        def __getitem__(self, index: int) -> Item:
            return Item(torch.arange((5 + index) * 3).view(-1, 3).to(TYPES[index]), 0, None, None)

    monkeypatch.setattr(items, "_CHUNK", 1)
    kept = Items(Clouds(), read=lambda source, index: source[index])
    kept.keep_in_memory(num_workers=0, show=False, most_bytes=1e9)
    for index, dtype in enumerate(TYPES):
        item, place = kept.item(index, [])
        assert place == index and item.values.dtype == dtype and torch.equal(item.values, Clouds()[index].values)
