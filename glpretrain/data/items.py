"""The items of a source as batches for the device: read in workers or kept in memory, and prepared there for the views.

Left out: which items an epoch holds (`orders`), how workers are kept alive (`loading`), how processes share memory (`memory`), and what is
taken of an item (`views`).
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from glpretrain.core import keys as rng
from glpretrain.core.listing import say_once
from glpretrain.core.node import Node
from glpretrain.core.types import Item
from glpretrain.data.loading import Loader, Order
from glpretrain.data.memory import CannotShareError, Chunk, Decoded, Written, shared
from glpretrain.data.sources.base import Source, UnreadableItemError
from glpretrain.data.views.changes import Changes

_MAX_UNREADABLE_RUN = 50
_SAMPLED = 8  # items whose size is measured before all are read
_CHUNK, _CHUNK_BYTES = 64, 64 << 20  # items that a worker hands over at once to be kept, and their bytes
_TOGETHER = 64 << 20  # bytes of decoded items that a worker holds at once
_SETTING = "--data.num_workers"
_STEP = 0x57E9  # purpose that the key of a step is folded with, which otherwise is that of the item with its number


class Asked(NamedTuple):
    """The items of a batch. The draws of an item depend on the epoch, and workers read ahead into the next one."""

    epoch: int  # number of epochs before
    indices: list[int]  # dataset indices
    step: int | None = None  # number of steps of the epoch before this batch's; None outside of a run


class RawBatch(NamedTuple):
    """A batch as a worker gives it."""

    parts: dict[str, Tensor]  # what the maker of views took of each item, see `ViewMaker.prepare`; the first axis of each is B
    drawn: dict[str, Tensor]  # what is drawn for the items without looking at them, see `RawItems`
    changes: dict[str, Changes]  # what it will change in the views of the batch, see `ViewMaker.draw`
    index: Tensor  # Int[B]  dataset index of the item or its replacement  # pyright: ignore[reportIncompatibleMethodOverride]  hides tuple.index
    epoch: int
    unreadable: list[tuple[int, str]]  # dataset index and reason of every item that was replaced
    read_seconds: float = 0.0  # in which the items were read and decoded
    prepare_seconds: float = 0.0  # in which their views were cut and masks drawn
    size: int = 0  # number of the maker among `ViewMaker.of_each_size` that makes the views


class Items(Dataset[Chunk]):
    """The items of a source, as a maker of views reads them. An unreadable item is replaced by the next readable one.

    Args:
        source: source of the items.
        read: function that reads one item of it, see `ViewMaker.read`.
    """

    def __init__(self, source: Source, *, read: Callable[[Source, int], Item]) -> None:
        self.source = source
        self._read = read
        self._memory: Decoded | None = None

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

    def __getitem__(self, indices: Sequence[int]) -> Chunk:
        unreadable: list[tuple[int, str]] = []
        items, index = zip(*(self.item(index, unreadable) for index in indices), strict=True)
        return Chunk.of(items, list(index), unreadable)

    def named(self, indices: Sequence[int]) -> str:
        """What a batch reads, for messages."""
        first = self.source.paths[indices[0]] if self.source.paths else f"item {indices[0]}"
        return f"{self.source.name}: a batch of {len(indices)} items, the first of them {first}"

    def mean_bytes(self) -> float:
        """Bytes that an item takes in memory, from a few of them spread over the source."""
        last = len(self) - 1
        sampled = sorted({last * place // (_SAMPLED - 1) for place in range(_SAMPLED)})
        return sum(self[[index]].nbytes for index in sampled) / len(sampled)

    def keep_in_memory(self, *, num_workers: int, show: bool, most_bytes: float, node: Node | None = None) -> list[tuple[int, str]] | None:
        """Decode everything once on this machine, and keep it unless it takes more than `most_bytes`.

        Args:
            num_workers: number of worker processes that decode for this process.
            show: whether to show a progress bar.
            most_bytes: bytes that may be kept.
            node: the processes that share the work and the memory; each of them calls this. This process alone when left out.

        Returns:
            Dataset index and reason of each unreadable item; None if nothing is kept.
        """
        node = Node.alone() if node is None else node
        mean = self.mean_bytes()
        if max(map(float, node.told("bytes", str(mean)))) * len(self) > most_bytes:
            return None
        size = max(1, min(_CHUNK, int(_CHUNK_BYTES / max(mean, 1.0))))
        try:
            return self._keep(node, size=size, num_workers=num_workers, show=show, most_bytes=most_bytes)
        except CannotShareError as error:
            say_once(f"{self.source.name}: the processes of this machine cannot share memory ({error}); each keeps all decoded items")
            return self._keep(Node.alone(), size=size, num_workers=num_workers, show=show, most_bytes=most_bytes)

    def _keep(self, node: Node, *, size: int, num_workers: int, show: bool, most_bytes: float) -> list[tuple[int, str]] | None:
        """What `keep_in_memory` does, with items that are handed over in chunks of `size`."""
        first, last = (len(self) * place // len(node.ranks) for place in (node.place, node.place + 1))
        order = [range(start, min(start + size, last)) for start in range(first, last, size)]
        chunks = Loader(self, order, num_workers=min(num_workers, len(order) // 8), named=self.named, setting=_SETTING)
        written, unreadable = Written(), set[tuple[int, str]]()
        for chunk in track(chunks, description=f"decoding {self.source.name}", total=len(order), transient=True, disable=not show):
            unreadable |= set(chunk.unreadable)
            if written.num_bytes + chunk.nbytes > most_bytes:
                written.close()
                written = None
                break
            written.add(chunk)
        told = node.told("unreadable", json.dumps(list(unreadable)))
        self._memory = shared(written, node=node, most_bytes=most_bytes)
        # An unreadable item is reported again wherever it would have replaced the one before it.
        return None if self._memory is None else sorted({(index, reason) for one in told for index, reason in json.loads(one)})


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
        start, prepare_seconds = time.perf_counter(), 0.0
        unreadable: list[tuple[int, str]] = []
        parts: list[dict[str, Tensor]] = []
        index: list[int] = []
        keys: list[Tensor] = []
        for items, positions in self._together(asked.indices, unreadable):
            read = time.perf_counter()
            keys.append(rng.item_keys(seed=self._seed, epoch=asked.epoch, index=torch.tensor(positions)))
            parts.append(self._prepare(items, keys=keys[-1]))
            index += positions
            prepare_seconds += time.perf_counter() - read
        joined = parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        read = time.perf_counter()
        all_keys = torch.cat(keys)
        drawn, changes = self._draw(all_keys), {} if self._change is None else self._change(all_keys)
        prepare_seconds += time.perf_counter() - read
        read_seconds = time.perf_counter() - start - prepare_seconds
        return RawBatch(joined, drawn, changes, torch.tensor(index), asked.epoch, unreadable, read_seconds, prepare_seconds)

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


class SizedItems(Dataset[RawBatch]):
    """Batches whose views have sizes that are drawn anew at every step: from its number alone, so all processes and workers draw the same.

    Args:
        of_sizes: the batches in each size, see `ViewMaker.of_each_size`.
        drawn: function that draws the number of a size from the key Int[] of a step, see `ViewMaker.drawn_size`.
        seed: seed of the run.
    """

    def __init__(self, of_sizes: Sequence[RawItems], *, drawn: Callable[[Tensor], int], seed: int) -> None:
        self.of_sizes, self._drawn, self._seed = tuple(of_sizes), drawn, seed
        self.items = self.of_sizes[0].items

    def __getitem__(self, asked: Asked) -> RawBatch:
        """Batches that are not asked for by a step have the own sizes of the views."""
        number = 0 if asked.step is None else self._drawn(step_key(seed=self._seed, epoch=asked.epoch, step=asked.step))
        return self.of_sizes[number][asked]._replace(size=number)


def step_key(*, seed: int, epoch: int, step: int) -> Tensor:
    """Int[]: what is drawn for a step as a whole, from the seed of the run, the number of epochs before and that of steps in the epoch."""
    return rng.fold_in(rng.item_keys(seed=seed, epoch=epoch, index=torch.tensor(step)), _STEP)


def batches_of(items: RawItems | SizedItems, order: Order[Asked], *, num_workers: int) -> Loader[RawBatch, Asked]:
    """A loader of the raw batches that `order` lists."""
    return Loader(items, order, num_workers=num_workers, named=lambda asked: items.items.named(asked.indices), setting=_SETTING)
