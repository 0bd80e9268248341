"""InfoBatch in runs of methods: schedules, what is remembered of items, resuming, workers, two processes."""

import os
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import pytorch_lightning as pl
import torch
from contract import build, check_accumulation, check_resume, check_total
from processes import free_port
from shrinking import FINE_TUNING, ONE_PER_METHOD, ROOT, name_of, tuned
from test_host_waits import Waits
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from glpretrain.cli.training import Training
from glpretrain.data.infobatch import InfoBatch
from glpretrain.encoders import ViT
from glpretrain.weights import export

EPOCHS, ITEMS = 8, 24


def with_infobatch(settings: str = '{"delta": 0.75}') -> list[str]:
    return ["--data.order", '{"class_path": "glpretrain.data.infobatch.InfoBatch", "init_args": ' + settings + "}"]


class Seen(NamedTuple):
    """What a step was given, and what was remembered after it."""

    epoch: int
    index: list[int]
    weight: list[float]
    loss: float
    progress: float
    rate: float
    momentum: float
    kept_ratio: float


class Notes(pl.Callback):
    """Notes every step; saves after some of them, and stops after the last of these."""

    def __init__(self, *, folder: Path | None = None, cuts: Sequence[int] = ()) -> None:
        self.steps: list[Seen] = []
        self.lasts: list[Tensor] = []  # the losses that are remembered
        self._folder, self._cuts = folder, cuts
        self._progress = 0.0

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self._progress = module.progress()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        logged = {name: float(trainer.callback_metrics.get(f"schedule/{name}", -1.0)) for name in ("lr", "momentum", "kept_ratio")}
        loss = outputs["loss"].item()
        rest = (self._progress, logged["lr"], logged["momentum"], logged["kept_ratio"])
        self.steps.append(Seen(trainer.current_epoch, batch.index.tolist(), batch.weight.tolist(), loss, *rest))
        self.lasts.append(module.item_losses.last.clone())
        if trainer.global_step in self._cuts:
            trainer.save_checkpoint(self._folder / f"{trainer.global_step}.ckpt")
            trainer.should_stop = trainer.global_step == max(self._cuts)


def noted(recipe: Path, folder: Path, *arguments: str, cuts: Sequence[int] = (), epochs: int = EPOCHS) -> tuple[Training, Notes]:
    """A run of some epochs of 24 items, 4 a step, or until the last cut."""
    folder.mkdir(exist_ok=True)
    sizes = ["--trainer.max_steps", "-1", "--trainer.max_epochs", str(epochs), "--data.source.init_args.length", str(ITEMS)]
    training = build(recipe, folder, *sizes, "--data.num_workers", "0", *with_infobatch(), *arguments)
    notes = Notes(folder=folder, cuts=cuts)
    training.trainer.callbacks.append(notes)
    training.fit()
    return training, notes


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> tuple[Training, Notes]:
    return noted(ROOT / "dino.yaml", tmp_path_factory.mktemp("dino"))


def test_epochs_are_whole_then_shorter_then_whole_again(dino: tuple[Training, Notes]) -> None:
    lengths = [len(list(steps)) for _, steps in groupby(dino[1].steps, key=lambda step: step.epoch)]
    assert len(lengths) == EPOCHS and lengths[0] == lengths[6] == lengths[7] == 6
    assert all(3 <= length < 6 for length in lengths[1:6])
    for step in dino[1].steps:
        if step.epoch in (0, 6, 7):
            assert step.weight == [1.0] * 4
    assert {weight for step in dino[1].steps for weight in step.weight} == {1.0, 2.0}


def test_schedules_follow_the_share_of_items_that_are_seen_or_left_out_and_end_where_they_should(dino: tuple[Training, Notes]) -> None:
    training, notes = dino
    epochs = [list(steps) for _, steps in groupby(notes.steps, key=lambda step: step.epoch)]
    expected = [(number + place / len(steps)) / EPOCHS for number, steps in enumerate(epochs) for place in range(len(steps))]
    assert [step.progress for step in notes.steps] == pytest.approx(expected)
    assert all(earlier.progress < later.progress for earlier, later in pairwise(notes.steps))
    model = training.model
    assert [step.rate for step in notes.steps] == pytest.approx([model.optimization.lr(share) for share in expected], rel=1e-5)
    assert [step.momentum for step in notes.steps] == pytest.approx([model.momentum(share) for share in expected])
    assert expected[-1] == pytest.approx(1.0 - 1.0 / (6 * EPOCHS))


def test_what_is_remembered_of_an_item_is_its_last_loss_without_its_weight(dino: tuple[Training, Notes]) -> None:
    before = torch.full((ITEMS,), float("nan"))
    for step, last in zip(dino[1].steps, dino[1].lasts, strict=True):
        of_others = [index for index in range(ITEMS) if index not in step.index]
        torch.testing.assert_close(last[of_others], before[of_others], equal_nan=True, rtol=0.0, atol=0.0)
        assert (torch.tensor(step.weight) * last[step.index]).mean().item() == pytest.approx(step.loss, rel=1e-5)
        before = last


def test_items_of_low_loss_are_those_that_are_left_out_or_doubled(dino: tuple[Training, Notes]) -> None:
    pairs = list(zip(dino[1].steps, dino[1].lasts, strict=True))
    epochs = [list(of_epoch) for _, of_epoch in groupby(pairs, key=lambda pair: pair[0].epoch)]
    for earlier, seen in pairwise(epochs[:6]):
        _, before = earlier[-1]
        low = set((before.double() < before.double().mean()).nonzero().flatten().tolist())
        weights = {index: weight for step, _ in seen for index, weight in zip(step.index, step.weight, strict=True)}
        assert {index for index, weight in weights.items() if weight == 2.0} == low & weights.keys()
        assert len(low - weights.keys()) >= len(low) // 2


def test_the_share_of_items_is_logged(dino: tuple[Training, Notes]) -> None:
    for _, steps in groupby(dino[1].steps, key=lambda step: step.epoch):
        seen = list(steps)
        assert {round(step.kept_ratio, 5) for step in seen} == {round(len(seen) * 4 / ITEMS, 5)}
    order = dino[0].datamodule.order
    assert isinstance(order, InfoBatch) and order.said().startswith(f"epoch {EPOCHS}: {ITEMS} of {ITEMS} items (100.0%); ")


def test_the_score_is_the_sum_of_the_terms_with_a_number_per_item(tmp_path: Path) -> None:
    training, notes = noted(ROOT / "mmc.yaml", tmp_path, epochs=2)
    assert training.model.item_terms == ("inputs", "patch", "local", "contrast")
    check_total(training, loss=notes.steps[-1].loss)
    weighted = (torch.tensor(notes.steps[-1].weight) * notes.lasts[-1][notes.steps[-1].index]).mean().item()
    cosine = 0.1 * float(training.trainer.callback_metrics["train/cosine"])
    assert weighted == pytest.approx(notes.steps[-1].loss - cosine, rel=1e-5)
    said = training._summary()
    assert "InfoBatch: an item is compared by inputs, patch, local, contrast; patch, contrast compare it with its batch;" in said
    assert "cosine is one number for a batch, without weights\n" in said


@pytest.mark.parametrize("name", ["dino", pytest.param("mmc", marks=pytest.mark.slow)])
def test_a_run_that_is_resumed_in_an_epoch_or_between_two_goes_on_exactly(name: str, tmp_path: Path) -> None:
    _, whole = noted(ROOT / f"{name}.yaml", tmp_path / "whole", epochs=4)
    lengths = [len(list(steps)) for _, steps in groupby(whole.steps, key=lambda step: step.epoch)]
    cuts = (lengths[0] + 1, lengths[0] + lengths[1], sum(lengths[:2]) + 1)  # within, at the end, within the next
    assert lengths[1] < 6 and lengths[2] < 6
    noted(ROOT / f"{name}.yaml", tmp_path / "cut", epochs=4, cuts=cuts)
    for cut in cuts:
        _, rest = noted(ROOT / f"{name}.yaml", tmp_path / str(cut), "--ckpt_path", str(tmp_path / "cut" / f"{cut}.ckpt"), epochs=4)
        assert rest.steps == whole.steps[cut:]
        assert torch.equal(rest.lasts[-1], whole.lasts[-1])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ONE_PER_METHOD, ids=name_of)
def test_a_resumed_run_of_every_method_goes_on_with_the_same_losses(recipe: Path, tmp_path: Path) -> None:
    """Of four steps, two are an epoch of all items; the third, after which the run is cut, is in an epoch without some."""
    check_resume(recipe, tmp_path, *with_infobatch('{"delta": 1.0}'), "--data.source.init_args.length", "8", cut=3)


@pytest.mark.slow
def test_two_micro_batches_are_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_accumulation(ROOT / "dino.yaml", tmp_path, monkeypatch, *with_infobatch())


@pytest.mark.slow
def test_workers_that_read_ahead_give_the_same_run(tmp_path: Path, dino: tuple[Training, Notes]) -> None:
    """They live from epoch to epoch, and are asked for an epoch only when the losses of the one before are known."""
    _, notes = noted(ROOT / "dino.yaml", tmp_path, "--data.num_workers", "2", "--data.cache", "false")
    assert notes.steps == dino[1].steps


def _process(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "infobatch"}  # as torchrun sets them
    options = ("--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.batch_size", "2")
    _, notes = noted(ROOT / "dino.yaml", folder / str(rank), *options, epochs=4)
    torch.save(([tuple(step) for step in notes.steps], notes.lasts), folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_leave_out_and_weigh_what_one_does(tmp_path: Path) -> None:
    spawn(_process, args=(tmp_path, free_port()), nprocs=2)
    (first, first_lasts), (second, second_lasts) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    _, one = noted(ROOT / "dino.yaml", tmp_path / "one", epochs=4)
    assert len(first) == len(one.steps)
    for step, of_first, of_second in zip(one.steps, map(Seen._make, first), map(Seen._make, second), strict=True):
        assert of_first.index + of_second.index == step.index and of_first.weight + of_second.weight == step.weight
        assert of_first.progress == of_second.progress == step.progress and of_first.kept_ratio == step.kept_ratio
    for last, own, other in zip(one.lasts, first_lasts, second_lasts, strict=True):
        torch.testing.assert_close(own, other, equal_nan=True, rtol=0.0, atol=0.0)
        torch.testing.assert_close(own, last, equal_nan=True, rtol=1e-4, atol=1e-5)  # float32 sums in another order


@pytest.mark.slow
def test_fine_tuning_takes_it_too(tmp_path: Path) -> None:
    (recipe,) = (path for path in FINE_TUNING if path.stem == "classification")
    export(ViT("vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=24, depth=2, num_heads=3), tmp_path / "backbone")
    tuning = tuned(recipe, tmp_path / "backbone", tmp_path)
    tuning.datamodule.order = InfoBatch()
    tuning.fit()
    assert int((~tuning.model.item_losses.last.isnan()).sum()) == 8  # two steps of four


def test_the_host_waits_for_no_device(dino: tuple[Training, Notes]) -> None:
    training, _ = dino
    losses, index = training.model.item_losses, torch.tensor([3, 1])
    with Waits() as waits:
        losses.update(index, terms={"cls": torch.ones(2)}, weights={"cls": 1.0})
        losses.advance()
        training.datamodule._batches.weights_of(index)
    assert not +waits.found


def test_a_run_without_it_remembers_no_losses(tmp_path: Path) -> None:
    training = build(ROOT / "mae.yaml", tmp_path, "--trainer.max_steps", "1")
    training.fit()
    assert training.model.item_losses is None and not any("item_losses" in name for name in training.model.state_dict())
