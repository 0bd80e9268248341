"""The contract of a maker of views: it brings an item to one size in a worker, and makes the views of a batch on the device."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from glpretrain.core.batch import ViewGroup
from glpretrain.core.types import EncoderCard, Item
from glpretrain.data.loading import RawBatch
from glpretrain.data.sources.base import FittedItem


class Views(NamedTuple):
    """Views of a batch of items."""

    groups: dict[str, ViewGroup]  # by role, without masks and corruption
    regions: Tensor | None = None  # Int[G B h w]  the region map, cut as the global views


class ViewMaker(nn.Module, ABC):
    """Makes views as a function of items and keys, without state or random generator."""

    modality: ClassVar[str]  # name of the kind of item, see `glpretrain.modalities`

    @abstractmethod
    def groups(self, num_channels: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """The groups that are made, each with its number of views V and the shape of one view, as `Encoder.grid` takes it."""

    @abstractmethod
    def default_size(self) -> int:
        """Size to which workers bring items if the recipe names none."""

    @abstractmethod
    def require_size(self, size: int) -> None:
        """Check at construction that items of this size can be used.

        Raises:
            ValueError: the size is too small for the views.
        """

    @abstractmethod
    def fitted(self, item: Item, *, size: int) -> FittedItem:
        """The item, brought to this size; runs in a worker."""

    @abstractmethod
    def make(self, raw: RawBatch, *, keys: Tensor, card: EncoderCard) -> Views:
        """Views of a batch on its device.

        Args:
            raw: items as workers give them.
            keys: Int[B], one key per item.
            card: card of the encoder, which names mean and standard deviation.
        """
