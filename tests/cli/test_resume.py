"""The same command again: what goes on, what starts anew and why; checkpoints that are damaged, late or impossible; signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import pytest
import pytorch_lightning as pl
import shrinking
import torch
from shrinking import ROOT, shrunk

from glpretrain.callbacks import Checkpoints, StoppedBySignalError
from glpretrain.callbacks.checkpoints import newest_whole, proved
from glpretrain.cli.pretraining import fit, pretrain
from glpretrain.cli.training import Training
from glpretrain.core.files import locked
from glpretrain.runs import Run

QUIET = [*shrinking.QUIET, "--trainer.accelerator", "cpu"]
STEPS = ["--trainer.max_steps", "4"]


class Interrupt(pl.Callback):
    """Sends a signal to this process during a step."""

    def __init__(self, number: int, *, step: int = 1) -> None:
        self.number, self.step = number, step

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(shrunk(ROOT / "dino.yaml", tmp_path))


def interrupted(recipe: str, *more: str, number: int = signal.SIGTERM) -> Path:
    """The folder of a run of 4 steps that a signal has ended after the third."""
    training = Training(["--config", recipe, *QUIET, *STEPS, *more])
    training.trainer.callbacks.insert(0, Interrupt(number))
    with pytest.raises(StoppedBySignalError, match="after step 3; its checkpoint is written"):
        training.fit()
    assert training.folder is not None
    return training.folder


def again(recipe: str, *more: str, resume: str = "auto") -> Run:
    return pretrain(recipe, resume=resume, overrides=[*QUIET, *STEPS, *more])


def weights(run: Run) -> dict[str, torch.Tensor]:
    return torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGHUP, signal.SIGUSR1))]
)
def test_a_signal_ends_a_run_between_two_steps_and_the_same_command_goes_on(
    number: int, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = interrupted(recipe, number=number)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # the handlers are those of before
    run = again(recipe)
    assert f"{folder.name} goes on after step 3, from last.ckpt" in capsys.readouterr().out
    assert run.folder.name == folder.name and run.results["steps"] == 4
    assert run.results["resumed_from"].endswith("last.ckpt")
    whole = fit(recipe, runs="others", overrides=[*QUIET, *STEPS])
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(run).items())
    assert again(recipe).folder != run.folder  # after a run that ended, a new one starts


def test_what_differs_is_named_and_starts_a_new_run_unless_forced(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = interrupted(recipe)
    other = ["--model.init_args.optimization.lr.base", "3e-4"]
    assert again(recipe, *other, "--trainer.max_steps", "1").folder.name != folder.name
    said = capsys.readouterr().out
    assert f"{folder.name} was interrupted, but " in said and "model.init_args.optimization.lr.base was 0.001, is 0.0003" in said
    assert "trainer.max_steps was 4, is 1" in said and "a new run starts (--resume force goes on)" in said


def test_force_goes_on_although_settings_differ_and_never_does_not(recipe: str) -> None:
    folder = interrupted(recipe)
    assert again(recipe, resume="never").folder.name != folder.name
    later = interrupted(recipe)
    forced = again(recipe, "--model.init_args.optimization.lr.base", "3e-4", resume="force")
    assert forced.folder.name == later.name and forced.results["steps"] == 4


def test_other_items_start_a_new_run(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = interrupted(recipe)
    items = json.loads((folder / "items.json").read_text())
    (folder / "items.json").write_text(json.dumps({**items, "listing": "of other files"}))
    assert again(recipe).folder.name != folder.name
    assert "items.listing was of other files, is" in capsys.readouterr().out


def test_a_run_that_is_alive_is_left_alone(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = interrupted(recipe)
    with locked(folder, argument="run folder"):
        assert again(recipe).folder.name != folder.name
    assert "is being trained by another process; a new run starts" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(damage: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    every = json.dumps([{"class_path": "glpretrain.callbacks.Checkpoints", "init_args": {"every_n_steps": 1}}])
    folder = interrupted(recipe, "--trainer.callbacks", every) / "checkpoints"
    last = folder / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.unlink()  # `previous.ckpt` has other bytes
    last.write_bytes({"flipped": bytes(content), "cut": bytes(content[:1000]), "empty": b""}[damage])
    run = again(recipe, "--trainer.callbacks", every)
    said = capsys.readouterr().out
    assert "last.ckpt is damaged" in said and "goes on after step 2, from previous.ckpt" in said
    assert run.results["steps"] == 4
    if damage == "flipped":
        last.write_bytes(bytes(content))
        with pytest.raises(ValueError, match=r"ckpt_path: the bytes of .*last.ckpt are not those that were written"):
            Training(["--config", recipe, *QUIET, "--ckpt_path", str(last)])


def test_a_full_disk_costs_a_line_and_keeps_the_checkpoint_before(
    recipe: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training(["--config", recipe, *QUIET, *STEPS])
    training.checkpoints.every_n_steps = 1
    save = torch.save

    def full(checkpoint: dict, file: BinaryIO) -> None:
        if checkpoint["global_step"] >= 3:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", full)
    run = training.fit()
    assert "checkpoint of step 3: not written ([Errno 28] No space left on device: '" in caplog.text
    assert "last.ckpt'); the one before is kept" in caplog.text
    whole, damaged = newest_whole(run.folder / "checkpoints")
    assert whole is not None and whole.step == 2 and not damaged
    assert not list((run.folder / "checkpoints").glob(".*.part")) and (run.folder / "backbone" / "card.json").is_file()


def test_a_checkpoint_is_written_when_it_is_time_and_milestones_stay(recipe: str) -> None:
    training = Training(["--config", recipe, *QUIET, *STEPS])
    training.checkpoints.every_minutes, training.checkpoints.milestones = 1e-9, 2
    folder = training.fit().folder / "checkpoints"
    assert {path.name for path in folder.glob("*.ckpt")} == {"last.ckpt", "previous.ckpt", "step-2.ckpt", "step-4.ckpt"}
    steps = [torch.load(folder / name, weights_only=True)["global_step"] for name in ("previous.ckpt", "step-2.ckpt", "last.ckpt")]
    assert steps == [3, 2, 4]
    assert proved(folder / "last.ckpt") in (folder / "sha256.txt").read_text()
    with pytest.raises(ValueError, match="every_minutes is above 0, or null for none, not 0"):
        Checkpoints(every_minutes=0)


def test_the_trained_state_is_saved_before_the_last_scores(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed while it is scored is scored by the same command, and its scores before training are not lost."""
    options = [option for option in QUIET if option not in ("--evaluate", "false")]
    options = [
        "--trainer.logger",
        "false",
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.accelerator",
        "cpu",
        "--report",
        "false",
        *STEPS,
    ]
    training = Training(["--config", recipe, *options])
    assert training.evaluators is not None

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training.evaluators, "on_fit_end", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        training.fit()
    run = pretrain(recipe, overrides=options)
    assert training.folder is not None and run.folder.name == training.folder.name
    assert run.results["before"] and run.results["after"].keys() == run.results["before"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("recipe_name", ["dino", "mae"])
def test_a_run_that_is_killed_again_and_again_has_the_weights_of_one_that_is_not(recipe_name: str, tmp_path: Path) -> None:
    """SIGKILL after different times, then the same command, until the run ends."""
    recipe = str(shrunk(ROOT / f"{recipe_name}.yaml", tmp_path))
    every = json.dumps([{"class_path": "glpretrain.callbacks.Checkpoints", "init_args": {"every_n_steps": 5}}])
    options = [*QUIET, "--trainer.max_steps", "60", "--trainer.callbacks", every]
    command = [sys.executable, "-m", "glpretrain.cli", "pretrain", recipe, *options]
    kills = 0
    while not list((tmp_path / "runs").glob("*/*/results.json")):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        begun, folder = time.monotonic(), tmp_path / "runs"
        while process.poll() is None:
            saved = [path.stat().st_mtime for path in folder.glob("*/*/checkpoints/last.ckpt")]
            if kills < 3 and saved and time.time() - max(saved) < 5 and time.monotonic() - begun > 3 + kills:
                process.kill()
                kills += 1
                break
            time.sleep(0.02)
        process.wait()
    assert kills == 3
    (run,) = [path.parent for path in (tmp_path / "runs").glob("*/*/results.json") if path.parent.name != "latest"]
    whole = fit(recipe, runs=tmp_path / "whole", overrides=options)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(Run(run)).items())


KILLED_AT = """
import os, signal, sys
import torch
import glpretrain.callbacks.checkpoints as checkpoints
from glpretrain.cli.training import Training

moment, *arguments = sys.argv[1:]
training = Training(arguments)
training.checkpoints.every_n_steps = 1
save, second_name = torch.save, checkpoints._second_name


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def half(checkpoint, file):
    save(checkpoint, file)
    if checkpoint["global_step"] == 3:
        file.truncate(file.tell() // 2)
        die()


def before_it_takes_its_place(path, other):
    if training.trainer.global_step == 3:
        die()
    second_name(path, other)


def after_the_old_one_has_moved(path, other):
    second_name(path, other)
    if training.trainer.global_step == 3:
        die()


if moment == "half":
    torch.save = half
else:
    checkpoints._second_name = {"proved": before_it_takes_its_place, "moved": after_the_old_one_has_moved}[moment]
training.fit()
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["half", "proved", "moved"])
def test_a_kill_while_a_checkpoint_is_written_costs_the_steps_since_the_one_before(moment: str, recipe: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_AT, moment, "--config", recipe, *QUIET, *STEPS]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == -signal.SIGKILL
    (folder,) = {path.parent for path in tmp_path.glob("runs/*/*/checkpoints") if path.parent.name != "latest"}
    assert len(list(folder.glob("checkpoints/.last.ckpt.*.part"))) == 1
    whole, damaged = newest_whole(folder / "checkpoints")
    assert whole is not None and whole.step == 2 and not damaged
    run = again(recipe)
    assert run.folder.name == folder.name and run.results["resumed_from"].endswith(f"checkpoints/{whole.path.name}")
    assert not list(folder.glob("checkpoints/.*.part"))
    undisturbed = fit(recipe, runs=tmp_path / "whole", overrides=[*QUIET, *STEPS])
    assert all(torch.equal(value, weights(undisturbed)[name]) for name, value in weights(run).items())


def test_a_kill_between_the_backbone_and_the_results_costs_nothing(recipe: str) -> None:
    first = again(recipe)
    trained = (first.folder / "backbone" / "model.safetensors").read_bytes()
    (first.folder / "results.json").unlink()
    (first.folder / "backbone" / "card.json").unlink()  # half of the backbone was there
    second = again(recipe)
    assert second.folder == first.folder and json.loads((second.folder / "results.json").read_text())["steps"] == 4
    backbone = second.folder / "backbone"
    assert (backbone / "model.safetensors").read_bytes() == trained and (backbone / "card.json").is_file()


@pytest.mark.slow
def test_a_run_that_goes_on_has_the_same_run_in_wandb(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged = ["--evaluate", "false", "--report", "false", "--trainer.enable_progress_bar", "false", *STEPS]
    training = Training(["--config", recipe, *logged])
    training.trainer.callbacks.insert(0, Interrupt(signal.SIGTERM))
    with pytest.raises(StoppedBySignalError):
        training.fit()
    assert training.folder is not None
    known = (training.folder / "wandb_run.txt").read_text().strip()
    time.sleep(1.1)  # wandb names its folders by the second
    run = pretrain(recipe, overrides=logged)
    assert run.folder.name == training.folder.name and (run.folder / "wandb_run.txt").read_text().strip() == known
    parts = [path.name.rpartition("-")[2] for path in run.folder.glob("wandb/offline-run-*")]
    assert parts == [known, known]
