"""What the package needs to know about one kind of item, in one object per kind.

Everything that differs between images and clouds of points, and that is not a data source, a maker of views or an encoder, is here: how an
item is brought to the size of a batch, normalised and drawn, and by what it is evaluated. Code elsewhere asks the object and does not
compare names of modalities.

Left out: `glpretrain.data.sources` reads files, `glpretrain.data.views` makes views. Classes above this package are named by their import
path, because a modality is imported by all of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Literal

from torch import Tensor

from glpretrain.core.types import EncoderCard, Item

Size = int | Sequence[int]
Fit = Literal["crop", "inner_crop", "stretch"]


class Modality(ABC):
    """One kind of item. Objects hold no state; there is one per kind (`glpretrain.modalities.get`)."""

    name: ClassVar[str]  # name in cards, sources and makers of views
    axes: ClassVar[tuple[str, ...]]  # letters of the axes of one item, from the legend in `glpretrain.core.types`
    num_coordinates: ClassVar[int]  # A: number of coordinates of a place in an item
    channel_axis: ClassVar[int]  # axis of the channels in one item
    embedded_source: ClassVar[str]  # a source with classes and masks that needs no files, to score on where the data has none
    embedded_size: ClassVar[str]  # name of its argument for the size of items
    own_sources: ClassVar[tuple[str, ...]]  # sources of a user's folder or file; the first one whose `reads` is true is taken
    held: ClassVar[tuple[str, str]]  # functions that divide what a program holds into items, and make the values of one
    masked_source: ClassVar[str]  # the source that reads a user's items with masks
    default_evaluators: ClassVar[dict[str, str]]  # evaluators that every run is scored with, by name
    unlabelled_evaluators: ClassVar[Mapping[str, str]] = MappingProxyType({})  # those for a user's items without labels, by name
    page: ClassVar[str]  # function that writes the page to look into backbones
    tuning: ClassVar[tuple[str, ...] | None] = (
        None  # options with which `glpretrain finetune` makes a classifier; None where reports name none
    )
    page_data: ClassVar[str] = ""  # function that makes what a page holds of items; empty where the report of a run shows none to look into

    @abstractmethod
    def item_shape(self, card: EncoderCard, size: Size | None) -> tuple[int, ...]:
        """Shape that items are brought to for an encoder.

        Args:
            card: card of the encoder.
            size: size that a user asked for; None is the size of the card.

        Raises:
            ValueError: this kind of item has no such size.
        """

    @abstractmethod
    def resize(self, item: Item, shape: Sequence[int], *, fit: Fit) -> Item:
        """An item, masks included, at the size of a batch.

        Args:
            item: the item at its own size.
            shape: shape of the result, as `item_shape` gives it.
            fit: `crop` keeps the proportions and cuts the centre; `inner_crop` cuts an eighth off the short side too, as published
                evaluations of images do; `stretch` keeps everything.

        Raises:
            ValueError: the item is of another kind, or has another number of channels.
        """

    @abstractmethod
    def normalise(self, items: Tensor, card: EncoderCard) -> Tensor:
        """What an encoder takes, Float[B *item], of items as sources give them, [B *item], on the device of `items`."""

    @abstractmethod
    def inputs_of_tokens(self, tokens: Tensor, views: Tensor, *, grid: tuple[int, ...]) -> Tensor:
        """Which inputs (pixels, points) belong to the marked tokens.

        Args:
            tokens: Bool[B N].
            views: Float[B *item], the views whose tokens are marked.
            grid: tokens along each axis, N in all.

        Returns:
            Bool[B *inputs].
        """

    @abstractmethod
    def pictures(self, views: Tensor, *, card: EncoderCard, dimmed: Tensor | None = None) -> Tensor:
        """Views as pictures.

        Args:
            views: Float[B *item], normalised.
            card: card of the encoder that they are normalised for.
            dimmed: Bool[B *inputs], inputs that are drawn darker.

        Returns:
            Float[B h w 3] in [0, 1], on the CPU.
        """

    def thumbnail(self, item: Item, *, card: EncoderCard, side: int) -> Tensor:
        """Float[h w 3] in [0, 1]: one item at its own size as a picture; where that has a size of its own, of at most `side` pixels a side.

        Args:
            item: the item as its source gives it.
            card: card of the encoder that it is for.
            side: number of pixels.
        """
        return self.pictures(self.normalise(item.values[None], card), card=card)[0]

    @abstractmethod
    def describe_size(self, card: EncoderCard) -> str:
        """The size of the card's items in words."""
