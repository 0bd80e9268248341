"""Loggers are told where a run comes from, without a network; a table is written whichever there are."""

import csv
import json
from pathlib import Path

import pytest
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from shrinking import ROOT, shrunk

from glpretrain.callbacks.loggers import finish, run_loggers
from glpretrain.cli import provenance
from glpretrain.cli.pretraining import pretrain
from glpretrain.runs import Run

ABOUT = {"data": {"batch_size": 4}, "commit": "abc", "machine": {"host": "here"}}


class Told(Logger):
    """Keeps what it is told."""

    name, version, experiment = "told", "0", None

    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, object] = {}

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        self.settings |= params

    def log_metrics(self, metrics, step=None) -> None:
        pass


def test_a_logger_of_the_users_is_told_everything_and_stands_beside_the_table(tmp_path: Path) -> None:
    told = Told()
    table, own = run_loggers(tmp_path, own=[told], recipe="mmc", about=ABOUT)
    assert own is told and told.settings == ABOUT
    assert isinstance(table, CSVLogger) and Path(table.log_dir) == tmp_path


def test_a_table_of_the_users_takes_the_place_of_ours(tmp_path: Path) -> None:
    own = CSVLogger(tmp_path / "mine")
    assert run_loggers(tmp_path, own=[own], recipe="mmc", about=ABOUT) == [own]


def test_wandb_gets_settings_versions_commit_and_machine_and_the_same_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    loggers = run_loggers(tmp_path, recipe="mmc", about=ABOUT)
    run = loggers[1].experiment
    assert {name: run.config[name] for name in ABOUT} == ABOUT
    known = run.id
    finish(loggers)
    loggers = run_loggers(tmp_path, recipe="mmc", about=ABOUT | {"machine": {"host": "there"}}, resumed=True)
    run = loggers[1].experiment
    assert run.id == known and run.config["machine"] == {"host": "there"}
    finish(loggers)


@pytest.fixture
def mae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(shrunk(ROOT / "mae.yaml", tmp_path))


def run_with(mae: str, *words: str) -> Run:
    options = ["--evaluate", "false", "--report", "false", "--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1"]
    run = pretrain(mae, overrides=[*options, *words])
    assert isinstance(run, Run)
    rows = [row for row in csv.DictReader((run.folder / "metrics.csv").open()) if row["train/loss"]]
    assert [int(row["step"]) for row in rows] == [0, 1]
    return run


def test_results_say_where_a_run_comes_from(mae: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    results = run_with(mae).results
    assert results["commit"] == provenance.commit() and set(results["machine"]) == {"host", "system", "device"}


def test_the_commit_is_that_of_the_checkout_and_says_whether_it_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"status": " M a.py", "rev-parse": "f" * 40}
    monkeypatch.setattr(provenance, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(provenance, "_git", lambda *words: answers[words[0]])
    (tmp_path / ".git").mkdir()
    assert provenance.commit() == "f" * 40 + "+changes"
    answers["status"] = ""
    assert provenance.commit() == "f" * 40


def test_the_commit_of_an_installed_package_is_the_one_that_pip_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed:
        def read_text(self, name: str) -> str:
            return json.dumps({"vcs_info": {"commit_id": "a" * 40}})

    monkeypatch.setattr(provenance, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(provenance, "distribution", lambda name: Installed())
    assert provenance.commit() == "a" * 40


def test_tensorboard_has_the_settings_and_the_losses(mae: str) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'glpretrain[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    name = f"{TensorBoardLogger.__module__}.{TensorBoardLogger.__name__}".replace(".tensorboard.", ".")
    run_with(mae, "--trainer.logger", name, "--trainer.logger.save_dir", "tensorboard")
    (folder,) = Path("tensorboard").glob("*/version_0")
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1]
    assert "batch_size: 4" in (folder / "hparams.yaml").read_text()


def test_mlflow_has_the_settings_and_the_losses(mae: str) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'glpretrain[mlflow]'")
    uri = "sqlite:///mlflow.db"
    run_with(mae, "--trainer.logger", "pytorch_lightning.loggers.MLFlowLogger", "--trainer.logger.tracking_uri", uri)
    client = mlflow.tracking.MlflowClient(uri)
    (found,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert found.data.params["data/batch_size"] == "4" and "train/loss" in found.data.metrics
