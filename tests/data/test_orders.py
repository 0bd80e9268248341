"""Orders whose epochs differ in length, weigh their items and remember something: what a run and a resumed run see of them."""

from itertools import chain
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from test_module import Ramp, Recorder, trainer, views
from torch import Tensor

from glpretrain.core.batch import Batch
from glpretrain.data.module import DataModule
from glpretrain.data.orders import Epoch, EpochBatches, Order, Shuffled


class Changing(Order):
    """Epochs of 21, 9 and 15 items, from an item on that moves with every epoch; every odd item counts twice."""

    start: Tensor
    LENGTHS = (21, 9, 15)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("start", torch.zeros((), dtype=torch.int64))

    def epoch(self, number: int, *, length: int, seed: int, progress: float) -> Epoch:
        self.start.fill_(5 * number)
        indices = (torch.arange(self.LENGTHS[number % 3]) + self.start) % length
        return Epoch(indices, weights=1.0 + (indices % 2))


class Weighed(Recorder):
    """Notes progress, dataset indices and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.uses = dict(self.uses)
        self.batches: list[tuple[list[int], list[float]]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.batches.append((batch.index.tolist(), batch.weight.tolist()))
        return super().training_step(batch, batch_idx)


def data(**arguments) -> DataModule:
    return DataModule(Ramp(23), views(), batch_size=3, order=Changing(), **arguments)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_epoch_has_its_own_length_and_items_their_weights(num_workers: int, tmp_path: Path) -> None:
    model = Weighed()
    run = trainer(tmp_path, max_epochs=4)
    run.fit(model, datamodule=data(cache=False, num_workers=num_workers))
    assert run.global_step == 7 + 3 + 5 + 7
    seen = [index for index, _ in model.batches]
    assert list(chain(*seen[7:10])) == [(number + 5) % 23 for number in range(9)]
    assert list(chain(*seen[10:15])) == [(number + 10) % 23 for number in range(15)]
    assert all(weight == 1.0 + index % 2 for indices, weights in model.batches for index, weight in zip(indices, weights, strict=True))


@pytest.mark.parametrize("steps", [3, 7, 8, 10, 15])
def test_a_resumed_run_goes_on_through_epochs_of_other_lengths(steps: int, tmp_path: Path) -> None:
    whole, first, second = Weighed(), Weighed(), Weighed()
    trainer(tmp_path, max_steps=20).fit(whole, datamodule=data())
    saver = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=steps)
    trainer(tmp_path, max_steps=steps, callbacks=[saver], enable_checkpointing=True).fit(first, datamodule=data())
    resumed = data()
    trainer(tmp_path, max_steps=20).fit(second, datamodule=resumed, ckpt_path=tmp_path / f"step={steps}.ckpt")
    assert first.batches + second.batches == whole.batches
    assert first.seen + second.seen == whole.seen


def test_what_an_order_remembers_is_in_the_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=9)
    run.fit(Weighed(), datamodule=data())
    run.save_checkpoint(tmp_path / "nine.ckpt")
    state = torch.load(tmp_path / "nine.ckpt", weights_only=False)["DataModule"]
    assert state["epoch"] == 1 and state["batches_done"] == 2 and int(state["order"]["start"]) == 5


def test_items_that_an_epoch_does_not_hold_weigh_nothing() -> None:
    batches = EpochBatches(Changing(), length=23, batch_size=3, rank=0, world_size=1, seed=0)
    batches.set_epoch(1)  # items 5 to 13
    assert batches.weights_of(torch.tensor([4, 5, 6, 13, 14])).tolist() == [0.0, 2.0, 1.0, 2.0, 0.0]
    plain = EpochBatches(Shuffled(), length=23, batch_size=3, rank=0, world_size=1, seed=0)
    plain.set_epoch(0)
    assert plain.weights_of(torch.tensor([4, 5])).tolist() == [1.0, 1.0]


def test_a_resumed_run_makes_the_order_of_its_epoch_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of ten million items take a second each."""
    saver = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="middle", every_n_train_steps=17)
    run = trainer(tmp_path, max_steps=17, callbacks=[saver], enable_checkpointing=True)
    run.fit(Recorder(), datamodule=DataModule(Ramp(23), views(), batch_size=3, num_workers=0))
    made: list[int] = []
    plan = Shuffled.epoch
    monkeypatch.setattr(Shuffled, "epoch", lambda self, number, **of: made.append(number) or plan(self, number, **of))
    resumed = Recorder()
    trainer(tmp_path, max_steps=20).fit(
        resumed,
        datamodule=DataModule(Ramp(23), views(), batch_size=3, num_workers=0),
        ckpt_path=tmp_path / "middle.ckpt",
    )
    assert made == [2] and len(resumed.seen) == 3
