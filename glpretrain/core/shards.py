"""Tensors that are divided among processes by their rows (FSDP2's DTensors): the part of a process, the whole, and files of parts.

A sharded checkpoint is a head and a file of parts for each process. In the head every divided tensor has its shape and no numbers (it is
on torch's meta device), and `FILES` names the other files with their digests. Left out: which modules are divided (`training.sharding`),
and when what is written (`callbacks.checkpoints`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

FILES = "shards"  # in a head: SHA-256 by the names of the files beside it
Place = tuple[str | int, ...]  # keys that lead to a tensor in a checkpoint


def local(tensor: Tensor) -> Tensor:
    """The part of this process, without a copy; a tensor that is not divided is itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The whole tensor in every process, without gradient. All processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def is_divided(tensors: Sequence[Tensor]) -> bool:
    """Whether one of them is divided among processes."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """L2 norms of whole tensors, Float[] each, with one collective where some of them are divided."""
    own = torch._foreach_norm([local(tensor) for tensor in tensors])  # pyright: ignore[reportPrivateImportUsage]  torch has no public name
    if not is_divided(tensors):
        return list(own)
    assert all(isinstance(tensor, DTensor) for tensor in tensors), "a method is divided as a whole"
    squares = torch.stack([norm.double().square() for norm in own])  # those of small numbers would be zero in float32
    dist.all_reduce(squares)
    return list(squares.sqrt().to(own[0].dtype).unbind())


def divided(given: "Tensor | Parts", own: Tensor, *, at: Place = ()) -> Tensor:
    """A whole tensor, or the one that belongs at a place of `Parts`, divided as `own` is."""
    if not isinstance(own, DTensor):
        return given.whole(at) if isinstance(given, Parts) else given
    assert list(own.placements) == [Shard(0)], own.placements
    count, step = len(local(own)), -(-own.shape[0] // own.device_mesh.size())  # torch.chunk's division, as in FSDP2
    first = min(own.device_mesh.get_local_rank() * step, own.shape[0])
    rows = given.whole(at, first=first, count=count) if isinstance(given, Parts) else given[first : first + count]
    # A copy: the rows may be those of a file that is mapped into memory.
    rows = rows.to(local(own).device, copy=True, memory_format=torch.contiguous_format)
    return DTensor.from_local(rows, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride())


def split(checkpoint: dict) -> tuple[dict, dict[Place, Tensor]]:
    """A checkpoint as its head, and the parts of this process by where they belong."""
    parts: dict[Place, Tensor] = {}

    def without(value: object, place: Place) -> object:
        if isinstance(value, DTensor):
            parts[place] = local(value).detach().cpu()
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
        if isinstance(value, dict):
            return {key: without(one, (*place, key)) for key, one in value.items()}
        if isinstance(value, list):
            return [without(one, (*place, number)) for number, one in enumerate(value)]
        return value

    head = without(checkpoint, ())
    assert isinstance(head, dict)
    return head, parts


def is_head(checkpoint: object) -> bool:
    """Whether a checkpoint is the head of one whose tensors lie in files beside it."""
    return isinstance(checkpoint, dict) and isinstance(checkpoint.get(FILES), dict)


def files_of(checkpoint: Mapping, *, path: Path) -> list[Path]:
    """The files of parts that the head at `path` names, in the order of their processes.

    Raises:
        ValueError: a name leads elsewhere, or a file is missing.
    """
    found = []
    for name in checkpoint[FILES]:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{path}: it names {name!r} as a file of shards; accepted: names of files beside it")
        if not (path.parent / name).is_file():
            raise ValueError(f"{path} is written in {len(checkpoint[FILES])} shards, of which {name} is not beside it; copy all of them")
        found.append(path.parent / name)
    return found


class Parts:
    """The parts of the divided tensors of a checkpoint.

    Args:
        parts: the parts of each process by where they belong, in the order of the processes.
    """

    def __init__(self, parts: Sequence[Mapping[Place, Tensor]]) -> None:
        self._parts = parts

    def whole(self, place: Place, *, first: int = 0, count: int | None = None) -> Tensor:
        """The tensor that belongs at a place, or `count` of its rows from the `first` one on."""
        found, start = [], 0
        for rows in (part[place] for part in self._parts):
            stop = len(rows) if count is None else max(first + count - start, 0)
            found.append(rows[max(first - start, 0) : stop])
            start += len(rows)
        return torch.cat(found)
