"""Where Lightning's trainer is made to behave as the rest of the command line: interrupts, warnings and refusals.

Which trainer a run gets is left out (`training`).
"""

import logging
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch
from jsonargparse import Namespace
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException  # pyright: ignore[reportPrivateImportUsage] - its public home

from glpretrain.callbacks import finish
from glpretrain.cli import provenance
from glpretrain.cli.sharded import NAME, FullySharded

_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "32", "16", "bf16")
_LIGHTNING = {"pytorch_lightning", "lightning_fabric", "lightning_utilities"}


def require_settings(given: Namespace) -> None:
    """Refuse what Lightning accepts and a run here cannot do, or would ignore.

    Args:
        given: the `trainer` of a configuration.

    Raises:
        ValueError: names the setting, its value and what is accepted.
    """
    if given.precision is not None and str(given.precision) not in _PRECISIONS:
        raise ValueError(f"trainer.precision={given.precision}: weights are kept in float32; accepted: {', '.join(_PRECISIONS)}")
    if isinstance(given.strategy, str) and given.strategy.startswith(("fsdp", "deepspeed", "model_parallel")):
        if given.strategy != NAME:
            raise ValueError(f"trainer.strategy={given.strategy}; accepted: {NAME}, which shards all parameters, ddp, auto")
        if str(given.precision) in ("16-mixed", "16"):  # a loss scale per process
            raise ValueError(f"trainer.precision={given.precision} with strategy {NAME}; accepted: bf16-mixed, 32-true")
    if given.max_steps == -1 and given.max_epochs in (None, -1):
        raise ValueError("trainer: give max_steps or max_epochs; the schedules need to know where the run ends")
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        if given[name] is not None and given[name] == 0:
            raise ValueError(f"trainer.{name}=0: nothing would be trained; accepted: numbers above 0")
    if given.accumulate_grad_batches < 1:
        raise ValueError(f"trainer.accumulate_grad_batches={given.accumulate_grad_batches}; accepted: whole numbers from 1 on")
    ignored = {
        "default_root_dir": "--runs says where run folders go",
        "gradient_clip_val": "set model.init_args.optimization.clip",
        "gradient_clip_algorithm": "set model.init_args.optimization.clip",
        "overfit_batches": "lower the number of items of the source, or set limit_train_batches",
        "sync_batchnorm": "leave it out: batch norm always sees all processes",
    }
    for name, instead in ignored.items():
        if given[name]:
            raise ValueError(f"trainer.{name}={given[name]} would be ignored; {instead}")


def precision_of(given: Namespace) -> str:
    """The precision of a run: the given one, or bf16 on a GPU that computes in it, and float32 elsewhere.

    Args:
        given: the `trainer` of a configuration.
    """
    if given.precision is not None:
        return str(given.precision)
    may_be_gpu = given.accelerator in ("auto", "gpu", "cuda")
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if may_be_gpu and has_bf16 else "32-true"


def chosen(given: Namespace) -> dict[str, str | Strategy]:
    """The settings of a trainer that do not stand as they are given: its precision, and its strategy where that is ours.

    Args:
        given: the `trainer` of a configuration.
    """
    return {"precision": precision_of(given), "strategy": FullySharded() if given.strategy == NAME else given.strategy}


def require_callbacks(callbacks: list[pl.Callback]) -> None:
    """Refuse a callback that would change how many batches a step has.

    Raises:
        ValueError: there is one.
    """
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
        raise ValueError("trainer.callbacks: GradientAccumulationScheduler changes the batch during a run; set accumulate_grad_batches")


def read_folders(data: Namespace) -> list[str]:
    """The folders that the sources of a configuration name."""
    sources = [data[role] for role in ("source", "labelled", "labelled_test", "masked") if data.get(role) is not None]
    return [value for source in sources for value in source.init_args.values() if isinstance(value, str) and os.path.isdir(value)]


def machine_of(trainer: pl.Trainer) -> dict[str, object]:
    """Where and with what a run took place, for results.json."""
    return {
        "devices": trainer.world_size,
        "precision": str(trainer.precision),
        "device": torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else "cpu",
        **provenance.origin(trainer.strategy.root_device),
    }


@contextmanager
def refusals() -> Iterator[None]:
    """Make a mistake in the settings of what Lightning itself refuses, whatever kind of error it raises."""
    try:
        yield
    except (AttributeError, MisconfigurationException, ModuleNotFoundError, RuntimeError, TypeError, ValueError) as error:
        innermost = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if isinstance(error, MisconfigurationException) or _LIGHTNING & set(innermost.parts):
            raise ValueError(f"trainer: {error}") from error
        raise


@contextmanager
def interruptible(trainer: pl.Trainer) -> Iterator[None]:
    """Undo what Lightning makes of an interrupt: an exit, which ends a notebook too, with every later interrupt ignored."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if not trainer.interrupted:
            raise
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)
        finish(trainer.loggers)
        raise KeyboardInterrupt from stop


def is_first_process() -> bool:
    """Known before the trainer is: a launcher says it in the environment, and without one there is a single process so far."""
    rank = rank_zero_only.rank  # pyright: ignore[reportFunctionMemberAccess] - Lightning keeps it there
    return rank == 0 and os.environ.get("NODE_RANK", "0") == "0"


def quiet() -> None:
    """Without advertisements and warnings about what is on purpose."""
    for message in (
        ".*does not have many workers.*",  # decoded items in memory need none
        ".*in eval mode at the start of training.*",  # the teacher's
        ".*is smaller than the logging interval.*",  # the interval counts steps, whatever an epoch is
        ".*isinstance.treespec, LeafSpec.*",  # Lightning's own
        ".*FSDP2-wrapped module .* returned a view tensor.*",  # losses, which nothing changes in place
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()
