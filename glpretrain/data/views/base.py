"""What every maker of views offers, whatever an item is: how a worker hands an item over, and views of a batch on the device."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from glpretrain.core.types import EncoderCard
from glpretrain.data.loading import RawBatch
from glpretrain.data.sources.base import FittedItem, Item, Source


class Views(NamedTuple):
    """Views of a batch of items, globals first where both share an axis."""

    global_views: Tensor  # Float[G B *item]  normalised
    local_views: Tensor | None  # Float[L B *item]
    student_views: Tensor | None  # Float[S B *item]  of the size of the globals
    weak: Tensor | None  # Bool[B]           True: the student views of this item were weakly augmented
    regions: Tensor | None  # Int[G B h w]      the region map, cut as the global views
    boxes: Tensor | None  # Float[V B 5]      x0 y0 x1 y1 in the item's unit square, flip + 2 * quarter turns; None: items have none
    coarse_views: tuple[Tensor, ...] | None = None  # Float[V B *item] per resolution


class Counted(Protocol):
    """Settings of one view."""

    @property
    def count(self) -> int:
        """How many such views there are."""


class ViewMaker(nn.Module, ABC):
    """Holds no state and no randomness: views are a function of items and keys."""

    modality: ClassVar[Literal["image", "points", "audio"]]
    channel_axis: ClassVar[int]  # of one item

    # Settings of the views, each for `count` equal ones; a maker sets those that it has.
    global_views: tuple[Counted, ...]
    local_views: tuple[Counted, ...] = ()
    student_views: tuple[Counted, ...] = ()
    coarse_views: tuple[Counted, ...] = ()

    @property
    def num_global_views(self) -> int:
        """G."""
        return sum(spec.count for spec in self.global_views)

    @property
    def num_local_views(self) -> int:
        """L."""
        return sum(spec.count for spec in self.local_views)

    @property
    def num_student_views(self) -> int:
        """S."""
        return sum(spec.count for spec in self.student_views)

    @property
    def num_coarse_views(self) -> int:
        """Of all lower resolutions together."""
        return sum(spec.count for spec in self.coarse_views)

    @abstractmethod
    def shapes(self, num_channels: int) -> list[tuple[int, ...]]:
        """Shapes of the views, as `Encoder.grid` takes them."""

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
            raw: fitted items.
            keys: Int[B], one key per item.
            card: of the encoder, which names mean and std.
        """

    @abstractmethod
    def embedded_source(self, size: int) -> Source:
        """An embedded source of such items, with labels and masks, to score on where the data has none."""
