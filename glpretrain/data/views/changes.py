"""Which views of a batch are changed, how, and in which order: drawn by a worker, packed for the device.

A worker knows all draws of a batch, so it also knows which views an operation changes. It hands over their numbers with the batch, and the
device takes these views alone: it draws nothing, and never waits to learn how many there are. Left out: the operations (`colour`, `stain`,
`erasing`).
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Change(NamedTuple):
    """One operation on n views of a group."""

    operation: str
    rows: Tensor  # Int[n], ascending: numbers of the views among all (V B) of the group
    numbers: Tensor  # Float[n k]: what the operation needs of each
    integers: Tensor  # Int[n j]

    @classmethod
    def where(cls, operation: str, selected: Tensor, *, numbers: Tensor | None = None, integers: Tensor | None = None) -> "Change":
        """The change of the views that Bool[V B] selects, by Float[V B k] and Int[V B j]."""
        rows = selected.flatten().nonzero().squeeze(1)
        taken = [
            torch.empty(len(rows), 0, dtype=dtype) if values is None else values.flatten(0, 1).index_select(0, rows).to(dtype)
            for values, dtype in ((numbers, torch.float32), (integers, torch.int64))
        ]
        return cls(operation, rows, *taken)


class Changes(NamedTuple):
    """The changes of a group in few tensors, because each of them is a copy to the device."""

    layout: Sequence[tuple[str, int, int, int]]  # of each change: operation, n, k and j
    numbers: Tensor  # Float[all n * k]
    integers: Tensor  # Int[all n * (1 + j)]

    @classmethod
    def of(cls, changes: Sequence[Change]) -> "Changes":
        """Packed changes, in this order; those of no view are left out."""
        kept = [change for change in changes if len(change.rows) > 0]
        return cls(
            layout=[(one.operation, len(one.rows), one.numbers.shape[1], one.integers.shape[1]) for one in kept],
            numbers=torch.cat([one.numbers.flatten() for one in kept] or [torch.empty(0)]),
            integers=torch.cat(
                [part for one in kept for part in (one.rows, one.integers.flatten())] or [torch.empty(0, dtype=torch.int64)]
            ),
        )

    def to(self, device: torch.device) -> "Changes":
        """The same changes on a device."""
        return self._replace(numbers=self.numbers.to(device), integers=self.integers.to(device))

    def unpacked(self) -> list[Change]:
        """The changes as they were given."""
        numbers = self.numbers.split([n * k for _, n, k, _ in self.layout])
        integers = self.integers.split([size for _, n, _, j in self.layout for size in (n, n * j)])
        return [
            Change(operation, integers[2 * place], numbers[place].view(n, k), integers[2 * place + 1].view(n, j))
            for place, (operation, n, k, j) in enumerate(self.layout)
        ]


def divided(changes: Sequence[Change], ends: Sequence[int]) -> Iterator[list[Change]]:
    """The changes of each part of the views, whose rows begin with 0, by the ends of the parts. On a CPU only: it reads numbers."""
    rows = [change.rows.tolist() for change in changes]
    start = 0
    for end in ends:
        part = []
        for change, numbers in zip(changes, rows, strict=True):
            place = slice(bisect_left(numbers, start), bisect_left(numbers, end))
            if place.start < place.stop:
                part.append(Change(change.operation, change.rows[place] - start, change.numbers[place], change.integers[place]))
        yield part
        start = end


def apply_changes(images: Tensor, changes: Sequence[Change], *, operations: Mapping[str, Callable[[Tensor, Change], Tensor]]) -> Tensor:
    """The images [B C H W] after all changes; the memory of the input may be used for the result."""
    for change in changes:
        operation = operations[change.operation]
        if len(change.rows) == len(images):
            images = operation(images, change)
        else:
            images.index_copy_(0, change.rows, operation(images.index_select(0, change.rows), change))
    return images
