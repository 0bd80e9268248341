"""From a source to batches of items of one size: the order of an epoch, memory, and files that cannot be read.

Runs in worker processes. Left out: how an item is brought to that size (`views`), and views and masks, which are made on the device
(`glpretrain.data.module`).
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from glpretrain.core import keys
from glpretrain.data.sources.base import FittedItem, Item, Source, UnreadableItemError

_ORDER = 0x0EDE  # what the key of an epoch's order is folded with
_MAX_UNREADABLE_RUN = 50
_CHUNK = 64


class RawBatch(NamedTuple):
    """What a worker hands over."""

    images: Tensor  # UInt8[B C S S]  each item stretched to one square; or Float[B P 3], clouds of as many points
    aspect: Tensor  # Float[B]        true width / height
    index: Tensor  # Int[B]          dataset index of what is really there
    regions: Tensor | None  # Int16[B S S]
    unreadable: list[tuple[int, str]]  # dataset index and reason of the items that others stand in for


class RawItems(Dataset[RawBatch]):
    """Batches of a source's items by lists of indices. An unreadable item is replaced by the next readable one.

    Args:
        source: of the items.
        fit: brings an item to the size of all.
    """

    def __init__(self, source: Source, *, fit: Callable[[Item], FittedItem]) -> None:
        self.source = source
        self.fit = fit
        self._memory: RawBatch | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: Sequence[int]) -> RawBatch:
        if self._memory is not None:
            chosen = torch.as_tensor(indices)
            regions = self._memory.regions
            return RawBatch(
                images=self._memory.images[chosen],
                aspect=self._memory.aspect[chosen],
                index=self._memory.index[chosen],
                regions=None if regions is None else regions[chosen],
                unreadable=[],
            )
        unreadable: list[tuple[int, str]] = []
        rows = [self._read(index, unreadable) for index in indices]
        images, aspect, index, regions = zip(*rows, strict=True)
        return RawBatch(
            images=torch.stack(images),
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
            fitted = self.fit(item)
            return fitted.image, fitted.aspect, position, fitted.regions
        raise ValueError(f"{self.source.name}: {len(unreadable)} items in a row cannot be read, the first: {unreadable[0][1]}")

    def bytes_in_memory(self) -> int:
        """What `keep_in_memory` would take."""
        first = self[[0]]
        regions = 0 if first.regions is None else first.regions.nbytes
        return len(self) * (first.images.nbytes + regions)

    def keep_in_memory(self, *, num_workers: int, show: bool) -> list[tuple[int, str]]:
        """Decode everything once.

        Args:
            num_workers: processes that decode.
            show: a progress bar.

        Returns:
            Dataset index and reason of each unreadable item.
        """
        chunks = [range(start, min(start + _CHUNK, len(self))) for start in range(0, len(self), _CHUNK)]
        loader = batches_of(self, chunks, num_workers=min(num_workers, len(chunks) // 8))
        parts = list(track(loader, description=f"decoding {self.source.name}", total=len(chunks), transient=True, disable=not show))
        self._memory = RawBatch(
            images=torch.cat([part.images for part in parts]),
            aspect=torch.cat([part.aspect for part in parts]),
            index=torch.cat([part.index for part in parts]),
            regions=None if parts[0].regions is None else torch.cat([part.regions for part in parts]),
            unreadable=[],
        )
        # An unreadable item is met again wherever it would have stood in for its predecessor.
        return sorted({entry for part in parts for entry in part.unreadable})


def batches_of(items: RawItems, order: Iterable[Sequence[int]], *, num_workers: int) -> DataLoader:
    """A loader of the raw batches whose indices `order` lists."""
    return DataLoader(
        items,
        sampler=order,
        batch_size=None,  # the order yields whole batches
        collate_fn=_unchanged,  # the default would turn the tuples of `unreadable` into lists
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def _unchanged(batch: RawBatch) -> RawBatch:
    return batch


class EpochOrder(DistributedSampler):
    """The batches of each epoch, as lists of indices.

    An epoch is a permutation that depends on (seed, epoch) only. Global batch t is its t-th contiguous slice, and rank r takes
    the slice's r-th part: two processes with B items each see what one with 2B sees, in the same order. The last items that fill no
    global batch are left out; the next epoch has others.

    A `DistributedSampler` by type only, which tells Lightning that the items are already divided between the processes.

    Args:
        length: number of items.
        batch_size: B, per process.
        rank: of this process.
        world_size: number of processes.
        seed: of the run.

    Raises:
        ValueError: fewer items than one global batch.
    """

    def __init__(self, length: int, *, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        if length < batch_size * world_size:
            raise ValueError(
                f"DataModule: the source has {length} items, fewer than one batch of {batch_size * world_size}"
                f" ({batch_size} in each of {world_size} processes); lower batch_size or give more images"
            )
        super().__init__(range(length), num_replicas=world_size, rank=rank, seed=seed)
        self.length = length
        self.batch_size = batch_size
        self._resumed = (0, 0)

    def resume(self, *, epoch: int, batches_done: int) -> None:
        """Begin with this epoch after this many of its batches, instead of with epoch 0."""
        self._resumed = (epoch, batches_done)

    def __len__(self) -> int:
        """Batches of a whole epoch, also of one that was resumed: Lightning counts the ones done before."""
        return self.length // (self.batch_size * self.num_replicas)

    def __iter__(self) -> Iterator[list[int]]:
        # Where the checkpoint was made after an epoch's last batch, Lightning asks for batches before it has raised its own
        # count of epochs: the later of the two is right.
        epoch, first = max(self._resumed, (self.epoch, 0))
        key = keys.fold_in(keys.item_keys(seed=self.seed, epoch=epoch, index=torch.tensor(self.length)), _ORDER)
        order = keys.permutation(key, self.length)
        for batch in range(first, len(self)):
            start = (batch * self.num_replicas + self.rank) * self.batch_size
            yield order[start : start + self.batch_size].tolist()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))
