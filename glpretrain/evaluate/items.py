"""The items that scores are computed on: decoded and brought to one size once, and known by their content.

Augmentation is left out on purpose (an evaluation has none), and so are features.
"""

import hashlib
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from glpretrain import modalities
from glpretrain.core import keys
from glpretrain.data.sources.base import Item, Source, Subset, UnreadableItemError
from glpretrain.data.sources.images.videos import VideoSource
from glpretrain.encoders.base import bytes_of

# Roles that every configuration may name. An evaluator may ask for further ones in its settings.
ROLES = ("train", "test", "development", "masked_train", "masked", "videos")
Resize = Literal["crop", "stretch"]

_LOG = logging.getLogger(__name__)
_CACHE_BYTES = 1 << 30  # larger sets are decoded again in each run
_SUBSET_SEED = 20


@dataclass(frozen=True, eq=False)
class ItemBatch:
    """Items of one size."""

    items: Tensor  # UInt8[B C H W], or Float[B P 3]; masks of clouds are Int[B P]
    labels: Tensor  # Int[B]  -1 where there is none
    instances: Tensor | None  # Int[B H W]  as in `Item`
    semantic: Tensor | None  # Int[B H W]  as in `Item`
    index: Tensor  # Int[B]  dataset index
    digests: tuple[str, ...]  # per item, of what the source gave, before any resize

    def positions_of(self, wanted: Collection[int]) -> list[int]:
        """Where in the batch the items with these dataset indices are."""
        return [position for position, index in enumerate(self.index.tolist()) if index in wanted]

    def instance_masks(self) -> Tensor:
        """Int[B H W]: `instances`.

        Raises:
            ValueError: an item has none.
        """
        if self.instances is None:
            raise ValueError(f"an item among {self.index.tolist()} has no mask")
        return self.instances

    def class_masks(self) -> Tensor:
        """Int[B H W]: `semantic`.

        Raises:
            ValueError: an item has none.
        """
        if self.semantic is None:
            raise ValueError(f"an item among {self.index.tolist()} has no mask of classes")
        return self.semantic


class DecodedItems:
    """The items that a score is computed on, decoded and resized once however often they are asked for.

    Args:
        source: source of the items.
        max_items: sources with more items are cut to a fixed pseudo-random subset of this size; None takes all items.
    """

    def __init__(self, source: Source, *, max_items: int | None = None) -> None:
        if max_items is not None and max_items < 1:
            raise ValueError(f"max_items: {max_items}; accepted: a positive number, or None for all")
        if len(source) == 0:
            raise ValueError(f"source {source.name!r} has no items; at least one is needed")
        self.source = source
        count = len(source) if max_items is None else min(max_items, len(source))
        # Neither the first items (folders come class by class) nor every n-th (classes may alternate) would be a fair subset.
        order = keys.permutation(torch.tensor(_SUBSET_SEED), len(source)) if count < len(source) else torch.arange(count)
        self.indices: list[int] = order[:count].sort().values.tolist()
        self._cache: dict[tuple, list[ItemBatch]] = {}
        self._digests: dict[int, str] = {}
        self._unreadable: set[int] = set()
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
        part.indices = sorted(indices)
        part._cache = {}
        return part

    def digest(self, index: int) -> str:
        """Digest of an item that was read, of its values, label and masks, before any resize."""
        return self._digests[index]

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
            resize: "crop" keeps the aspect ratio and cuts the centre, "stretch" keeps the whole item.
            batch_size: number of items in a batch.

        Raises:
            ValueError: an item cannot be brought to the shape, or none can be read.
        """
        for batch in self._batches(shape, resize=resize, batch_size=batch_size):
            numbers = batch.labels if self._labels is None else self._labels[batch.labels]
            yield replace(batch, labels=torch.where(batch.labels < 0, batch.labels, numbers))

    def _batches(self, shape: Sequence[int], *, resize: Resize, batch_size: int) -> Iterator[ItemBatch]:
        cache_key = (*shape, resize, batch_size)
        if cache_key in self._cache:
            yield from self._cache[cache_key]
            return
        keep = len(self) * math.prod(shape) <= _CACHE_BYTES
        kept: list[ItemBatch] = []
        readable = False
        for start in range(0, len(self), batch_size):
            batch = self._read(self.indices[start : start + batch_size], shape, resize)
            if batch is None:
                continue
            readable = True
            if keep:
                kept.append(batch)
            yield batch
        if not readable:
            raise ValueError(f"source {self.name!r}: none of {len(self)} items can be read")
        if keep:
            self._cache[cache_key] = kept

    def fingerprint(self) -> str:
        """SHA-256 of all readable items as the source gives them: pixels, labels and masks, in order."""
        if len(self._digests) + len(self._unreadable) < len(self):
            for index in self.indices:
                if index not in self._digests and index not in self._unreadable:
                    self._item(index)
        return hashlib.sha256("".join(self._digests[index] for index in self.indices if index in self._digests).encode()).hexdigest()

    def _item(self, index: int) -> Item | None:
        try:
            item = self.source[index]
        except UnreadableItemError as error:
            if index not in self._unreadable:
                _LOG.warning("left out of the evaluation: %s", error)
            self._unreadable.add(index)
            return None
        self._digests[index] = _digest(item)
        return item

    def _read(self, indices: Sequence[int], shape: Sequence[int], resize: Resize) -> ItemBatch | None:
        modality = modalities.get(self.source.modality)
        items: dict[int, Item] = {}
        for index in indices:
            item = self._item(index)
            if item is not None:
                try:
                    items[index] = modality.resize(item, shape, fit=resize)
                except ValueError as error:
                    raise ValueError(f"source {self.name!r}: item {index}: {error}") from error
        if not items:
            return None
        return ItemBatch(
            items=torch.stack([item.values for item in items.values()]),
            labels=torch.tensor([item.label for item in items.values()]),
            instances=_stacked([item.instances for item in items.values()]),
            semantic=_stacked([item.semantic for item in items.values()]),
            index=torch.tensor(list(items)),
            digests=tuple(self._digests[index] for index in items),
        )


class Sources:
    """What a score is computed on, by role, such as `train` and `test`. Each source is decoded once for all evaluators.

    Args:
        given: sources or decoded items by role.
        missing: roles that have no source, each with the reason.
    """

    def __init__(
        self, given: Mapping[str, Source | DecodedItems | VideoSource], *, missing: Mapping[str, str] = MappingProxyType({})
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

    def measured(self, role: str) -> DecodedItems | VideoSource:
        """What has this role, with its name and fingerprint."""
        return self._by_role[role]


def _stacked(masks: Sequence[Tensor | None]) -> Tensor | None:
    """Int[B H W], None where an item has none."""
    there = [mask for mask in masks if mask is not None]
    return torch.stack(there) if len(there) == len(masks) else None


def _digest(item: Item) -> str:
    digest = hashlib.sha256(f"{tuple(item.values.shape)} {item.label}".encode())
    for tensor in (item.values, item.instances, item.semantic):
        digest.update(b"-" if tensor is None else bytes_of(tensor))
    return digest.hexdigest()
