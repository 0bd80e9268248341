"""What every method owes, checked on a recipe: small enough for a test, built by the same code as a real run."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from shrinking import shrunk

from glpretrain.cli.training import Training
from glpretrain.core.batch import Batch
from glpretrain.methods.base import Method
from glpretrain.training.memory import states_of
from glpretrain.weights import export, load_backbone


def build(recipe: Path, folder: Path, *arguments: str) -> Training:
    """The shrunk recipe, ready to fit four steps within an epoch."""
    options = [
        "--trainer.logger",
        "false",
        "--evaluate",
        "false",
        "--report",
        "false",
        "--runs",
        str(folder / "runs"),
        "--trainer.enable_progress_bar",
        "false",
    ]
    size = ["--trainer.max_steps", "4", "--data.source.init_args.length", "32"]
    return Training(["--config", str(shrunk(recipe, folder)), *options, *size, *arguments])


def fixed_batch(training: Training, *, count: int = 4, epoch: int = 0) -> Batch:
    """A batch of the recipe's own data."""
    data, encoder = training.datamodule, training.model.encoder
    return data.make_batch(data.raw_batch(range(count), encoder=encoder, epoch=epoch), encoder=encoder)


def share(batch: Batch, number: int, count: int) -> Batch:
    """One of `count` contiguous parts of the items."""
    rows = torch.arange(len(batch.index)).chunk(count)[number]
    views = {name: group.of_items(rows) for name, group in batch.views.items()}
    return Batch(index=batch.index.chunk(count)[number], views=views, weight=batch.weight.chunk(count)[number])


def terms_of(model: Method, batch: Batch, *, progress: float = 0.5) -> dict[str, torch.Tensor]:
    """The terms of a step, as the base gets them."""
    model.begin_step(progress)
    return model(batch, progress)


class Losses(pl.Callback):
    """Notes the loss of every micro-batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.values.append(outputs["loss"].item())


def check_terms(model: Method, batch: Batch) -> None:
    """Finite float32 numbers, one per item or, where the method says so, one in all; named in the weights; the same for the same batch."""
    first, second = terms_of(model, batch), terms_of(model, batch)
    assert set(first) == set(model.weights_at(0.5))
    assert {name for name, value in first.items() if value.ndim == 0} == set(model.joint) <= set(model.in_batch)
    assert set(model.item_terms) | set(model.joint) == set(model.weights_at(1.0)) and not set(model.item_terms) & set(model.joint)
    for name, value in first.items():
        assert value.shape in ((), (len(batch.index),)) and value.dtype == torch.float32 and torch.isfinite(value).all(), (name, value)
        assert torch.equal(value, second[name]), name


def check_gradients(model: Method, batch: Batch) -> None:
    """Every trainable parameter of the student has one, none of the teacher's."""
    sum(value.mean() for value in terms_of(model, batch).values()).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("teacher."):
            assert not parameter.requires_grad and parameter.grad is None, name
        elif parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    model.zero_grad(set_to_none=True)


def check_items(model: Method, batch: Batch) -> None:
    """In another order of the items, their terms are in this order; a term of one number does not depend on the order."""
    order = torch.arange(len(batch.index)).roll(1)
    views = {name: group.of_items(order) for name, group in batch.views.items()}
    mixed = terms_of(model, Batch(index=batch.index[order], views=views, weight=batch.weight[order]))
    for name, value in terms_of(model, batch).items():
        if value.ndim == 1:
            assert value.std() > 1e-6, f"{name}: all items have the same number"
            value = value[order]
        torch.testing.assert_close(mixed[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def check_overfits(model: Method, batch: Batch) -> None:
    """Thirty steps on one batch lower the total. A teacher that moves away moves the target, so it stays where it is."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    totals = []
    for _ in range(30):
        total = model.total(model.averaged(terms_of(model, batch), batch), 0.5)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.95 * totals[0], totals


def check_resume(recipe: Path, folder: Path, *arguments: str, cut: int = 2) -> None:
    """A run that was cut after two (or `cut`) of four steps goes on with the same losses."""
    whole, first, rest = Losses(), Losses(), Losses()
    training = build(recipe, folder, *arguments)
    training.trainer.callbacks.append(whole)
    training.fit()
    training = build(recipe, folder, *arguments)
    training.trainer.callbacks.append(first)
    training.trainer.fit_loop.epoch_loop.max_steps = 4  # the schedules end where the whole run's do

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            if trainer.global_step == cut:
                trainer.save_checkpoint(folder / "cut.ckpt")
                trainer.should_stop = True

    training.trainer.callbacks.append(Stop())
    training.fit()
    training = build(recipe, folder, *arguments, "--ckpt_path", str(folder / "cut.ckpt"))
    training.trainer.callbacks.append(rest)
    training.fit()
    assert len(whole.values) == 4 and first.values[:cut] == whole.values[:cut]
    assert rest.values == whole.values[cut:], (rest.values, whole.values)


def check_export(training: Training, folder: Path) -> None:
    """What is loaded from the export of a checkpoint gives the features of the trained backbone, bit for bit."""
    run = training.fit()
    export(load_backbone(run.folder / "checkpoints" / "last.ckpt"), folder / "exported")
    items = fixed_batch(training).views["global"].items[0]
    expected = training.model.backbone().eval()(items)
    for place in (run.folder / "backbone", folder / "exported"):
        loaded = load_backbone(place)(items)
        assert torch.equal(loaded.cls, expected.cls) and torch.equal(loaded.patches, expected.patches)


def check_total(training: Training, *, loss: float, progress: float = 0.0) -> None:
    """What was trained on last is the sum of the terms that are logged, each times its weight, and is what is logged as the loss."""
    logged, weights = training.trainer.callback_metrics, training.model.weights_at(progress)
    total = sum(weight * float(logged[f"train/{name}"]) for name, weight in weights.items())
    assert loss == pytest.approx(total, rel=1e-5) and float(logged["train/loss"]) == pytest.approx(loss, rel=1e-6)


def check_accumulation(recipe: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Over four micro-batches of two each, teacher and states move twice."""
    training = build(recipe, folder, "--trainer.accumulate_grad_batches", "2", "--trainer.max_steps", "2", *arguments)
    model, moves = training.model, []
    states = states_of(model)
    for key, state in enumerate(states):
        monkeypatch.setattr(state, "advance", lambda progress, move=state.advance, key=key: (moves.append(key), move(progress)))
    if model.teacher is not None:
        update = model.teacher.update
        monkeypatch.setattr(model.teacher, "update", lambda *args, **kwargs: (moves.append("teacher"), update(*args, **kwargs)))
    losses = Losses()
    training.trainer.callbacks.append(losses)
    model.weights = {name: 0.5 + number for number, name in enumerate(model.weights)}  # all different, none of them 1
    training.fit()
    assert len(losses.values) == 4
    check_total(training, loss=2 * losses.values[-1], progress=0.5)  # Lightning divides by how many are accumulated
    expected = [*range(len(states))] + ["teacher"] * (model.teacher is not None)
    assert sorted(map(str, moves)) == sorted(map(str, expected * 2))
