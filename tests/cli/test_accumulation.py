"""Accumulated batches are one step, whatever the length of an epoch, and whatever stops the run in the middle of a step."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from shrinking import QUIET, ROOT, shrunk
from torch import Tensor

from glpretrain.cli.training import Training


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def training(recipe: str, *options: str, batch_size: int = 4, items: int = 24) -> Training:
    sizes = ["--data.source.init_args.length", str(items), "--data.batch_size", str(batch_size)]
    return Training(["--config", str(shrunk(ROOT / f"{recipe}.yaml", Path.cwd())), *QUIET, *sizes, *options])


def accumulating(count: int, steps: int) -> list[str]:
    return ["--trainer.accumulate_grad_batches", str(count), "--trainer.max_steps", str(steps)]


class Seen(pl.Callback):
    """Which items every step was made of, and a stop in the middle of one."""

    def __init__(self, *, stop_at: int | None = None, inside: bool = False) -> None:
        self.steps: dict[int, list[int]] = {}
        self.batches, self.stop_at, self.inside = 0, stop_at, inside

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.steps.setdefault(trainer.global_step, []).extend(batch.index.tolist())

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if self.inside and self.batches + 1 == self.stop_at:
            raise KeyboardInterrupt

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.batches += 1
        if not self.inside and self.batches == self.stop_at:
            raise KeyboardInterrupt


def run(made: Training, seen: Seen) -> dict[str, Tensor]:
    made.trainer.callbacks.insert(0, seen)
    made.fit()
    return {name: tensor.clone() for name, tensor in made.model.state_dict().items()}


def test_every_step_is_made_of_equally_many_items_where_they_do_not_divide_an_epoch() -> None:
    seen = Seen()
    run(training("mae", *accumulating(4, 3)), seen)  # 6 batches in an epoch
    assert [len(items) for items in seen.steps.values()] == [16, 16, 16]
    assert all(len(set(items)) == 16 for items in seen.steps.values())


@pytest.mark.parametrize(
    ("accumulated", "said"),
    [
        ("4", "24 items of scenes, 16 a step in 4 batches of 4, 8 left out of each epoch\n"),
        ("1", "24 items of scenes, 4 a step\n"),
    ],
)
def test_the_summary_says_how_many_items_a_step_has(accumulated: str, said: str) -> None:
    assert said in training("mae", "--trainer.accumulate_grad_batches", accumulated)._summary()


def test_a_rule_counts_accumulated_batches_and_the_run_says_which_rate_it_uses() -> None:
    rule = ["--model.init_args.optimization.lr", "{base: 5.0e-4, end: 1.0e-6, warmup: 0.5, per: 256}"]
    made = training("mae", *accumulating(4, 2), *rule)
    assert "lr: 0.0005 x (16 items a step / 256) = 3.125e-05\n" in made._summary()
    made.fit()  # the rate of the second step, where the warm-up ends
    rates = [group["lr"] / group["lr_scale"] for group in made.trainer.optimizers[0].param_groups]
    assert rates == pytest.approx([5e-4 * 16 / 256] * len(rates), rel=1e-6)


def test_accumulated_batches_hold_the_items_of_one_large_batch() -> None:
    small, large = Seen(), Seen()
    run(training("mae", *accumulating(4, 3)), small)
    run(training("mae", *accumulating(1, 3), batch_size=16), large)
    assert small.steps == large.steps


@pytest.mark.parametrize("limit", [["--trainer.limit_train_batches", "3"], ["--trainer.limit_train_batches", "0.5"]])
def test_a_limit_of_batches_makes_whole_steps(limit: list[str]) -> None:
    seen = Seen()
    run(training("mae", *accumulating(2, 2), *limit), seen)
    assert [len(items) for items in seen.steps.values()] == [8, 8]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "accumulate_grad_batches=7: an epoch has 6 batches of 4 items"),
        (["--trainer.limit_train_batches", "3"], "an epoch has 3 batches"),
    ],
)
def test_a_step_that_no_epoch_fills_is_refused(options: list[str], said: str) -> None:
    made = training("mae", *accumulating(7 if not options else 4, 2), *options)
    with pytest.raises(ValueError, match=said):
        made.fit()


def test_epochs_are_counted_in_whole_steps() -> None:
    seen = Seen()
    made = training("mae", "--trainer.accumulate_grad_batches", "4", "--trainer.max_steps", "-1", "--trainer.max_epochs", "2")
    run(made, seen)
    assert made.trainer.global_step == 2
    assert [len(items) for items in seen.steps.values()] == [16, 16]


@pytest.mark.parametrize(
    ("recipe", "stop_at", "inside"),  # of 2 batches a step and 4 an epoch: the second batch of a step does not begin, or does not end
    [("dino", 3, False), ("dino", 6, True)]
    + [pytest.param(recipe, stop_at, inside, marks=pytest.mark.slow) for recipe, stop_at, inside in
       (("dino", 5, False), ("dino", 4, True), ("dcglr", 3, False), ("dcglr", 5, True), ("mugs", 5, False), ("mugs", 6, True))],
)  # fmt: skip
def test_a_stop_inside_a_step_resumes_to_the_weights_of_the_whole_run(recipe: str, stop_at: int, inside: bool) -> None:
    options = accumulating(2, 5)
    sizes = {"items": 19}  # the last batch of an epoch does not fill a step, nor a batch
    whole_seen, rest = Seen(), Seen()
    whole = run(training(recipe, *options, **sizes), whole_seen)
    stopped = training(recipe, *options, **sizes)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, Seen(stop_at=stop_at, inside=inside))
    assert stopped.folder is not None
    resumed = training(recipe, *options, "--ckpt_path", str(stopped.folder / "checkpoints" / "last.ckpt"), **sizes)
    state = run(resumed, rest)
    assert rest.steps == {step: items for step, items in whole_seen.steps.items() if step >= min(rest.steps)}
    assert state.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(whole[name], state[name])] == []
