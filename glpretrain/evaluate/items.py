"""The items that scores are computed on: read and brought to one size as seldom as possible, and known by their content.

Augmentation is left out on purpose (an evaluation has none), and so are features. How items are read is in `reading`.
"""

import binascii
import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from glpretrain.core import keys
from glpretrain.core.distributed import rank
from glpretrain.data.sources.base import Source, Subset
from glpretrain.data.sources.images.videos import VideoSource
from glpretrain.evaluate.reading import (
    Decoded,
    ItemBatch,
    Known,
    Resize,
    batch_of,
    checked_workers,
    give_back,
    hex_of,
    read,
    read_all,
    read_as_it_is,
)

# Roles that every configuration may name. An evaluator may ask for further ones in its settings.
ROLES = ("train", "test", "development", "masked_train", "masked", "videos")

_LOG = logging.getLogger(__name__)
_CACHE_BYTES = 1 << 30  # of decoded items that are kept of one source; a larger set is read again where its pixels are needed again
_SUBSET_SEED = 20
_TOGETHER = 1 << 16
_GIVEN_BACK = 2048  # items after which memory that was freed is given back


def always(batch: ItemBatch) -> bool:
    """That the values or masks of every batch are needed."""
    return True


class _Kept:
    """Decoded batches by shape, resize and number of items, and then by their number, as far as there is room."""

    def __init__(self) -> None:
        self.batches: dict[tuple, dict[int, ItemBatch]] = {}
        self.num_bytes = 0


class DecodedItems:
    """The items that a score is computed on, read as seldom as possible however often they are asked for.

    Args:
        source: source of the items.
        max_items: sources with more items are cut to a fixed pseudo-random subset of this size; None takes all items.
        num_workers: number of processes that read, see `read_all`.
    """

    def __init__(self, source: Source, *, max_items: int | None = None, num_workers: int | None = None) -> None:
        if max_items is not None and max_items < 1:
            raise ValueError(f"max_items: {max_items}; accepted: a positive number, or None for all")
        if len(source) == 0:
            raise ValueError(f"source {source.name!r} has no items; at least one is needed")
        self.source, self.num_workers = source, checked_workers(num_workers)
        self.indices: Sequence[int] = range(len(source))
        if max_items is not None and max_items < len(source):
            # Neither the first items (folders come class by class) nor every n-th (classes may alternate) would be a fair subset.
            self.indices = keys.permutation(torch.tensor(_SUBSET_SEED), len(source))[:max_items].sort().values.tolist()
        self.known, self.since = Known(self.indices), time.time()  # nothing was read before
        self.reasons: dict[int, str] = {}  # why items cannot be read, by dataset index
        self._kept = _Kept()
        self._said: set[str] = set()
        self._labels: Tensor | None = None  # Int[classes]  other numbers for the labels of the source

    def with_classes(self, classes: Sequence[str]) -> "DecodedItems":
        """The same items, decoded once for both, with labels that are positions in these classes, by their names.

        Args:
            classes: names of classes; those that only this source has come behind them.
        """
        names = [*classes, *(name for name in self.source.classes if name not in classes)]
        renamed = copy(self)
        renamed.source = Subset(self.source, indices=range(len(self.source)))
        renamed.source.classes = names
        renamed._labels = torch.tensor([names.index(name) for name in self.source.classes])
        return renamed

    def some(self, indices: Collection[int]) -> "DecodedItems":
        """The items with these dataset indices, in the order of the source."""
        part = copy(self)
        part.indices, part._kept = sorted(indices), _Kept()
        return part

    def identities(self, index: Tensor) -> np.ndarray:
        """UInt64[B]: a number for each of these items, which were read; it is the same for the same values, label and masks."""
        return np.ascontiguousarray(self.known.digests(index.numpy())[:, :8]).view(np.uint64)[:, 0]

    def warn(self, line: str) -> None:
        """Say something about these items, once however often they are scored."""
        if line not in self._said:
            _LOG.warning("source %r: %s", self.name, line)
        self._said.add(line)

    @property
    def name(self) -> str:
        """Name of the source."""
        return self.source.name

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, shape: Sequence[int], *, resize: Resize, batch_size: int) -> Iterator[ItemBatch]:
        """Batches at one size, in the order of the source; an item that cannot be read is left out with a warning.

        Args:
            shape: shape that items are brought to, see `Modality.item_shape`.
            resize: how they are brought to it, see `Modality.resize`.
            batch_size: number of items in a batch.

        Raises:
            ValueError: an item cannot be brought to the shape, or none can be read.
        """
        readable = False
        for _, batch in self.numbered(shape, resize=resize, batch_size=batch_size, numbers=range(self.num_batches(batch_size))):
            readable = True
            yield batch
        if not readable:
            raise self.nothing_to_read()

    def indices_of(self, number: int, *, batch_size: int) -> Sequence[int]:
        """Dataset indices of the items of a batch, those that cannot be read included."""
        return self.indices[number * batch_size : (number + 1) * batch_size]

    def known_batch(self, number: int, shape: Sequence[int], *, resize: Resize, batch_size: int) -> ItemBatch | None:
        """One of the `batches`; None where it has an item that was not read yet, or none that can be read. Arguments as there.

        Its labels are those of the source.
        """
        if (kept := self._kept.batches.get((*shape, resize, batch_size), {}).get(number)) is not None:
            return kept
        indices = self.indices_of(number, batch_size=batch_size)
        if self.known.unseen(indices) or not (there := self.known.readable(indices)):
            return None
        return self._unread(there, shape, resize)

    def nothing_to_read(self) -> ValueError:
        """What is wrong where no batch comes."""
        return ValueError(f"source {self.name!r}: none of {len(self)} items can be read")

    def num_batches(self, batch_size: int) -> int:
        """Number of batches, of items that can be read or not."""
        return -(-len(self) // batch_size)

    def numbered(
        self,
        shape: Sequence[int],
        *,
        resize: Resize,
        batch_size: int,
        numbers: Sequence[int],
        is_needed: Callable[[ItemBatch], bool] = always,
    ) -> Iterator[tuple[int, ItemBatch]]:
        """Some of the `batches`, each with its number; one without an item that can be read is missing. Other arguments as there.

        Args:
            numbers: numbers of the batches.
            is_needed: whether the values or masks of a batch of items that are known will be needed. Workers read these ahead of time;
                those of another batch are read when they are asked for after all.
        """
        kept = self._kept.batches.setdefault((*shape, resize, batch_size), {})

        def indices_of(number: int) -> Sequence[int]:
            return self.indices_of(number, batch_size=batch_size)

        def unread(number: int) -> ItemBatch | None:
            return self.known_batch(number, shape, resize=resize, batch_size=batch_size)

        asked = [number for number in numbers if number not in kept and ((batch := unread(number)) is None or is_needed(batch))]
        answers = read_all(self.source, asked, indices_of, shape, resize, num_workers=self.num_workers)
        keeps: bool | None = None
        position = 0
        for turn, number in enumerate(numbers):
            if turn * batch_size % _GIVEN_BACK < batch_size:
                give_back()
            if position < len(asked) and asked[position] == number:
                position += 1
                decoded = next(answers)
                if (batch := self._noted(decoded)) is not None:
                    keeps = self._kept.num_bytes + len(asked) * decoded.num_bytes <= _CACHE_BYTES if keeps is None else keeps
                    if keeps:
                        kept[number] = batch
                        self._kept.num_bytes += decoded.num_bytes
            else:
                batch = unread(number)
            if batch is not None:
                yield number, self.renamed(batch)

    def fingerprint(self) -> str:
        """SHA-256 of all readable items as the source gives them: pixels, labels and masks, in order."""
        digest = hashlib.sha256()
        for start in range(0, len(self), _TOGETHER):
            indices = self.indices[start : start + _TOGETHER]
            for index in self.known.unseen(indices):
                self._noted(read_as_it_is(self.source, index))
            digest.update(binascii.hexlify(self.known.digests(self.known.readable(indices)).tobytes()))
        return digest.hexdigest()

    def _unread(self, indices: Sequence[int], shape: Sequence[int], resize: Resize) -> ItemBatch:
        """A batch of items that are known."""

        def read_now() -> Decoded:
            decoded = read(self.source, indices, shape, resize)
            if decoded.refusal or decoded.unreadable:
                raise ValueError(decoded.refusal or "; ".join(decoded.unreadable.values()))
            return decoded

        return ItemBatch(self.known.labels(indices), torch.tensor(indices), hex_of(self.known.digests(indices)), read_now)

    def _noted(self, decoded: Decoded) -> ItemBatch | None:
        """The batch of what was read."""
        self.note(decoded)
        if decoded.refusal:
            raise ValueError(decoded.refusal)
        return None if decoded.values is None else batch_of(decoded)

    def note(self, decoded: Decoded) -> None:
        """Take over what was read, and say which items cannot be."""
        self.reasons |= decoded.unreadable
        for index in self.known.note(decoded):
            if rank() == 0:
                _LOG.warning("left out of the evaluation: %s", decoded.unreadable[index])

    def renamed(self, batch: ItemBatch) -> ItemBatch:
        """A batch of `known_batch` with the numbers of the classes that scores are computed with."""
        if self._labels is None:
            return batch
        return replace(batch, labels=torch.where(batch.labels < 0, batch.labels, self._labels[batch.labels]))


class Sources:
    """What a score is computed on, by role, such as `train` and `test`. Each source is decoded once for all evaluators.

    Args:
        given: sources or decoded items by role.
        missing: roles that have no source, each with the reason.
    """

    def __init__(
        self,
        given: Mapping[str, Source | DecodedItems | VideoSource],
        *,
        missing: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._by_role = {role: DecodedItems(source) if isinstance(source, Source) else source for role, source in given.items()}
        self.missing = dict(missing)

    @classmethod
    def of(cls, given: "Mapping[str, Source | DecodedItems | VideoSource] | Sources") -> "Sources":
        """`given` itself where its items are decoded already."""
        return given if isinstance(given, Sources) else cls(given)

    def __contains__(self, role: str) -> bool:
        return role in self._by_role

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_role)

    def __or__(self, others: "Sources") -> "Sources":
        """These and others, which come first where both have a role."""
        return Sources(self._by_role | others._by_role, missing=self.missing | others.missing)

    def with_common_classes(self, roles: Sequence[str]) -> "Sources":
        """These sources, their labels being positions in the classes of the first of these roles that has any, by the classes' names."""
        labelled = {role: found for role in roles if isinstance(found := self._by_role.get(role), DecodedItems) and found.source.classes}
        classes = next((list(found.source.classes) for found in labelled.values()), [])
        others = {role: found.with_classes(classes) for role, found in labelled.items() if list(found.source.classes) != classes}
        return self | Sources(others) if others else self

    def __getitem__(self, role: str) -> DecodedItems:
        found = self._by_role[role]
        if not isinstance(found, DecodedItems):
            raise ValueError(f"{role}: {type(found).__name__}; accepted: a source of items")
        return found

    def videos(self, role: str = "videos") -> VideoSource:
        """The videos of a role.

        Raises:
            ValueError: the role has no videos.
        """
        found = self._by_role[role]
        if not isinstance(found, VideoSource):
            given = type(found.source).__name__ if isinstance(found, DecodedItems) else type(found).__name__
            raise ValueError(f"{role}: {given}; accepted: a source of videos, such as VideoFolder")
        return found

    def read_with(self, num_workers: int | None) -> None:
        """Let so many processes read the items of each source, see `DecodedItems`.

        Raises:
            ValueError: the number is negative.
        """
        for found in self._by_role.values():
            if isinstance(found, DecodedItems):
                found.num_workers = checked_workers(num_workers)

    def measured(self, role: str) -> DecodedItems | VideoSource:
        """What has this role, with its name and fingerprint."""
        return self._by_role[role]
