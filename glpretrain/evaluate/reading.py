"""Items read and brought to one size, by this process or by workers, and what is known of an item once it was read.

Which items a score is computed on is left out (`items`), and so is what outlives the process (`known_files`).
"""

import ctypes
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from glpretrain import modalities
from glpretrain.core.distributed import world_size
from glpretrain.core.node import usable_cores
from glpretrain.core.types import Item
from glpretrain.data.loading import Loader
from glpretrain.data.sources.base import Source, UnreadableItemError
from glpretrain.encoders.states import bytes_of

Resize = modalities.Fit
# How much of the patches of an item is needed: none, Float[B 0 D]; their mean and their maximum, Float[B 2 D]; all, Float[B N D].
Patches = Literal["none", "pooled", "all"]
WORTH_WORKERS = 2048  # items from which on workers read them, unless their number is given
_MOST_WORKERS = 16
_UNSEEN, _UNREADABLE, _READ, _NEW = 0, 1, 2, 3  # what is new was read by this process, and is nowhere else yet
_TOGETHER = 1 << 16


class Decoded(NamedTuple):
    """Items of one size; those that cannot be read are missing. `values` is None where this is true of all."""

    values: Tensor | None  # UInt8[B C H W], or Float[B P 3]; masks of clouds are Int[B P]
    labels: Tensor  # Int[B]  -1 where there is none
    instances: Tensor | None  # Int[B H W]  as in `Item`
    semantic: Tensor | None  # Int[B H W]  as in `Item`
    index: Tensor  # Int[B]  dataset index
    digests: Tensor  # UInt8[B 32]  of what the source gave, before any resize
    unreadable: Mapping[int, str]  # the reason by dataset index
    refusal: str = ""  # why an item cannot be brought to the size

    @property
    def num_bytes(self) -> int:
        """Bytes of the items and their masks."""
        return sum(0 if part is None else part.nbytes for part in (self.values, self.instances, self.semantic))


@dataclass(frozen=True, eq=False)
class ItemBatch:
    """Items of one size. Where their features are known already, values and masks are read only if they are asked for."""

    labels: Tensor  # Int[B]  -1 where there is none
    index: Tensor  # Int[B]  dataset index
    digests: tuple[str, ...]  # per item, of what the source gave, before any resize
    read: Callable[[], Decoded]

    @cached_property
    def _decoded(self) -> Decoded:
        return self.read()

    @property
    def items(self) -> Tensor:
        """UInt8[B C H W], or Float[B P 3]."""
        values = self._decoded.values
        assert values is not None
        return values

    @property
    def semantic(self) -> Tensor | None:
        """Int[B H W] as in `Item`, Int[B P] of clouds; None where an item has none."""
        return self._decoded.semantic

    def positions_of(self, wanted: Collection[int]) -> list[int]:
        """Where in the batch the items with these dataset indices are."""
        return [position for position, index in enumerate(self.index.tolist()) if index in wanted]

    def instance_masks(self) -> Tensor:
        """Int[B H W] as in `Item`, Int[B P] of clouds.

        Raises:
            ValueError: an item has none.
        """
        if self._decoded.instances is None:
            raise ValueError(f"an item among {self.index.tolist()} has no mask")
        return self._decoded.instances

    def class_masks(self) -> Tensor:
        """Int[B H W]: `semantic`.

        Raises:
            ValueError: an item has none.
        """
        if self.semantic is None:
            raise ValueError(f"an item among {self.index.tolist()} has no mask of classes")
        return self.semantic


def batch_of(decoded: Decoded) -> ItemBatch:
    """A batch of items that were read."""
    return ItemBatch(decoded.labels, decoded.index, hex_of(decoded.digests.numpy()), lambda: decoded)


class Known:
    """Digest and label of each item that was read, in arrays, and which items cannot be read.

    Args:
        indices: dataset indices of the items, in order.
    """

    def __init__(self, indices: Sequence[int]) -> None:
        self._all, self._indices = indices, None if isinstance(indices, range) else np.asarray(indices)
        self._state = np.zeros(len(indices), dtype=np.uint8)
        self._digests = np.zeros((len(indices), hashlib.sha256().digest_size), dtype=np.uint8)
        self._labels = np.full(len(indices), -1, dtype=np.int32)

    def _places(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        given = np.asarray(indices, dtype=np.int64)
        return given if self._indices is None else np.searchsorted(self._indices, given)

    def note(self, decoded: Decoded) -> list[int]:
        """Take over what was read.

        Returns:
            Dataset indices of the items that were not known to be unreadable before.
        """
        places = self._places(decoded.index.numpy())
        self._digests[places], self._labels[places], self._state[places] = decoded.digests.numpy(), decoded.labels.numpy(), _NEW
        lost = [index for index in decoded.unreadable if self._state[self._places([index])[0]] != _UNREADABLE]
        self._state[self._places(lost)] = _UNREADABLE
        return lost

    def set(self, index: int, *, digest: bytes, label: int) -> None:
        """Take over what is known of an item from elsewhere."""
        place = self._places([index])[0]
        self._digests[place], self._labels[place], self._state[place] = np.frombuffer(digest, dtype=np.uint8), label, _READ

    def every_unseen(self) -> Iterator[int]:
        """Those of all items that were not read yet."""
        return (index for part in self._parts() for index in self.unseen(part))

    def every_new(self) -> Iterator[int]:
        """Those of all items that were read and not given here before."""
        for part in self._parts():
            places = self._places(part)
            new = self._state[places] == _NEW
            self._state[places[new]] = _READ
            yield from np.asarray(part)[new].tolist()

    def _parts(self) -> Iterator[Sequence[int]]:
        return (self._all[start : start + _TOGETHER] for start in range(0, len(self._all), _TOGETHER))

    def unseen(self, indices: Sequence[int]) -> list[int]:
        """Those of the items that were not read yet."""
        return [index for index, state in zip(indices, self._state[self._places(indices)], strict=True) if state == _UNSEEN]

    def readable(self, indices: Sequence[int]) -> list[int]:
        """Those of the items that were read."""
        return [index for index, state in zip(indices, self._state[self._places(indices)], strict=True) if state >= _READ]

    def labels(self, indices: Sequence[int]) -> Tensor:
        """Int[B]."""
        return torch.from_numpy(self._labels[self._places(indices)].astype(np.int64))

    def seen(self, indices: Sequence[int], *, reasons: Mapping[int, str]) -> Decoded:
        """What is known of items that were read, or that cannot be read for these reasons, without values and masks."""
        there = self.readable(indices)
        unreadable = {index: reasons[index] for index in indices if index in reasons}
        return Decoded(None, self.labels(there), None, None, torch.tensor(there), torch.from_numpy(self.digests(there)), unreadable)

    def digests(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """UInt8[B 32]."""
        return self._digests[self._places(indices)]


class _Reader(Dataset[Decoded]):
    """Reads items by their dataset indices."""

    def __init__(self, source: Source, shape: Sequence[int], resize: Resize) -> None:
        self.source, self.shape = source, shape
        self.resize: Resize = resize

    def __getitem__(self, index: Sequence[int]) -> Decoded:
        return read(self.source, index, self.shape, self.resize)


class _Asked:
    """Dataset indices of batches, one after another."""

    def __init__(self, batches: Sequence[int], indices_of: Callable[[int], Sequence[int]]) -> None:
        self._batches, self._indices_of = batches, indices_of

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Sequence[int]]:
        return map(self._indices_of, self._batches)


def read(source: Source, indices: Sequence[int], shape: Sequence[int], resize: Resize) -> Decoded:
    """Read items, and bring them to one size.

    Args:
        source: source of the items.
        indices: their dataset indices.
        shape: shape that they are brought to, see `Modality.item_shape`.
        resize: how, see `Modality.resize`.
    """
    modality = modalities.get(source.modality)
    items: dict[int, Item] = {}
    digests: list[Tensor] = []
    unreadable: dict[int, str] = {}
    for index in indices:
        try:
            item = source[index]
        except UnreadableItemError as error:
            unreadable[index] = str(error)
            continue
        digests.append(torch.frombuffer(bytearray(digest_of(item)), dtype=torch.uint8))
        try:
            items[index] = modality.resize(item, shape, fit=resize)
        except ValueError as error:
            return nothing(unreadable, refusal=f"source {source.name!r}: item {index}: {error}")
    if not items:
        return nothing(unreadable)
    return Decoded(
        values=torch.stack([item.values for item in items.values()]),
        labels=torch.tensor([item.label for item in items.values()]),
        instances=_stacked([item.instances for item in items.values()]),
        semantic=_stacked([item.semantic for item in items.values()]),
        index=torch.tensor(list(items)),
        digests=torch.stack(digests),
        unreadable=unreadable,
    )


def read_as_it_is(source: Source, index: int) -> Decoded:
    """What is known of an item once it was read, for an item that nobody looks at."""
    try:
        item = source[index]
    except UnreadableItemError as error:
        return nothing({index: str(error)})
    digest = torch.frombuffer(bytearray(digest_of(item)), dtype=torch.uint8)[None]
    return Decoded(None, torch.tensor([item.label]), None, None, torch.tensor([index]), digest, {})


def read_all(
    source: Source,
    batches: Sequence[int],
    indices_of: Callable[[int], Sequence[int]],
    shape: Sequence[int],
    resize: Resize,
    *,
    num_workers: int | None,
) -> Iterator[Decoded]:
    """Read batches in order; several processes do so ahead of time where there are many items.

    Args:
        source: source of the items.
        batches: numbers of the batches.
        indices_of: function of the number of a batch to the dataset indices of its items.
        shape: see `read`.
        resize: see `read`.
        num_workers: number of processes; None for as many as this process has cores where there are 2,048 items or more, and none else.
    """
    if num_workers is None:
        num_items = len(batches) * len(indices_of(batches[0])) if batches else 0
        num_workers = default_workers() if num_items >= WORTH_WORKERS else 0
    if num_workers == 0:
        return (read(source, indices_of(number), shape, resize) for number in batches)
    return iter(
        Loader(
            _Reader(source, shape, resize),
            _Asked(batches, indices_of),
            num_workers=min(num_workers, len(batches)),
            named=lambda indices: f"source {source.name!r}, items {indices[0]} to {indices[-1]}",
            setting="num_workers",
        )
    )


def checked_workers(num_workers: int | None) -> int | None:
    """The number itself.

    Raises:
        ValueError: it is negative.
    """
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"num_workers: {num_workers}; accepted: 0 or more, or None")
    return num_workers


def default_workers() -> int:
    """Number of processes that read a large set: as many as this process has cores, shared with the other processes of the machine."""
    return max(1, min(_MOST_WORKERS, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))))


def give_back() -> None:
    """Give memory that was freed back to the system.

    glibc keeps what was freed below a small block that is still used, such as the features of a batch. Without this, a large set takes as
    much memory as all its pixels, though hardly any of them are there at a time.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def digest_of(item: Item) -> bytes:
    """SHA-256 of the values, label and masks of an item."""
    digest = hashlib.sha256(f"{tuple(item.values.shape)} {item.label}".encode())
    for tensor in (item.values, item.instances, item.semantic):
        digest.update(b"-" if tensor is None else bytes_of(tensor))
    return digest.digest()


def hex_of(digests: np.ndarray) -> tuple[str, ...]:
    """UInt8[B 32] as texts."""
    return tuple(row.tobytes().hex() for row in digests)


def nothing(unreadable: Mapping[int, str], *, refusal: str = "") -> Decoded:
    """What is read where no item can be."""
    none = torch.empty(0, dtype=torch.int64)
    return Decoded(None, none, None, None, none, torch.empty(0, 32, dtype=torch.uint8), unreadable, refusal)


def _stacked(masks: Sequence[Tensor | None]) -> Tensor | None:
    """Int[B H W], None where an item has none."""
    there = [mask for mask in masks if mask is not None]
    return torch.stack(there) if len(there) == len(masks) else None
