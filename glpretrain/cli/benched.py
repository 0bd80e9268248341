"""A recipe as a run that is only measured: a few steps, without checkpoints, evaluation or wandb, in a folder that does not stay.

Left out: what is measured (`callbacks.cost`), and the verb with its tables (`bench`).
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from jsonargparse import Namespace
from pytorch_lightning.utilities import move_data_to_device

from glpretrain.bench.machine import machine_name, peak_flops
from glpretrain.bench.official import Compared, compare
from glpretrain.bench.summary import Costs, parts_of
from glpretrain.callbacks import LogViews, StopOnSignal
from glpretrain.callbacks.cost import WAIT, StepCost
from glpretrain.cli.trainer import interruptible, quiet, refusals
from glpretrain.cli.training import Training
from glpretrain.data.items import RawBatch
from glpretrain.data.module import DataModule
from glpretrain.methods.base import Method

_WARMUP = 3
_HERE = {"accelerator": "auto", "devices": "1", "num_nodes": "1", "strategy": "auto"}  # of the trainer, unless the user says otherwise
_OWN = ("trainer.max_steps", "trainer.max_epochs", "trainer.logger", "trainer.profiler", "trainer.enable_checkpointing")
_OWN += ("trainer.enable_progress_bar", "evaluate", "resume", "runs", "ckpt_path")
DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # of the products, by the precision of the trainer


class Beside(NamedTuple):
    """A recipe beside other code."""

    recipe: str
    machine: str
    precision: str
    items: int  # of a step
    other: str  # whose step is beside ours
    compared: Compared

    def to_json(self) -> dict[str, object]:
        """Everything, for scripts."""
        return {**self._asdict(), "compared": {**self.compared._asdict(), "speed": self.compared.speed}}


class Benched(Training):
    """A run whose steps are measured.

    Args:
        arguments: of the command line, `--config FILE` among them.
        cost: callback that measures.
    """

    def __init__(self, arguments: Sequence[str], *, cost: StepCost) -> None:
        self.cost = cost
        self._constructed = time.perf_counter()
        super().__init__(arguments)

    def instantiate_trainer(self, **kwargs: object) -> pl.Trainer:
        """The trainer, which reports its actions."""
        return super().instantiate_trainer(profiler=self.cost.profiler, **kwargs)

    def _default_callbacks(self, given: Namespace, own: list[pl.Callback]) -> list[pl.Callback]:
        """Those of every run but the picture of the views, which is seconds of work before the first step, and the stop that saves."""
        return [self.cost, *(one for one in super()._default_callbacks(given, own) if not isinstance(one, LogViews | StopOnSignal))]

    def costs(self) -> Costs:
        """Train the steps.

        Raises:
            ValueError: the run ended before its last step.
        """
        with self.together.ending(), self._leaving_nothing_behind(), interruptible(self.trainer):
            self.trainer.fit(self.model, datamodule=self.datamodule)
        if (measured := self.cost.measured) is None:
            raise ValueError(f"bench: the run ended after {self.trainer.global_step} steps; look at max_time")
        device, precision = self.trainer.strategy.root_device, str(self.trainer.precision)
        items = self.datamodule.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches
        parts, totals = parts_of(measured.steps), sorted(sum(step.values()) for step in measured.steps)
        loader = self.trainer.train_dataloader
        return Costs(
            recipe=self.recipe,
            machine=machine_name(device),
            precision=precision,
            items=items,
            num_workers=loader.num_workers if loader is not None else 0,
            parts=parts,
            step_milliseconds=totals[len(totals) // 2],
            items_per_second=1e3 * items * len(totals) / sum(totals),
            peak_bytes=measured.peak_bytes,
            peak_of="allocated on the GPU" if device.type == "cuda" else "resident in this process, libraries included",
            flops=measured.flops * self.trainer.world_size,
            machine_flops=peak_flops(device, DTYPES.get(precision, torch.float32)) * self.trainer.world_size,
            wait=next((part.share for part in parts if part.name == WAIT), 0.0),
            read_milliseconds=statistics.median(measured.read),
            cut_milliseconds=statistics.median(measured.cut),
            start_seconds=measured.first_batch - self._constructed,
        )


def require_not_own(overrides: Sequence[str]) -> None:
    """Refuse settings that the benchmark makes itself.

    Raises:
        ValueError: names the first of them.
    """
    for word in overrides:
        name = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and name in _OWN:
            raise ValueError(f"bench: --{name} would be ignored; the benchmark sets it itself (--steps says how many steps are measured)")


def on_this_machine(arguments: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The arguments of a run in one process, with the overrides behind."""
    here = [word for name, value in _HERE.items() for word in (f"--trainer.{name}", value)]
    return [*arguments, *here, *overrides]


@contextmanager
def _built(arguments: Sequence[str], *, steps: int) -> Iterator["Benched"]:
    """The run, in a folder that goes when the context ends."""
    quiet()
    cost = StepCost(num_warmup_steps=_WARMUP, num_steps=steps)
    with TemporaryDirectory(prefix="glpretrain-bench-") as folder, refusals():
        logger = f"{{class_path: pytorch_lightning.loggers.CSVLogger, init_args: {{save_dir: {folder}}}}}"
        own = {
            "trainer.max_steps": str(_WARMUP + steps),
            "trainer.max_epochs": "null",
            "trainer.logger": logger,
            "trainer.enable_checkpointing": "false",
            "trainer.enable_progress_bar": "false",
            "evaluate": "false",
            "resume": "never",
            "runs": str(Path(folder) / "runs"),
        }
        run = Benched([*arguments, *(word for name, value in own.items() for word in (f"--{name}", value))], cost=cost)
        try:
            yield run
        finally:
            if run.run_folder is not None:
                run.run_folder.close()


def measured_costs(arguments: Sequence[str], *, steps: int) -> Costs:
    """What the steps of a recipe cost.

    Args:
        arguments: of `glpretrain fit`.
        steps: number of steps that are measured.

    Raises:
        ValueError: names what is wrong with a setting and what is accepted.
    """
    with _built(arguments, steps=steps) as run:
        return run.costs()


def compared(arguments: Sequence[str], *, name: str, code: Path | None, steps: int) -> Beside:
    """The steps of a recipe beside those of other code.

    Args:
        arguments: of `glpretrain fit`.
        name: `lightly`, or the name of official code, see `bench.official.OFFICIAL`.
        code: clone of official code, which is executed.
        steps: number of steps of each that are timed.

    Raises:
        ValueError: names what is wrong with a setting and what is accepted.
    """
    with one_batch(arguments) as given:
        if given.precision == "16-mixed":
            raise ValueError(f"bench: {name} in trainer.precision=16-mixed; accepted: 32-true, bf16-mixed")
        batch = given.data.make_batch(given.raw, encoder=given.method.encoder)
        found = compare(given.method, batch, name=name, code=code, dtype=DTYPES.get(given.precision), steps=steps)
        return Beside(given.recipe, machine_name(given.device), given.precision, given.data.batch_size, name, found)


class OneBatch(NamedTuple):
    """A method and the first batch of its data, on a device."""

    recipe: str
    method: Method
    data: DataModule
    raw: RawBatch  # what workers prepared
    device: torch.device
    precision: str


@contextmanager
def one_batch(arguments: Sequence[str]) -> Iterator[OneBatch]:
    """What a recipe trains, without a trainer.

    Args:
        arguments: of `glpretrain fit`.

    Raises:
        ValueError: names what is wrong with a setting and what is accepted.
    """
    with _built(arguments, steps=1) as run:
        method, data, device = run.model, run.datamodule, run.trainer.strategy.root_device
        if len(data.source) < data.batch_size:
            raise ValueError(f"bench: {data.batch_size} items a step, and the source has {len(data.source)}; lower data.batch_size")
        method.to(device)
        raw = data.raw_batch(range(data.batch_size), encoder=method.encoder, epoch=0)
        yield OneBatch(run.recipe, method, data, moved(raw, device), device, str(run.trainer.precision))


def moved(raw: RawBatch, device: torch.device) -> RawBatch:
    """What a worker prepared, on a device."""
    return move_data_to_device(raw, device)
