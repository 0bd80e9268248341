"""Workers that are killed, end, hang or run out of shared memory; the batches that a run sees nevertheless."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

from glpretrain.data import Item, Source, loading
from glpretrain.data.items import Asked, Items, RawBatch, RawItems, batches_of
from glpretrain.data.loading import Loader

Act = Callable[[], None]


class Wavy(Source):
    """Items made from a formula. Each time that one of `fatal` is read in a worker while `marks` holds fewer than `times` files, the worker
    does something first."""

    name = "wavy"

    def __init__(self, marks: Path, *, fatal: Sequence[int] = (), act: Act = lambda: None, times: int = 1, length: int = 40) -> None:
        self.marks, self.fatal, self.act, self.times, self.length = marks, set(fatal), act, times, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        if index in self.fatal and get_worker_info() is not None and len(list(self.marks.iterdir())) < self.times:
            (self.marks / str(time.monotonic_ns())).touch()
            self.act()
        values = (127 + 120 * torch.sin(torch.arange(3 * 8 * 8) * 0.01 + index)).to(torch.uint8).view(3, 8, 8)
        return Item(values=values, label=-1, instances=None, regions=None)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raw(source: Source, *, repeated: int = 1) -> RawItems:
    """Batches of whole items, which show the keys that they were given."""

    def prepare(items: Sequence[Item], *, keys: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"items": torch.stack([item.values.repeat(1, repeated, repeated) for item in items]), "keys": keys}

    return RawItems(Items(source, read=lambda source, index: source[index]), prepare=prepare, draw=lambda keys: {}, seed=3)


def order(length: int = 40) -> list[Asked]:
    """Batches of three in an order of their own."""
    indices = [index * 7 % length for index in range(length)]
    return [Asked(2, indices[start : start + 3]) for start in range(0, length, 3)]


def assert_equal(batches: Sequence[RawBatch], expected: Sequence[RawBatch]) -> None:
    assert [batch.index.tolist() for batch in batches] == [batch.index.tolist() for batch in expected]
    for batch, other in zip(batches, expected, strict=True):
        assert batch.epoch == other.epoch
        assert all(torch.equal(part, other.parts[name]) for name, part in batch.parts.items())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_GLANCE", 0.2)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_worker_changes_no_batch(num_workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = list(batches_of(raw(Wavy(tmp_path)), order(), num_workers=0))
    loader = batches_of(raw(Wavy(tmp_path, fatal=[20, 33], act=killed, times=2)), order(), num_workers=num_workers)
    for _ in range(2):  # the second epoch is undisturbed, by the same workers
        assert_equal(list(loader), expected)
    assert len(list(tmp_path.iterdir())) == 2
    messages = [record.getMessage() for record in caplog.records]
    assert 1 <= len(messages) <= 2 and all("killed by SIGKILL" in message and "start again" in message for message in messages)


def test_a_worker_that_is_killed_from_outside_raises_nothing_in_the_step(tmp_path: Path) -> None:
    expected = list(batches_of(raw(Wavy(tmp_path)), order(), num_workers=0))
    loader, batches = batches_of(raw(Wavy(tmp_path)), order(), num_workers=2), []
    for batch in loader:
        batches.append(batch)
        if len(batches) in (2, 9):
            os.kill(loader._workers[len(batches) % 2].pid or 0, signal.SIGKILL)
            time.sleep(0.3)  # a step, in which the signal arrives
    assert_equal(batches, expected)


def test_workers_that_are_killed_again_and_again_end_the_run_with_a_line(tmp_path: Path) -> None:
    loader = batches_of(raw(Wavy(tmp_path, fatal=[7], act=killed, times=99)), order(), num_workers=2)
    with pytest.raises(
        ValueError, match=r"wavy: a batch of 3 items, the first of them item 0: .*SIGKILL, the 4th .*lower --data.num_work"
    ) as error:
        list(loader)
    assert "\n" not in str(error.value) and len(list(tmp_path.iterdir())) == 4


def test_a_bus_error_is_put_down_to_shared_memory(tmp_path: Path) -> None:
    act = lambda: os.kill(os.getpid(), signal.SIGBUS)  # noqa: E731
    with pytest.raises(ValueError, match=r"SIGBUS.*/dev/shm.* is full .*--data.num_workers 0"):
        list(batches_of(raw(Wavy(tmp_path, fatal=[7], act=act, times=99)), order(), num_workers=1))


def test_a_worker_that_hangs_ends_the_run_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_PATIENCE", 1.0)
    loader = batches_of(raw(Wavy(tmp_path, fatal=[14], act=lambda: time.sleep(600))), order(), num_workers=1)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"first of them item 0: no worker has given anything for 1 seconds; see whether the file system"):
        list(loader)
    assert time.monotonic() - start < 10 and not loader._workers


def test_slow_batches_are_waited_for(tmp_path: Path) -> None:
    loader = batches_of(raw(Wavy(tmp_path, fatal=range(0, 40, 9), act=lambda: time.sleep(0.5), times=3)), order(), num_workers=1)
    assert_equal(list(loader), list(batches_of(raw(Wavy(tmp_path)), order(), num_workers=0)))


class Failing(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        if index == 2:
            raise RuntimeError("a mistake of ours")
        return index


def test_errors_of_the_items_are_what_they_were() -> None:
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        list(Loader(Failing(), range(4), num_workers=1, named=str, setting="workers"))


def test_items_kept_in_memory_survive_a_killed_worker(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, disturbed = raw(Wavy(tmp_path / "a", length=1100)), raw(Wavy(tmp_path / "b", fatal=[700], act=killed, length=1100))
    for batches in (whole, disturbed):
        assert batches.items.keep_in_memory(num_workers=2, show=False, most_bytes=1e9) == []
    assert len(list((tmp_path / "b").iterdir())) == 1
    asked = Asked(0, list(range(1100)))
    assert torch.equal(disturbed[asked].parts["items"], whole[asked].parts["items"])


_FULL = """
import sys
sys.path[:0] = sys.argv[1:]
from pathlib import Path
from test_loading import Wavy, order, raw
from glpretrain.data.items import batches_of
try:
    list(batches_of(raw(Wavy(Path("/dev/null")), repeated=200), order(), num_workers=1))
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_small_shared_memory_is_named() -> None:
    mounted = "mount -t tmpfs -o size=8m tmpfs /dev/shm"
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "sh", "-c", mounted], capture_output=True, check=False).returncode:
        pytest.skip("a small /dev/shm can be mounted by an administrator only")
    command = f'{mounted} && exec "{sys.executable}" -c "$0" "$@"'
    folders = [str(Path(__file__).parent), str(Path(loading.__file__).parents[2])]
    found = subprocess.run(["unshare", "-m", "sh", "-c", command, _FULL, *folders], capture_output=True, text=True, timeout=60, check=False)
    assert "through which workers give batches, is full" in found.stdout and "8 MiB" in found.stdout, found
    assert found.stderr == ""
