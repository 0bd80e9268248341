"""DataModule: order, resumption, unreadable files, and the batch that it makes."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from glpretrain.core.batch import PARTS, Batch, Uses
from glpretrain.core.types import EncoderCard
from glpretrain.data import Item, Scenes, Source, UnreadableItemError
from glpretrain.data.module import DataModule
from glpretrain.data.orders import EpochBatches, Shuffled
from glpretrain.data.views import MultiCrop, ViewSpec
from glpretrain.masking import GroupCorruption, RandomMask

PATCH = 4


class Ramp(Source):
    """Items made from a formula; those in `broken` cannot be read."""

    name = "ramp"
    classes = ()
    has_masks = False

    def __init__(self, length: int, *, broken: Sequence[int] = (), channels: int = 3, regions: bool = False) -> None:
        self.length, self.broken, self.channels, self.regions = length, set(broken), channels, regions

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        if index in self.broken:
            raise UnreadableItemError(f"ramp/{index}.jpg: truncated")
        wave = torch.sin(torch.arange(self.channels * 20 * 30) * 0.01 + index)
        image = (wave * 127 + 128).to(torch.uint8).view(self.channels, 20, 30)
        regions = (torch.arange(30) // 15).expand(20, 30) if self.regions else None
        return Item(values=image, label=-1, instances=None, regions=regions)


class FakeEncoder(nn.Module):
    """As much of an encoder as the data needs to know."""

    card = EncoderCard("fake", {}, "image", (3, 16, 16), (PATCH, PATCH), 5, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

    def grid(self, item_shape: Sequence[int]) -> tuple[int, int]:
        _, height, width = item_shape
        if height % PATCH or width % PATCH:
            raise ValueError(f"view of {height} x {width} does not divide by patch {PATCH}")
        return height // PATCH, width // PATCH


class Recorder(pl.LightningModule):
    """Keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = FakeEncoder()
        self.uses = {"global": Uses(takes=PARTS), "local": Uses(required=False)}
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[list[int], float]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append((batch.index.tolist(), float(batch.views["global"].items.sum())))
        return self.weight * 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def views(size: int = 16, *, local: bool = False) -> MultiCrop:
    local_views = [ViewSpec(size=8, scale=(0.05, 0.3), count=3)] if local else None
    return MultiCrop([ViewSpec(size=size, scale=(0.3, 1.0), count=2)], local_views)


def made(data: DataModule, indices: Sequence[int], *, epoch: int) -> Batch:
    encoder = FakeEncoder()
    return data.make_batch(data.raw_batch(indices, encoder=encoder, epoch=epoch), encoder=encoder)


def trainer(folder: Path, **arguments) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **({"enable_checkpointing": False} | arguments),
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_see_the_batches_of_one(world_size: int) -> None:
    whole = EpochBatches(Shuffled(), length=47, batch_size=2 * world_size, rank=0, world_size=1, seed=5)
    parts = [EpochBatches(Shuffled(), length=47, batch_size=2, rank=rank, world_size=world_size, seed=5) for rank in range(world_size)]
    for order in (whole, *parts):
        order.set_epoch(3)
    joined = [list(chain(*(asked.indices for asked in batches))) for batches in zip(*parts, strict=True)]
    assert joined == [asked.indices for asked in whole]
    assert len(joined) == len(whole) == 47 // (2 * world_size)


def test_each_epoch_has_its_own_order_of_all_items() -> None:
    order = EpochBatches(Shuffled(), length=21, batch_size=7, rank=0, world_size=1, seed=0)
    epochs = []
    for epoch in range(2):
        order.set_epoch(epoch)
        epochs.append(list(chain(*(asked.indices for asked in order))))
        assert {asked.epoch for asked in order} == {epoch}
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(21))
    assert epochs[0] != epochs[1]


def test_too_few_items_are_refused_by_their_numbers() -> None:
    with pytest.raises(ValueError, match="5 items, fewer than one batch of 6"):
        EpochBatches(Shuffled(), length=5, batch_size=3, rank=0, world_size=2, seed=0)


def test_a_batch_has_the_documented_shapes() -> None:
    data = DataModule(
        Ramp(11, regions=True), views(local=True), batch_size=3, mask=RandomMask(0.5), corruption=GroupCorruption(0.4, max_side=0.5)
    )
    batch = made(data, [7, 2, 5], epoch=0)
    assert batch.views["global"].items.shape == (2, 3, 3, 16, 16)
    assert batch.views["local"].items.shape == (3, 3, 3, 8, 8)
    assert batch.views["global"].mask.shape == (2, 3, 16) and batch.views["global"].mask.dtype == torch.bool
    assert batch.views["global"].corrupted.shape == (2, 3, 3, 16, 16)
    assert batch.views["global"].corruption.shape == (2, 3, 16, 16)
    assert batch.views["global"].frame.shape == (2, 3, 2, 3) and batch.views["local"].frame.shape == (3, 3, 2, 3)
    assert batch.weight.tolist() == [1.0, 1.0, 1.0]
    assert batch.index.tolist() == [7, 2, 5]
    assert not torch.equal(batch.views["global"].mask[0], batch.views["global"].mask[1])


def test_an_item_gets_the_same_views_in_any_batch() -> None:
    data = DataModule(Ramp(11), views(), batch_size=3, mask=RandomMask(0.5))
    many = made(data, [7, 2, 5], epoch=1)
    one = made(data, [5], epoch=1)
    torch.testing.assert_close(
        many.views["global"].items[:, 2:], one.views["global"].items, rtol=0, atol=1e-5
    )  # batched sums may differ by rounding
    assert torch.equal(many.views["global"].mask[:, 2:], one.views["global"].mask)
    other = made(data, [5], epoch=2)
    assert not torch.equal(one.views["global"].frame, other.views["global"].frame)


# The end of an epoch is the hard case with workers, which fetch the next epoch before Lightning has counted the last.
def test_every_epoch_has_views_of_its_own(tmp_path: Path) -> None:
    data, model, seen = DataModule(Ramp(5), views(), batch_size=5), Recorder(), list[Batch]()
    model.on_train_batch_start = lambda batch, batch_idx: seen.append(batch)
    trainer(tmp_path, max_epochs=2).fit(model, datamodule=data)
    for epoch, batch in enumerate(seen):
        expected = made(data, batch.index.tolist(), epoch=epoch)
        assert torch.equal(batch.views["global"].items, expected.views["global"].items)
    first, second = (batch.views["global"].items[:, batch.index.argsort()] for batch in seen)
    assert not any(torch.equal(before, after) for before, after in zip(first.unbind(1), second.unbind(1), strict=True))


@pytest.mark.parametrize(("steps", "num_workers"), [(3, 0), (7, 0), (10, 0), (7, 1)])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(tmp_path: Path, steps: int, num_workers: int) -> None:
    def data() -> DataModule:
        return DataModule(Ramp(23), views(), batch_size=3, cache=False, num_workers=num_workers)  # 7 batches an epoch

    whole = Recorder()
    trainer(tmp_path, max_steps=17).fit(whole, datamodule=data())
    assert len(whole.seen) == 17

    first = Recorder()
    saver = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=steps)
    trainer(tmp_path, max_steps=steps, callbacks=[saver], enable_checkpointing=True).fit(first, datamodule=data())
    second = Recorder()
    trainer(tmp_path, max_steps=17).fit(second, datamodule=data(), ckpt_path=tmp_path / f"step={steps}.ckpt")
    assert first.seen + second.seen == whole.seen


def test_a_run_resumed_from_the_end_of_an_epoch_goes_on(tmp_path: Path) -> None:
    def data() -> DataModule:
        return DataModule(Ramp(23), views(), batch_size=3)

    whole, first, second = Recorder(), Recorder(), Recorder()
    trainer(tmp_path, max_epochs=3).fit(whole, datamodule=data())
    saver = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="end", save_on_train_epoch_end=True)
    trainer(tmp_path, max_epochs=1, callbacks=[saver], enable_checkpointing=True).fit(first, datamodule=data())
    trainer(tmp_path, max_epochs=3).fit(second, datamodule=data(), ckpt_path=tmp_path / "end.ckpt")
    assert first.seen + second.seen == whole.seen


def test_resuming_with_another_batch_size_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2)
    run.fit(Recorder(), datamodule=DataModule(Ramp(23), views(), batch_size=3))
    run.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match="global_batch_size = 3, this one has 4"):
        trainer(tmp_path, max_steps=4).fit(
            Recorder(), datamodule=DataModule(Ramp(23), views(), batch_size=4), ckpt_path=tmp_path / "two.ckpt"
        )


@pytest.mark.parametrize(("cache", "num_workers"), [(True, 0), (True, 2), (False, 0), (False, 1), (False, 2)])
def test_an_unreadable_file_is_replaced_and_listed(tmp_path: Path, cache: bool, num_workers: int) -> None:
    model = Recorder()
    data = DataModule(Ramp(21, broken=[4, 5]), views(), batch_size=3, cache=cache, num_workers=num_workers)
    trainer(tmp_path, max_epochs=1).fit(model, datamodule=data)
    seen = list(chain(*(index for index, _ in model.seen)))
    assert len(seen) == 21 and not {4, 5} & set(seen) and seen.count(6) == 3
    listed = (tmp_path / "unreadable.txt").read_text().splitlines()
    assert sorted(listed) == ["ramp/4.jpg: truncated", "ramp/5.jpg: truncated"]


def test_too_many_unreadable_files_stop_the_run(tmp_path: Path) -> None:
    data = DataModule(Ramp(210, broken=range(0, 60, 2)), views(), batch_size=3)
    with pytest.raises(ValueError, match="30 of 210 items cannot be read, more than max_unreadable"):
        trainer(tmp_path, max_epochs=1).fit(Recorder(), datamodule=data)


def test_a_view_that_does_not_divide_by_the_patch_fails_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="18 x 18 does not divide by patch 4"):
        trainer(tmp_path, max_epochs=1).fit(Recorder(), datamodule=DataModule(Ramp(21), views(18), batch_size=3))


def test_sources_for_evaluation_follow_the_documented_order() -> None:
    scenes = DataModule(Scenes(40, size=16), views(), batch_size=3)
    train, test = scenes.labelled_sources()
    assert (train.split, test.split) == ("train", "test")
    assert scenes.masked_source().split == "test"
    unlabelled = DataModule(Ramp(11), views(), batch_size=3)
    assert [part.name for part in unlabelled.labelled_sources()] == ["scenes", "scenes"]
    assert unlabelled.masked_source().name == "scenes"
    labelled = Ramp(101)
    labelled.classes = ("a", "b")
    train, test = DataModule(Ramp(11), views(), batch_size=3, labelled=labelled).labelled_sources()
    assert len(train) + len(test) == 101 and not set(train.indices) & set(test.indices)
    with pytest.raises(ValueError, match="4 channels and scenes has 3"):
        DataModule(Ramp(11, channels=4), views(), batch_size=3).masked_source()


def test_bad_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="max_unreadable is a share in \\[0, 1\\], not 3"):
        DataModule(Ramp(11), views(), batch_size=3, max_unreadable=3)
    with pytest.raises(ValueError, match="masked is 'ramp', which has no masks"):
        DataModule(Ramp(11), views(), batch_size=3, masked=Ramp(3))
