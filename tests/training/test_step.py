"""A step is all or nothing: what a loss or a gradient that is not finite may move, which is nothing, and how such a step is replayed."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from batches import Given, Optimized, Recorder, batch_of, fitted, method, views_of
from torch import Tensor, nn

from glpretrain.cli import main
from glpretrain.cli.pretraining import fit
from glpretrain.cli.replay import replayed
from glpretrain.core.batch import Batch
from glpretrain.encoders import ViT
from glpretrain.methods import DINO, LocalContrast
from glpretrain.methods.base import Method

CROPS = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(2, 3, 4)
NAN = float("nan")


class Normed(ViT):
    """A ViT whose items go through a batch norm with running statistics, which a forward pass moves."""

    def __init__(self) -> None:
        super().__init__("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=3)
        self.statistics = nn.BatchNorm2d(3)

    def forward(self, items, **kwargs):
        lists = isinstance(items, list)
        normed = [self.statistics(one) for one in (items if lists else [items])]
        return super().forward(normed if lists else normed[0], **kwargs)


def dino(optimized: Optimized | None = None) -> DINO:
    return method(DINO, Normed(), optimized, num_prototypes=7, hidden_dim=11, bottleneck_dim=5)


def contrast(optimized: Optimized | None = None) -> LocalContrast:
    return method(LocalContrast, Normed(), optimized, hidden_dim=11, projection_dim=5)


def batches(count: int) -> list[Batch]:
    return [batch_of(global_views=views_of("g", 2, step=step), crops=CROPS) for step in range(count)]


class Faulty(pl.Callback):
    """Makes one number of one gradient, or of one view, NaN in the steps that are named."""

    def __init__(self, steps: tuple[int, ...], *, where: str) -> None:
        self.steps, self.where = steps, where

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        if self.where == "view" and trainer.global_step in self.steps:
            batch.views["global"].items[0, 0, 0, 0, 0] = NAN

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.where == "gradient" and trainer.global_step in self.steps:
            gradient = next(parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None)
            gradient.view(-1)[0] = NAN


@pytest.mark.parametrize("where", ["gradient", "view"])
@pytest.mark.parametrize("make", [dino, contrast])
def test_a_step_with_a_number_that_is_not_finite_moves_nothing(make: Callable[[], Method], where: str) -> None:
    model = make()
    seen = fitted(model, batches(3), callbacks=[Faulty((1,), where=where)])
    first, second, third = seen.states
    assert all(torch.equal(value, first[name]) for name, value in second.items() if not name.endswith("place"))
    moved = {name for name, value in third.items() if not torch.equal(value, second[name])}
    assert any(name.startswith("student.encoder.") for name in moved)
    assert all(bool(torch.isfinite(value).all()) for value in third.values())
    assert model.step.num_refused == 1


def test_the_steps_after_a_refused_one_are_those_of_a_run_without_it() -> None:
    """Momenta of the optimizer, centre and batch statistics too: with constant rates, leaving the batch out gives the same weights."""
    torch.manual_seed(0)
    refused = dino()
    fitted(refused, batches(3), callbacks=[Faulty((1,), where="gradient")])
    torch.manual_seed(0)
    without = dino()
    seen = fitted(without, [batches(3)[0], batches(3)[2]])
    names = [name for name in seen.states[-1] if name.startswith("student.")]
    state = refused.state_dict()
    assert names and all(torch.equal(state[name], seen.states[-1][name]) for name in names)


def test_one_micro_batch_that_is_not_finite_costs_its_whole_step() -> None:
    model, recorder = dino(), Recorder()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    class Second(Faulty):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
            if batch_idx == 1:
                super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, accumulate_grad_batches=2, callbacks=[Second((0,), where="view"), recorder], **options
    )
    trainer.fit(model, Given(batches(2)))
    assert model.step.reason.startswith("step 1: the loss is not finite (cls = nan)")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_run_stops_after_too_many_refused_steps_in_a_row_and_only_then() -> None:
    model = dino(Optimized(max_refused=1))
    fitted(model, batches(5), callbacks=[Faulty((0, 2, 4), where="gradient")])
    assert model.step.num_refused == 3
    with pytest.raises(ValueError, match=r"step 3: 1 of \d+ gradients are not finite.*step 2 in a row that moved nothing, more than"):
        fitted(dino(Optimized(max_refused=1)), batches(5), callbacks=[Faulty((1, 2), where="gradient")])


def test_a_step_that_was_interrupted_half_way_is_in_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dino()
    assert model.teacher is not None

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.teacher, "update", stop)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fitted(model, batches(1))
    with pytest.raises(ValueError, match="was interrupted half way; the checkpoint before it is kept"):
        model.on_save_checkpoint({})


SMALL = [
    *(
        "--evaluate",
        "false",
        "--report",
        "false",
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.accelerator",
        "cpu",
        "--data.num_workers",
        "0",
    ),
    *("--data.batch_size", "4", "--data.source.init_args.length", "16", "--model.init_args.num_prototypes", "16"),
]
TOO_FAST = ["--model.init_args.optimization.lr.base", "1e30", "--model.init_args.optimization.lr.warmup", "0"]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_refused_step_is_kept_and_computed_again_bit_for_bit(
    accumulated: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--trainer.accumulate_grad_batches", str(accumulated), *SMALL, *TOO_FAST]
    run = fit("dino", max_steps=2, runs=tmp_path, overrides=more)
    assert json.loads((run.folder / "results.json").read_text())["refused_steps"] == 1
    (bundle,) = (run.folder / "refused").iterdir()
    capsys.readouterr()
    assert main(["replay", str(bundle)]) == 0
    text = capsys.readouterr().out
    assert "in the run: step 2: the loss is not finite" in text and "bit for bit the terms of the run" in text
    assert f"micro-batch {accumulated} of {accumulated}" in text and "forward in teacher.branch.encoder." in text


def test_replay_refuses_what_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 no archive")
    torch.save({"format": 0}, tmp_path / "other.pt")
    for name, reason in (("damaged.pt", "cannot be read"), ("other.pt", "is no bundle"), ("none.pt", "cannot be read")):
        assert main(["replay", str(tmp_path / name)]) == 2
        assert reason in capsys.readouterr().err


class Root(nn.Module):
    """A root at zero: a finite value with an infinite slope."""

    def forward(self, values: Tensor) -> Tensor:
        return (values - values.detach()).sqrt()


def test_replay_names_the_module_where_a_gradient_stops_being_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dino()
    model.student.heads["root"] = Root()
    losses = model.losses

    def rooted(batch: Batch, progress: float) -> dict[str, Tensor]:
        terms = losses(batch, progress)
        return {"cls": terms["cls"] + model.student.heads["root"](terms["cls"])}

    monkeypatch.setattr(model, "losses", rooted)
    batch = batches(1)[0]
    value = {name: term.detach() for name, term in model.averaged(model.losses(batch, 0.0), batch).items()}
    content = {
        "state": {**model.state_dict(), "item_losses.last": torch.zeros(3)},  # what an order remembers is part of no step
        "batches": [{"index": batch.index, "weight": batch.weight, "views": {"global": {"items": batch.views["global"].items}}}],
        "terms": [value],
        "progress": 0.0,
        "random_state": torch.get_rng_state(),
        "precision": "32-true",
        "loss_scale": 1.0,
    }
    result = replayed(model, content)
    assert result.same and math.isfinite(result.terms[0]["cls"])
    assert result.where == "backward in student.heads.root (Root), from gradients that came into it finite"
