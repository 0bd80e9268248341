"""What every maker of views offers, whatever an item is: how a worker hands an item over, and views of a batch on the device."""

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
    """Holds no state and no randomness: views are a function of items and keys."""

    modality: ClassVar[str]  # name of the kind of item, see `glpretrain.modalities`

    @abstractmethod
    def groups(self, num_channels: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Groups of views that are made, each with the number of views V and the shape of one of them, as `Encoder.grid` takes it."""

    @abstractmethod
    def default_size(self) -> int:
        """Size of items as workers hand them over, where a recipe does not say."""

    @abstractmethod
    def require_size(self, size: int) -> None:
        """Say at construction that items come in this size.

        Raises:
            ValueError: it is too small for the views.
        """

    @abstractmethod
    def fitted(self, item: Item, *, size: int) -> FittedItem:
        """An item in one size; runs in a worker."""

    @abstractmethod
    def make(self, raw: RawBatch, *, keys: Tensor, card: EncoderCard) -> Views:
        """Views of a batch on its device.

        Args:
            raw: items as workers hand them over.
            keys: Int[B], one key per item.
            card: card of the encoder, which names mean and standard deviation.
        """
