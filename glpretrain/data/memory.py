"""Decoded items in memory. The processes of a run on one machine decode a part each, and all of them map the parts of all.

The memory belongs to files without a name (`memfd_create`), so it goes with the last process that maps it, however that ends, and a small
/dev/shm does not limit it. A process that changes an item changes its own copy. Left out: how items are read (`items`).
"""

import json
import logging
import mmap
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from glpretrain.core.node import Node
from glpretrain.core.types import Item

_LOG = logging.getLogger(__name__)
_TYPES = (torch.uint8, torch.float32, torch.int64, torch.int32, torch.int16, torch.int8, torch.float64, torch.float16, torch.bool)
_ALIGNED = 64  # bytes
_MOST_AXES = 4
_ROW = np.dtype(
    [
        *(("values", np.int64), ("regions", np.int64)),  # where they begin; regions at -1 are none
        *(("values_type", np.int8), ("regions_type", np.int8)),
        *(("shape", np.int32, _MOST_AXES), ("order", np.int8, _MOST_AXES), ("num_axes", np.int8)),  # axes in the order of the memory
        *(("index", np.int64), ("label", np.int32)),  # dataset index
    ]
)


class CannotShareError(Exception):
    """Some process of a machine cannot open the memory of another one. The message says why."""


class Chunk(NamedTuple):
    """Items in few tensors, because each tensor that a worker gives takes a file descriptor."""

    values: Tensor  # [number of all values]
    regions: Tensor | None
    layouts: list[tuple[tuple[int, ...], tuple[int, ...]]]  # of each item: its shape, and its axes in the order of its memory
    index: list[int]
    unreadable: list[tuple[int, str]]
    labels: list[int]

    @classmethod
    def of(cls, items: Sequence[Item], index: list[int], unreadable: list[tuple[int, str]]) -> "Chunk":
        regions = [item.regions.flatten() for item in items if item.regions is not None]
        orders = [sorted(range(item.values.dim()), key=lambda axis, item=item: -item.values.stride(axis)) for item in items]
        return cls(
            values=torch.cat([item.values.permute(order).flatten() for item, order in zip(items, orders, strict=True)]),
            regions=torch.cat(regions) if regions else None,
            layouts=[(tuple(item.values.shape), tuple(order)) for item, order in zip(items, orders, strict=True)],
            index=index,
            unreadable=unreadable,
            labels=[item.label for item in items],
        )

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.regions is None else self.regions.nbytes)


class Written:
    """The items that this process has decoded, one behind another."""

    def __init__(self) -> None:
        self._file = os.memfd_create("glpretrain items")
        self._length = 0
        self._rows: list[np.ndarray] = []
        self.num_bytes = 0  # of items

    def add(self, chunk: Chunk) -> None:
        """Add items."""
        rows = np.zeros(len(chunk.layouts), dtype=_ROW)
        values = self._append(chunk.values)
        regions = -1 if chunk.regions is None else self._append(chunk.regions)
        rows["values_type"] = _TYPES.index(chunk.values.dtype)
        rows["regions_type"] = -1 if chunk.regions is None else _TYPES.index(chunk.regions.dtype)
        for row, (shape, order) in zip(rows, chunk.layouts, strict=True):
            row["values"], row["regions"], row["num_axes"] = values, regions, len(shape)
            row["shape"][: len(shape)], row["order"][: len(order)] = shape, order
            values += torch.Size(shape).numel() * chunk.values.itemsize
            if chunk.regions is not None:
                regions += torch.Size(shape[1:]).numel() * chunk.regions.itemsize
        rows["index"], rows["label"] = chunk.index, chunk.labels
        self._rows.append(rows)
        self.num_bytes += chunk.nbytes

    def _append(self, part: Tensor) -> int:
        """Write the bytes of a tensor, and say where they begin."""
        start = self._length + -self._length % _ALIGNED
        rest = part.contiguous().flatten().view(torch.uint8).numpy().data
        self._length = start + len(rest)
        os.lseek(self._file, start, os.SEEK_SET)
        while rest:  # one write takes 2 GB at most
            rest = rest[os.write(self._file, rest) :]
        return start

    def described(self) -> dict[str, int]:
        """What another process needs in order to map the items."""
        rows = np.concatenate(self._rows) if self._rows else np.zeros(0, dtype=_ROW)
        start = self._append(torch.from_numpy(rows.view(np.uint8))) if len(rows) else 0
        facts = {"process": os.getpid(), "file": self._file, "rows": start, "num_rows": len(rows)}
        return {**facts, "length": self._length, "num_bytes": self.num_bytes}

    def close(self) -> None:
        """Forget the file; who has mapped it keeps it."""
        os.close(self._file)


class Decoded:
    """Decoded items of one or several processes, in order.

    Args:
        parts: what each process has described.

    Raises:
        OSError: one cannot be opened.
    """

    def __init__(self, parts: Sequence[dict[str, int]]) -> None:
        parts = [part for part in parts if part["num_rows"]]
        self._parts = [_mapped(part) for part in parts]
        sizes = (slice(part["rows"], part["rows"] + part["num_rows"] * _ROW.itemsize) for part in parts)
        self._rows = [data.numpy()[rows].view(_ROW) for data, rows in zip(self._parts, sizes, strict=True)]
        self._ends = np.cumsum([part["num_rows"] for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[Item, int]:
        """An item without masks, and its dataset index."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        row = self._rows[part][index - int(self._ends[part])]  # counted from the end
        count = int(row["num_axes"])
        shape, order = row["shape"][:count].tolist(), row["order"][:count].tolist()
        stored = self._part(part, int(row["values"]), int(row["values_type"]), [shape[axis] for axis in order])
        values = stored.permute([order.index(axis) for axis in range(count)])
        regions = None if row["regions"] < 0 else self._part(part, int(row["regions"]), int(row["regions_type"]), shape[1:])
        return Item(values, int(row["label"]), None, regions), int(row["index"])

    def _part(self, part: int, start: int, kind: int, shape: Sequence[int]) -> Tensor:
        dtype = _TYPES[kind]
        return self._parts[part][start : start + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(*shape)


def shared(written: Written | None, *, node: Node, most_bytes: float) -> Decoded | None:
    """What all processes of a machine have decoded, mapped by all.

    Args:
        written: items of this process; None where they are more than may be kept.
        node: the processes; each calls this.
        most_bytes: bytes that may be kept of all items together.

    Returns:
        None where they are more.

    Raises:
        CannotShareError: a process cannot open what another one has decoded; it is raised in all of them.
    """
    told = node.told("decoded", json.dumps(None if written is None else written.described()))
    parts: list[dict[str, int] | None] = [json.loads(one) for one in told]
    whole = [part for part in parts if part is not None]
    try:
        if len(whole) < len(parts) or sum(part["num_bytes"] for part in whole) > most_bytes:
            return None
        decoded, fault = None, ""
        try:
            decoded = Decoded(whole)
        except OSError as error:
            fault = str(error)
        # From here on no process needs the file of another one.
        if (faults := [one for one in node.told("mapped", fault) if one]) or decoded is None:
            raise CannotShareError(faults[0])
        return decoded
    finally:
        if written is not None:
            written.close()


def _mapped(part: dict[str, int]) -> Tensor:
    """UInt8[length]: the file of a process."""
    is_own = part["process"] == os.getpid()
    file = os.dup(part["file"]) if is_own else os.open(f"/proc/{part['process']}/fd/{part['file']}", os.O_RDONLY)
    try:
        private = mmap.mmap(file, part["length"], flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(file)
    return torch.frombuffer(private, dtype=torch.uint8)
