"""Shards that are read one after another: the order of their items, compressed ones, and what is read ahead."""

import gzip
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from processes import together
from test_module import Ramp, Recorder, trainer, views
from test_shards import png, values, write

from glpretrain.core.listing import say_once
from glpretrain.data import Subset, TarShards
from glpretrain.data.module import DataModule
from glpretrain.data.orders import ByShard, EpochBatches, Position
from glpretrain.data.sources import tar_files, unpacked
from glpretrain.data.sources.unpacked import Unpacked

SIZES = (5, 3, 7, 1, 6, 4, 2)  # items of the shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards whose images have the number of the item as their value, and that of the shard as their class."""
    return _written(tmp_path / "shards")


def _written(folder: Path, *, compressed: bool = False) -> Path:
    folder.mkdir()
    item = 0
    for shard, size in enumerate(SIZES):
        members = {}
        for _ in range(size):
            members |= {f"{item:03d}.png": png(item), f"{item:03d}.cls": str(shard).encode()}
            item += 1
        write(folder / f"{shard}.tar", members)
        if compressed:
            plain = (folder / f"{shard}.tar").read_bytes()
            (folder / f"{shard}.{'tgz' if shard % 2 else 'tar.gz'}").write_bytes(gzip.compress(plain))
            (folder / f"{shard}.tar").unlink()
    return folder


def _shards_of(indices: list[int]) -> list[int]:
    return np.searchsorted(np.cumsum(SIZES), indices, side="right").tolist()


@pytest.mark.parametrize("number", [1, 2, 3, 7, 100])
def test_an_epoch_has_all_items_once_and_its_shards_a_few_at_a_time(number: int, folder: Path) -> None:
    source, order = TarShards(folder), ByShard(number)
    order.begin(source)
    epochs = [order.epoch(epoch, length=len(source), seed=3, progress=0.0).indices.tolist() for epoch in range(3)]
    firsts = set()
    for indices in epochs:
        assert sorted(indices) == list(range(sum(SIZES)))
        shards = _shards_of(indices)
        spans = {shard: (shards.index(shard), len(shards) - shards[::-1].index(shard)) for shard in range(len(SIZES))}
        open_at = [sum(start <= place < end for start, end in spans.values()) for place in range(len(shards))]
        assert max(open_at) <= number
        firsts.add(shards[0])
        of_one = [index for index, shard in zip(indices, shards, strict=True) if shard == 2]
        assert of_one != sorted(of_one)
    assert len({tuple(indices) for indices in epochs}) == 3 and len(firsts) > 1
    again, other = (order.epoch(1, length=len(source), seed=seed, progress=0.0).indices.tolist() for seed in (3, 4))
    assert again == epochs[1] != other


def test_groups_of_shards_have_nearly_equal_sizes(folder: Path) -> None:
    order = ByShard(3)  # of seven: two, two and three, and not three, three and one
    order.begin(TarShards(folder))
    shards = _shards_of(order.epoch(0, length=sum(SIZES), seed=0, progress=0.0).indices.tolist())
    changes = [place for place in range(1, len(shards)) if not set(shards[:place]) & set(shards[place:])]
    sizes = [len(set(part)) for part in np.split(np.array(shards), changes)]
    assert sum(sizes) == 7 and max(sizes) <= 3 and len(sizes) >= 3 and sizes[-1] > 0


def test_the_shards_of_some_of_the_items_are_told(folder: Path) -> None:
    source = TarShards(folder)
    assert source.shard_starts.tolist() == [0, 5, 8, 15, 16, 22, 26]
    assert Subset(source, indices=[1, 2, 9, 10, 26, 27]).shard_starts.tolist() == [0, 2, 4]
    assert Subset(Ramp(5), indices=[1, 2]).shard_starts.tolist() == []


def test_a_source_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ByShard: source 'ramp' has no shards; give TarShards or TileFolder"):
        trainer(tmp_path, max_steps=1).fit(Recorder(), datamodule=DataModule(Ramp(9), views(), batch_size=3, order=ByShard()))
    with pytest.raises(ValueError, match="together is 0"):
        ByShard(0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_goes_on_in_the_middle_of_a_group(num_workers: int, folder: Path, tmp_path: Path) -> None:
    def data() -> DataModule:
        return DataModule(TarShards(folder), views(), batch_size=3, cache=False, order=ByShard(2), num_workers=num_workers)

    whole, first, second = Recorder(), Recorder(), Recorder()
    trainer(tmp_path, max_steps=15).fit(whole, datamodule=data())  # nine batches an epoch
    saver = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="middle", every_n_train_steps=11)
    trainer(tmp_path, max_steps=11, callbacks=[saver], enable_checkpointing=True).fit(first, datamodule=data())
    trainer(tmp_path, max_steps=15).fit(second, datamodule=data(), ckpt_path=tmp_path / "middle.ckpt")
    assert first.seen + second.seen == whole.seen


def test_two_processes_see_the_batches_of_one(folder: Path) -> None:
    def batches(rank: int, world_size: int) -> list[list[int]]:
        order = ByShard(2)
        order.begin(TarShards(folder))
        of_rank = EpochBatches(order, length=28, batch_size=6 // world_size, rank=rank, world_size=world_size, seed=5)
        of_rank.resume(Position(1, 1))
        return [asked.indices for asked in of_rank]

    joined = [list(chain(*parts)) for parts in zip(batches(0, 2), batches(1, 2), strict=True)]
    assert joined == batches(0, 1) and len(joined) == 3


def test_a_shard_is_read_ahead_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    ranges: list[tuple[int, int]] = []

    def advise(file: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        if start == 0:
            asked.append(os.readlink(f"/proc/self/fd/{file}"))
        ranges.append((start, start + length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    assert values(TarShards(folder)) == list(range(28)) and not asked
    assert values(TarShards(folder, read_ahead=True)) == list(range(28))
    assert asked == [str(folder / f"{shard}.tar") for shard in range(len(SIZES))]
    monkeypatch.setattr(tar_files, "_AHEAD", 4096)
    ranges.clear()
    assert TarShards(folder, read_ahead=True)[0].label == 0
    assert ranges == [(start, start + 4096) for start in range(0, (folder / "0.tar").stat().st_size, 4096)] and len(ranges) > 1
    asked.pop()
    monkeypatch.setattr(tar_files, "_REMEMBERED", -1.0)
    source = TarShards(folder, read_ahead=True)
    assert source[0].label == source[0].label == 0 and asked[7:] == [str(folder / "0.tar")] * 2


# Compressed shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    say_once.cache_clear()
    return _written(tmp_path / "packed", compressed=True)


def test_compressed_shards_give_the_items_of_plain_ones(folder: Path, packed: Path, tmp_path: Path) -> None:
    plain, source = TarShards(folder), TarShards(packed, unpack_to=str(tmp_path / "room"))
    assert values(source) == values(plain) == list(range(28)) and source.classes == plain.classes
    assert [source[index].label for index in range(28)] == [plain[index].label for index in range(28)]
    assert sorted(path.suffix for path in (tmp_path / "room").iterdir() if path.suffix != ".lock") == [".tar"] * 7
    assert (
        TarShards.reads(packed) and TarShards.reads(packed / "0.tar.gz") and len(TarShards(packed / "1.tgz", unpack_to=str(tmp_path))) == 3
    )
    gone = TarShards(packed, unpack_to=str(tmp_path / "room"))
    (packed / "0.tar.gz").unlink()
    with pytest.raises(ValueError, match=r"0\.tar\.gz:000\.png: .*no such file"):
        gone[0]


def test_processes_unpack_a_shard_once(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = unpacked._blocks

    def noted(shard: Path) -> Iterator[bytes]:
        (tmp_path / f"opened {shard.name} {os.getpid()}").touch()
        return blocks(shard)

    monkeypatch.setattr(unpacked, "_blocks", noted)
    ended = together(lambda number: values(TarShards(packed, unpack_to=str(tmp_path / "room"))), count=3)
    assert [one.value for one in ended] == [list(range(28))] * 3, ended
    assert len(list(tmp_path.glob("opened *"))) == len(SIZES)


def test_a_bounded_room_holds_the_shards_of_an_order_by_shards(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room, opened = tmp_path / "room", list[str]()
    source = TarShards(packed, unpack_to=str(room), unpack_gb=45e-6)  # four shards of 10 kB, the size of a small tar file
    clock = iter(range(10**6))
    monkeypatch.setattr(unpacked, "_USED", -1.0)
    monkeypatch.setattr(os, "utime", lambda path, utime=os.utime: utime(path, (2e9 + (now := next(clock)), 2e9 + now)))
    blocks = unpacked._blocks
    monkeypatch.setattr(unpacked, "_blocks", lambda shard: opened.append(shard.name) or blocks(shard))
    for path in room.glob("*.tar"):
        path.unlink()
    order = ByShard(2)
    order.begin(source)
    source._shards.unpacked._made.clear()
    caplog.clear()
    for index in order.epoch(0, length=28, seed=0, progress=0.0).indices.tolist():
        assert int(source[index].values[0, 0, 0]) == index
        assert sum(path.stat().st_size for path in room.glob("*.tar")) <= 45e3
    assert len(opened) == len(set(opened)) == len(SIZES) and "again and again" not in caplog.text
    for index in torch.randperm(28, generator=torch.Generator().manual_seed(0)).tolist() * 2:
        assert int(source[index].values[0, 0, 0]) == index
    assert len(opened) > 2 * len(SIZES) and "unpacked again and again; read shard after shard" in caplog.text


@pytest.mark.parametrize("kept", [0.0, 0.4, 0.7, 0.95])
def test_of_a_damaged_compressed_shard_all_is_read_that_can_be_unpacked(
    kept: float, packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    noise = {f"{item:03d}.png": png(item) + os.urandom(2000) for item in range(9)}
    write(tmp_path / "2.tar", noise)
    half = len(content := (tmp_path / "2.tar").read_bytes()) // 2
    content = gzip.compress(content[:half]) + gzip.compress(content[half:])  # one file may hold several streams
    (packed / "2.tar.gz").write_bytes(content[: int(kept * len(content))])
    others = {f"{item:03d}.png": png(item) for item in range(20, 23)}
    for name in ("0.tar.gz", "1.tgz", "3.tgz", "4.tar.gz", "5.tgz", "6.tar.gz"):
        write(tmp_path / "other.tar", others)
        (packed / name).write_bytes(gzip.compress((tmp_path / "other.tar").read_bytes()))
    source = TarShards(packed, unpack_to=str(tmp_path / "room"))
    whole = len(source) - 6 * 3
    assert values(source) == [*[20, 21, 22] * 2, *range(whole), *[20, 21, 22] * 4]
    assert 9 * kept - 1.5 <= whole <= 9 * kept and "2.tar.gz" in caplog.text and "1 of 7 shards are damaged" in caplog.text


def test_a_shard_that_unpacks_to_more_than_is_allowed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bomb.tar.gz").write_bytes(gzip.compress(bytes(5_000_000)))
    with pytest.raises(ValueError, match=r"bomb\.tar\.gz unpacks to more than unpack_gb, which is 0\.002"):
        TarShards(tmp_path / "bomb.tar.gz", unpack_to=str(tmp_path / "room"), unpack_gb=0.002)
    assert not [path for path in (tmp_path / "room").iterdir() if path.suffix != ".lock"]
    with pytest.raises(ValueError, match="unpack_gb is 0; expected a positive number"):
        TarShards(tmp_path / "bomb.tar.gz", unpack_gb=0)


def test_a_folder_that_others_may_write_to_is_refused(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    room = Unpacked(None, most_bytes=1e6)
    assert room.plain(packed / "0.tar.gz").parent == tmp_path / "temporary" / f"glpretrain-{os.getuid()}" / "shards"
    own = tmp_path / "temporary" / f"glpretrain-{os.getuid()}"
    assert own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)
    with pytest.raises(ValueError, match="a folder that others may write to cannot hold unpacked shards"):
        room.plain(packed / "0.tar.gz")
    own.rename(tmp_path / "elsewhere")
    own.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="cannot hold unpacked shards"):
        room.plain(packed / "0.tar.gz")
