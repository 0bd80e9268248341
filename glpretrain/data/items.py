"""The items of a source as batches for the device: read in workers or kept in memory, and prepared there for the views.

Left out: which items an epoch holds (`orders`), how workers are kept alive (`loading`), and what is taken of an item (`views`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from glpretrain.core import keys as rng
from glpretrain.core.types import Item
from glpretrain.data.loading import Loader, Order
from glpretrain.data.sources.base import Source, UnreadableItemError
from glpretrain.data.views.changes import Changes

_MAX_UNREADABLE_RUN = 50
_SAMPLED = 8  # items whose size is measured before all are read
_CHUNK, _CHUNK_BYTES = 64, 64 << 20  # items that a worker hands over at once to be kept, and their bytes
_TOGETHER = 64 << 20  # bytes of decoded items that a worker holds at once
_SETTING = "--data.num_workers"


class Asked(NamedTuple):
    """The items of a batch. The draws of an item depend on the epoch, and workers read ahead into the next one."""

    epoch: int  # number of epochs before
    indices: list[int]  # dataset indices


class RawBatch(NamedTuple):
    """A batch as a worker gives it."""

    parts: dict[str, Tensor]  # what the maker of views took of each item, see `ViewMaker.prepare`; the first axis of each is B
    drawn: dict[str, Tensor]  # what is drawn for the items without looking at them, see `RawItems`
    changes: dict[str, Changes]  # what it will change in the views of the batch, see `ViewMaker.draw`
    index: Tensor  # Int[B]  dataset index of the item or its replacement  # pyright: ignore[reportIncompatibleMethodOverride]  hides tuple.index
    epoch: int
    unreadable: list[tuple[int, str]]  # dataset index and reason of every item that was replaced


class _Chunk(NamedTuple):
    """Items in few tensors, because each tensor that a worker gives takes a file descriptor."""

    values: Tensor  # [number of all values]
    regions: Tensor | None
    layouts: list[tuple[tuple[int, ...], tuple[int, ...]]]  # of each item: its shape, and its axes in the order of its memory
    index: list[int]
    unreadable: list[tuple[int, str]]

    @classmethod
    def of(cls, items: Sequence[Item], index: list[int], unreadable: list[tuple[int, str]]) -> "_Chunk":
        regions = [item.regions.flatten() for item in items if item.regions is not None]
        orders = [sorted(range(item.values.dim()), key=lambda axis, item=item: -item.values.stride(axis)) for item in items]
        return cls(
            values=torch.cat([item.values.permute(order).flatten() for item, order in zip(items, orders, strict=True)]),
            regions=torch.cat(regions) if regions else None,
            layouts=[(tuple(item.values.shape), tuple(order)) for item, order in zip(items, orders, strict=True)],
            index=index,
            unreadable=unreadable,
        )

    def items(self) -> Iterator[Item]:
        """Items as views of copies of the tensors."""
        values = self.values.clone()
        regions = None if self.regions is None else self.regions.clone()
        start = start_of_regions = 0
        for shape, order in self.layouts:
            end = start + torch.Size(shape).numel()
            back = [order.index(axis) for axis in range(len(order))]
            item = Item(values[start:end].view([shape[axis] for axis in order]).permute(back), -1, None, None)
            start = end
            if regions is not None:
                size = shape[1:]
                end_of_regions = start_of_regions + torch.Size(size).numel()
                item = item._replace(regions=regions[start_of_regions:end_of_regions].view(size))
                start_of_regions = end_of_regions
            yield item

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.regions is None else self.regions.nbytes)


class Items(Dataset[_Chunk]):
    """The items of a source, as a maker of views reads them. An unreadable item is replaced by the next readable one.

    Args:
        source: source of the items.
        read: function that reads one item of it, see `ViewMaker.read`.
    """

    def __init__(self, source: Source, *, read: Callable[[Source, int], Item]) -> None:
        self.source = source
        self._read = read
        self._memory: list[tuple[Item, int]] | None = None  # each with its dataset index

    def __len__(self) -> int:
        return len(self.source)

    def item(self, index: int, unreadable: list[tuple[int, str]]) -> tuple[Item, int]:
        """An item and its dataset index, which is another one where `index` cannot be read; that is added to `unreadable`."""
        if self._memory is not None:
            return self._memory[index]
        for step in range(min(_MAX_UNREADABLE_RUN, len(self.source))):
            position = (index + step) % len(self.source)
            try:
                return self._read(self.source, position), position
            except UnreadableItemError as error:
                unreadable.append((position, str(error)))
        raise ValueError(f"{self.source.name}: {len(unreadable)} items in a row cannot be read, the first: {unreadable[0][1]}")

    def __getitem__(self, indices: Sequence[int]) -> _Chunk:
        unreadable: list[tuple[int, str]] = []
        items, index = zip(*(self.item(index, unreadable) for index in indices), strict=True)
        return _Chunk.of(items, list(index), unreadable)

    def named(self, indices: Sequence[int]) -> str:
        """What a batch reads, for messages."""
        first = self.source.paths[indices[0]] if self.source.paths else f"item {indices[0]}"
        return f"{self.source.name}: a batch of {len(indices)} items, the first of them {first}"

    def mean_bytes(self) -> float:
        """Bytes that an item takes in memory, from a few of them spread over the source."""
        last = len(self) - 1
        sampled = sorted({last * place // (_SAMPLED - 1) for place in range(_SAMPLED)})
        return sum(self[[index]].nbytes for index in sampled) / len(sampled)

    def keep_in_memory(self, *, num_workers: int, show: bool, most_bytes: float) -> list[tuple[int, str]] | None:
        """Decode everything once, and keep it unless it takes more than `most_bytes`.

        Args:
            num_workers: number of processes that decode.
            show: whether to show a progress bar.
            most_bytes: bytes that may be kept.

        Returns:
            Dataset index and reason of each unreadable item; None if nothing is kept.
        """
        mean = self.mean_bytes()
        if mean * len(self) > most_bytes:
            return None
        size = max(1, min(_CHUNK, int(_CHUNK_BYTES / max(mean, 1.0))))
        order = [range(start, min(start + size, len(self))) for start in range(0, len(self), size)]
        chunks = Loader(self, order, num_workers=min(num_workers, len(order) // 8), named=self.named, setting=_SETTING)
        kept: list[tuple[Item, int]] = []
        unreadable: set[tuple[int, str]] = set()
        taken = 0
        for chunk in track(chunks, description=f"decoding {self.source.name}", total=len(order), transient=True, disable=not show):
            if (taken := taken + chunk.nbytes) > most_bytes:
                return None
            kept += zip(chunk.items(), chunk.index, strict=True)
            unreadable |= set(chunk.unreadable)
        self._memory = kept
        # An unreadable item is reported again wherever it would have replaced the one before it.
        return sorted(unreadable)


class RawItems(Dataset[RawBatch]):
    """Batches, each asked for by its epoch and indices.

    Args:
        items: the items.
        prepare: function that takes of some items, with their keys Int[B], what the views need of them, see `ViewMaker.prepare`.
        draw: function that draws what depends on the keys alone, Int[B], for a whole batch.
        seed: seed of the run.
        change: function that draws what is changed in the views of a batch, see `ViewMaker.draw`; None changes nothing.
    """

    def __init__(
        self,
        items: Items,
        *,
        prepare: Callable[..., dict[str, Tensor]],
        draw: Callable[[Tensor], dict[str, Tensor]],
        seed: int,
        change: Callable[[Tensor], dict[str, Changes]] | None = None,
    ) -> None:
        self.items = items
        self._prepare = prepare
        self._draw = draw
        self._change = change
        self._seed = seed

    def __getitem__(self, asked: Asked) -> RawBatch:
        unreadable: list[tuple[int, str]] = []
        parts: list[dict[str, Tensor]] = []
        index: list[int] = []
        keys: list[Tensor] = []
        for items, positions in self._together(asked.indices, unreadable):
            keys.append(rng.item_keys(seed=self._seed, epoch=asked.epoch, index=torch.tensor(positions)))
            parts.append(self._prepare(items, keys=keys[-1]))
            index += positions
        joined = parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        all_keys = torch.cat(keys)
        changes = {} if self._change is None else self._change(all_keys)
        return RawBatch(joined, self._draw(all_keys), changes, torch.tensor(index), asked.epoch, unreadable)

    def _together(self, indices: Sequence[int], unreadable: list[tuple[int, str]]) -> Iterator[tuple[list[Item], list[int]]]:
        """As many items at once as a worker may hold: draws for several cost what they cost for one."""
        items: list[Item] = []
        positions: list[int] = []
        held = 0  # bytes
        for index in indices:
            item, position = self.items.item(index, unreadable)
            items.append(item)
            positions.append(position)
            held += item.values.nbytes
            if held >= _TOGETHER:
                yield items, positions
                items, positions, held = [], [], 0
        if items:
            yield items, positions


def batches_of(items: RawItems, order: Order[Asked], *, num_workers: int) -> Loader[RawBatch, Asked]:
    """A loader of the raw batches that `order` lists."""
    return Loader(items, order, num_workers=num_workers, named=lambda asked: items.items.named(asked.indices), setting=_SETTING)
