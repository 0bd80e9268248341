"""Three steps of a recipe with 16 items a step, which are cut in several ways: into micro-batches, chunks and processes.

PYTHONPATH=tests:tests/methods python tests/methods/layouts.py gradients    a table for docs/measurements.md
PYTHONPATH=tests:tests/methods python tests/methods/layouts.py cost         what chunks cost
"""

import math
import multiprocessing
import os
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from shrinking import ROOT, shrunk
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from glpretrain.cli.training import Training
from glpretrain.encoders import PointTransformer, ViT
from glpretrain.encoders.base import Encoder

ITEMS, STEPS = 16, 3
# Two blocks, the second of which drops paths.
DROPPING = ("--model.init_args.encoder.init_args.depth", "2", "--model.init_args.encoder.init_args.drop_path_rate", "0.3")
CHUNKS = ("--model.init_args.optimization.chunk_size", "5")  # which does not divide the number of views
_VIEWS = 32  # of the costs
_ADAM_EPS = 1e-2  # far above rounding: with 1e-8, AdamW makes whole steps of gradients that are zero but for rounding
Tensors = dict[str, Tensor]


class Seen(NamedTuple):
    """What a run has computed: the gradient of its first step, how far its parameters moved in all steps, and its other state; and which
    terms its method names."""

    gradient: Tensors
    moved: Tensors
    state: Tensors
    micro_batch_terms: tuple[str, ...]

    def difference(self, other: "Seen") -> dict[str, float]:
        """Length of the difference, relative to the length of `self`, for gradients, weights, teacher and states."""
        assert self.gradient.keys() == other.gradient.keys() and self.moved.keys() == other.moved.keys()
        assert self.state.keys() == other.state.keys()
        teacher = {name for name in self.moved if name.startswith("teacher.")}
        parts = {
            "gradient": (self.gradient, other.gradient),
            "weights": tuple({name: value for name, value in run.moved.items() if name not in teacher} for run in (self, other)),
            "teacher": tuple({name: value for name, value in run.moved.items() if name in teacher} for run in (self, other)),
            "states": (self.state, other.state),
        }
        return {name: _relative(*pair) for name, pair in parts.items() if pair[0]}


def _relative(one: Tensors, other: Tensors) -> float:
    """What is NaN or infinite in one, as what a state has not seen yet, has to be the same in the other."""
    for name, value in one.items():
        if not torch.equal(*(torch.where(values.isfinite(), 0.0, values).nan_to_num(nan=1.0) for values in (value, other[name]))):
            return math.inf
    finite = {name: value.double().where(value.isfinite(), 0.0) for name, value in one.items()}
    length = sum(float(value.square().sum()) for value in finite.values()) ** 0.5
    others = {name: other[name].double().where(other[name].isfinite(), 0.0) for name in one}
    apart = sum(float((value - others[name]).square().sum()) for name, value in finite.items()) ** 0.5
    return apart / length if length > 0.0 else apart


class _Notes(pl.Callback):
    def __init__(self) -> None:
        self.gradient: Tensors = {}
        self.start: Tensors = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["eps"] = _ADAM_EPS
        self.start = {name: value.detach().clone() for name, value in pl_module.named_parameters()}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        if not self.gradient:
            self.gradient = {name: value.grad.clone() for name, value in pl_module.named_parameters() if value.grad is not None}


def fitted(recipe: Path, folder: Path, *arguments: str, batch_size: int = ITEMS) -> Seen:
    """Run the shrunk recipe for three steps of Lightning's own loop.

    Args:
        recipe: quick-start recipe.
        folder: where the shrunk recipe and the run's folder go.
        arguments: further settings.
        batch_size: items of a micro-batch in one process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "--trainer.logger": "false",
        "--evaluate": "false",
        "--report": "false",
        "--runs": str(folder / "runs"),
        "--trainer.enable_progress_bar": "false",
        "--trainer.enable_checkpointing": "false",
        "--trainer.max_steps": str(STEPS),
        "--data.source.init_args.length": str(ITEMS * STEPS),
        "--data.batch_size": str(batch_size),
        "--data.num_workers": "0",
    }
    given = [word for pair in settings.items() for word in pair]
    training = Training(["--config", str(shrunk(recipe, folder)), *given, *DROPPING, *arguments])
    notes, model = _Notes(), training.model
    training.trainer.callbacks[:] = [notes]  # pyright: ignore[reportAttributeAccessIssue]  Lightning sets it elsewhere
    training.trainer.fit(model, datamodule=training.datamodule)
    assert training.trainer.global_step == STEPS
    parameters = dict(model.named_parameters())
    moved = {name: parameters[name].detach() - start for name, start in notes.start.items()}
    state = {name: value for name, value in model.state_dict().items() if name not in parameters and value.is_floating_point()}
    return Seen(notes.gradient, {name: value for name, value in moved.items() if value.any()}, state, model.micro_batch_terms)


def _process(rank: int, recipes: Sequence[Path], folder: Path, arguments: Sequence[str], count: int, port: int) -> None:
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "layouts"}  # as torchrun sets them
    options = ("--trainer.strategy", "ddp", "--trainer.devices", str(count))
    for recipe in recipes:
        seen = fitted(recipe, folder / str(rank), *options, *arguments, batch_size=ITEMS // count)
        torch.save(tuple(seen), folder / f"{recipe.stem}.{rank}.pt")


def in_processes(recipes: Sequence[Path], folder: Path, *arguments: str, count: int) -> dict[str, list[Seen]]:
    """Run recipes in `count` processes (gloo), started as torchrun starts them; what each of them has computed, by recipe."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_process, args=(recipes, folder, arguments, count, port), nprocs=count)
    return {recipe.stem: [Seen(*torch.load(folder / f"{recipe.stem}.{rank}.pt")) for rank in range(count)] for recipe in recipes}


def _gradients() -> None:
    """Print, for every quick-start recipe, how far the gradient of the first step is from that of 16 items at once."""
    print("| recipe | 4 x 4 accumulated | 16 in chunks of 5 views | terms that see a micro-batch only |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for recipe in sorted(ROOT.glob("*.yaml")):
            whole = fitted(recipe, Path(name) / "whole")
            accumulated = fitted(recipe, Path(name) / "parts", "--trainer.accumulate_grad_batches", "4", batch_size=ITEMS // 4)
            chunks = fitted(recipe, Path(name) / "chunks", *CHUNKS)
            cells = [f"{whole.difference(other)['gradient']:.0e}" for other in (accumulated, chunks)]
            print("| " + " | ".join([recipe.stem, *cells, ", ".join(whole.micro_batch_terms)]) + " |", flush=True)


def _cost() -> None:
    """Print CPU seconds of a forward and backward pass of an encoder, and how much memory it takes beyond the weights."""
    print("| encoder | views | chunk | CPU seconds | MB |\n|---|---|---|---|---|")
    encoders = {
        "vit_small_patch16_224": (lambda: ViT("vit_small_patch16_224"), (3, 224, 224)),
        "point_mae": (lambda: PointTransformer("point_mae"), (1024, 3)),
    }
    for name, (make, shape) in encoders.items():
        for chunk_size in (None, 16, 4):
            receiver, sender = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.get_context("fork").Process(target=_step_cost, args=(make, shape, chunk_size, sender))
            process.start()
            seconds, megabytes = receiver.recv()
            process.join()
            print(f"| {name} | {_VIEWS} | {chunk_size or 'all'} | {seconds:.1f} | {megabytes:.0f} |", flush=True)


def _step_cost(make: Callable[[], Encoder], shape: tuple[int, ...], chunk_size: int | None, sender: Connection) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder, views = make().train(), torch.randn(_VIEWS, *shape)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    output = encoder(views, chunk_size=chunk_size)
    (output.cls.square().sum() + output.patches.square().sum()).backward()
    sender.send((time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


if __name__ == "__main__":
    {"gradients": _gradients, "cost": _cost}[sys.argv[1]]()
