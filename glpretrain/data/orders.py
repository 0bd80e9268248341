"""Which items the next epoch holds, in which order and with which weights; and the batches that each process takes of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, DistributedSampler

from glpretrain.core import keys
from glpretrain.core.listing import say_once
from glpretrain.data.items import Asked
from glpretrain.data.sources.base import Source, check_choice

_ORDER, _SHARDS = 0x0EDE, 0x05AD  # what the key of an epoch's order, and that of its shards, is folded with


class Epoch(NamedTuple):
    """The items of one epoch."""

    indices: Tensor  # Int[S]  dataset indices in the order in which they are seen; any number of them
    weights: Tensor | None = None  # Float[S]  weights in the loss; None gives every item the weight 1


class Order(nn.Module, ABC):
    """Decides what each epoch holds. A subclass implements `epoch`, and `fewest` where the length of an epoch is known beforehand.

    An order draws from keys, so that the same (seed, epoch) gives the same items whatever ran before. An order that remembers something,
    such as losses of items, keeps it in registered buffers, which are in every checkpoint and must be equal in all processes.
    """

    @abstractmethod
    def epoch(self, number: int, *, length: int, seed: int, progress: float) -> Epoch:
        """The items of an epoch.

        Args:
            number: number of epochs before this one.
            length: number of items of the source.
            seed: seed of the run.
            progress: share of the run that is done when the epoch begins, in [0, 1).
        """

    def begin(self, source: Source) -> None:
        """Look at the source, before the first epoch of a run. Raises a ValueError if the order is none for it."""

    def fewest(self, length: int) -> int | None:
        """The smallest number of items in an epoch of a source with `length` items, if it can be told without making one."""
        return None

    def said(self) -> str:
        """What a run should say of the epoch that was made last, in one line; empty where there is nothing to say."""
        return ""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what the order of an interrupted run remembered.

        Raises:
            ValueError: it was another order.
        """
        own = self.state_dict()
        if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in own.items()}:
            remembered, needed = (", ".join(sorted(held)) or "nothing" for held in (state, own))
            raise ValueError(
                f"resume: the order of the checkpoint's run remembered {remembered}, {type(self).__name__} remembers {needed};"
                " give the same data.order"
            )
        self.load_state_dict(state)


class Shuffled(Order):
    """All items once, in an order that depends on the seed and the epoch only."""

    def epoch(self, number: int, *, length: int, seed: int, progress: float) -> Epoch:
        """A permutation."""
        return Epoch(keys.permutation(epoch_key(number, length=length, seed=seed), length))

    def fewest(self, length: int) -> int:
        """All."""
        return length


class ByShard(Order):
    """Shards in random order, a few of them at a time, whose items are shuffled together. All items come once.

    A disk that seeks badly reads shard after shard (`read_ahead` of `TarShards`), and compressed shards are unpacked once in an epoch.

    Args:
        together: number of shards that are shuffled together; where each holds one class, as many as a batch should have at least.

    Raises:
        ValueError: `together` is below 1.
    """

    def __init__(self, together: int = 16) -> None:
        super().__init__()
        if together < 1:
            raise ValueError(f"ByShard: together is {together}; expected at least 1 shard")
        self.together = together
        self._starts = torch.empty(0, dtype=torch.int64)  # first item of each shard

    def begin(self, source: Source) -> None:
        """Find the shards.

        Raises:
            ValueError: there are none.
        """
        self._starts = torch.from_numpy(source.shard_starts.astype(np.int64))
        if not len(self._starts):
            raise ValueError(f"ByShard: source {source.name!r} has no shards; give TarShards or TileFolder, or leave data.order out")

    def epoch(self, number: int, *, length: int, seed: int, progress: float) -> Epoch:
        """A permutation of the items group by group."""
        key = epoch_key(number, length=length, seed=seed)
        num_shards = len(self._starts)
        num_groups = -(-num_shards // self.together)
        place = keys.permutation(keys.fold_in(key, _SHARDS), num_shards).argsort()  # of each shard
        group = place * num_groups // num_shards  # of nearly equal sizes
        of_item = torch.repeat_interleave(group, torch.diff(self._starts, append=torch.tensor([length])))  # [N]
        shuffled = keys.permutation(key, length)
        return Epoch(shuffled[of_item[shuffled].argsort(stable=True)])

    def fewest(self, length: int) -> int:
        """All."""
        return length


class Balanced(Order):
    """As many items of each group in every batch, when the batch divides by the number of groups.

    An epoch has as many items of each group as the smallest group has, without repetition; those of larger groups are drawn anew for every
    epoch. Groups take turns.

    Args:
        by: `class`, the classes of the items; or `folder`, the folders that their files lie in, such as `real/oulu` and `attack/oulu`.

    Raises:
        ValueError: `by` is unknown.
    """

    def __init__(self, by: Literal["class", "folder"] = "class") -> None:
        super().__init__()
        check_choice(by, ("class", "folder"), what="Balanced: by")
        self.by: Literal["class", "folder"] = by
        self._members: list[Tensor] = []  # Int[*]: dataset indices of each group

    def begin(self, source: Source) -> None:
        """Find the groups.

        Raises:
            ValueError: there are fewer than two, or an item has no class.
        """
        names = [self._name(source, index) for index in range(len(source))]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        if len(numbers) < 2:
            found = f"one {self.by}, {next(iter(numbers))!r}" if numbers else "no items"
            raise ValueError(f"Balanced: source {source.name!r} has {found}; expected two or more, or leave data.order out")
        group = torch.tensor([numbers[name] for name in names])
        self._members = [(group == number).nonzero()[:, 0] for number in range(len(numbers))]
        smallest = min(map(len, self._members))
        say_once(f"Balanced: {len(numbers)} groups by {self.by}; an epoch has {smallest} items of each, as many as the smallest")

    def _name(self, source: Source, index: int) -> str:
        if self.by == "folder":
            return source.named(index).rpartition("/")[0]
        if (label := source.label_of(index)) < 0:
            raise ValueError(f"Balanced: {source.named(index)} of source {source.name!r} has no class; give by: folder, or classes")
        return source.classes[label]

    def epoch(self, number: int, *, length: int, seed: int, progress: float) -> Epoch:
        """Random items of each group in turn."""
        key = epoch_key(number, length=length, seed=seed)
        smallest = min(map(len, self._members))
        drawn = [own[keys.permutation(keys.fold_in(key, group), len(own))[:smallest]] for group, own in enumerate(self._members)]
        return Epoch(torch.stack(drawn, dim=1).flatten())

    def fewest(self, length: int) -> int:
        """Those of the smallest group for each."""
        return min(map(len, self._members)) * len(self._members)


def epoch_key(number: int, *, length: int, seed: int) -> Tensor:
    """Int[]: what the order of an epoch is drawn from; see `Order.epoch`."""
    return keys.fold_in(keys.item_keys(seed=seed, epoch=number, index=torch.tensor(length)), _ORDER)


class _Length(Dataset[int]):
    """All that a `DistributedSampler` asks of its data."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


class Position(NamedTuple):
    """The position of a run in its data."""

    epoch: int
    batches_done: int  # of this epoch


class EpochBatches(DistributedSampler):
    """The batches of each epoch, as what the workers are asked for.

    Global batch t is the t-th contiguous slice of the epoch's items, and rank r takes the slice's r-th part: two processes with B items
    each see the items of one process with 2B, in the same order. The last items that do not fill a step, which is one global batch or as
    many as are accumulated, are left out: every step is made of equally many items.

    It is a `DistributedSampler` only to tell Lightning that the items are already divided between the processes.

    Args:
        order: which items an epoch holds.
        length: number of items of the source.
        batch_size: B, items per process.
        rank: number of this process.
        world_size: number of processes.
        seed: seed of the run.
        num_accumulated: number of global batches that one optimizer step accumulates.
        on_epoch: function that is called with this object when an epoch begins; epochs may differ in length.
        progress: function that gives the share of the run that is done when an epoch begins, by its number; 0 when left out.

    Raises:
        ValueError: an epoch has fewer items than one step.
    """

    def __init__(
        self,
        order: Order,
        *,
        length: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        num_accumulated: int = 1,
        on_epoch: Callable[["EpochBatches"], None] | None = None,
        progress: Callable[[int], float] = lambda number: 0.0,
    ) -> None:
        super().__init__(_Length(length), num_replicas=world_size, rank=rank, seed=seed)
        self.order, self.length, self.batch_size, self.num_accumulated = order, length, batch_size, num_accumulated
        self.on_epoch, self._progress = on_epoch, progress
        self._resumed = Position(0, 0)
        self._planned: tuple[int, Epoch] | None = None
        self._table: Tensor | None = None  # Float[N]: weight of every item in the planned epoch; None before it is needed
        if (fewest := order.fewest(length)) is None:
            self._plan(0)
        else:  # the order of millions of items is made once it is known which epoch comes first
            self._num_batches(fewest)

    def resume(self, position: Position) -> None:
        """Begin at this position instead of with epoch 0."""
        self._resumed = position
        self._plan(position.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before every epoch."""
        super().set_epoch(epoch)
        self._plan(self.position.epoch)
        if self.on_epoch is not None:
            self.on_epoch(self)

    @property
    def position(self) -> Position:
        """Where the next iteration begins.

        After a resume from the end of an epoch, Lightning asks for batches before it has raised its own count of epochs, so the later of
        the two positions is right.
        """
        return max(self._resumed, Position(self.epoch, 0))

    def weights_of(self, index: Tensor) -> Tensor:
        """Float[B]: weights of items Int[B] in this epoch, 0 for items that are not in it."""
        assert self._planned is not None
        _, planned = self._planned
        if planned.weights is None:
            return torch.ones(len(index), device=index.device)
        if self._table is None:
            self._table = torch.zeros(self.length)
            self._table[planned.indices] = planned.weights
        self._table = self._table.to(index.device)  # once: the host would wait for indices at every step
        return self._table[index]

    def _plan(self, epoch: int) -> Epoch:
        if self._planned is None or self._planned[0] != epoch:
            self._planned = None  # the memory of the epoch before
            planned = self.order.epoch(epoch, length=self.length, seed=self.seed, progress=self._progress(epoch))
            self._num_batches(len(planned.indices))
            self._planned = epoch, planned
            self._table = None
        return self._planned[1]

    def __len__(self) -> int:
        """Number of batches of the whole epoch, also after a resume: Lightning counts those that were done before."""
        assert self._planned is not None
        return self._num_batches(len(self._planned[1].indices))

    def _num_batches(self, count: int) -> int:
        """Number of batches that are made of the items of an epoch.

        Raises:
            ValueError: there are fewer items than a step needs.
        """
        together = self.batch_size * self.num_replicas
        if count < together:
            raise ValueError(
                f"DataModule: an epoch has {count} items, fewer than one batch of {together}"
                f" ({self.batch_size} in each of {self.num_replicas} processes); lower batch_size or give more items"
            )
        return self.whole_steps(count // together)

    def whole_steps(self, num_batches: int) -> int:
        """The largest number of batches, out of these, that makes whole steps; Lightning would take a step of those that are left over.

        Raises:
            ValueError: there are fewer than one step accumulates.
        """
        if num_batches < self.num_accumulated:
            raise ValueError(
                f"trainer.accumulate_grad_batches={self.num_accumulated}: an epoch has {num_batches} batches of"
                f" {self.batch_size * self.num_replicas} items, fewer than one step accumulates; lower it or batch_size"
            )
        return num_batches - num_batches % self.num_accumulated

    def __iter__(self) -> Iterator[Asked]:
        epoch, first = self.position
        indices = self._plan(epoch).indices
        for batch in range(first, len(self)):
            start = (batch * self.num_replicas + self.rank) * self.batch_size
            yield Asked(epoch, indices[start : start + self.batch_size].tolist(), batch // self.num_accumulated)
