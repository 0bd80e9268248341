"""How much memory a step of a recipe takes, without taking it: a step is run on tensors that have shapes and no numbers.

What is allocated and freed on the way is counted as torch's allocator would count it. So the plan follows the code of the method, the
encoder, the losses and FSDP2, whatever these are. Left out: the scratch memory of kernels, what CUDA and an allocator add, what a loss
gathers from other processes where parameters are not sharded, and making the views.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glpretrain.bench.alone import Alone
from glpretrain.core.batch import Batch, ViewGroup
from glpretrain.core.shards import local
from glpretrain.encoders.base import Encoder
from glpretrain.methods.base import Method
from glpretrain.training.sharding import shard
from glpretrain.training.teacher import FrozenTeacher

_PARAMETERS, _GRADIENTS, _OPTIMIZER, _TEACHER, _EXPERTS = "parameters of the student", "gradients", "optimizer", "teacher", "experts"
_STATES, _VIEWS, _STUDENT = "centres, queues and buffers", "views and masks", "activations of the encoder"
_GATHERED = "parameters that are gathered"
_SEEN, _HEADS, _BACKWARD = "features of teacher and experts", "logits, heads and losses", "backward, recomputed activations included"
ROWS = (_PARAMETERS, _GRADIENTS, _OPTIMIZER, _TEACHER, _EXPERTS, _STATES, _VIEWS, _GATHERED, _STUDENT, _SEEN, _HEADS, _BACKWARD)
_WITHOUT_NUMBERS = ("items", "corrupted")  # parts of a group of views of which only the shapes matter


class _Fake(FakeTensorMode):
    """Tensors without numbers, all of them on the CPU."""

    avoid_device_init = False  # torch would look for a GPU at every operation  # pyright: ignore[reportAssignmentType]


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that live, by what was computed when they were made."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = _VIEWS
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.parameters: list[nn.Parameter] = []  # whose gradients are counted apart
        self._seen: dict[int, tuple[str, int]] = {}  # kind and bytes of every storage that lives

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204 - torch's signature
        """Run one operation, and count what it made."""
        if self.kind == _BACKWARD and func is torch.ops.aten.scatter.src:
            # The gradient of a maximum. Where nobody listens, torch writes it into the zeros that it has just made.
            func = torch.ops.aten.scatter_.src
        result = _result(func, args, kwargs or {})
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self.count(one, self.kind)
        return result

    def count(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor from now on until it is freed; of a sharded one the part of this process."""
        storage = local(tensor).untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            weakref.finalize(storage, self._free, key)
            self._note(key, kind, storage.nbytes())

    def _note(self, key: int, kind: str, size: int) -> None:
        before, held = self._seen.get(key, (kind, 0))
        self.live[before] -= held
        self._seen[key] = kind, size
        self.live[kind] += size
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()
            held = sum(local(parameter.grad).nbytes for parameter in self.parameters if parameter.grad is not None)
            self.peak[_GRADIENTS] = held
            self.peak[_BACKWARD] -= held

    def _free(self, key: int) -> None:
        kind, size = self._seen.pop(key)
        self.live[kind] -= size

    @contextmanager
    def following_sizes(self) -> Iterator[None]:
        """Inside this context, storages whose size is changed are counted too: those that FSDP2 gathers parameters in, and empties."""
        resize = torch.UntypedStorage.resize_

        def followed(storage: torch.UntypedStorage, size: int) -> object:
            result = resize(storage, size)
            if storage._cdata in self._seen:
                self._note(storage._cdata, _GATHERED, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = followed  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """What is made inside this context is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before


def _result(func, args: tuple, kwargs: dict) -> object:  # noqa: ANN001 - an operation of torch
    """The result of an operation, whose shape may depend on numbers: masks are real, and of other numbers the shapes do not depend."""
    aten = torch.ops.aten
    if func is aten.index.Tensor or func in (aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default):
        indices = [one for index in args[1] for one in _as_integers(index)]
        return func(args[0], indices, *args[2:], **kwargs)
    if func is aten.masked_select.default and not isinstance(args[1], FakeTensor):
        return args[0].new_empty(int(args[1].sum()))
    if func is aten.masked_scatter_backward.default:
        return args[0].new_empty(args[2])
    if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
        return torch.ones((), dtype=args[0].dtype).item()  # a loss that is finite
    return func(*args, **kwargs)


def _as_integers(index: Tensor | None) -> list[Tensor | None]:
    """An index of booleans as the indices that it stands for, one for each of its axes."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return list(index.nonzero(as_tuple=True))


class Plan(NamedTuple):
    """Bytes at the moment at which a process holds most."""

    rows: dict[str, int]  # by what they are; see `ROWS`

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.rows.values())


class Planner:
    """Plans for one method.

    Args:
        method: a method that was built on torch's meta device.
        sample: a batch of a few real items. Its views only lend their shapes; its masks decide how many tokens a loss is computed for.
        dtype: type of autocast, None for none.
        mesh: processes among which parameters are sharded, in a group that communicates nothing; None where each process holds all.
    """

    def __init__(self, method: Method, sample: Batch, *, dtype: torch.dtype | None, mesh: DeviceMesh | None = None) -> None:
        self._fake = _Fake(allow_non_fake_inputs=True)
        self._sample, self._dtype, self._mesh = sample, dtype, mesh
        self._has_gathered = False
        with self._fake:
            self.method = method.to_empty(device="cpu").train()
            if mesh is not None:
                shard(self.method, mesh)

    def plan(self, batch_size: int, *, chunk_size: int | None = None, activation_checkpointing: bool = False) -> Plan:
        """The peak of the losses and gradients of a step that is not the first one. The optimizer takes less: activations are gone by then.

        Args:
            batch_size: items of a process.
            chunk_size: see `Optimization.chunk_size`.
            activation_checkpointing: see `Optimization.activation_checkpointing`.

        Raises:
            ValueError: the encoder cannot see the batch in chunks, or names no blocks.
        """
        method, live = self.method, _Live()
        for branch in (method.student, *(() if method.teacher is None else (method.teacher.branch,))):
            branch.set_chunk_size(chunk_size)
            branch.set_activation_checkpointing(activation_checkpointing)
        alone = Alone(method, num_items=batch_size, dtype=self._dtype, caches_casts=False)  # as Lightning's plugin
        batch = self._batch(batch_size)
        live.parameters = [one for one in method.parameters() if one.requires_grad]
        for kind, tensors in self._held(batch).items():
            for one in tensors:
                live.count(one, kind)
        kinds = {"losses": _HEADS, "backward": _BACKWARD}
        with live, live.following_sizes(), _listened(method, live):
            with live.during(_BACKWARD):  # gradients of a step before, which are there until the next ones are computed
                for one in live.parameters:
                    one.grad = torch.empty_like(one)
                if self._mesh is not None and not self._has_gathered:  # FSDP2 makes its storages in the first step
                    alone.compute(batch)
                    self._has_gathered = True
            with live.during(_OPTIMIZER):
                alone.move()
            live.peak.clear()
            alone.compute(batch, during=lambda name: live.during(kinds[name]))
        method.zero_grad(set_to_none=True)
        return Plan({name: live.peak[name] for name in ROWS})

    def _held(self, batch: Batch) -> dict[str, list[Tensor]]:
        """What is held from the first step on."""
        experts = [one for one in self.method.modules() if isinstance(one, FrozenTeacher)]
        return {
            _EXPERTS: [one for expert in experts for one in (*expert.parameters(), *expert.buffers())],
            _TEACHER: [] if self.method.teacher is None else list(self.method.teacher.parameters()),
            _PARAMETERS: list(self.method.parameters()),  # those that are left
            _STATES: list(self.method.buffers()),
            _VIEWS: [one for one in tree_leaves(batch) if isinstance(one, Tensor)],
        }

    def _batch(self, batch_size: int) -> Batch:
        """The sample's items again and again, views without numbers."""
        index = torch.arange(batch_size)
        rows = index % len(self._sample.index)
        views: dict[str, ViewGroup] = {}
        for name, group in self._sample.views.items():
            parts = {part: value for part, value in group._asdict().items() if value is not None and part != "hidden"}
            axes = {part: 0 if part == "strong" else 1 for part in parts}
            shapes = {part: (*value.shape[: axes[part]], batch_size, *value.shape[axes[part] + 1 :]) for part, value in parts.items()}
            real = {part: value.index_select(axes[part], rows) for part, value in parts.items() if part not in _WITHOUT_NUMBERS}
            with self._fake:
                fake = {part: torch.empty(shapes[part]) for part in parts if part in _WITHOUT_NUMBERS}
            views[name] = ViewGroup(**real, **fake)
        return Batch(index, views, torch.ones(batch_size))


@contextmanager
def _listened(method: Method, live: _Live) -> Iterator[None]:
    """Tell apart what the encoders of student, teacher and experts make."""
    before: list[str] = []

    def enter(kind: str, module: nn.Module, args: object) -> None:
        before.append(live.kind)
        live.kind = kind

    def leave(module: nn.Module, args: object, output: object) -> None:
        live.kind = before.pop()

    experts = [module for module in method.modules() if isinstance(module, FrozenTeacher)]
    owners = [(_STUDENT, method.student), *((_SEEN, one) for one in (method.teacher, *experts) if one is not None)]
    encoders = [(kind, module) for kind, owner in owners for module in owner.modules() if isinstance(module, Encoder)]
    handles = [module.register_forward_pre_hook(partial(enter, kind)) for kind, module in encoders]
    handles += [module.register_forward_hook(leave) for _, module in encoders]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
