"""Batches of items of one size from a source: decoding in workers, items kept in memory, and files that cannot be read.

Left out: which items an epoch holds (`orders`), how an item is brought to that size (`views`), and views and masks, which are made on the
device (`glpretrain.data.module`).
"""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from glpretrain.core.types import Item
from glpretrain.data.sources.base import FittedItem, Source, UnreadableItemError

_MAX_UNREADABLE_RUN = 50
_CHUNK = 64


class RawBatch(NamedTuple):
    """A batch as a worker gives it."""

    items: Tensor  # UInt8[B C S S]  images, each stretched to one square; or Float[B P 3], clouds of one number of points
    aspect: Tensor  # Float[B]  true width / height
    index: Tensor  # Int[B]  dataset index of the item or its replacement  # pyright: ignore[reportIncompatibleMethodOverride]  hides tuple.index
    regions: Tensor | None  # Int16[B S S]
    unreadable: list[tuple[int, str]]  # dataset index and reason of every item that was replaced


class RawItems(Dataset[RawBatch]):
    """A source as a dataset of batches, each asked for by its list of indices. An unreadable item is replaced by the next readable one.

    Args:
        source: source of the items.
        resize: function that brings an item to the size of the batch.
    """

    def __init__(self, source: Source, *, resize: Callable[[Item], FittedItem]) -> None:
        self.source = source
        self.resize = resize
        self._memory: RawBatch | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: Sequence[int]) -> RawBatch:
        if self._memory is not None:
            chosen = torch.as_tensor(indices)
            regions = self._memory.regions
            return RawBatch(
                items=self._memory.items[chosen],
                aspect=self._memory.aspect[chosen],
                index=self._memory.index[chosen],
                regions=None if regions is None else regions[chosen],
                unreadable=[],
            )
        unreadable: list[tuple[int, str]] = []
        rows = [self._read(index, unreadable) for index in indices]
        items, aspect, index, regions = zip(*rows, strict=True)
        return RawBatch(
            items=torch.stack(items),
            aspect=torch.tensor(aspect),
            index=torch.tensor(index),
            regions=None if regions[0] is None else torch.stack(regions),
            unreadable=unreadable,
        )

    def _read(self, index: int, unreadable: list[tuple[int, str]]) -> tuple[Tensor, float, int, Tensor | None]:
        for step in range(min(_MAX_UNREADABLE_RUN, len(self.source))):
            position = (index + step) % len(self.source)
            try:
                item = self.source[position]
            except UnreadableItemError as error:
                unreadable.append((position, str(error)))
                continue
            fitted = self.resize(item)
            return fitted.values, fitted.aspect, position, fitted.regions
        raise ValueError(f"{self.source.name}: {len(unreadable)} items in a row cannot be read, the first: {unreadable[0][1]}")

    def bytes_in_memory(self) -> int:
        """Bytes that `keep_in_memory` would take."""
        first = self[[0]]
        regions = 0 if first.regions is None else first.regions.nbytes
        return len(self) * (first.items.nbytes + regions)

    def keep_in_memory(self, *, num_workers: int, show: bool) -> list[tuple[int, str]]:
        """Decode everything once.

        Args:
            num_workers: number of processes that decode.
            show: whether to show a progress bar.

        Returns:
            Dataset index and reason of each unreadable item.
        """
        chunks = [range(start, min(start + _CHUNK, len(self))) for start in range(0, len(self), _CHUNK)]
        loader = batches_of(self, chunks, num_workers=min(num_workers, len(chunks) // 8))
        parts = list(track(loader, description=f"decoding {self.source.name}", total=len(chunks), transient=True, disable=not show))
        self._memory = RawBatch(
            items=torch.cat([part.items for part in parts]),
            aspect=torch.cat([part.aspect for part in parts]),
            index=torch.cat([part.index for part in parts]),
            regions=None if parts[0].regions is None else torch.cat([part.regions for part in parts]),
            unreadable=[],
        )
        # An unreadable item is reported again wherever it would have replaced the one before it.
        return sorted({entry for part in parts for entry in part.unreadable})


def batches_of(items: RawItems, order: Iterable[Sequence[int]], *, num_workers: int) -> DataLoader:
    """A loader of the raw batches whose indices `order` lists."""
    return DataLoader(
        items,
        sampler=order,
        batch_size=None,  # the order yields whole batches
        collate_fn=_unchanged,  # pyright: ignore[reportArgumentType]  batches are made here already; the default would change tuples into lists
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def _unchanged(batch: RawBatch) -> RawBatch:
    return batch


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))
