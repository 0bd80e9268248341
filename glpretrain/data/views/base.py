"""The contract of a maker of views: it takes what it needs of items in a worker, and makes the views of a batch on the device."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from glpretrain.core.batch import ViewGroup
from glpretrain.core.types import EncoderCard, Item
from glpretrain.data.sources.base import Source
from glpretrain.data.views.changes import Changes


class Views(NamedTuple):
    """Views of a batch of items."""

    groups: dict[str, ViewGroup]  # by role, without masks and corruption
    regions: Tensor | None = None  # Int[G B h w]  the region map, cut as the global views


class ViewMaker(nn.Module, ABC):
    """Makes views as a function of items and keys, without state or random generator.

    A key is a function of (seed, epoch, dataset index), so a worker draws what the device would draw. What is done where is decided by
    each maker: `read`, `prepare` and `draw` run in workers, `make` on the device.
    """

    modality: ClassVar[str]  # name of the kind of item, see `glpretrain.modalities`

    @abstractmethod
    def groups(self, num_channels: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """The groups that are made, each with its number of views V and the shape of one view, as `Encoder.grid` takes it."""

    def of_each_size(self) -> Sequence["ViewMaker"]:
        """Makers of the same views in every size that they may have in a step, the own one first; here there is no other one."""
        return (self,)

    def drawn_size(self, key: Tensor) -> int:
        """Number of the maker among `of_each_size` that makes all views of a step, whose key Int[] is the same in all processes."""
        return 0

    @abstractmethod
    def default_size(self) -> int:
        """Size of the items of an embedded source, on which a run is scored whose data has no classes or masks."""

    def read(self, source: Source, index: int) -> Item:
        """One item, as it may be kept in memory for all epochs.

        Raises:
            UnreadableItemError: the item cannot be decoded.
        """
        return source[index]

    @abstractmethod
    def prepare(self, items: Sequence[Item], *, keys: Tensor, card: EncoderCard) -> dict[str, Tensor]:
        """What `make` needs of items that `read` gave, in tensors whose first axis is that of the items, B.

        Args:
            items: items that may have different sizes.
            keys: Int[B], one key per item.
            card: card of the encoder.
        """

    def draw(self, keys: Tensor) -> dict[str, Changes]:
        """What `make` changes in the views of all items of a batch, by group; for makers that choose views. The keys are Int[B]."""
        return {}

    @abstractmethod
    def make(self, parts: Mapping[str, Tensor], *, changes: Mapping[str, Changes], keys: Tensor, card: EncoderCard) -> Views:
        """Views of a batch on its device.

        Args:
            parts: what `prepare` gave, for all items of the batch.
            changes: what `draw` gave.
            keys: Int[B], one key per item.
            card: card of the encoder, which names mean and standard deviation.
        """
