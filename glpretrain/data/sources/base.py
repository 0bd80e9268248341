"""What every source of items offers, and what the synthetic sources have in common.

A source decodes one item at a time. It draws no random number that is not a function of the index, and it applies no augmentation.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from glpretrain.core import keys
from glpretrain.core.types import Item
from glpretrain.data.sources.paths import Paths

Split = Literal["train", "test"]
_TRAIN_LENGTH, _TEST_LENGTH = 2400, 1200  # items of the two parts of a synthetic source
_LONGEST_REASON = 300  # characters
_TRAIN_WIDTH, _GAP = 0.62, 0.03  # shares of a photograph's width


class UnreadableItemError(ValueError):
    """An item cannot be decoded. The message names the file and the reason."""


def reason_of(error: Exception) -> str:
    """Why a reader failed, in one line: some readers put parts of a damaged file into their message."""
    text = " ".join(str(error).encode("ascii", "backslashreplace").decode().split())
    text = text if text.isprintable() else repr(text)
    return f"{type(error).__name__}: {text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + '...'}"


class Stored(NamedTuple):
    """Where an item lies. The same place in a file that is the same, read in the same way, gives the same item."""

    file: Path
    way: str  # what else decides the values, such as the number of channels and the place in the file
    label: int


class Source(ABC):
    """A map from dataset index to item.

    A subclass sets the attributes below, in its class body or in its constructor, as far as they differ from the defaults.
    """

    name: str  # short name for tables, such as the name of the folder
    classes: Sequence[str] = ()  # class names; empty without labels
    has_masks: bool = False  # whether items carry `instances`
    has_regions: bool = False  # whether items carry `regions`
    mask_classes: Sequence[str] = ()  # names of the values of `semantic`; empty where items carry none
    paths: Sequence[Path] = ()  # file of each item; empty where items are no files of their own
    value_range: tuple[tuple[float, float], ...] = ()  # values of files that become 0 and 255 in each channel; empty for whole bytes
    accepts: ClassVar[str] = ""  # what its `reads` is true of, in words

    @property
    def modality(self) -> str:
        """Name of the kind of item, see `glpretrain.modalities`."""
        return "image"

    @property
    def groups(self) -> Sequence[str]:
        """Name of the group of each item, such as the video that a frame is from; empty where items are not grouped."""
        return ()

    @property
    def shard_starts(self) -> np.ndarray:
        """Int[R]: the first item of each shard, of items that lie shard by shard; empty where they are files of their own."""
        return np.empty(0, dtype=np.int64)

    def named(self, index: int) -> str:
        """Name of an item: its path below the folder of the source where it is a file of its own, or else its number; no file is read."""
        if isinstance(self.paths, Paths):
            return "/".join(part for part in self.paths.parts(index) if part)
        return str(self.paths[index]) if self.paths else str(index)

    def whole(self) -> "Source":
        """The same items and those of its other splits, for work that is done on all of a user's items."""
        return self

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether this source is the one for a folder or file that a user names; other sources of its kind may be asked first."""
        return True

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Item:
        """Decode one item.

        Raises:
            UnreadableItemError: the file cannot be decoded.
            IndexError: `index` is outside range(len(self)).
        """

    def reduced(self, index: int, *, side: int) -> Item:
        """Decode one item, an image at a half, a quarter or an eighth of its size where this saves time and leaves `side` pixels or more on
        each side. Raises what `__getitem__` raises."""
        return self[index]

    def stored(self, index: int) -> Stored | None:
        """Where an item lies, if all of it is in one file; no file is read."""
        return None

    def label_of(self, index: int) -> int:
        """Class of an item, -1 without one; the item is decoded only where the source does not know it otherwise.

        Raises:
            UnreadableItemError: the item cannot be decoded.
        """
        stored = self.stored(index)
        return self[index].label if stored is None else stored.label

    def train_test_split(self) -> "tuple[Source, Source] | None":
        """The labelled (train, test) split that comes with this source; None where there is none."""
        return None

    def fingerprint(self) -> str:
        """SHA-256 of the listing: which items there are, their order and their labels. No item is read, and where the files lie does not
        matter."""
        digest = hashlib.sha256(repr((type(self).__name__, self.modality, len(self), list(self.classes))).encode())
        for part in self._listing():
            digest.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else repr(part).encode())
        return digest.hexdigest()

    def _listing(self) -> tuple[object, ...]:
        """What tells the items from those of another source of this class, for `fingerprint`: arrays, and what has a `repr`."""
        return (self.paths.digest(),) if isinstance(self.paths, Paths) else ()


class Subset(Source):
    """Some of the items of another source.

    Args:
        source: source of the items.
        indices: Int sequence, dataset indices in `source`.
    """

    def __init__(self, source: Source, *, indices: Sequence[int] | np.ndarray) -> None:
        self.source = source
        self.indices = np.asarray(indices, dtype=np.int64)
        self.name, self.classes, self.mask_classes = source.name, source.classes, source.mask_classes
        self.has_masks, self.has_regions = source.has_masks, source.has_regions
        self.value_range = source.value_range

    @property
    def modality(self) -> str:
        return self.source.modality

    @property
    def groups(self) -> Sequence[str]:
        groups = self.source.groups
        chosen: list[int] = self.indices.tolist()
        return [groups[index] for index in chosen] if groups else ()

    @property
    def shard_starts(self) -> np.ndarray:
        return np.flatnonzero(np.diff(np.searchsorted(self.source.shard_starts, self.indices, side="right"), prepend=0))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        return self.source[int(self.indices[checked_index(index, len(self))])]

    def reduced(self, index: int, *, side: int) -> Item:
        return self.source.reduced(int(self.indices[checked_index(index, len(self))]), side=side)

    def named(self, index: int) -> str:
        return self.source.named(int(self.indices[checked_index(index, len(self))]))

    def stored(self, index: int) -> Stored | None:
        return self.source.stored(int(self.indices[checked_index(index, len(self))]))

    def label_of(self, index: int) -> int:
        return self.source.label_of(int(self.indices[checked_index(index, len(self))]))

    def _listing(self) -> tuple[object, ...]:
        return self.source.fingerprint(), self.indices


class SyntheticSource(Source):
    """Labelled items with masks that are computed instead of read. Each item is a function of (seed, split, index).

    Args:
        length: number of items.
        split: `train` or `test`.
        seed: seed of all items.

    Raises:
        ValueError: `length` is below 1, or `split` is unknown.
    """

    has_masks = True

    def __init__(self, length: int, *, split: Split, seed: int) -> None:
        owner = type(self).__name__
        if length < 1:
            raise ValueError(f"{owner}: length is {length}; expected at least 1")
        check_choice(split, ("train", "test"), what=f"{owner}: split")
        self.length, self.seed = length, seed
        self.split: Split = split

    def __len__(self) -> int:
        return self.length

    def train_test_split(self) -> tuple[Source, Source]:
        return self.with_split("train", length=min(self.length, _TRAIN_LENGTH)), self.with_split("test", length=_TEST_LENGTH)

    @abstractmethod
    def with_split(self, split: Split, *, length: int) -> Source:
        """The same source with another split and length."""

    def _listing(self) -> tuple[object, ...]:
        return self.seed, self.split

    def key(self, index: int) -> Tensor:
        """Int[]: the key of everything that is drawn for one item. Raises an IndexError outside range(len(self))."""
        return item_key(self.seed, self.split, checked_index(index, self.length))


def item_key(seed: int, split: Split, index: int) -> Tensor:
    """Int[]: the key of everything that is drawn for one item of a synthetic source."""
    return keys.item_keys(seed=seed, epoch=("train", "test").index(split), index=torch.tensor(index))


def columns_of(split: Split, width: int) -> slice:
    """The columns of a photograph of this width that a split may show: the two splits share none, and there is a gap between them."""
    return slice(0, int(width * _TRAIN_WIDTH)) if split == "train" else slice(int(width * (_TRAIN_WIDTH + _GAP)), width)


def checked_index(index: int, length: int) -> int:
    """`index`, if it is in range(length). Negative indices are refused as well.

    Raises:
        IndexError: it is not.
    """
    if not 0 <= index < length:
        raise IndexError(f"index {index} is outside range({length})")
    return index


def check_choice(value: object, accepted: Sequence[object], *, what: str) -> None:
    """Refuse a value that is not among the accepted ones.

    Args:
        value: value that was given.
        accepted: values that are accepted.
        what: class and argument, for the message.

    Raises:
        ValueError: `value` is another one.
    """
    if value not in accepted:
        raise ValueError(f"{what} is {value!r}; expected {' or '.join(map(repr, accepted))}")


def label_items(
    names: Sequence[str], numbers: np.ndarray, *, owner: str, key: Callable[[str], tuple[object, ...]] | None = None
) -> tuple[list[str], np.ndarray]:
    """Number the classes of items in their order.

    Args:
        names: names, each once, in any order.
        numbers: Int[N], number of each item's name among them, -1 without one.
        owner: class and file, for the message.
        key: what classes are sorted by; their names when left out.

    Returns:
        Names of the classes that items have, in order, and Int[N], each item's index among them, -1 without a class.

    Raises:
        ValueError: only some items have a class.
    """
    labelled = int((numbers >= 0).sum())
    if 0 < labelled < len(numbers):
        raise ValueError(f"{owner}: {labelled} of {len(numbers)} items have a class name; expected one for all images or for none")
    used = np.flatnonzero(np.bincount(numbers + 1, minlength=len(names) + 1)[1:]).tolist()
    ordered = sorted(used, key=lambda number: names[number] if key is None else key(names[number]))
    places = np.full(len(names) + 1, -1, dtype=np.int32)  # the last one is that of -1
    places[ordered] = np.arange(len(ordered), dtype=np.int32)
    return [names[number] for number in ordered], places[numbers]
