"""Several seeds by one command: a run for each, one after the other; signals, failures, the same command again; and the list of runs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import shrinking
from rich.console import Console
from shrinking import ROOT, shrunk

from glpretrain.cli import main, resume, seeds
from glpretrain.cli.pretraining import pretrain
from glpretrain.cli.run_list import listed
from glpretrain.cli.training import Training
from glpretrain.core.files import locked
from glpretrain.runs import Run

QUIET = [*shrinking.QUIET, "--trainer.accelerator", "cpu"]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(shrunk(ROOT / "mae.yaml", tmp_path))


class Children:
    """Stands in for the processes: answers with a status per seed, and writes the folder of a finished run."""

    def __init__(self, statuses: dict[int, int], folder: Path) -> None:
        self.statuses, self.folder, self.ran = statuses, folder, []

    def run(self, arguments: list[str], *, answer: Path) -> int:
        seed = int(arguments[-1])
        self.ran.append(arguments)
        if self.statuses.get(seed, 0) == 0:
            answer.write_text(str(self.folder))
        return self.statuses.get(seed, 0)


@pytest.fixture
def finished(recipe: str) -> Path:
    return pretrain(recipe, overrides=[*QUIET, "--runs", "single"]).folder.resolve()


def with_children(monkeypatch: pytest.MonkeyPatch, statuses: dict[int, int], folder: Path) -> Children:
    children = Children(statuses, folder)
    monkeypatch.setattr(seeds._Running, "run", lambda self, arguments, *, answer: children.run(arguments, answer=answer))
    return children


@pytest.mark.parametrize("text", ["", "0,", "0,x", "1,1", "01,1", "-1", "0.5"])
def test_seeds_that_are_none_are_one_line(text: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", recipe, f"--seeds={text}"]) == 2
    assert "accepted: different whole numbers with commas between, such as 0,1,2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "environment", "said"),
    [
        (["--seed_everything", "3"], {}, "seeds: --seed_everything is given too"),
        (["--ckpt_path=a.ckpt"], {}, "seeds: --ckpt_path is given too"),
        ([], {"LOCAL_RANK": "0"}, "seeds: a launcher has started this process"),
    ],
)
def test_what_does_not_go_with_seeds_is_refused(
    more: list[str], environment: dict[str, str], said: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        pretrain(recipe, seeds="0,1", overrides=more)


def test_every_seed_gets_the_arguments_and_modules_of_the_command(
    recipe: str, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my_methods.py").write_text("")
    children = with_children(monkeypatch, {}, finished)
    given = ["--import", "my_methods", "--trainer.max_steps", "3"]
    assert main(["pretrain", recipe, "--seeds", "0,2", "--resume", "never", *given]) == 0
    common = ["--config", recipe, "--resume", "never", *given, "--seed_everything"]
    assert children.ran == [[*common, "0"], [*common, "2"]]
    said = capsys.readouterr().out
    assert "seed 2 (2 of 2)" in said and f"as a page: glpretrain compare {finished} {finished} --out page.html" in said


def test_a_failed_seed_costs_the_others_nothing(
    recipe: str, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    children = with_children(monkeypatch, {0: -9}, finished)
    assert main(["pretrain", recipe, "--seeds", "0,1"]) == 1
    assert len(children.ran) == 2
    assert "seed 0 has failed with exit status -9" in (said := capsys.readouterr()).err and "mae" in said.out


@pytest.mark.parametrize(
    ("status", "said"), [(75, "stopped in seed 1; the same command goes on, with 1, 2 left"), (130, "stopped"), (2, "")]
)
def test_a_signal_or_a_mistake_ends_all(
    status: int, said: str, recipe: str, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    children = with_children(monkeypatch, {1: status}, finished)
    assert main(["pretrain", recipe, "--seeds", "0,1,2"]) == status
    assert len(children.ran) == 2 and said in capsys.readouterr().err


def trained(recipe: str, seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple[Run, str]:
    """The run of a seed, as its process makes it, and what that process answers."""
    answer = folder / f"answer-{seed}"
    monkeypatch.setenv(resume.AMONG_SEEDS, str(answer))
    run = pretrain(recipe, overrides=[*QUIET, "--seed_everything", str(seed), *more])
    monkeypatch.delenv(resume.AMONG_SEEDS)
    assert isinstance(run, Run)
    return run, answer.read_text()


def test_a_seed_that_has_finished_is_not_trained_again_whatever_came_later(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, told = trained(recipe, 0, tmp_path, monkeypatch)
    assert told == str(first.folder)
    trained(recipe, 1, tmp_path, monkeypatch)
    trained(recipe, 0, tmp_path, monkeypatch, "--data.batch_size", "3")
    capsys.readouterr()
    again, told = trained(recipe, 0, tmp_path, monkeypatch)
    assert again.folder == first.folder and told == str(first.folder)
    assert f"resume: {first.folder} is finished and has the same settings; it is not trained again" in capsys.readouterr().out
    assert trained(recipe, 0, tmp_path, monkeypatch, "--resume", "never")[0].folder != first.folder


def test_outside_of_seeds_a_finished_run_is_trained_again(recipe: str) -> None:
    assert pretrain(recipe, overrides=QUIET).folder != pretrain(recipe, overrides=QUIET).folder


def test_an_interrupted_seed_goes_on_behind_those_of_others(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = trained(recipe, 0, tmp_path, monkeypatch)
    (run.folder / "results.json").unlink()
    shutil.rmtree(run.folder / "backbone")
    trained(recipe, 1, tmp_path, monkeypatch)
    again, _ = trained(recipe, 0, tmp_path, monkeypatch)
    assert again.folder == run.folder and again.results["resumed_from"].endswith("last.ckpt")


def test_the_list_tells_finished_interrupted_failed_running_and_damaged_runs_apart(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        run = pretrain(recipe, overrides=[*QUIET, "--seed_everything", str(number)])
        run.folder.rename(run.folder.with_name(f"2026-{number}"))
    folder = run.folder.parent
    for number in (1, 2, 3):
        (folder / f"2026-{number}" / "results.json").unlink()
    (folder / "2026-2" / "failed.txt").write_text("ValueError: a photo\n")
    (folder / "2026-3" / "config.yaml").write_text("- no mapping")
    assert listed(folder / "2026-0")[1:6] == ("finished", "", "scenes", "0", "2")
    assert listed(folder / "2026-1")[1:6] == ("interrupted", "", "scenes", "1", "2 of 2")
    assert listed(folder / "2026-2")[1:3] == ("failed", "ValueError: a photo")
    with locked(folder / "2026-2", argument="run folder"):
        assert listed(folder / "2026-2").state == "running"
    assert listed(folder / "2026-3").state == "unreadable" and "a list given" in listed(folder / "2026-3").reason
    monkeypatch.setattr("glpretrain.cli.run_list.Console", lambda: Console(width=200))
    assert main(["runs", "--last", "3"]) == 0
    said = capsys.readouterr().out
    assert said.index("2026-3") < said.index("2026-2") < said.index("2026-1") and "2026-0" not in said
    assert "failed: ValueError: a photo" in said and "1 older runs are not shown (--last 4)" in said


def test_a_run_that_fails_says_so_until_it_goes_on(recipe: str) -> None:
    import pytorch_lightning as pl

    class Fail(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            raise RuntimeError("the first\nof two lines")

    training = Training(["--config", recipe, *QUIET])
    training.trainer.callbacks.append(Fail())
    with pytest.raises(RuntimeError):
        training.fit()
    assert training.folder is not None
    assert listed(training.folder)[1:3] == ("failed", "RuntimeError: the first of two lines")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "folder: nowhere is not a folder"),
        (["."], "folder: there is no run in ."),
        ([".", "--last", "0"], "last: 0; accepted: numbers above 0"),
    ],
)
def test_a_list_of_nothing_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["runs", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_signal_to_the_command_ends_the_run_at_hand_and_the_same_command_finishes(recipe: str) -> None:
    command = [sys.executable, "-m", "glpretrain.cli", "pretrain", recipe, "--seeds", "0,1", *QUIET, "--trainer.max_steps", "400"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(Path("runs").glob("mae/*/views.png")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "stopped in seed 0; the same command goes on, with 0, 1 left" in err
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr
    folders = [path for path in Path("runs/mae").iterdir() if not path.is_symlink()]
    assert len(folders) == 2 and "goes on after step" in done.stdout and "seeds 0, 1" in " ".join(done.stdout.split())
