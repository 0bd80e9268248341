"""A recipe whose memory is planned: its method on torch's meta device, and a few embedded items in place of its data.

No file of the recipe is read but those of experts that are there. Left out: the plan itself (`bench.plan`), and the verb (`bench`).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from glpretrain.bench.plan import Plan, Planner
from glpretrain.cli.benched import DTYPES
from glpretrain.cli.parsing import parse_values
from glpretrain.cli.sharded import NAME
from glpretrain.cli.training import Training
from glpretrain.cli.trust import Parser, mapping_of
from glpretrain.core.batch import Batch
from glpretrain.data import LFWSubset
from glpretrain.data.module import DataModule
from glpretrain.data.own import embedded_source
from glpretrain.data.views import ViewMaker
from glpretrain.encoders import timm_adapter
from glpretrain.masking import Corruption, Mask, RegionMask
from glpretrain.methods.base import Method
from glpretrain.training.branch import norms_in_chunks
from glpretrain.weights import load_backbone

_CHUNKS = 4  # chunks of the largest group of views, for comparison
_SAMPLE = 8  # items whose masks stand for those of the batch
_LOADER = "glpretrain.weights.load_expert"
_REPLICAS = ("auto", "ddp")  # strategies in which every process holds everything


class Planned(NamedTuple):
    """The plan of a recipe."""

    recipe: str
    precision: str
    batch_size: int  # items of a process
    num_processes: int
    num_accumulated: int  # micro-batches of a step
    plans: dict[str, Plan]  # by what is kept in the forward pass; the recipe's own first
    buckets: int  # bytes that DistributedDataParallel adds
    notes: list[str]
    fitting: int | None  # largest number of items of a process that fits; None where no memory was given

    @property
    def total(self) -> int:
        """Bytes of a process."""
        return next(iter(self.plans.values())).total + self.buckets

    def to_json(self) -> dict[str, object]:
        """Everything, for scripts."""
        plans = {name: {"total": plan.total + self.buckets, **plan.rows} for name, plan in self.plans.items()}
        return {**self._asdict(), "plans": plans, "total": self.total}


class Unbuilt(Training):
    """A configuration that nothing is built of."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def part(self, name: str) -> dict:
        """The settings below a name, with defaults and overrides, as plain values."""
        settings = mapping_of(self.parser.dump(self.config, skip_validation=True), self.recipe)[name]
        assert isinstance(settings, dict)
        return settings


def planned(arguments: Sequence[str], *, gpus: int | None, gpu_memory: float | None) -> Planned:
    """Plan the memory of a recipe.

    Args:
        arguments: of `glpretrain fit`.
        gpus: number of processes, one per GPU; None takes the recipe's.
        gpu_memory: gigabytes of a GPU, for the largest batch that fits; None leaves that out.

    Raises:
        ValueError: names what is wrong with a setting and what is accepted.
    """
    for name, value in (("gpus", gpus), ("gpu_memory", gpu_memory)):
        if value is not None and not value > 0:
            raise ValueError(f"bench: {name} is {value}; accepted: numbers above 0")
    run = Unbuilt([*arguments, "--evaluate", "false"])
    trainer, data, model = (run.part(name) for name in ("trainer", "data", "model"))
    if (strategy := trainer.get("strategy", "auto")) not in (*_REPLICAS, NAME):
        raise ValueError(f"bench: plan for strategy={strategy}; accepted: {', '.join(_REPLICAS)}, where each GPU holds all, and {NAME}")
    notes: list[str] = []
    method = _method(model, notes)
    batch_size = int(data["batch_size"])
    precision = str(trainer.get("precision") or ("32-true" if trainer.get("accelerator") == "cpu" else "bf16-mixed"))  # as on a GPU
    sample = _sample(data, method)
    count = _processes(trainer) if gpus is None else gpus
    with _among(count) if strategy == NAME else nullcontext() as mesh:
        planner = Planner(method, sample, dtype=DTYPES.get(precision), mesh=mesh)
        own = Kept(method.optimization.chunk_size, method.optimization.activation_checkpointing)
        plans = {kept.words: kept.plan(planner, batch_size) for kept in _alternatives(own, method, sample, batch_size)}
        buckets = sum(one.nbytes for one in method.parameters() if one.requires_grad) if count > 1 and mesh is None else 0
        fitting = None
        if gpu_memory is not None:
            known = {batch_size: plans[own.words].total}
            fitting = _fitting(planner, known, kept=own, bytes_left=int(1e9 * gpu_memory) - buckets)
    return Planned(run.recipe, precision, batch_size, count, trainer.get("accumulate_grad_batches", 1), plans, buckets, notes, fitting)


class Kept(NamedTuple):
    """What a forward pass keeps for the gradients."""

    chunk_size: int | None
    activation_checkpointing: bool

    @property
    def words(self) -> str:
        """Both, for the head of a column."""
        chunks = "whole batch" if self.chunk_size is None else f"chunk_size {self.chunk_size}"
        return chunks if not self.activation_checkpointing else "checkpointing" if self.chunk_size is None else f"{chunks}, checkpointing"

    def plan(self, planner: Planner, batch_size: int) -> Plan:
        """The plan for so many items."""
        return planner.plan(batch_size, chunk_size=self.chunk_size, activation_checkpointing=self.activation_checkpointing)


def _alternatives(own: Kept, method: Method, sample: Batch, batch_size: int) -> list[Kept]:
    """The recipe's own setting, and those that differ from it in one of the two."""
    found = [own]
    if method.encoder.blocks():
        found.append(own._replace(activation_checkpointing=not own.activation_checkpointing))
    if not norms_in_chunks(method.encoder):
        largest = max(len(group.items) for group in sample.views.values()) * batch_size
        found.append(own._replace(chunk_size=largest // _CHUNKS or 1 if own.chunk_size is None else None))
    return found


@contextmanager
def _among(count: int) -> Iterator[DeviceMesh]:
    """So many processes that are not there, of which this one is the first: what it sends goes nowhere."""
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (count,))
    finally:
        dist.destroy_process_group()


def _processes(trainer: dict) -> int:
    devices = trainer.get("devices", 1)
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else 1
    return count * trainer.get("num_nodes", 1)


def _method(model: dict, notes: list[str]) -> Method:
    """The method, whose tensors have shapes only."""
    student = model["init_args"]["encoder"]
    values = {"model": _with_shapes(model, student=student, name="", notes=notes)}
    parser = Parser(exit_on_error=False)
    parser.add_argument("--model", type=Method, required=True)
    parsed = parse_values(parser, values)
    with torch.device("meta"):
        return parser.instantiate(parsed).model


def _with_shapes(settings: object, *, student: dict, name: str, notes: list[str]) -> object:
    """The settings, with an encoder of the same shapes wherever an expert's weights would be read."""
    if not isinstance(settings, dict):
        return settings
    if settings.get("class_path") != _LOADER:
        return {key: _with_shapes(value, student=student, name=key, notes=notes) for key, value in settings.items()}
    given = settings["init_args"]
    if given.get("random_weights"):
        encoder = {"class_path": f"glpretrain.encoders.{timm_adapter(given['path'])}", "init_args": {"name": given["path"]}}
    elif Path(given["path"]).exists():
        hints = {key: given.get(key) for key in ("format", "name", "num_heads", "mean", "std")}
        card = load_backbone(given["path"], which=given.get("which") or "teacher", **hints).card
        encoder = {"class_path": f"glpretrain.encoders.{card.encoder}", "init_args": card.arguments}
    else:
        notes.append(f"expert {name}: {given['path']} is not here; it is planned as an encoder like the student's")
        encoder = student
    own = {"encoder": encoder, "size": given.get("size"), "precision": given.get("precision", "float32")}
    return {"class_path": "glpretrain.training.teacher.FrozenTeacher", "init_args": own}


def _sample(data: dict, method: Method) -> Batch:
    """A batch of embedded items, with the recipe's views, in the sizes that have most inputs, masks and corruption."""
    parser = Parser(exit_on_error=False)
    parser.add_argument("--views", type=ViewMaker, required=True)
    parser.add_argument("--mask", type=Mask | RegionMask | None, default=None)
    parser.add_argument("--corruption", type=Corruption | None, default=None)
    made = parser.instantiate(parse_values(parser, {name: data.get(name) for name in ("views", "mask", "corruption")}))
    views = max(made.views.of_each_size(), key=lambda maker: sum(count * math.prod(shape) for count, shape in maker.groups(1).values()))
    size = views.default_size()
    source = LFWSubset(_SAMPLE, size=size) if isinstance(made.mask, RegionMask) else embedded_source(views.modality, size=size)
    module = DataModule(source, views, batch_size=_SAMPLE, mask=made.mask, corruption=made.corruption)
    return module.make_batch(module.raw_batch(range(_SAMPLE), encoder=method.encoder, epoch=0), encoder=method.encoder)


def _fitting(planner: Planner, known: dict[int, int], *, kept: Kept, bytes_left: int) -> int:
    """The largest number of items that fits, from a number of items whose bytes are known: memory grows in a straight line; 0 where not
    one fits."""
    ((count, total),) = known.items()
    other = 2 * count
    slope = (kept.plan(planner, other).total - total) / (other - count)
    guess = int(count + (bytes_left - total) / slope)
    while guess > 0 and kept.plan(planner, guess).total > bytes_left:
        guess = min(guess - 1, int(0.99 * guess))
    return max(guess, 0)
