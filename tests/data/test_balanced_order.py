"""Batches with as many items of each class, or of each folder, for one process and for two."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from glpretrain.data import ImageFolder, Subset
from glpretrain.data.orders import Balanced, EpochBatches

SIZES = {"blue": 5, "green": 8, "red": 7}


def pictures(folder: Path, *, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (4, 4)).save(folder / f"{number}.png")


def folder(root: Path) -> ImageFolder:
    """Three classes of 5, 8 and 7 pictures."""
    for name, count in SIZES.items():
        pictures(root / name, count=count)
    return ImageFolder(root)


def begun(source: ImageFolder | Subset, **settings: str) -> Balanced:
    order = Balanced(**settings)  # type: ignore[arg-type]
    order.begin(source)
    return order


def indices(order: Balanced, number: int, *, length: int, seed: int = 0) -> list[int]:
    return order.epoch(number, length=length, seed=seed, progress=0.0).indices.tolist()


@pytest.mark.parametrize("by", ["class", "folder"])
def test_every_batch_has_as_many_of_each_group_and_an_epoch_repeats_none(by: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "set")
    order = begun(source, by=by)
    assert order.fewest(20) == 15
    seen: set[int] = set()
    for number in range(12):
        epoch = indices(order, number, length=20)
        assert len(set(epoch)) == len(epoch) == 15
        labels = [source.label_of(index) for index in epoch]
        assert all(sorted(labels[start : start + 3]) == [0, 1, 2] for start in range(0, 15, 3))
        seen |= set(epoch)
    assert seen == set(range(20))
    assert indices(order, 3, length=20) == indices(begun(source, by=by), 3, length=20)  # nothing is remembered
    assert indices(order, 3, length=20) != indices(order, 4, length=20) != indices(order, 4, length=20, seed=1)


def test_two_processes_share_the_batches_of_one(tmp_path: Path) -> None:
    source = folder(tmp_path / "set")
    batches = [
        [asked.indices for asked in EpochBatches(begun(source), length=20, batch_size=size, rank=rank, world_size=world, seed=0)]
        for rank, world, size in ((0, 1, 6), (0, 2, 3), (1, 2, 3))
    ]
    assert [left + right for left, right in zip(*batches[1:], strict=True)] == batches[0] and len(batches[0]) == 2
    assert all(sorted(source.label_of(index) for index in part) == [0, 1, 2] for part in batches[1])


def test_folders_below_a_class_are_groups_of_their_own(tmp_path: Path) -> None:
    for name in ("real/oulu", "real/casia", "attack/oulu", "attack/casia"):
        pictures(tmp_path / "set" / name, count=3)
    source = ImageFolder(tmp_path / "set")
    epoch = indices(begun(source, by="folder"), 0, length=12)
    folders = [source.named(index).rpartition("/")[0] for index in epoch]
    assert source.classes == ["attack", "real"] and len(epoch) == 12
    assert all(len(set(folders[start : start + 4])) == 4 for start in range(0, 12, 4))


def test_what_has_no_groups_is_refused(tmp_path: Path) -> None:
    source = folder(tmp_path / "set")
    with pytest.raises(ValueError, match="has one class, 'blue'; expected two or more"):
        begun(Subset(source, indices=torch.arange(5).numpy()))
    with pytest.raises(ValueError, match="Balanced: by is 'set'"):
        Balanced(by="set")  # type: ignore[arg-type]
    pictures(tmp_path / "flat", count=2)
    with pytest.raises(ValueError, match="has no class; give by: folder, or classes"):
        begun(ImageFolder(tmp_path / "flat"))
