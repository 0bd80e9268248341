"""Soak test: a developer's tool that kills every quick start again and again, and compares its weights with those of an undisturbed run.

    python tests/soak.py --work FOLDER                        2,000 steps of every recipe, killed every 200
    python tests/soak.py --work FOLDER --only dino mae --steps 120 --every 30

Each recipe is trained twice by the command line, `glpretrain pretrain RECIPE`: once undisturbed, and once with a SIGKILL every so many
steps, after which the same command is given again until the run has ended. The kills take turns through the moments of a step (`MOMENTS`;
another recipe begins with another one). Most of them lose steps, which are computed again. Then
the last checkpoints are compared, every tensor bit for bit, and what a process takes (memory, open files) and a run folder on the disk is
compared between its start and its end.

So that the steps are cheap, a recipe is made small as for other tests (`shrinking.shrunk`: width 24, depth 1, batches of 4) and trained on
256 embedded items without scores; everything else is its own. Processes are forked from this one after the large libraries were imported.

Left out: other signals and damaged checkpoints (tests/cli/test_resume.py), and several processes.
"""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.utilities.types import STEP_OUTPUT
from shrinking import ROOT, shrunk
from torch import Tensor

from glpretrain.callbacks import checkpoints

RECIPES = sorted(ROOT.glob("*.yaml"))
MOMENTS = ("batch", "forward", "backward", "optimizer", "teacher", "logging", "writing", "saved")
PLAN, LOG = "SOAK_PLAN", "SOAK_LOG"  # environment: `step moment` of the kill, and the file of what was measured
_SAMPLED = 50  # number of steps between two measurements
_SETTINGS = (
    "--trainer.enable_progress_bar",
    "false",
    "--evaluate",
    "false",
    "--report",
    "false",
    "--trainer.accelerator",
    "cpu",
    "--resume",
    "auto",
)


class Probe(pl.Callback):
    """Measures what this process takes, and kills it by SIGKILL at the moment that the environment names."""

    def __init__(self) -> None:
        step, _, self._moment = os.environ.get(PLAN, "-1 ").partition(" ")
        self._step = int(step)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reach the two moments for which Lightning has no hook."""
        trainer.optimizers[0].register_step_post_hook(lambda *_: self._at("teacher", trainer))
        whole = checkpoints._write_to

        def half(path: Path, checkpoint: dict) -> None:
            whole(path, checkpoint)
            if self._moment == "writing" and trainer.global_step >= self._step:
                os.truncate(path, path.stat().st_size // 2)
                _die()

        checkpoints._write_to = half

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int) -> None:
        """Between two steps."""
        if trainer.global_step % _SAMPLED == 0:
            _write(trainer)
        self._at("batch", trainer)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """After the forward pass."""
        self._at("forward", trainer)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the backward pass."""
        self._at("backward", trainer)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Before the optimizer."""
        self._at("optimizer", trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """After the step, and after its checkpoint if there is one."""
        self._at("logging", trainer)
        if trainer.global_step >= self._step and any(getattr(one, "has_saved", False) for one in trainer.callbacks):  # pyright: ignore[reportAttributeAccessIssue]
            self._at("saved", trainer)

    def _at(self, moment: str, trainer: pl.Trainer) -> None:
        if moment == self._moment and trainer.global_step >= self._step:
            _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _write(trainer: pl.Trainer) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {
        "step": trainer.global_step,
        "memory": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        "files": len(os.listdir("/proc/self/fd")),
        "disk": _bytes_below(Path(trainer.default_root_dir)) / 1e6,
    }
    with open(os.environ[LOG], "a") as file:
        file.write(json.dumps(found) + "\n")


def _bytes_below(folder: Path) -> int:
    """Of all files, a file with two names counted once."""
    found = {(stat.st_dev, stat.st_ino): stat.st_size for path in folder.rglob("*") if path.is_file() for stat in [path.stat()]}
    return sum(found.values())


class Soaked(NamedTuple):
    """What became of a recipe."""

    recipe: str
    steps: int
    every: int
    kills: int
    again: int  # number of steps that were computed more than once
    tensors: int
    differ: list[str]  # names of tensors and numbers that are not equal
    verdicts: list[str]  # of the undisturbed run
    undisturbed: list[dict[str, float]]  # measurements
    killed: list[dict[str, float]]
    seconds: float

    def row(self) -> str:
        """Of the table."""
        ends = [(next(one for one in several if one["step"] >= self.every), several[-1]) for several in (self.undisturbed, self.killed)]
        pairs = [f"{first[name]:.0f} / {last[name]:.0f}" for first, last in ends for name in ("memory", "files")]
        disk = " / ".join(f"{one['disk']:.2f}" for one in ends[1])
        equal = f"{self.tensors - len(self.differ)} of {self.tensors}"
        said = "; ".join(self.verdicts) or "none"
        counts = [str(count) for count in (self.steps, self.kills, self.again)]
        return f"| {' | '.join([self.recipe, *counts, equal, *pairs, disk, said, f'{self.seconds:.0f}'])} |"


HEADER = (
    "| recipe | steps | kills | steps computed again | equal tensors | undisturbed: MB | open files | killed: MB | open files "
    "| run folder, MB | verdicts of health | seconds |\n|" + "---|" * 12
)


def cheap(path: Path, folder: Path) -> Path:
    """The recipe with cheap steps, written to a folder."""
    written = shrunk(path, folder)
    recipe = yaml.safe_load(written.read_text())
    recipe["data"]["source"]["init_args"]["length"] = 256  # 64 steps an epoch, so that kills fall on all parts of one
    written.write_text(yaml.safe_dump(recipe))
    return written


def soak(path: Path, *, work: Path, steps: int, every: int, checkpoints: int) -> Soaked:
    """Train a recipe twice and compare.

    Args:
        path: recipe.
        work: folder that everything is written to.
        steps: number of steps.
        every: number of steps between two kills.
        checkpoints: number of steps between two checkpoints.
    """
    begun = time.monotonic()
    (work / "recipes").mkdir(parents=True, exist_ok=True)
    recipe, name = cheap(path, work / "recipes"), path.stem
    callbacks = [
        {"class_path": "glpretrain.callbacks.Checkpoints", "init_args": {"every_n_steps": checkpoints, "every_minutes": None}},
        {"class_path": "soak.Probe"},
    ]
    command = ["pretrain", str(recipe), "--import", "soak", *_SETTINGS, "--trainer.max_steps", str(steps)]
    command += ["--trainer.callbacks", json.dumps(callbacks)]
    logs = [work / f"{name}-undisturbed.jsonl", work / f"{name}-killed.jsonl"]
    for log in logs:
        log.unlink(missing_ok=True)
    status, _ = _command([*command, "--runs", "runs"], work=work, log=str(logs[0]))
    assert status == 0, f"{name}: the undisturbed run ended with {status}"
    undisturbed = (work / "runs" / name / "latest").resolve()
    kills, reached = 0, 0
    again = 0
    for number, step in enumerate(range(every, steps, every)):
        moment = MOMENTS[(RECIPES.index(path) + number) % len(MOMENTS)]
        at = step if moment in ("writing", "saved") else step + checkpoints * 3 // 4
        status, said = _command([*command, "--runs", "killed"], work=work, log=str(logs[1]), plan=f"{at} {moment}")
        assert status == -signal.SIGKILL, f"{name}: killed at {at} ({moment}), but ended with {status}"
        again += reached - _resumed_after(said, name=name, first=kills == 0)
        kills, reached = kills + 1, at
    status, said = _command([*command, "--runs", "killed"], work=work, log=str(logs[1]))
    assert status == 0, f"{name}: the resumed run ended with {status}"
    again += reached - _resumed_after(said, name=name, first=kills == 0)
    (killed,) = [folder for folder in (work / "killed" / name).iterdir() if folder.name != "latest"]
    tensors, differ = compare(undisturbed, killed)
    verdicts = [verdict["name"] for verdict in json.loads((undisturbed / "results.json").read_text())["health"]["verdicts"]]
    whole, resumed = ([json.loads(line) for line in log.read_text().splitlines()] for log in logs)
    return Soaked(name, steps, every, kills, again, tensors, differ, verdicts, whole, resumed, time.monotonic() - begun)


def _resumed_after(said: str, *, name: str, first: bool) -> int:
    """Number of the step that a run went on after, from what it printed."""
    lines = [line for line in said.splitlines() if line.startswith("resume:")]
    if first:
        assert not lines, f"{name}: {lines}"
        return 0
    assert len(lines) == 1 and " goes on after step " in lines[0], f"{name}: {lines}"
    return int(lines[0].partition(" goes on after step ")[2].partition(",")[0])


def compare(first: Path, second: Path) -> tuple[int, list[str]]:
    """Number of the values in the last checkpoints of two runs that are compared, and the names of those that differ."""
    whole, other = (dict(_values(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True))) for folder in (first, second))
    differ = sorted(whole.keys() ^ other.keys())
    for name in whole.keys() & other.keys():
        one, two = whole[name], other[name]
        equal = torch.equal(one, two) if isinstance(one, Tensor) and isinstance(two, Tensor) else one == two
        if not equal:
            differ.append(name)
    weights = [(folder / "backbone" / "model.safetensors").read_bytes() for folder in (first, second)]
    if weights[0] != weights[1]:
        differ.append("backbone/model.safetensors")
    return len(whole), differ


def _values(checkpoint: dict) -> Iterator[tuple[str, object]]:
    """Tensors and numbers of student, teacher, states and optimizer, and how far the run is."""
    for part in ("state_dict", "optimizer_states", "global_step", "epoch"):
        yield from _flat(checkpoint[part], part)


def _flat(value: object, name: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _flat(one, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for place, one in enumerate(value):
            yield from _flat(one, f"{name}[{place}]")
    else:
        yield name, value


def _command(arguments: Sequence[str], *, work: Path, log: str, plan: str = "-1 ") -> tuple[int, str]:
    """Exit status of `glpretrain ARGUMENTS` in a process of its own, and what it printed."""
    output = work / "output.txt"
    status = forked(lambda: _run(arguments, log=log, plan=plan), folder=work, output=output)
    if status not in (0, -signal.SIGKILL):
        print(output.read_text(), file=sys.stderr)
    return status, output.read_text()


def _run(arguments: Sequence[str], *, log: str, plan: str) -> int:
    from glpretrain.cli import main

    os.environ |= {PLAN: plan, LOG: log, "WANDB_MODE": "disabled"}
    return main(arguments)


def forked(function: Callable[[], int], *, folder: Path, output: Path) -> int:
    """Exit status of a function in a forked process, minus the number of the signal that ended it.

    Args:
        function: what is called; its value is the exit status.
        folder: working folder.
        output: file for all that is printed.
    """
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        status = 3
        try:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.close(file)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115  a test has others
            os.chdir(folder)
            torch.set_num_threads(1)
            status = function()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, waited = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(waited)


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak the recipes that were asked for, and print a line of the table for each."""
    parser = argparse.ArgumentParser(prog="python tests/soak.py")
    parser.add_argument("--work", type=Path, required=True, help="folder that everything is written to")
    parser.add_argument("--only", nargs="+", default=[path.stem for path in RECIPES], help="names of recipes")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=200, help="number of steps between two kills")
    parser.add_argument("--checkpoints", type=int, default=50, help="number of steps between two checkpoints")
    given = parser.parse_args(arguments)
    import glpretrain.cli.pretraining  # noqa: F401  once for all processes

    print(f"{given.steps} steps, SIGKILL every {given.every}, checkpoints every {given.checkpoints}; batches of 4, width 24, depth 1\n")
    print(HEADER, flush=True)
    differ = False
    for name in given.only:
        (path,) = (path for path in RECIPES if path.stem == name)
        soaked = soak(path, work=given.work.resolve(), steps=given.steps, every=given.every, checkpoints=given.checkpoints)
        print(soaked.row(), flush=True)
        if soaked.differ:
            print(f"  differ: {', '.join(soaked.differ)}", flush=True)
        differ |= bool(soaked.differ)
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
