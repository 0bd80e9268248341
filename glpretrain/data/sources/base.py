"""What every source of items offers. A source decodes; it draws no random number and applies no augmentation."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from glpretrain.core.types import Item


class FittedItem(NamedTuple):
    """An item as a worker hands it over: of one size for all."""

    image: Tensor  # UInt8[C S S], stretched to a square, or Float[S 3]
    aspect: float  # true width / height
    regions: Tensor | None  # Int16[S S]


class UnreadableItemError(ValueError):
    """An item that cannot be decoded; the message names the file and the reason."""


class Source(ABC):
    """A map from dataset index to item."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for tables: the folder's name, or `scenes`."""

    @property
    def modality(self) -> str:
        """Name of the kind of item, see `glpretrain.modalities`."""
        return "image"

    @property
    def classes(self) -> Sequence[str]:
        """Class names, empty without labels."""
        return ()

    @property
    def has_masks(self) -> bool:
        """Whether items carry `instances`."""
        return False

    @property
    def has_regions(self) -> bool:
        """Whether items carry `regions`."""
        return False

    @property
    def mask_classes(self) -> Sequence[str]:
        """Names of what a pixel can show, where items carry `semantic`; empty where they do not."""
        return ()

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

    @property
    def groups(self) -> Sequence[str]:
        """Of each item, what it was taken from together with others, such as a video; empty where every item stands for itself."""
        return ()

    def train_test_split(self) -> "tuple[Source, Source] | None":
        """The labelled (train, test) parts that this source itself defines, None where it defines none."""
        return None


class Subset(Source):
    """Some items of another source.

    Args:
        source: where the items are.
        indices: Int sequence, dataset indices of `source`.
    """

    def __init__(self, source: Source, *, indices: Sequence[int]) -> None:
        self.source = source
        self.indices = list(indices)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def modality(self) -> str:
        return self.source.modality

    @property
    def classes(self) -> Sequence[str]:
        return self.source.classes

    @property
    def has_masks(self) -> bool:
        return self.source.has_masks

    @property
    def has_regions(self) -> bool:
        return self.source.has_regions

    @property
    def mask_classes(self) -> Sequence[str]:
        return self.source.mask_classes

    @property
    def groups(self) -> Sequence[str]:
        groups = self.source.groups
        return [groups[index] for index in self.indices] if groups else ()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        return self.source[self.indices[checked_index(index, len(self))]]


def checked_index(index: int, length: int) -> int:
    """`index`, when it is one of range(length): a negative index counts from nowhere here.

    Raises:
        IndexError: it is not.
    """
    if not 0 <= index < length:
        raise IndexError(f"index {index} is outside range({length})")
    return index
